"""Matrix products by the compiled kernels: `product(a, b)`, with operands stored either way, and `linear` with its gradients.

A product of many rows is memory-bound in its operands' packing only (product.c); two threads keep two cores at nine tenths of what
their multipliers can do. Deterministic: the order of additions follows from the sizes, not from the number of threads.
"""

import ctypes
import time
from functools import cache

import torch
from torch import Tensor

from moe_cpu.library import library

_long, _pointer, _int = ctypes.c_long, ctypes.c_void_p, ctypes.c_int


@cache
def _kernel():
    function = library().moe_cpu_product
    operand = (_pointer, _long, _int)
    function.argtypes, function.restype = [_long] * 3 + [*operand, *operand, _pointer, _long, _int, _int], None
    return function


def _operand(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix whose rows or whose columns are contiguous: itself or a copy, the distance of the others, and which."""
    if matrix.stride(1) == 1 or matrix.shape[1] == 1:
        return matrix, max(matrix.stride(0), matrix.shape[1]), 0
    if matrix.stride(0) == 1:
        return matrix, matrix.stride(1), 1
    copy = matrix.contiguous()
    return copy, copy.stride(0), 0


def product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor | None = None, *, add: bool = False) -> Tensor:
    """a @ b of float32 matrices on the CPU, into `out_MN` (rows contiguous), or added to it. Raises ValueError for others."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    for matrix in (a_MK, b_KN) if out_MN is None else (a_MK, b_KN, out_MN):
        if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
            raise ValueError(f"float32 matrices on the CPU, not {matrix.dtype} on {matrix.device}")
    if b_KN.shape[0] != K or (out_MN is not None and (out_MN.shape != (M, N) or out_MN.stride(1) != 1)):
        raise ValueError(f"[{M}, {K}] times {list(b_KN.shape)} gives [{M}, {N}] with contiguous rows")
    if out_MN is None:
        out_MN, add = a_MK.new_empty(M, N), False
    a, a_stride, a_turned = _operand(a_MK)
    b, b_stride, b_turned = _operand(b_KN)
    operands = (a.data_ptr(), a_stride, a_turned, b.data_ptr(), b_stride, b_turned)
    _kernel()(M, N, K, *operands, out_MN.data_ptr(), out_MN.stride(0), add, torch.get_num_threads())
    return out_MN


def peak_gigaflops(*, rounds: int = 15) -> float:
    """The roof of these kernels: 10^9 floating-point operations a second of tiles whose operands are in the first cache.

    The best of `rounds`, in float32 with torch's number of threads.
    """
    tiles, flops = library().moe_cpu_tiles, library().moe_cpu_tile_flops
    tiles.argtypes, tiles.restype = [_long, _long, _int], None
    flops.argtypes, flops.restype = [_long], _long
    depth, times, threads, seconds = 128, 2000, torch.get_num_threads(), []
    for _ in range(rounds):
        start = time.perf_counter()
        tiles(depth, times, threads)
        seconds.append(time.perf_counter() - start)
    return threads * times * flops(depth) / min(seconds) / 1e9


@torch.library.custom_op("moe_cpu::product_into", mutates_args={"out_MN"})
def product_into(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, add: bool) -> None:
    """`product` as an operator, which a FLOP counter sees and torch.compile takes; without gradients."""
    product(a_MK, b_KN, out_MN, add=add)


@torch.library.custom_op("moe_cpu::linear", mutates_args=())
def linear(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """x @ weightᵀ: [T, D] and [N, D] to [T, N], all float32 on the CPU, with gradients of both."""
    return product(x_TD, weight_ND.t())


@linear.register_fake
def _(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ND.shape[0])


@torch.library.custom_op("moe_cpu::linear_backward", mutates_args=())
def _backward(dy_TN: Tensor, x_TD: Tensor, weight_ND: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        product(dy_TN, weight_ND) if of_x else x_TD.new_empty(0),
        product(dy_TN.t(), x_TD) if of_weight else x_TD.new_empty(0),
    )


@_backward.register_fake
def _(dy_TN: Tensor, x_TD: Tensor, weight_ND: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x_TD) if of_x else x_TD.new_empty(0),
        torch.empty_like(weight_ND) if of_weight else x_TD.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy_TN):
    of_x, of_weight = ctx.needs_input_grad
    dx_TD, dweight_ND = _backward(dy_TN, *ctx.saved_tensors, of_x, of_weight)
    return dx_TD if of_x else None, dweight_ND if of_weight else None


linear.register_autograd(_autograd, setup_context=_setup_context)
