"""Blocks of the `torch` backend: many of them against one, row counts that return, and rows that no product may mix.

Values and gradients of the backend itself are in test_experts.py, against the float64 reference, in blocks of one size.
"""

import pytest
import torch

from moe.experts import BACKENDS, row_blocks
from moe.routing import Dispatch

D, F, E = 16, 24, 6


def dispatch_of(counts: list[int], T: int) -> Dispatch:
    """Rows of random tokens, `counts` per expert, the last three of which go nowhere."""
    P = sum(counts) + 3
    offsets = torch.tensor([0, *counts]).cumsum(0)
    weight_P = torch.where(torch.arange(P) < P - 3, torch.rand(P) + 0.1, 0.0)
    return Dispatch(torch.arange(P), torch.randint(T, (P,)), weight_P, offsets, torch.tensor(counts), "output")


def gradients(dispatch: Dispatch, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of x and of the three weights."""
    torch.manual_seed(1)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    inputs = [x.clone().requires_grad_()] + [(torch.randn(s) / 4).to(x.dtype).requires_grad_() for s in shapes]
    y = BACKENDS["torch"](*inputs, dispatch)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("elements", [1, 24 * 40, 24 * 75])
def test_neither_the_size_of_a_block_nor_the_way_of_summing_changes_a_value(dtype, elements, monkeypatch):
    counts, T = [33, 1, 0, 40, 9, 70], 50
    dispatch, x, dy = dispatch_of(counts, T), torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    whole = gradients(dispatch, x, dy)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(row_blocks, "SUM_ELEMENTS", 0)
    assert len(row_blocks.blocks_of(x, dispatch.offsets_E1, [F] * E)) == {1: 5, 24 * 40: 4, 24 * 75: 3}[elements]
    for one, many in zip(whole, gradients(dispatch, x, dy), strict=True):
        # a few roundings: a matrix product's own sums depend on where its rows lie in memory
        rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 1e-2)}[dtype]
        torch.testing.assert_close(many, one, rtol=rtol, atol=atol)


def test_16_bit_products_have_few_numbers_of_rows_and_others_no_spare_ones():
    offsets = torch.arange(2, 1200).cumsum(0)
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        blocks = row_blocks.blocks_of(torch.zeros(1, D, dtype=dtype), offsets, [F] * (len(offsets) - 1))
        spans = [span for block in blocks for span in block.spans]
        assert [span.end - span.start for span in spans] == list(range(3, 1200))
        rows[dtype] = {span.end - span.start + span.spare for span in spans}
        if dtype == torch.bfloat16:
            assert max(span.spare / (span.end - span.start) for span in spans if span.end - span.start >= 256) < 1 / 64
    # 4 to 512 in fours, on to 1024 in eights, the rest in sixteens
    assert len(rows[torch.bfloat16]) == 128 + 64 + 11
    assert len(rows[torch.float32]) == 1197


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_token_that_is_not_finite_reaches_the_gradients_of_its_own_experts_alone(dtype):
    counts, T = [5, 11, 3, 8, 2, 9], 38
    dispatch = dispatch_of(counts, T)
    dispatch.token_P[:38] = torch.arange(38)  # every token in one row, those of expert 2 at 16 to 18
    x, dy = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    x[17] = float("nan")
    y, dx, *dweights = gradients(dispatch, x, dy)
    alone = torch.arange(T) == 17
    assert y[alone].isnan().all() and not y[~alone].isnan().any()
    assert dx[alone].isnan().all() and not dx[~alone].isnan().any()
    for dweight in dweights:
        assert dweight[2].isnan().any() and not dweight[[0, 1, 3, 4, 5]].isnan().any()
