"""The compiled causal attention against torch's in float64: values and all gradients, on awkward sizes, strides and scores."""

import pytest
import torch
from compiler import NEEDS_COMPILER
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe.attention import GroupedQuery, Latent, RotaryEmbedding, rotate
from moe.config.schema import GroupedQueryAttention, LatentAttention, Model
from moe_cpu.attention import causal_attention

pytestmark = NEEDS_COMPILER

# B, N, M, S, D, V
SIZES = [
    (1, 1, 1, 1, 8, 8),
    (3, 2, 2, 2, 8, 8),
    (2, 4, 2, 13, 24, 24),
    (1, 2, 1, 96, 64, 64),
    (2, 3, 3, 97, 64, 64),
    (4, 8, 4, 100, 80, 80),
    (1, 4, 1, 513, 64, 64),
    (1, 1, 1, 520, 128, 128),
    (1, 2, 2, 1030, 8, 24),
    (2, 6, 2, 50, 17, 5),
    (1, 2, 2, 12, 192, 128),
    (1, 1, 1, 1, 1, 1),
]


def inputs(B: int, N: int, M: int, S: int, D: int, V: int) -> list[Tensor]:
    """q, k and v, stored as [B, S, heads, elements] like a model's."""
    generator = torch.Generator().manual_seed(S)
    shapes = ((B, S, N, D), (B, S, M, D), (B, S, M, V))
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor, dtype=torch.float64) -> list[Tensor]:
    """Output and gradients by torch's softmax and products. Its fused kernel makes NaN of a negative scale."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in leaves[1:])
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (leaves[0] @ keys.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ values
    return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor) -> list[Tensor]:
    out = causal_attention(q, k, v, scale)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values_and_gradients_are_torchs(size):
    q, k, v = inputs(*size)
    grad = torch.randn(*q.shape[:3], v.shape[3])
    scale = q.shape[3] ** -0.5
    for a, b in zip(ours(q, k, v, scale, grad), plain(q, k, v, scale, grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(
    "size", [(2, 4, 2, 13, 24, 24, 24), (1, 2, 1, 97, 64, 32, 40), (9, 1, 1, 200, 8, 8, 2)], ids=str
)
def test_rotary_embedding_inside_is_the_one_outside(size):
    *size, rotated = size
    q, k, v = inputs(*size)
    grad, angle = torch.randn(*q.shape[:3], v.shape[3]), torch.randn(q.shape[2], rotated)
    cos_sin = angle.cos(), angle.sin()
    out = causal_attention(q, k, v, 0.3, cos_sin)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    turned = [*(rotate(x, cos_sin) for x in wide[:2]), wide[2]]
    expected = scaled_dot_product_attention(*turned, is_causal=True, scale=0.3, enable_gqa=True)
    expected = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * max(1.0, b.abs().max().item()))


def test_a_row_by_hand():
    """Equal scores: the mean of the values so far."""
    q, k = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    v = torch.tensor([3.0, 5.0, 10.0]).view(1, 1, 3, 1)
    assert causal_attention(q, k, v, 1.0).flatten().tolist() == [3.0, 4.0, 6.0]


def test_any_strides_and_expanded_gradients():
    q, k, v = inputs(2, 4, 2, 101, 16, 16)
    expected = ours(q, k, v, 0.3, torch.ones(2, 4, 101, 16))
    turned = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k, v)]
    shifted = [torch.cat((x, x), 3).detach()[..., 3:19] for x in (q, k, v)]
    shifted = [torch.cat((x[..., 13:], x[..., :13]), 3) for x in shifted]
    wider = [torch.stack((x, x, x), 2).detach()[:, :, 1].requires_grad_() for x in shifted]
    for variant in (turned, wider):
        out = causal_attention(*variant, 0.3)
        found = [out, *torch.autograd.grad(out.sum(), variant)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sharing", [(1, 1), (8, 4), (20, 20)], ids=("one head", "shared key heads", "many heads"))
def test_threads_change_no_bit(sharing):
    N, M = sharing
    q, k, v = inputs(1, N, M, 300, 16, 16)
    grad, threads, results = torch.randn(q.shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ours(q, k, v, 0.25, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("factor", [1e3, -1e3, 1e-30])
def test_scores_of_any_size(factor):
    """Nothing overflows. Backward has weights from a log-sum-exp as large as the scores: its rounding is theirs."""
    q, k, v = inputs(1, 2, 2, 550, 16, 16)
    grad = torch.randn(q.shape)
    largest = (q @ k.transpose(2, 3) * factor).abs().max()
    bound = torch.finfo().eps * (largest + 4)
    for a, b in zip(ours(q, k, v, factor, grad), plain(q, k, v, factor, grad), strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= bound * b.norm() + 1e-30


def test_nan_reaches_every_later_row_and_its_gradients():
    for which in range(3):
        tensors = [x.detach().clone() for x in inputs(1, 1, 1, 600, 16, 16)]
        tensors[which][0, 0, 50, 3] = float("nan")
        for x in tensors:
            x.requires_grad_()
        out, dq, dk, dv = ours(*tensors, 0.25, torch.ones(1, 1, 600, 16))
        rows = slice(50, 51) if which == 0 else slice(50, None)
        assert out[0, 0, rows].isnan().any(1).all()
        assert not out[0, 0, :36].isnan().any()
        assert dq[0, 0, rows].isnan().any(1).all()
        assert (dk if which else dv)[0, 0, :51].isnan().any()


def test_opcheck_and_compile():
    q, k, v = inputs(2, 4, 2, 20, 8, 8)
    angle = torch.randn(20, 4)
    torch.library.opcheck(torch.ops.moe_cpu.causal_attention.default, (q, k, v, 0.5, None, None))
    torch.library.opcheck(torch.ops.moe_cpu.causal_attention.default, (q, k, v, 0.5, angle.cos(), angle.sin()))
    grad = torch.randn(q.shape)

    def step(q, k, v):
        return causal_attention(q, k, v, 0.5).transpose(1, 2).flatten(2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    found = torch.autograd.grad(compiled, (q, k, v), grad.transpose(1, 2).flatten(2))
    expected = ours(q, k, v, 0.5, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


def test_heads_are_put_together_without_a_copy():
    out = causal_attention(*inputs(2, 4, 2, 20, 8, 8), 0.5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("empty", [0, 2])
def test_nothing_in_nothing_out(empty):
    shape = [2, 2, 3, 8]
    shape[empty] = 0
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out = causal_attention(q, k, v, 1.0)
    assert out.shape == q.shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3


X, ANGLES = torch.ones(1, 2, 3, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("tensors", "angles", "message"),
    [
        ((X.double(), X, X), None, "float64"),
        ((X, X.to("meta"), X), None, "meta"),
        ((X, X[0], X), None, r"\[B, N, S, D\], not"),
        ((X, X[:, :, :2], X), None, "not those of queries"),
        ((X, X, X[..., :2, :]), None, "not those of queries"),
        ((torch.ones(1, 3, 3, 8), X, X), None, "3 query heads cannot share 2"),
        ((torch.ones(1, 2, 3, 300),) * 3, None, "1 to 256 elements, not 300"),
        ((X, X, X), (ANGLES[:2], ANGLES[:2]), "angles of 3 positions"),
        ((X, X, X), (ANGLES, ANGLES[:, :2]), "angles of 3 positions"),
        ((X, X, X), (torch.ones(3, 10),) * 2, "up to 8"),
        ((X, X, X), (torch.ones(3, 3),) * 2, "even number"),
        ((X, X, X), (ANGLES.bfloat16(),) * 2, "bfloat16"),
        ((X, X, X), (ANGLES.clone().requires_grad_(), ANGLES), "no gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(tensors, angles, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(*tensors, 1.0, angles)


CONFIGS = {
    "grouped": GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    "latent": LatentAttention(num_heads=4, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=12),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_models_attention_with_it_is_the_same(kind, monkeypatch):
    calls = []
    counted = lambda *given: (calls.append(given), causal_attention(*given))[1]  # noqa: E731
    monkeypatch.setattr("moe.attention.causal_attention", counted)
    model = Model(vocab_size=64, num_layers=1, ffn_hidden=32, dim=32, attention=CONFIGS[kind])
    attention = (GroupedQuery if kind == "grouped" else Latent)(CONFIGS[kind], model)
    x = torch.randn(2, 30, 32, requires_grad=True)
    cos_sin = RotaryEmbedding(model.rotary, 8)(torch.arange(30))
    results = []
    for compiled in (False, True):
        attention.compiled = compiled
        out = attention(x, cos_sin, None)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *attention.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1
    attention(x, cos_sin, torch.ones(1, 1, 30, 30, dtype=torch.bool))
    assert len(calls) == 1
