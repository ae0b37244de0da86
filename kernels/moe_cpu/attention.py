"""Causal attention by the compiled kernels: `causal_attention(q, k, v, scale)`, float32, with gradients.

Nothing of S x S is stored: forward keeps the output and each row's log-sum-exp, and backward computes the weights again. A mask is
a number per row, the first key that it sees: documents that lie one after another and sliding windows are masks of this kind. Tiles
of scores that no row sees are not computed, key heads that query heads share are not repeated, and the rotary embedding is applied
where rows are packed and never stored. Results do not depend on the number of threads. The method of FlashAttention (arXiv
2205.14135), laid out for a core's caches and registers.
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


class _Angles(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("width", ctypes.c_long))


class _Sight(ctypes.Structure):
    _fields_ = (("first", ctypes.c_void_p), ("batch", ctypes.c_long))


class _Tensors(ctypes.Structure):
    _fields_ = (("strided", _Strided * 8), ("angles", _Angles), ("sight", _Sight))


@cache
def _forward_kernel():
    function = library().moe_cpu_attention
    tensors = [ctypes.POINTER(_Strided)] * 4
    rest = [ctypes.POINTER(_Angles), ctypes.POINTER(_Sight), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    function.argtypes = [ctypes.POINTER(_Sizes), ctypes.c_float, *tensors, *rest]
    return function


@cache
def _backward_kernel():
    function = library().moe_cpu_attention_backward
    function.argtypes = [
        ctypes.POINTER(_Sizes), ctypes.c_float, ctypes.POINTER(_Tensors), ctypes.c_void_p, ctypes.c_int
    ]  # fmt: skip
    return function


def _rows(x_BNSD: Tensor) -> Tensor:
    """The tensor, or a copy where a row's elements are not next to one another."""
    return x_BNSD if x_BNSD.stride(3) == 1 or x_BNSD.shape[3] == 1 else x_BNSD.contiguous()


def _strided(x_BNSD: Tensor) -> _Strided:
    return _Strided(x_BNSD.data_ptr(), *x_BNSD.stride()[:3])


def _angles(cos_SR: Tensor | None, sin_SR: Tensor | None) -> _Angles:
    if cos_SR is None or sin_SR is None:
        return _Angles(None, None, 0)
    return _Angles(cos_SR.data_ptr(), sin_SR.data_ptr(), cos_SR.shape[1])


def _sight(first_BS: Tensor | None) -> _Sight:
    return (
        _Sight(None, 0) if first_BS is None else _Sight(first_BS.data_ptr(), first_BS.stride(0) * (len(first_BS) > 1))
    )


def _raise_for(failure: int) -> None:
    """What a kernel returned, as an error."""
    if failure == 2:
        raise ValueError(
            "first keys must not be after their row's position, nor before the first key of the row before"
        )
    if failure:
        raise MemoryError("no memory for attention's packed keys and values, or their gradients")


def _sizes(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor) -> _Sizes:
    (B, N, S, D), (M, V) = q_BNSD.shape, v_BMSV.shape[1::2]
    return _Sizes(B, N, M, S, D, V)


def unsupported(
    q_BNSD: Tensor,
    k_BMSD: Tensor,
    v_BMSV: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    first_BS: Tensor | None = None,
    sink_N: Tensor | None = None,
) -> str | None:
    """Why these tensors cannot be attended to by this kernel, or None where they can."""
    angles: tuple[Tensor, ...] = cos_sin or ()
    for x in (q_BNSD, k_BMSD, v_BMSV, *angles, *(() if sink_N is None else (sink_N,))):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return f"float32 on the CPU, not {x.dtype} on {x.device}"
    if not q_BNSD.dim() == k_BMSD.dim() == v_BMSV.dim() == 4:
        return f"[B, N, S, D], not {list(q_BNSD.shape)}, {list(k_BMSD.shape)} and {list(v_BMSV.shape)}"
    (B, N, S, D), (M, V) = q_BNSD.shape, v_BMSV.shape[1::2]
    if k_BMSD.shape != (B, M, S, D) or v_BMSV.shape != (B, M, S, V):
        return (
            f"keys {list(k_BMSD.shape)} and values {list(v_BMSV.shape)} are not those of queries {list(q_BNSD.shape)}"
        )
    if M == 0 or N % M:
        return f"{N} query heads cannot share {M} key heads evenly"
    if not (0 < D <= MAX_DIM and 0 < V <= MAX_DIM):
        return f"heads of 1 to {MAX_DIM} elements, not {D} and {V}"
    for x in angles:
        if x.dim() != 2 or x.shape[0] != S or x.shape[1] > D or x.shape[1] % 2:
            return f"angles of {S} positions for an even number of elements up to {D}, not {list(x.shape)}"
        if x.requires_grad:
            return "angles have no gradient here"
    if cos_sin is not None and cos_sin[0].shape != cos_sin[1].shape:
        return f"angles of {S} positions, cosines {list(cos_sin[0].shape)} and sines {list(cos_sin[1].shape)}"
    if first_BS is not None:
        if first_BS.dtype != torch.int32 or first_BS.device.type != "cpu":
            return f"first keys are int32 on the CPU, not {first_BS.dtype} on {first_BS.device}"
        if first_BS.dim() != 2 or first_BS.shape[0] not in (1, B) or first_BS.shape[1] != S:
            return f"first keys of {S} positions in 1 or {B} rows, not {list(first_BS.shape)}"
    if sink_N is not None and (sink_N.shape != (N,) or not sink_N.is_contiguous()):
        return f"sinks of {N} query heads next to one another, not {list(sink_N.shape)}"
    return None


@torch.library.custom_op("moe_cpu::causal_attention", mutates_args=())
def _forward(
    q_BNSD: Tensor,
    k_BMSD: Tensor,
    v_BMSV: Tensor,
    scale: float,
    cos_SR: Tensor | None,
    sin_SR: Tensor | None,
    first_BS: Tensor | None,
    sink_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, S, V], stored as [B, S, N, V], and log-sum-exp [B, N, S]."""
    out_BNSV, lse_BNS = _fake(q_BNSD, k_BMSD, v_BMSV, scale, cos_SR, sin_SR, first_BS, sink_N)
    inputs = tuple(map(_rows, (q_BNSD, k_BMSD, v_BMSV)))
    places, sink = map(_strided, (*inputs, out_BNSV)), None if sink_N is None else sink_N.data_ptr()
    given = _sizes(*inputs), scale, *places, _angles(cos_SR, sin_SR), _sight(first_BS), sink, lse_BNS.data_ptr()
    _raise_for(_forward_kernel()(*given, torch.get_num_threads()))
    return out_BNSV, lse_BNS


@_forward.register_fake
def _fake(
    q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, scale: float, cos_SR, sin_SR, first_BS, sink_N
) -> tuple[Tensor, Tensor]:
    angles = None if cos_SR is None or sin_SR is None else (cos_SR, sin_SR)
    if reason := unsupported(q_BNSD, k_BMSD, v_BMSV, angles, first_BS, sink_N):
        raise ValueError(reason)
    B, N, S, _ = q_BNSD.shape
    return q_BNSD.new_empty(B, S, N, v_BMSV.shape[3]).transpose(1, 2), q_BNSD.new_empty(B, N, S)


@torch.library.custom_op("moe_cpu::causal_attention_backward", mutates_args=())
def _backward(
    grad_BNSV: Tensor,
    q_BNSD: Tensor,
    k_BMSD: Tensor,
    v_BMSV: Tensor,
    out_BNSV: Tensor,
    lse_BNS: Tensor,
    scale: float,
    cos_SR: Tensor | None,
    sin_SR: Tensor | None,
    first_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, stored as [B, S, heads, elements]."""
    gradients = _like(q_BNSD), _like(k_BMSD), _like(v_BMSV)
    inputs = tuple(map(_rows, (q_BNSD, k_BMSD, v_BMSV, out_BNSV, grad_BNSV)))
    places = (_Strided * 8)(*map(_strided, (*inputs, *gradients)))
    tensors = _Tensors(places, _angles(cos_SR, sin_SR), _sight(first_BS))
    _raise_for(_backward_kernel()(_sizes(*inputs[:3]), scale, tensors, lse_BNS.data_ptr(), torch.get_num_threads()))
    return gradients


def _like(x_BNSD: Tensor) -> Tensor:
    B, N, S, D = x_BNSD.shape
    return x_BNSD.new_empty(B, S, N, D).transpose(1, 2)


@_backward.register_fake
def _fake_backward(
    grad_BNSV, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, out_BNSV, lse_BNS, scale, cos_SR, sin_SR, first_BS
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q_BNSD), _like(k_BMSD), _like(v_BMSV)


def _setup_context(ctx, inputs, output) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[4:])


def _autograd(ctx, grad_BNSV, _grad_lse):
    q, k, v, out_BNSV, lse_BNS, cos_SR, sin_SR, first_BS, sink_N = ctx.saved_tensors
    of_qkv = _backward(grad_BNSV, q, k, v, out_BNSV, lse_BNS, ctx.scale, cos_SR, sin_SR, first_BS)
    of_sink = None
    if sink_N is not None and ctx.needs_input_grad[7]:
        # a sink weighs e^(sink - lse) on a value of zero: its score's gradient is that times what softmax takes off, do . out
        weight_BNS = (sink_N.view(-1, 1) - lse_BNS).exp()
        of_sink = -(weight_BNS * (grad_BNSV * out_BNSV).sum(3)).sum((0, 2))
    return *of_qkv, None, None, None, None, of_sink


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_attention(
    q_BNSD: Tensor,
    k_BMSD: Tensor,
    v_BMSV: Tensor,
    scale: float,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    *,
    first_BS: Tensor | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys up to a query's own position; raises ValueError for what does not fit (`unsupported`).

    q [B, N, S, D], k [B, M, S, D] and v [B, M, S, V] with any strides, N a multiple of M: N / M consecutive query heads share a
    key head. The result [B, N, S, V] is stored as [B, S, N, V], so that its heads can be put together without a copy. With cosines
    and sines [S, R] the first R elements of queries and keys are rotated first, element i with i + R / 2. With first_BS [B or 1, S]
    int32, never falling along a row, a query sees the keys from that one on. sink_N [N] is the score of one more key for every
    query of a head, whose value is zero.
    """
    cos_SR, sin_SR = cos_sin or (None, None)
    if cos_SR is not None and sin_SR is not None:
        cos_SR, sin_SR = cos_SR.contiguous(), sin_SR.contiguous()
    first_BS = None if first_BS is None else first_BS.contiguous()
    return _forward(q_BNSD, k_BMSD, v_BMSV, scale, cos_SR, sin_SR, first_BS, sink_N)[0]
