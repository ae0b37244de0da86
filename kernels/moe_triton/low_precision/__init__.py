"""Products of 8-bit operands with scales: number formats, quantising, and the expert FFN that uses them."""

from moe_triton.low_precision.ffn import compile_cases, fp8_ffn
from moe_triton.low_precision.formats import FORMATS

__all__ = ["FORMATS", "compile_cases", "fp8_ffn"]
