"""What an operator file says about compiling itself without a GPU: real calls of its public functions, on small tensors.

Each operator module has a function `compile_cases() -> list[CompileCase]`; the gate (tests/test_compile_gate.py, through
moe_triton.compile_only) runs every case for every target, where each launch is compiled and none is executed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_triton.targets import TARGETS


@dataclass(frozen=True)
class CompileCase:
    """One real call of an operator's public function, forward or forward and backward."""

    name: str
    """Unique in its module, e.g. "forward_and_backward"."""
    gemm: bool
    """Whether at least one of the launched kernels is a matrix product; those must use the matrix unit."""
    run: Callable[[torch.dtype, int, int], None]
    """run(dtype, D, F): calls the public function on CPU tensors with few tokens. Outputs hold no meaningful values."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Where the case compiles; an operator that refuses an architecture leaves it out (fp8 on sm_80)."""
    ops: tuple[str, ...] = ()
    """Rows of the tuning table that the call asks for: the full gate forces each of their rows in turn."""
    height: int = 0
    """BLOCK_M, where the call itself fixes it (the block of a block-sparse product)."""
