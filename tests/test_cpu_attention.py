"""The compiled causal attention against torch's in float64: values and all gradients, on awkward sizes, strides and scores."""

from dataclasses import replace

import pytest
import torch
from compiler import NEEDS_COMPILER
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe.attention import GroupedQuery, Latent, RotaryEmbedding, attention_mask, rotate
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


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor, first: Tensor | None = None, sink: Tensor | None = None
) -> list[Tensor]:
    """Output and gradients in float64, by torch's softmax and products. Its fused kernel makes NaN of a negative scale."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *(() if sink is None else (sink,)))]
    (B, N, S, _), groups = q.shape, q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in leaves[1:3])
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1).view(1, 1, S, S)
    if first is not None:
        hidden = hidden | (torch.arange(S) < first.unsqueeze(2)).unsqueeze(1)
    scores = (leaves[0] @ keys.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, leaves[3].view(1, N, 1, 1).expand(B, N, S, 1)), dim=3)
    out = scores.softmax(-1)[..., :S] @ values
    return [out, *torch.autograd.grad(out, leaves, grad.double())]


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


def window_of(size: int, S: int) -> Tensor:
    return (torch.arange(S) - size + 1).clamp(min=0).unsqueeze(0).int()


def documents_of(seed: int, B: int, S: int, longest: int) -> Tensor:
    """First positions of documents of drawn lengths, one row of the batch unlike the other."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(B):
        lengths = torch.randint(1, longest + 1, (S,), generator=generator)
        begins = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        rows.append(begins[(torch.searchsorted(begins, torch.arange(S), right=True) - 1)])
    return torch.stack(rows).int()


FIRST_KEYS = {
    "all": lambda B, S: torch.zeros(1, S, dtype=torch.int32),
    "own": lambda B, S: torch.arange(S, dtype=torch.int32).expand(B, S),
    "window of 5": lambda B, S: window_of(5, S),
    "window of 130": lambda B, S: window_of(130, S),
    "window of 700": lambda B, S: window_of(700, S),
    "short documents": lambda B, S: documents_of(1, B, S, 9),
    "documents": lambda B, S: documents_of(2, B, S, 200),
    "long documents": lambda B, S: documents_of(3, B, S, 900),
    "both": lambda B, S: torch.maximum(documents_of(4, B, S, 300), window_of(64, S)),
    "the last alone": lambda B, S: torch.cat((torch.zeros(1, S - 1), torch.full((1, 1), S - 1)), 1).int(),
}


@pytest.mark.parametrize("kind", FIRST_KEYS)
@pytest.mark.parametrize(
    "size", [(2, 2, 1, 13, 8, 8), (2, 4, 2, 200, 24, 17), (2, 2, 2, 1100, 16, 16), (9, 1, 1, 300, 8, 8)], ids=str
)
def test_rows_see_from_their_first_key_on(size, kind):
    q, k, v = inputs(*size)
    first = FIRST_KEYS[kind](size[0], size[3])
    grad = torch.randn(*q.shape[:3], v.shape[3])
    out = causal_attention(q, k, v, 0.4, first_BS=first)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(found, plain(q, k, v, 0.4, grad, first), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=4e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("kind", ["all", "documents", "window of 5"])
@pytest.mark.parametrize("height", [0.0, 3.0, -200.0, 200.0])
def test_sinks_take_weight_and_have_a_gradient(kind, height):
    q, k, v = inputs(2, 4, 2, 600, 16, 16)
    sink, first = (torch.randn(4) + height).requires_grad_(), FIRST_KEYS[kind](2, 600)
    grad = torch.randn(q.shape)
    out = causal_attention(q, k, v, 0.4, first_BS=first, sink_N=sink)
    found = [out, *torch.autograd.grad(out, (q, k, v, sink), grad)]
    for a, b in zip(found, plain(q, k, v, 0.4, grad, first, sink), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=4e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_large_scores_before_and_after_a_window(factor):
    """A row that has seen nothing of a chunk has no largest score yet, however small the next ones are."""
    q, k, v = inputs(1, 1, 1, 1200, 16, 16)
    grad, first = torch.randn(q.shape), documents_of(5, 1, 1200, 800)
    out = causal_attention(q, k, v, factor, first_BS=first)
    bound = torch.finfo().eps * ((q @ k.transpose(2, 3) * factor).abs().max() + 4)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(found, plain(q, k, v, factor, grad, first), strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= bound * b.norm() + 1e-30


def test_documents_are_as_if_each_were_alone():
    q, k, v = inputs(1, 2, 1, 400, 16, 16)
    first, grad = torch.tensor([[0] * 150 + [150] * 250], dtype=torch.int32), torch.randn(q.shape)
    out = causal_attention(q, k, v, 0.3, first_BS=first)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    parts = []
    for rows in (slice(0, 150), slice(150, 400)):
        alone = [x[:, :, rows].detach().requires_grad_() for x in (q, k, v)]
        parts.append(ours(*alone, 0.3, grad[:, :, rows]))
    for a, *b in zip(found, *parts, strict=True):
        torch.testing.assert_close(a, torch.cat(b, dim=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [[0, 0, 3], [0, 1, 0], [0, -1, 0]], ids=str)
def test_first_keys_out_of_order_are_refused(first):
    q = torch.ones(1, 1, 3, 8)
    with pytest.raises(ValueError, match="not be after their row's position, nor before"):
        causal_attention(q, q, q, 1.0, first_BS=torch.tensor([first], dtype=torch.int32))


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
@pytest.mark.parametrize("kind", ["all", "documents"])
def test_threads_change_no_bit(sharing, kind):
    N, M = sharing
    q, k, v = inputs(1, N, M, 300, 16, 16)
    grad, threads, results = torch.randn(q.shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = causal_attention(q, k, v, 0.25, first_BS=FIRST_KEYS[kind](1, 300))
            results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
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


@pytest.mark.parametrize("sink", [False, True])
def test_a_row_whose_scores_are_all_minus_infinity(sink):
    """0 / 0 without a sink, as in torch's softmax; a sink has all of the weight, on a value of zero."""
    q, k, v = (x.detach() for x in inputs(1, 1, 1, 40, 8, 8))
    q[0, 0, 7] = torch.full((8,), -3e38)
    k[0, 0] = k[0, 0].abs() + 10
    first = torch.arange(40, dtype=torch.int32).view(1, 40)
    out = causal_attention(q, k, v, 1.0, first_BS=first, sink_N=torch.zeros(1) if sink else None)
    assert (out[0, 0, 7] == 0).all() if sink else out[0, 0, 7].isnan().all()
    others = torch.arange(40) != 7
    assert out[0, 0, others].isfinite().all()


def test_opcheck_and_compile():
    q, k, v = inputs(2, 4, 2, 20, 8, 8)
    angle = torch.randn(20, 4)
    operator = torch.ops.moe_cpu.causal_attention.default
    torch.library.opcheck(operator, (q, k, v, 0.5, None, None, None, None))
    sink = torch.randn(4, requires_grad=True)
    torch.library.opcheck(operator, (q, k, v, 0.5, angle.cos(), angle.sin(), window_of(3, 20), sink))
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"first_BS": torch.zeros(1, 3)}, "int32 on the CPU, not torch.float32"),
        ({"first_BS": torch.zeros(1, 4, dtype=torch.int32)}, r"3 positions in 1 or 1 rows, not \[1, 4\]"),
        ({"first_BS": torch.zeros(2, 3, dtype=torch.int32)}, r"in 1 or 1 rows, not \[2, 3\]"),
        ({"sink_N": torch.zeros(3)}, r"sinks of 2 query heads next to one another, not \[3\]"),
        ({"sink_N": torch.zeros(2, dtype=torch.float64)}, "float64"),
    ],
    ids=str,
)
def test_masks_and_sinks_that_do_not_fit_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(X, X, X, 1.0, **more)


GQA = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
CONFIGS = {
    "grouped": GQA,
    "sinks": replace(GQA, sinks=True),
    "latent": LatentAttention(num_heads=4, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=12),
}


@pytest.mark.parametrize("documents", [False, True], ids=("plain", "documents"))
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_models_attention_with_it_is_the_same(kind, documents, monkeypatch):
    calls = []
    counted = lambda *given, **named: (calls.append(given), causal_attention(*given, **named))[1]  # noqa: E731
    monkeypatch.setattr("moe.attention.causal_attention", counted)
    model = Model(vocab_size=64, num_layers=1, ffn_hidden=32, dim=32, attention=CONFIGS[kind])
    attention = (Latent if kind == "latent" else GroupedQuery)(CONFIGS[kind], model)
    if kind == "sinks":
        torch.nn.init.normal_(attention.sink_N)
    x, position = torch.randn(2, 30, 32, requires_grad=True), torch.arange(30)
    document = (position + 5 >= torch.tensor([[9], [20]])).long() if documents else None
    mask = attention_mask(position, document, 7 if documents else 0, bools=False)
    cos_sin = RotaryEmbedding(model.rotary, 8)(position)
    results = []
    for compiled in (False, True):
        attention.compiled = compiled
        out = attention(x, cos_sin, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *attention.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1
