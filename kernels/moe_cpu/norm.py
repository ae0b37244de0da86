"""RMSNorm by the compiled kernels: `rms_norm(x, weight, eps)`, float32, with gradients; one pass over the rows each way."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moe_cpu.library import library

ROWS = 64
"""Rows of a task in norm.c, which sums the weight's gradient over them."""

_long, _float, _pointer, _int = ctypes.c_long, ctypes.c_float, ctypes.c_void_p, ctypes.c_int


@cache
def _kernels():
    forward, backward = library().moe_cpu_norm, library().moe_cpu_norm_backward
    forward.argtypes, forward.restype = [_long, _long, _float, *[_pointer] * 4, _int], None
    backward.argtypes, backward.restype = [_long, _long, *[_pointer] * 7, _int], None
    return forward, backward


def _check(x_D: Tensor, weight_D: Tensor) -> None:
    for x in (x_D, weight_D):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"float32 on the CPU, not {x.dtype} on {x.device}")
    if weight_D.dim() != 1 or x_D.dim() == 0 or x_D.shape[-1] != weight_D.shape[0] or weight_D.shape[0] == 0:
        raise ValueError(f"a weight [D] for rows of D elements, not {list(weight_D.shape)} for {list(x_D.shape)}")


@torch.library.custom_op("moe_cpu::rms_norm", mutates_args=())
def _forward(x_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y_D, inverse = _fake(x_D, weight_D, eps)
    x_D, weight_D = x_D.contiguous(), weight_D.contiguous()
    pointers = (x.data_ptr() for x in (x_D, weight_D, y_D, inverse))
    _kernels()[0](inverse.numel(), len(weight_D), eps, *pointers, torch.get_num_threads())
    return y_D, inverse


@_forward.register_fake
def _fake(x_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x_D, weight_D)
    return x_D.new_empty(x_D.shape), x_D.new_empty(x_D.shape[:-1])


@torch.library.custom_op("moe_cpu::rms_norm_backward", mutates_args=())
def _backward(dy_D: Tensor, x_D: Tensor, weight_D: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    dx_D, dweight_D = _fake_backward(dy_D, x_D, weight_D, inverse)
    T, D = inverse.numel(), len(weight_D)
    sums = x_D.new_empty(-(-T // ROWS), D)
    held = (dy_D.contiguous(), x_D.contiguous(), weight_D.contiguous(), inverse.contiguous(), dx_D, dweight_D, sums)
    _kernels()[1](T, D, *(x.data_ptr() for x in held), torch.get_num_threads())
    return dx_D, dweight_D


@_backward.register_fake
def _fake_backward(dy_D: Tensor, x_D: Tensor, weight_D: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return x_D.new_empty(x_D.shape), weight_D.new_empty(weight_D.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _autograd(ctx, dy_D, _dinverse):
    return *_backward(dy_D, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension of x [..., D] (arXiv 1910.07467); raises ValueError for others."""
    return _forward(x_D, weight_D, eps)[0]
