"""What every kernel's wrapper asks of the machine it runs on: interpreter or compiler, target, and how to launch."""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether triton runs kernels in Python on the CPU; fixed per process, as it reads the variable when a kernel is decorated."""


def must_upcast(*tensors: Tensor) -> bool:
    """Whether operands of tl.dot must be made float32 first: the interpreter multiplies bfloat16 bits as integers, silently."""
    return INTERPRETING and any(tensor.dtype == torch.bfloat16 for tensor in tensors)


def cdiv(numerator: int, denominator: int) -> int:
    """Ceiling of a quotient of non-negative integers."""
    return -(-numerator // denominator)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


def target() -> str:
    """What kernels are compiled for now, as the tuning table names it: sm_90, gfx942, ..., or "interpret"."""
    if INTERPRETING:
        return "interpret"
    current: Any = driver.active.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else str(current.arch).split(":")[0]


def multiprocessors() -> int:
    """How many blocks a persistent kernel starts: multiprocessors of the current device, and 2 under the interpreter."""
    if INTERPRETING:
        return 2
    active: Any = driver.active
    return active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"]


def compiling_only() -> bool:
    """Whether the stand-in driver of moe_triton.compile_only is active, which takes CPU tensors and launches nothing."""
    return not INTERPRETING and getattr(driver._active, "compile_only", False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor; nothing is launched for an empty grid."""
    if 0 in grid:
        return
    device = next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def dot_precision(tensor: Tensor) -> str:
    """How tl.dot multiplies float32: exactly, unless torch.set_float32_matmul_precision has allowed TF32."""
    return "tf32" if tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
