"""The compiled expert kernels against the same formula in float64, and what the backend `cpu` does without a compiler.

The backend itself is in tests/test_experts.py, beside the others.
"""

import pytest
import torch
from compiler import NEEDS_COMPILER
from torch import Tensor
from torch.nn.functional import pad, silu

from moe.errors import BackendError
from moe.experts import resolve_backend
from moe_cpu import experts
from moe_cpu.library import library

pytestmark = NEEDS_COMPILER

CASES = [
    (1, 8, 8, 2, 1),
    (64, 16, 32, 4, 2),
    (300, 40, 24, 5, 2),
    (2500, 33, 50, 2, 2),
    (100, 64, 96, 40, 3),
    (7, 1, 1, 3, 3),
]
"""(T, D, F, E, K): one row, whole tiles, edges of every kind, more rows than a chunk, experts without rows, single columns."""


def weights(D: int, F: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = torch.randn(2, E, D, F) / D**0.5
    return gate, up, torch.randn(E, F, D) / F**0.5


def rows(T: int, E: int, K: int, lost: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token, weight and offsets of rows sorted by expert; expert 3 has none where there are more than K + 1."""
    score = torch.rand(T, E)
    if E > K + 1:
        score[:, min(3, E - 1)] = -1
    expert = score.topk(K).indices.flatten()
    order = expert.argsort(stable=True)
    offsets = pad(torch.bincount(expert, minlength=E).cumsum(0), (1, 0))
    kept = torch.cat((order, order[:lost]))
    return kept // K, torch.rand(T * K + lost), offsets


def in_float64(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, offsets: Tensor
) -> Tensor:
    y = 0 * x
    for e in range(gate.shape[0]):
        here = slice(int(offsets[e]), int(offsets[e + 1]))
        inner = x[token[here]]
        out = (silu(inner @ gate[e]) * (inner @ up[e])) @ down[e]
        y = y.index_add(0, token[here], out * weight[here, None])
    return y


@pytest.mark.parametrize("lost", [0, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_values_and_gradients_are_the_formulas_in_float64(case, lost):
    T, D, F, E, K = case
    torch.manual_seed(0)
    x, dy, (gate, up, down) = torch.randn(T, D), torch.randn(T, D), weights(D, F, E)
    token, weight, offsets = rows(T, E, K, lost)
    wide = [t.double().requires_grad_() for t in (x, gate, up, down, weight)]
    expected = in_float64(*wide, token, offsets)
    gradients = torch.autograd.grad(expected, wide, dy.double())
    y, kept_gate, kept_up = experts.forward(x, gate, up, down, token, weight, offsets, True)
    found = experts.backward(dy, x, gate, up, down, token, weight, offsets, kept_gate, kept_up)
    assert kept_gate[int(offsets[-1]) :].eq(0).all()
    for a, b in zip((y, *found), (expected, *gradients), strict=True):
        assert (a - b).abs().max() <= 2e-6 * max(1.0, b.abs().max().item())
    alone = experts.forward(x, gate, up, down, token, weight, offsets, False)
    assert torch.equal(alone[0], y)
    assert alone[1].shape == (0, F)


def test_threads_change_no_bit():
    torch.manual_seed(0)
    x, dy, (gate, up, down) = torch.randn(700, 72), torch.randn(700, 72), weights(72, 40, 6)
    token, weight, offsets = rows(700, 6, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, *kept = experts.forward(x, gate, up, down, token, weight, offsets, True)
            results.append((y, *kept, *experts.backward(dy, x, gate, up, down, token, weight, offsets, *kept)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_extreme_activations_stay_finite_and_nan_is_seen():
    x, (gate, up, down) = torch.full((3, 4), 1e4), weights(4, 16, 2)
    x[1] *= -1
    token, weight, offsets = rows(3, 2, 2)
    y, *kept = experts.forward(x, gate, up, down, token, weight, offsets, True)
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in experts.backward(x, x, gate, up, down, token, weight, offsets, *kept))
    x[2, 0] = float("nan")
    assert experts.forward(x, gate, up, down, token, weight, offsets, False)[0].isnan().all(1).tolist() == [
        False,
        False,
        True,
    ]


def test_without_a_compiler_auto_is_torch_and_cpu_is_refused(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    try:
        assert resolve_backend("auto") == "torch"
        with pytest.raises(BackendError, match=r"no C compiler was found.*use 'torch'"):
            resolve_backend("cpu")
    finally:
        monkeypatch.undo()
        library.cache_clear()
