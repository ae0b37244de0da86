"""Grouped products with gradients: a ragged dimension cut by offsets, in any of the four forms of torch's `grouped_mm`."""

from moe_triton.grouped.product import compile_cases, grouped_mm

__all__ = ["compile_cases", "grouped_mm"]
