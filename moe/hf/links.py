"""Which numbers of our model are which numbers of a family's files: views on both sides, copied one into the other.

A family's tensor is one or several of ours, or a slice, transposed or with its rows in another order. `Link` describes each
as two views of equal shape; copying from one to the other, either way, is all of the conversion. The links of a model cover
every element of its parameters and of the family's tensors exactly once (tests/test_hf.py counts them).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, is_moe_layer

View = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Link:
    """Part of a family's tensor, and the part of ours that holds the same numbers; the views have one shape."""

    ours: str
    """Our parameter's or buffer's name."""
    our_view: View = whole
    their_view: View = whole


@dataclass(frozen=True)
class Constant:
    """Part of a family's tensor for which we have no parameter, and the one value that stands for its absence."""

    value: float
    their_view: View = whole


@dataclass(frozen=True)
class Entry:
    """One tensor of a family's files."""

    name: str
    shape: tuple[int, ...]
    links: tuple[Link, ...]
    constants: tuple[Constant, ...] = ()
    exact: bool = False
    """Whether it is stored in float32 whatever the others are in: a rounded selection bias chooses other experts."""


@dataclass(frozen=True)
class Names:
    """How a family names what families disagree about."""

    moe: str = "mlp"
    """The expert layer's module within a block."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"
    selection_bias: bool = False
    """Whether the router carries a bias that only selects (DeepSeek-V3)."""
    rotary_pairs: bool = True
    """Whether latent attention rotates neighbours (0, 1), (2, 3), ...; otherwise halves, as we do (rope_interleave=false)."""
    gpt_oss: bool = False
    """gpt-oss's layout: a router with a bias, and experts stacked as we stack them, gate and up columns in turn, with biases."""


def entries(model: Model, names: Names, *, fused: bool = False) -> Iterator[Entry]:
    """The family's tensors in the order of its files. `fused`: gate and up of all experts in one tensor, down in another."""
    V, D = model.vocab_size, model.dim
    yield _same("model.embed_tokens.weight", "embedding.weight", V, D)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield _same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", D)
        yield from _attention(model, f"{ours}.attention", f"{theirs}.self_attn", names.rotary_pairs)
        yield _same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", D)
        if is_moe_layer(model, layer):
            yield from _experts(model, f"{ours}.moe", f"{theirs}.{names.moe}", names, fused)
        else:
            F = model.ffn_hidden_per_layer[layer] if model.ffn_hidden_per_layer else model.ffn_hidden
            yield from _swiglu(f"{ours}.ffn", f"{theirs}.mlp", D, F)
    yield _same("model.norm.weight", "norm.weight", D)
    if not model.tied_head:
        yield _same("lm_head.weight", "head.weight", V, D)


def _same(theirs: str, ours: str, *shape: int) -> Entry:
    return Entry(theirs, shape, (Link(ours),))


def _attention(model: Model, ours: str, theirs: str, rotary_pairs: bool) -> Iterator[Entry]:
    attention, D = model.attention, model.dim
    if isinstance(attention, LatentAttention):
        yield from _latent(attention, D, ours, theirs, rotary_pairs)
        return
    H = attention.head_dim
    for name, their_name, heads in (
        ("query", "q_proj", attention.num_heads),
        ("key", "k_proj", attention.num_kv_heads),
        ("value", "v_proj", attention.num_kv_heads),
    ):
        yield _same(f"{theirs}.{their_name}.weight", f"{ours}.{name}.weight", heads * H, D)
        if attention.qkv_bias:
            yield _same(f"{theirs}.{their_name}.bias", f"{ours}.{name}.bias", heads * H)
    yield _same(f"{theirs}.o_proj.weight", f"{ours}.out.weight", D, attention.num_heads * H)
    if attention.out_bias:
        yield _same(f"{theirs}.o_proj.bias", f"{ours}.out.bias", D)
    if attention.sinks:
        yield _same(f"{theirs}.sinks", f"{ours}.sink_N", attention.num_heads)
    if attention.qk_norm != "none":
        for name, their_name, heads in _norms(attention):
            yield _same(f"{theirs}.{their_name}.weight", f"{ours}.{name}.weight", heads * H)


def _norms(attention: GroupedQueryAttention) -> tuple[tuple[str, str, int], ...]:
    full = attention.qk_norm == "full"
    query, key = (attention.num_heads, attention.num_kv_heads) if full else (1, 1)
    return (("query_norm", "q_norm", query), ("key_norm", "k_norm", key))


def _pairs(tensor: Tensor, dim: int) -> Tensor:
    """Neighbours (0, 1), (2, 3), ... of a dimension of R rows as [2, R/2]."""
    return tensor.unflatten(dim, (-1, 2)).transpose(dim, dim + 1)


def _halves(tensor: Tensor, dim: int) -> Tensor:
    """The two halves of a dimension of R rows as [2, R/2]."""
    return tensor.unflatten(dim, (2, -1))


def _latent(attention: LatentAttention, D: int, ours: str, theirs: str, rotary_pairs: bool) -> Iterator[Entry]:
    """Where DeepSeek rotates neighbours and we rotate halves, the rotary rows change places."""
    N, R = attention.num_heads, attention.rope_dim
    head = attention.nope_dim + R
    their_rows = _pairs if rotary_pairs else _halves
    if attention.q_rank:
        yield _same(f"{theirs}.q_a_proj.weight", f"{ours}.query_down.weight", attention.q_rank, D)
        if attention.bias:
            yield _same(f"{theirs}.q_a_proj.bias", f"{ours}.query_down.bias", attention.q_rank)
        yield _same(f"{theirs}.q_a_layernorm.weight", f"{ours}.query_norm.weight", attention.q_rank)
    width = attention.q_rank or D

    def plain(tensor: Tensor) -> Tensor:
        return tensor.view(N, head, width)[:, : attention.nope_dim]

    def our_halves(tensor: Tensor) -> Tensor:
        return _halves(tensor.view(N, head, width)[:, attention.nope_dim :], 1)

    def their_view(tensor: Tensor) -> Tensor:
        return their_rows(tensor.view(N, head, width)[:, attention.nope_dim :], 1)

    query = f"{ours}.query.weight"
    yield Entry(
        f"{theirs}.{'q_b_proj' if attention.q_rank else 'q_proj'}.weight",
        (N * head, width),
        (Link(query, plain, plain), Link(query, our_halves, their_view)),
    )
    K = attention.kv_rank
    for kind, shape in (("weight", (K + R, D)), ("bias", (K + R,))):
        if kind == "weight" or attention.bias:
            down = f"{ours}.kv_down.{kind}"
            latent = Link(down, lambda t: t[:K], lambda t: t[:K])
            rotary = Link(down, lambda t: _halves(t[K:], 0), lambda t: their_rows(t[K:], 0))
            yield Entry(f"{theirs}.kv_a_proj_with_mqa.{kind}", shape, (latent, rotary))
    yield _same(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", K)
    kv_rows = N * (attention.nope_dim + attention.value_dim)
    yield _same(f"{theirs}.kv_b_proj.weight", f"{ours}.kv.weight", kv_rows, K)
    yield _same(f"{theirs}.o_proj.weight", f"{ours}.out.weight", D, N * attention.value_dim)
    if attention.bias:
        yield _same(f"{theirs}.o_proj.bias", f"{ours}.out.bias", D)


def _swiglu(ours: str, theirs: str, D: int, F: int) -> Iterator[Entry]:
    yield _same(f"{theirs}.gate_proj.weight", f"{ours}.gate.weight", F, D)
    yield _same(f"{theirs}.up_proj.weight", f"{ours}.up.weight", F, D)
    yield _same(f"{theirs}.down_proj.weight", f"{ours}.down.weight", D, F)


def _experts(model: Model, ours: str, theirs: str, names: Names, fused: bool) -> Iterator[Entry]:
    moe, D = model.moe, model.dim
    assert moe is not None
    E, F = moe.num_experts, moe.expert_hidden
    if names.gpt_oss:
        yield from _gpt_oss(ours, theirs, E, D, F, moe)
        return
    yield _same(f"{theirs}.gate.weight", f"{ours}.router.weight_ED", E, D)
    if names.selection_bias:
        yield Entry(f"{theirs}.gate.e_score_correction_bias", (E,), (Link(f"{ours}.router.bias_E"),), exact=True)
    gate, up, down = (f"{ours}.experts.{name}" for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
    if fused:
        halves = (
            Link(gate, _transposed, lambda t: t[:, :F]),
            Link(up, _transposed, lambda t: t[:, F:]),
        )
        yield Entry(f"{theirs}.experts.gate_up_proj", (E, 2 * F, D), halves)
        yield Entry(f"{theirs}.experts.down_proj", (E, D, F), (Link(down, _transposed),))
    else:
        for e in range(E):
            place = f"{theirs}.experts.{e}"
            yield Entry(f"{place}.{names.gate}.weight", (F, D), (Link(gate, _expert(e)),))
            yield Entry(f"{place}.{names.up}.weight", (F, D), (Link(up, _expert(e)),))
            yield Entry(f"{place}.{names.down}.weight", (D, F), (Link(down, _expert(e)),))
    if moe.shared_hidden:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.{names.shared}", D, moe.shared_hidden)
        if moe.shared_gate:
            yield _same(f"{theirs}.{names.shared}_gate.weight", f"{ours}.shared_gate.weight", 1, D)


def _gpt_oss(ours: str, theirs: str, E: int, D: int, F: int, moe: MoE) -> Iterator[Entry]:
    """Where we have no biases theirs are constant: 0, and -1 on up for SwiGLU, since up + 1 multiplies the gate there."""
    yield _same(f"{theirs}.router.weight", f"{ours}.router.weight_ED", E, D)
    yield _same(f"{theirs}.router.bias", f"{ours}.router.logit_bias_E", E)
    gate, up, down = (f"{ours}.experts.{name}" for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
    turns = (Link(gate, whole, _even), Link(up, whole, _odd))
    yield Entry(f"{theirs}.experts.gate_up_proj", (E, D, 2 * F), turns)
    b_gate, b_up, b_down = (f"{ours}.experts.{name}" for name in ("b_gate_EF", "b_up_EF", "b_down_ED"))
    first, second = f"{theirs}.experts.gate_up_proj_bias", f"{theirs}.experts.down_proj_bias"
    if moe.expert_bias:
        yield Entry(first, (E, 2 * F), (Link(b_gate, whole, _even), Link(b_up, whole, _odd)))
    else:
        on_up = -1.0 if moe.activation == "swiglu" else 0.0
        yield Entry(first, (E, 2 * F), (), (Constant(0.0, _even), Constant(on_up, _odd)))
    yield _same(f"{theirs}.experts.down_proj", down, E, F, D)
    links, constants = ((Link(b_down),), ()) if moe.expert_bias else ((), (Constant(0.0),))
    yield Entry(second, (E, D), links, constants)


def _even(tensor: Tensor) -> Tensor:
    return tensor[..., 0::2]


def _odd(tensor: Tensor) -> Tensor:
    return tensor[..., 1::2]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def _expert(index: int) -> View:
    return lambda tensor: tensor[index].t()
