"""The expert feed-forward network by the compiled kernels, forward and backward: functions over tensors, without autograd."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moe_cpu.library import library

_SUFFIX = {torch.float32: "", torch.bfloat16: "_bf16"}
_long, _pointer, _int = ctypes.c_long, ctypes.c_void_p, ctypes.c_int


@cache
def _kernel(name: str, tensors: int):
    function = getattr(library(), name)
    function.argtypes, function.restype = [*[_long] * 3, *[_pointer] * tensors, _int], _int
    return function


def _call(name: str, sizes: tuple[int, int, int], tensors: tuple[Tensor | None, ...]) -> None:
    held = [t if t is None else t.contiguous() for t in tensors]
    pointers = [None if t is None else t.data_ptr() for t in held]
    if _kernel(name, len(tensors))(*sizes, *pointers, torch.get_num_threads()):
        raise MemoryError(f"{name}: no scratch memory for experts of {sizes[0]} x {sizes[1]}")


@cache
def computes(dtype: torch.dtype) -> bool:
    """Whether there are kernels for this type: float32, and bfloat16 where the processor multiplies pairs of it (AVX512_BF16).

    Raises CannotCompile.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(library().moe_cpu_has_bf16()))


def forward(
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_TD, and gate_PF and up_PF if they are kept ([0, F] otherwise), of SwiGLU experts on the CPU.

    x and the weights are of one type that `computes`; so is what is returned, of sums in float32. weight_P is of any type.
    Rows p, sorted by expert: x[token_P[p]] through its expert, times weight_P[p]. Rows from offsets_E1[-1] on are in no expert.
    """
    E, D, F = w_up_EDF.shape
    shape = (token_P.shape[0] if keep else 0, F)
    whole = not keep or int(offsets_E1[-1]) == shape[0]
    gate_PF, up_PF = (x_TD.new_empty(shape) if whole else x_TD.new_zeros(shape) for _ in range(2))
    y_TD = torch.zeros(x_TD.shape)
    given = (offsets_E1, token_P, weight_P.float(), x_TD, w_gate_EDF, w_up_EDF, w_down_EFD)
    kept = (gate_PF, up_PF) if keep else (None, None)
    _call("moe_cpu_experts_forward" + _SUFFIX[x_TD.dtype], (D, F, E), (*given, *kept, y_TD))
    return y_TD.to(x_TD.dtype), gate_PF, up_PF


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the three weights and of weight_P, from `forward`'s arguments and what it kept."""
    E, D, F = w_up_EDF.shape
    dx_TD = torch.zeros(x_TD.shape)
    gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w_gate_EDF, w_up_EDF, w_down_EFD)]
    for e in (offsets_E1.diff() == 0).nonzero().flatten().tolist():
        for gradient in gradients:
            gradient[e].zero_()
    dweight_P = torch.zeros(weight_P.shape, dtype=torch.float32)
    given = (offsets_E1, token_P, weight_P.float(), x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, gate_PF, up_PF, dy_TD)
    _call("moe_cpu_experts_backward" + _SUFFIX[x_TD.dtype], (D, F, E), (*given, dx_TD, *gradients, dweight_P))
    return dx_TD.to(x_TD.dtype), gradients[0], gradients[1], gradients[2], dweight_P.to(weight_P.dtype)
