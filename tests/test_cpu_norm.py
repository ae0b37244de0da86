"""The compiled RMSNorm against torch's in float64: values and gradients, on awkward sizes."""

import pytest
import torch
from compiler import NEEDS_COMPILER
from torch import Tensor

from moe.attention import RMSNorm
from moe_cpu.norm import rms_norm

pytestmark = NEEDS_COMPILER

SHAPES = [(1, 1), (3, 7), (2, 5, 16), (63, 24), (65, 257), (130, 64), (0, 8)]


def both(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of x and the weight: ours, and torch's in float64."""
    results = []
    for function, dtype in ((rms_norm, torch.float32), (None, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        if function is None:
            y = torch.nn.functional.rms_norm(leaves[0], weight.shape, leaves[1], eps)
        else:
            y = function(*leaves, eps)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    return results[0], results[1]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_values_and_gradients_are_torchs(shape):
    x, weight, dy = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    for a, b in zip(*both(x, weight, 1e-5, dy), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_rows_by_hand():
    """Mean squares 12.5 and 0: the second row is zeros whatever eps."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    y = rms_norm(x, torch.tensor([1.0, 2.0]), 12.5)
    assert y.tolist() == [[pytest.approx(0.6), pytest.approx(1.6)], [0.0, 0.0]]


def test_extremes():
    """Large and small rows, and NaN in its own row only."""
    x, weight = torch.randn(4, 40), torch.randn(40)
    x[0] *= 1e15
    x[1] *= 1e-15
    for a, b in zip(*both(x, weight, 1e-30, torch.randn(4, 40)), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    x[2, 5] = float("nan")
    y = rms_norm(x, weight, 1e-30)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3]].isnan().any()


def test_any_strides():
    x, weight, dy = (
        torch.randn(30, 20, 10).transpose(0, 2),
        torch.randn(60)[::2],
        torch.randn(10, 1, 30).expand(10, 20, 30),
    )
    for a, b in zip(*both(x, weight, 1e-5, dy), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_threads_change_no_bit():
    x, weight, dy, threads = torch.randn(300, 48), torch.randn(48), torch.randn(300, 48), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both(x, weight, 1e-5, dy)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_cpu.rms_norm.default, (x, weight, 1e-5))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), r"\[4\] for \[2, 3\]"),
        (torch.ones(2, 3), torch.ones(3, 1), "a weight"),
        (torch.ones(2, 3).bfloat16(), torch.ones(3), "bfloat16"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), "meta"),
    ],
    ids=("sizes", "dimensions", "type", "device"),
)
def test_what_does_not_fit_is_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_norm_with_it_is_the_same(dtype):
    norm, x = RMSNorm(32, 1e-6), torch.randn(4, 6, 32, dtype=dtype)
    expected = norm(x)
    norm.compiled = True
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.transpose(0, 1)), expected.transpose(0, 1))
    assert ("moe_cpu" in str(norm(x).grad_fn)) == (dtype == torch.float32)
