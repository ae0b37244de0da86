"""Causal attention by the compiled kernels: `causal_attention(q, k, v, scale)`, float32, with gradients.

Nothing of S x S is stored: forward keeps the output and each row's log-sum-exp, and backward computes the weights again. Scores
above the diagonal are not computed, key heads that query heads share are not repeated, and results do not depend on the number
of threads. The method of FlashAttention (arXiv 2205.14135), laid out for a core's caches and registers.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moe_cpu.library import library

MAX_DIM = 256


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in "BNMSDV")


class _Strided(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head", "row")))


@cache
def _kernel(name: str, tensors: int, parameters: int):
    function = getattr(library(), name)
    function.argtypes = [
        ctypes.POINTER(_Sizes),
        ctypes.c_float,
        *[ctypes.c_void_p] * (tensors + parameters),
        ctypes.c_int,
    ]
    return function


def _rows(x_BNSD: Tensor) -> Tensor:
    """The tensor, or a copy where a row's elements are not next to one another."""
    return x_BNSD if x_BNSD.stride(3) == 1 or x_BNSD.shape[3] == 1 else x_BNSD.contiguous()


def _strided(tensors: tuple[Tensor, ...]) -> ctypes.Array:
    return (_Strided * len(tensors))(*(_Strided(x.data_ptr(), *x.stride()[:3]) for x in tensors))


def _sizes(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor) -> _Sizes:
    (B, N, S, D), (M, V) = q_BNSD.shape, v_BMSV.shape[1::2]
    return _Sizes(B, N, M, S, D, V)


def unsupported(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor) -> str | None:
    """Why these tensors cannot be attended to by this kernel, or None where they can."""
    for x in (q_BNSD, k_BMSD, v_BMSV):
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4:
            return f"[B, N, S, D] in float32 on the CPU, not {list(x.shape)} in {x.dtype} on {x.device}"
    (B, N, S, D), (M, V) = q_BNSD.shape, v_BMSV.shape[1::2]
    if k_BMSD.shape != (B, M, S, D) or v_BMSV.shape != (B, M, S, V):
        return (
            f"keys {list(k_BMSD.shape)} and values {list(v_BMSV.shape)} are not those of queries {list(q_BNSD.shape)}"
        )
    if M == 0 or N % M:
        return f"{N} query heads cannot share {M} key heads evenly"
    if not (0 < D <= MAX_DIM and 0 < V <= MAX_DIM):
        return f"heads of 1 to {MAX_DIM} elements, not {D} and {V}"
    return None


@torch.library.custom_op("moe_cpu::causal_attention", mutates_args=())
def _forward(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, S, V], stored as [B, S, N, V], and log-sum-exp [B, N, S]."""
    out_BNSV, lse_BNS = _fake(q_BNSD, k_BMSD, v_BMSV, scale)
    q_BNSD, k_BMSD, v_BMSV = map(_rows, (q_BNSD, k_BMSD, v_BMSV))
    sizes = _sizes(q_BNSD, k_BMSD, v_BMSV)
    places = _strided((q_BNSD, k_BMSD, v_BMSV, out_BNSV))
    arguments = (*(ctypes.addressof(place) for place in places), lse_BNS.data_ptr())
    if _kernel("moe_cpu_attention", 4, 1)(sizes, scale, *arguments, torch.get_num_threads()):
        raise MemoryError("no memory for attention's packed keys and values")
    return out_BNSV, lse_BNS


@_forward.register_fake
def _fake(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if reason := unsupported(q_BNSD, k_BMSD, v_BMSV):
        raise ValueError(reason)
    B, N, S, _ = q_BNSD.shape
    return q_BNSD.new_empty(B, S, N, v_BMSV.shape[3]).transpose(1, 2), q_BNSD.new_empty(B, N, S)


@torch.library.custom_op("moe_cpu::causal_attention_backward", mutates_args=())
def _backward(
    grad_BNSV: Tensor, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, out_BNSV: Tensor, lse_BNS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, stored as [B, S, heads, elements]."""
    grad_BNSV, q_BNSD, k_BMSD, v_BMSV = map(_rows, (grad_BNSV, q_BNSD, k_BMSD, v_BMSV))
    gradients = _fake_backward(grad_BNSV, q_BNSD, k_BMSD, v_BMSV, out_BNSV, lse_BNS, scale)
    sizes = _sizes(q_BNSD, k_BMSD, v_BMSV)
    places = _strided((q_BNSD, k_BMSD, v_BMSV, _rows(out_BNSV), grad_BNSV, *gradients))
    arguments = (ctypes.addressof(places), lse_BNS.contiguous().data_ptr())
    if _kernel("moe_cpu_attention_backward", 1, 1)(sizes, scale, *arguments, torch.get_num_threads()):
        raise MemoryError("no memory for attention's packed keys, values and their gradients")
    return gradients


@_backward.register_fake
def _fake_backward(
    grad_BNSV: Tensor, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, out_BNSV: Tensor, lse_BNS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q_BNSD, k_BMSD, v_BMSV)
    )
    return q, k, v


def _setup_context(ctx, inputs, output) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(*inputs[:3], *output)


def _autograd(ctx, grad_BNSV, _grad_lse):
    return *_backward(grad_BNSV, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_attention(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys up to a query's own position; raises ValueError for what does not fit (`unsupported`).

    q [B, N, S, D], k [B, M, S, D] and v [B, M, S, V] with any strides, N a multiple of M: N / M consecutive query heads share a
    key head. The result [B, N, S, V] is stored as [B, S, N, V], so that its heads can be put together without a copy.
    """
    return _forward(q_BNSD, k_BMSD, v_BMSV, scale)[0]
