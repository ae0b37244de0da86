"""The compiled expert kernels in bfloat16 against the formula in float64: they err at most 1.5 times as much as torch's.

Where the rounding of the result itself, a relative 2^-9, is more than what torch errs, it is that instead; for a few
numbers, of which torch may err less by luck, four such roundings: of gate, up, hidden values and the result.
"""

import pytest
import torch
from compiler import NEEDS_COMPILER, WHY_NOT
from test_cpu_experts import CASES, in_float64, rows, weights
from torch import Tensor

from moe.experts.torch_backend import expert_ffn
from moe.routing import Dispatch
from moe_cpu import experts

pytestmark = NEEDS_COMPILER

has_kernels = pytest.mark.skipif(
    bool(WHY_NOT) or not experts.computes(torch.bfloat16),
    reason="the processor (or its compiler, which must be gcc) has no AVX512_BF16",
)
ALL = [*CASES, (130, 65, 95, 3, 2), (5000, 9, 11, 2, 2)]
"""Odd sizes of more than a tile; an expert of several chunks, whose gradients are summed before they are rounded."""


def drawn(case: tuple[int, ...], lost: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """x and the three weights, of numbers that bfloat16 has, float32 weights of rows; token; offsets; dy."""
    T, D, F, E, K = case
    torch.manual_seed(0)
    x, dy, *matrices = (t.bfloat16() for t in (torch.randn(T, D), torch.randn(T, D), *weights(D, F, E)))
    token, weight, offsets = rows(T, E, K, lost)
    return [x, *matrices, weight], token, offsets, dy


def differentiated(given: list[Tensor], token: Tensor, offsets: Tensor, dy: Tensor, compiled: bool) -> list[Tensor]:
    """y and the five gradients by the backend's operator."""
    x, gate, up, down, weight = learned = [t.clone().requires_grad_() for t in given]
    dispatch = Dispatch(torch.arange(len(token)), token, weight, offsets, offsets.diff(), "output")
    y = expert_ffn(x, gate, up, down, dispatch, compiled=compiled)
    return [y, *torch.autograd.grad(y, learned, dy)]


@has_kernels
@pytest.mark.parametrize("case", ALL, ids=lambda case: "x".join(map(str, case)))
def test_errors_are_like_those_of_torchs_products(case):
    given, token, offsets, dy = drawn(case)
    wide = [t.double().requires_grad_() for t in given]
    expected = in_float64(*wide, token, offsets)
    exact = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    ours, torchs = (differentiated(given, token, offsets, dy, compiled) for compiled in (True, False))
    for name, a, b, c in zip(("y", "x", "gate", "up", "down", "weight"), ours, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        for measure in (torch.linalg.vector_norm, lambda t: t.abs().max()):
            theirs, least = measure(b.double() - c).item(), measure(c).item() * (1 if c.numel() > 100 else 4) / 2**9
            assert measure(a.double() - c).item() <= 1.5 * max(theirs, least), name


@has_kernels
def test_rows_in_no_expert_are_nowhere():
    given, token, offsets, dy = drawn((300, 40, 24, 5, 2))
    lost, more, _, _ = drawn((300, 40, 24, 5, 2), lost=7)
    x, gate, up, down, _ = given
    y, *kept = experts.forward(x, gate, up, down, more, lost[4], offsets, True)
    assert torch.equal(y, experts.forward(x, gate, up, down, token, lost[4][:600], offsets, False)[0])
    assert all(t.dtype == torch.bfloat16 and t[600:].eq(0).all() for t in kept)
    *_, dweight = experts.backward(dy, x, gate, up, down, more, lost[4], offsets, *kept)
    assert dweight[600:].eq(0).all()
    assert dweight[:600].ne(0).all()


@has_kernels
def test_threads_change_no_bit():
    given, token, offsets, dy = drawn((2500, 72, 40, 6, 2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(differentiated(given, token, offsets, dy, compiled=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@has_kernels
def test_infinity_and_nan_stay_where_they_are():
    given, token, offsets, _ = drawn((40, 33, 35, 2, 2))
    x = given[0]
    x[3, 32], x[5, 0] = float("nan"), float("inf")
    y, gate, _ = experts.forward(*given[:4], token, given[4], offsets, True)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 5]
    assert gate[token == 5].isinf().all()


def test_without_the_instructions_torch_computes(monkeypatch):
    given, token, offsets, dy = drawn((30, 16, 24, 3, 2))
    monkeypatch.setattr(experts, "computes", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(experts, "forward", None)
    asked, plain = (differentiated(given, token, offsets, dy, compiled) for compiled in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(asked, plain, strict=True))
