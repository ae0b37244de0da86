"""The activation between two 8-bit products, forward and backward, fused with quantising what the next product reads.

Forward reads the pre-activations and writes the hidden rows in e4m3 only. Backward reads the pre-activations and dA and
writes d(gate), d(up) and the weighted hidden rows in bfloat16 for the weights' gradients, d(gate) and d(up) in e4m3 for the
rows' gradient, and ds = <dA, A>. A scale per row needs the row twice, the second time from the cache. What eager torch would
do in about ten passes is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.activation import GATED_ACTIVATIONS, activate, activate_bwd
from moe_triton.low_precision.formats import BLOCK, ScaleFormat, constants, padded
from moe_triton.low_precision.quantize import Quantized, encode, magnitude, scale_of
from moe_triton.plan import RoutingPlan
from moe_triton.runtime import INTERPRETING, cdiv, launch
from moe_triton.tiles import within


@triton.jit
def _hidden(h_ptr, row, inside, f, F: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Hidden values of a tile, in float32; the pre-activations are [P, PARTS · F], gate first."""
    at = h_ptr + row[:, None] * (PARTS * F) + f[None, :]
    gate = tl.load(at, mask=inside, other=0).to(tl.float32)
    up = gate
    if PARTS == 2:
        up = tl.load(at + F, mask=inside, other=0).to(tl.float32)
    return activate(gate, up, ACTIVATION, PARTS == 2)


@triton.jit
def activate_quantize_kernel(
    h_ptr,  # [P, PARTS · F] bf16
    num_computed_ptr,  # [] int64
    values_ptr,  # [P, PADDED] e4m3
    scales_ptr,  # [P, 1 or PADDED / BLOCK_F] f32
    F: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCKED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Quantised f(gate)·up of BLOCK_R rows; rows that go nowhere are neither read nor written."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < tl.load(num_computed_ptr)
    lane = tl.arange(0, BLOCK_F)
    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    if not BLOCKED:
        for start in range(0, F, BLOCK_F):
            inside = exists[:, None] & within(start + lane, F, BLOCK_F)[None, :]
            hidden = _hidden(h_ptr, row, inside, start + lane, F, PARTS, ACTIVATION)
            largest = tl.maximum(largest, tl.max(magnitude(hidden), axis=1))
        tl.store(scales_ptr + row, scale_of(largest, LIMIT), mask=exists)
    SCALES: tl.constexpr = PADDED // BLOCK_F
    for start in range(0, PADDED, BLOCK_F):
        inside = exists[:, None] & within(start + lane, F, BLOCK_F)[None, :]
        hidden = _hidden(h_ptr, row, inside, start + lane, F, PARTS, ACTIVATION)
        if BLOCKED:
            largest = tl.max(magnitude(hidden), axis=1)
            tl.store(scales_ptr + row * SCALES + start // BLOCK_F, scale_of(largest, LIMIT), mask=exists)
        value = encode(hidden, scale_of(largest, LIMIT)[:, None], LIMIT, LEAST).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row[:, None] * PADDED + (start + lane)[None, :], value, mask=exists[:, None])


@triton.jit
def _gradients(
    h_ptr,
    dhidden_ptr,
    weight,
    row,
    inside,
    f,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """(hidden, dgate, dup, part of ds) of a tile in float32; the first three times the row's weight."""
    at = h_ptr + row[:, None] * (PARTS * F) + f[None, :]
    gate = tl.load(at, mask=inside, other=0).to(tl.float32)
    up = gate
    if PARTS == 2:
        up = tl.load(at + F, mask=inside, other=0).to(tl.float32)
    dhidden = tl.load(dhidden_ptr + row[:, None] * F + f[None, :], mask=inside, other=0).to(tl.float32)
    hidden, dgate, dup = activate_bwd(gate, up, dhidden, ACTIVATION, PARTS == 2)  # pyright: ignore[reportGeneralTypeIssues]
    dweight = tl.sum(dhidden * hidden, axis=1)
    return hidden * weight[:, None], dgate * weight[:, None], dup * weight[:, None], dweight


@triton.jit
def activate_bwd_quantize_kernel(
    h_ptr,  # [P, PARTS · F] bf16
    dhidden_ptr,  # [P, F] bf16
    weight_ptr,  # [R] f32
    row_ptr,  # [P] int
    num_computed_ptr,  # [] int64
    dgate_ptr,  # [P, F] bf16
    dup_ptr,  # [P, F] bf16
    weighted_ptr,  # [P, F] bf16
    dweight_ptr,  # [P] f32
    values_ptr,  # [P, PARTS · PADDED] e4m3
    scales_ptr,  # [P, 1 or PARTS · PADDED / BLOCK_F] f32
    F: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCKED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dgate, dup = s·f'·dA in both types, s·A and ds of BLOCK_R rows; with a scale per row it holds for dgate and dup."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < tl.load(num_computed_ptr)
    lane = tl.arange(0, BLOCK_F)
    weight = tl.load(weight_ptr + tl.load(row_ptr + row, mask=exists, other=0), mask=exists, other=0).to(tl.float32)
    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + lane
        inside = exists[:, None] & within(f, F, BLOCK_F)[None, :]
        hidden, dgate, dup, part = _gradients(h_ptr, dhidden_ptr, weight, row, inside, f, F, PARTS, ACTIVATION)
        dweight += part
        at = row[:, None] * F + f[None, :]
        tl.store(weighted_ptr + at, hidden, mask=inside)
        tl.store(dup_ptr + at, dup, mask=inside)
        if PARTS == 2:
            tl.store(dgate_ptr + at, dgate, mask=inside)
            largest = tl.maximum(largest, tl.max(magnitude(dgate), axis=1))
        largest = tl.maximum(largest, tl.max(magnitude(dup), axis=1))
    tl.store(dweight_ptr + row, dweight, mask=exists)
    if not BLOCKED:
        tl.store(scales_ptr + row, scale_of(largest, LIMIT), mask=exists)
    BLOCKS: tl.constexpr = PADDED // BLOCK_F
    scales_ptr += row * (PARTS * BLOCKS)
    for start in range(0, PADDED, BLOCK_F):
        f = start + lane
        inside = exists[:, None] & within(f, F, BLOCK_F)[None, :]
        _, dgate, dup, _ = _gradients(h_ptr, dhidden_ptr, weight, row, inside, f, F, PARTS, ACTIVATION)
        at = values_ptr + row[:, None] * (PARTS * PADDED) + f[None, :]
        if PARTS == 2:
            if BLOCKED:
                largest = tl.max(magnitude(dgate), axis=1)
                tl.store(scales_ptr + start // BLOCK_F, scale_of(largest, LIMIT), mask=exists)
            value = encode(dgate, scale_of(largest, LIMIT)[:, None], LIMIT, LEAST)
            tl.store(at, value.to(values_ptr.dtype.element_ty), mask=exists[:, None])
        if BLOCKED:
            largest = tl.max(magnitude(dup), axis=1)
            tl.store(scales_ptr + (PARTS - 1) * BLOCKS + start // BLOCK_F, scale_of(largest, LIMIT), mask=exists)
        value = encode(dup, scale_of(largest, LIMIT)[:, None], LIMIT, LEAST)
        tl.store(at + (PARTS - 1) * PADDED, value.to(values_ptr.dtype.element_ty), mask=exists[:, None])


def _rows() -> int:
    return 32 if INTERPRETING else 8


def activate_quantize(
    h: Tensor, plan: RoutingPlan, form: ScaleFormat, dtype: torch.dtype, *, activation: str
) -> Quantized:
    """Hidden rows of pre-activations h [P, 2F] (gate, up) or [P, F] without a gate: values [P, F padded]."""
    P, parts = h.shape[0], 2 if activation in GATED_ACTIVATIONS else 1
    F = h.shape[1] // parts
    columns = padded(F)
    result = Quantized(h.new_empty(P, columns, dtype=dtype), h.new_empty(P, form.scales(columns), dtype=torch.float32))
    launch(
        activate_quantize_kernel,
        (cdiv(P, _rows()),),
        h,
        plan.offsets_E1[-1:],
        *result,
        F=F,
        PADDED=columns,
        PARTS=parts,
        ACTIVATION=activation,
        BLOCKED=form.blocked,
        BLOCK_R=_rows(),
        BLOCK_F=BLOCK,
        **constants(dtype),
    )
    return result


def activate_bwd_quantize(
    h: Tensor,
    dhidden_PF: Tensor,
    weight_R: Tensor,
    plan: RoutingPlan,
    form: ScaleFormat,
    dtype: torch.dtype,
    *,
    activation: str,
) -> tuple[Quantized, Tensor, Tensor, Tensor, Tensor]:
    """(quantised [dgate | dup], dgate_PF, dup_PF, weighted_PF, dweight [1, P]); dgate is empty without a gate."""
    P, F = dhidden_PF.shape
    parts = 2 if activation in GATED_ACTIVATIONS else 1
    columns = parts * padded(F)
    result = Quantized(h.new_empty(P, columns, dtype=dtype), h.new_empty(P, form.scales(columns), dtype=torch.float32))
    dup_PF, weighted_PF = torch.empty_like(dhidden_PF), torch.empty_like(dhidden_PF)
    dgate_PF = h.new_empty(P if parts == 2 else 0, F)
    dweight = h.new_empty(1, P, dtype=torch.float32)
    launch(
        activate_bwd_quantize_kernel,
        (cdiv(P, _rows()),),
        h,
        dhidden_PF,
        weight_R,
        plan.row_P,
        plan.offsets_E1[-1:],
        dgate_PF,
        dup_PF,
        weighted_PF,
        dweight,
        *result,
        F=F,
        PADDED=padded(F),
        PARTS=parts,
        ACTIVATION=activation,
        BLOCKED=form.blocked,
        BLOCK_R=_rows(),
        BLOCK_F=BLOCK,
        **constants(dtype),
    )
    return result, dgate_PF, dup_PF, weighted_PF, dweight
