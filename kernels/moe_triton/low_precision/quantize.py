"""From bfloat16 to e4m3 with float32 scales: rows of activations, and weights laid out for one direction of a product.

A product of 8-bit operands reads both along the contraction, so a weight is quantised once per direction: W_down for its
forward as [E, D, F], for its gradient as [E, F, D]. A scale is the largest magnitude of its elements / the type's largest,
1 where all are zero. Rounding to nearest is done here, in float32, so that the cast is exact: every machine gives the same
bits (the interpreter's own cast does not carry). Where an element is not finite its scale is NaN, so that what follows is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.low_precision.formats import BLOCK, ScaleFormat, constants, padded
from moe_triton.runtime import INTERPRETING, cdiv, launch
from moe_triton.tiles import within


class Quantized(NamedTuple):
    """An operand of an 8-bit product."""

    values: Tensor
    """[..., rows, K] of an e4m3 type, K padded with zeros to a multiple of 128."""
    scales: Tensor
    """[..., rows or blocks of rows, 1 or blocks of K] float32; element ≈ value · scale."""


@triton.jit
def scale_of(largest, LIMIT: tl.constexpr):
    """The scale for elements of at most this magnitude: NaN if one of them is not finite, 1 if all are zero."""
    scale = tl.where(largest > 0, tl.div_rn(largest, LIMIT), 1.0)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def magnitude(x):
    """|x|, infinite for NaN too, so that a maximum shows it."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def encode(x, scale, LIMIT: tl.constexpr, LEAST: tl.constexpr):
    """x / scale rounded to the nearest e4m3 value, ties to even, in float32; never negative zero, which is NaN in fnuz."""
    x = tl.minimum(tl.maximum(tl.div_rn(x, scale), -LIMIT), LIMIT)
    bits = x.to(tl.int32, bitcast=True)
    # three of 23 bits of the significand are kept; the carry goes into the exponent
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # below the least normal value steps are equal: adding a number whose unit in the last place is that step rounds to it
    MAGIC: tl.constexpr = 12582912.0 * LEAST
    small = (x + MAGIC) - MAGIC
    value = tl.where(tl.abs(x) < 8 * LEAST, small, normal)
    return tl.where(value == 0, 0.0, value)


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [R, K] bf16
    values_ptr,  # [R, PADDED] e4m3
    scales_ptr,  # [R, 1 or PADDED / BLOCK_K] f32
    num_rows,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantise BLOCK_R rows; with a scale per row they are read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < num_rows
    k = tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    if not BLOCKED:
        for start in range(0, K, BLOCK_K):
            inside = exists[:, None] & within(start + k, K, BLOCK_K)[None, :]
            x = tl.load(x_ptr + row[:, None] * K + (start + k)[None, :], mask=inside, other=0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
    SCALES: tl.constexpr = PADDED // BLOCK_K if BLOCKED else 1
    for start in range(0, PADDED, BLOCK_K):
        inside = exists[:, None] & within(start + k, K, BLOCK_K)[None, :]
        x = tl.load(x_ptr + row[:, None] * K + (start + k)[None, :], mask=inside, other=0).to(tl.float32)
        if BLOCKED:
            largest = tl.max(magnitude(x), axis=1)
            tl.store(scales_ptr + row * SCALES + start // BLOCK_K, scale_of(largest, LIMIT), mask=exists)
        value = encode(x, scale_of(largest, LIMIT)[:, None], LIMIT, LEAST).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row[:, None] * PADDED + (start + k)[None, :], value, mask=exists[:, None])
    if not BLOCKED:
        tl.store(scales_ptr + row, scale_of(largest, LIMIT), mask=exists)


@triton.jit
def quantize_weight_kernel(
    first_ptr,  # [E, N, K] bf16, any strides
    second_ptr,  # likewise: the second part of the contraction
    values_ptr,  # [E, N, ROW] e4m3
    scales_ptr,  # [E, N or its blocks, 1 or blocks] f32
    stride_n,
    stride_k,
    stride_values,
    stride_scales,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCKED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantise BLOCK_N rows of one expert's weight; with a scale per row, its contraction may come in two parts."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = within(n, N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_N], dtype=tl.float32)
    at = expert * (N * K)
    values_ptr += expert * stride_values
    scales_ptr += expert * stride_scales
    if not BLOCKED:
        for part in tl.static_range(PARTS):
            for start in range(0, K, BLOCK_K):
                inside = in_n[:, None] & within(start + k, K, BLOCK_K)[None, :]
                w_ptr = (first_ptr if part == 0 else second_ptr) + at
                w = tl.load(w_ptr + n[:, None] * stride_n + (start + k)[None, :] * stride_k, mask=inside, other=0)
                largest = tl.maximum(largest, tl.max(magnitude(w.to(tl.float32)), axis=1))
        tl.store(scales_ptr + n, scale_of(largest, LIMIT), mask=in_n)
    for part in tl.static_range(PARTS):
        for start in range(0, PADDED, BLOCK_K):
            inside = in_n[:, None] & within(start + k, K, BLOCK_K)[None, :]
            w_ptr = (first_ptr if part == 0 else second_ptr) + at
            w = tl.load(w_ptr + n[:, None] * stride_n + (start + k)[None, :] * stride_k, mask=inside, other=0)
            w = w.to(tl.float32)
            if BLOCKED:
                most = tl.max(tl.max(magnitude(w), axis=1), axis=0)
                largest = tl.zeros([BLOCK_N], dtype=tl.float32) + most
                place = tl.program_id(0) * (ROW // BLOCK_K) + (part * PADDED + start) // BLOCK_K
                tl.store(scales_ptr + place, scale_of(most, LIMIT))
            value = encode(w, scale_of(largest, LIMIT)[:, None], LIMIT, LEAST).to(values_ptr.dtype.element_ty)
            place = n[:, None] * ROW + (part * PADDED + start + k)[None, :]
            tl.store(values_ptr + place, value, mask=in_n[:, None])


def quantize_rows(x_RK: Tensor, form: ScaleFormat, dtype: torch.dtype) -> Quantized:
    """Rows of a contiguous [R, K]: values [R, K padded] and scales [R, 1 or blocks of K]."""
    R, K = x_RK.shape
    columns = padded(K)
    result = Quantized(
        x_RK.new_empty(R, columns, dtype=dtype), x_RK.new_empty(R, form.scales(columns), dtype=torch.float32)
    )
    rows = 32 if INTERPRETING else 16
    launch(
        quantize_rows_kernel,
        (cdiv(R, rows),),
        x_RK,
        *result,
        R,
        K=K,
        PADDED=columns,
        BLOCKED=form.blocked,
        BLOCK_R=rows,
        BLOCK_K=BLOCK,
        **constants(dtype),
    )
    return result


def quantize_weights(
    weights: list[Tensor], form: ScaleFormat, dtype: torch.dtype, *, joined: bool = False
) -> Quantized:
    """Weights [E, N, K] of one shape, as views of contiguous tensors with K contracted: values [E, S, N, K], scales likewise.

    Several weights are S blocks of rows of one operand, or with `joined` one sum after the other along K (then S = 1).
    """
    E, N, K = weights[0].shape
    parts, segments = (len(weights), 1) if joined else (1, len(weights))
    columns, weight_rows = parts * padded(K), form.weight_rows(N)
    values = weights[0].new_empty(E, segments, N, columns, dtype=dtype)
    scales = weights[0].new_empty(E, segments, weight_rows, form.scales(columns), dtype=torch.float32)
    if not joined:
        launches = [([weight], values[:, i], scales[:, i]) for i, weight in enumerate(weights)]
    elif form.blocked:  # blocks never reach across two weights, so each is a launch: both in one would spill
        begins = [padded(K) * i for i in range(parts)]
        launches = [
            ([weight], values[:, 0, :, begin:], scales[:, 0, :, begin // BLOCK :])
            for weight, begin in zip(weights, begins, strict=True)
        ]
    else:
        launches = [(weights, values[:, 0], scales[:, 0])]
    rows = BLOCK if form.blocked or INTERPRETING else 32
    for sources, to_values, to_scales in launches:
        launch(
            quantize_weight_kernel,
            (cdiv(N, rows), E),
            sources[0],
            sources[-1],
            to_values,
            to_scales,
            weights[0].stride(1),
            weights[0].stride(2),
            values.stride(0),
            scales.stride(0),
            N=N,
            K=K,
            PADDED=padded(K),
            PARTS=len(sources),
            ROW=columns,
            BLOCKED=form.blocked,
            BLOCK_N=rows,
            BLOCK_K=BLOCK,
            num_warps=8 if form.blocked else 4,
            **constants(dtype),
        )
    return Quantized(values, scales)
