"""Parameters and floating-point operations of a model, per component and per layer.

FLOPs are those of matrix products, 2·m·n·k each; norms, rotary embedding, softmax, activations, gate weights, losses
and the optimizer are elementwise and not counted. This is what `torch.utils.flop_counter.FlopCounterMode` sees when
attention runs on SDPA's math backend, where query-key and value products are S×S per head, causal or not. (Of the
scores the counter sees nothing in the fused CPU kernel, and 3.5 instead of 3 times the forward in fused GPU kernels,
which recompute them.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from moe.config.schema import (
    GroupedQueryAttention,
    LatentAttention,
    Model,
    expert_dim,
    expert_widths,
    ffn_hidden,
    is_moe_layer,
    layer_experts,
)
from moe.cost.adapters import adapters

Number = TypeVar("Number", int, float)


class Part(NamedTuple):
    """One component of a block, or of what surrounds the blocks."""

    component: str
    """embedding, norm, attention, ffn, router, experts, latent, shared, lora or head."""
    total: int
    """Parameters."""
    active: int
    """Parameters that a token uses: K of the E experts (of mean width, where they differ), everything else whole."""
    multiplied: float
    """Weights that a token's vector is multiplied with; 2 FLOPs each."""


@dataclass(frozen=True)
class Parameters:
    """Counts of learned numbers; a router's state (selection biases) is no parameter."""

    total: int
    active: int
    """Embedding, head and shared expert whole, K of E routed experts; where their widths differ, the expectation under
    uniform routing, K·Σ widths / E, rounded."""
    components: dict[str, int]
    """Total by component."""
    active_components: dict[str, int]
    """Active by component."""
    layers: tuple[dict[str, int], ...]
    """Total by component, of each block."""


def moe_layers(model: Model) -> tuple[int, ...]:
    """Indices of the blocks that have experts."""
    return tuple(layer for layer in range(model.num_layers) if is_moe_layer(model, layer))


def parameters(model: Model) -> Parameters:
    """Count a model's parameters; equal to those of the built model and of transformers' models of the same config."""
    blocks = [_block(model, layer) for layer in range(model.num_layers)]
    parts = [part for block in blocks for part in block] + _around(model)
    return Parameters(
        total=sum(part.total for part in parts),
        active=sum(part.active for part in parts),
        components=_sum((part.component, part.total) for part in parts),
        active_components=_sum((part.component, part.active) for part in parts),
        layers=tuple(_sum((part.component, part.total) for part in block) for block in blocks),
    )


def forward_flops_per_token(model: Model, sequence_length: int, *, causal_half: bool = False) -> float:
    """FLOPs of a forward pass with loss, over S tokens, divided by S.

    Routed experts count with the router's expected rows per token, spread evenly where widths differ (what a run really
    routed: `moe.analysis.summaries.measured_flops`). With `causal_half`, scores count only the pairs that
    the causal mask and the windows leave, about half of S×S (documents packed into one row are not told apart).
    """
    return sum(flops_by_component(model, sequence_length, causal_half=causal_half).values())


def train_flops_per_token(model: Model, sequence_length: int, *, causal_half: bool = False) -> float:
    """FLOPs of forward and backward per token: three times the forward.

    Each product has two in its backward, for its input and for its weights (or other input); the first block's input
    needs its gradient too, for the embedding. Recomputation (checkpointing, fused attention) is not counted. Beside
    adapters, whose base is frozen, only they and the scores have two; the others' weights need no gradient.
    """
    parts = flops_by_component(model, sequence_length, causal_half=causal_half)
    if model.lora is None:
        return 3 * sum(parts.values())
    return 2 * sum(parts.values()) + parts["scores"] + parts.get("lora", 0.0)


def flops_by_component(model: Model, sequence_length: int, *, causal_half: bool = False) -> dict[str, float]:
    """Forward FLOPs per token of those of attention, scores, ffn, router, experts, latent, shared, lora and head that there are."""
    per_layer = flops_by_layer(model, sequence_length, causal_half=causal_half)
    around = [(part.component, 2 * part.multiplied) for part in _around(model) if part.multiplied]
    return _sum([pair for layer in per_layer for pair in layer.items()] + around)


def flops_by_layer(model: Model, sequence_length: int, *, causal_half: bool = False) -> tuple[dict[str, float], ...]:
    """Forward FLOPs per token by component, of each block."""
    return tuple(
        {
            **_sum((part.component, 2 * part.multiplied) for part in _block(model, layer) if part.multiplied),
            "scores": _score_flops(model, layer, sequence_length, causal_half),
        }
        for layer in range(model.num_layers)
    )


def vectors_by_layer(model: Model) -> tuple[int, ...]:
    """Parameters in vectors (norms, biases, sinks) of each block."""
    kinds = ("norm", "attention")
    blocks = [_block(model, layer) for layer in range(model.num_layers)]
    return tuple(
        sum(part.total - int(part.multiplied) for part in block if part.component in kinds) for block in blocks
    )


def expert_biases(model: Model, layer: int) -> int:
    """Parameters in the biases of block `layer`'s routed experts."""
    if not is_moe_layer(model, layer):
        return 0
    moe = layer_experts(model, layer)
    return moe.expert_bias * (2 * sum(expert_widths(moe)) + moe.num_experts * expert_dim(model))


def _around(model: Model) -> list[Part]:
    embedding = model.vocab_size * model.dim
    head = 0 if model.tied_head else embedding
    return [
        Part("embedding", embedding, embedding, 0),
        Part("norm", model.dim, model.dim, 0),
        Part("head", head, head, embedding),
    ]


def _block(model: Model, layer: int) -> list[Part]:
    total, active, multiplied = adapters(model, layer)
    return [*_base(model, layer), *([Part("lora", total, active, multiplied)] if total else [])]


def _base(model: Model, layer: int) -> list[Part]:
    norms = Part("norm", 2 * model.dim, 2 * model.dim, 0)
    if not is_moe_layer(model, layer):
        return [norms, _attention(model), _swiglu("ffn", model.dim, ffn_hidden(model, layer))]
    moe = layer_experts(model, layer)
    router = moe.router.parameters(dim=model.dim, num_experts=moe.num_experts, top_k=moe.top_k)
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    experts, biases = 3 * expert_dim(model) * sum(expert_widths(moe)), expert_biases(model, layer)
    parts = [
        norms,
        _attention(model),
        Part("router", router, router, router),
        Part(
            "experts",
            experts + biases,
            round(moe.top_k * (experts + biases) / moe.num_experts),
            rows * (experts / moe.num_experts),
        ),
    ]
    if moe.latent_dim:
        parts.append(Part("latent", *(2 * model.dim * moe.latent_dim,) * 3))
    if moe.shared_hidden:
        gate = model.dim if moe.shared_gate else 0
        parts.append(_swiglu("shared", model.dim, moe.shared_hidden, gate))
    return parts


def _swiglu(component: str, dim: int, hidden: int, extra: int = 0) -> Part:
    return Part(component, *(3 * dim * hidden + extra,) * 3)


def _attention(model: Model) -> Part:
    matrices, vectors = (
        _grouped_query(model.attention, model.dim)
        if isinstance(model.attention, GroupedQueryAttention)
        else _latent(model.attention, model.dim)
    )
    return Part("attention", matrices + vectors, matrices + vectors, matrices)


def _grouped_query(attention: GroupedQueryAttention, dim: int) -> tuple[int, int]:
    """Weights in matrices, and in vectors (biases, norms, sinks)."""
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    norms = {"none": 0, "head": 2 * attention.head_dim, "full": queries + keys}[attention.qk_norm]
    biases = attention.qkv_bias * (queries + 2 * keys) + attention.out_bias * dim
    return dim * (2 * queries + 2 * keys), norms + biases + attention.sinks * attention.num_heads


def _latent(attention: LatentAttention, dim: int) -> tuple[int, int]:
    """Weights in matrices, and in biases and the norms of the low-rank vectors (DeepSeek-V2, arXiv 2405.04434, appendix C)."""
    N, rank = attention.num_heads, attention.kv_rank
    queries = N * (attention.nope_dim + attention.rope_dim)
    query_matrices = (dim + queries) * attention.q_rank if attention.q_rank else dim * queries
    key_matrices = dim * (rank + attention.rope_dim) + rank * N * (attention.nope_dim + attention.value_dim)
    biases = attention.bias * (attention.q_rank + rank + attention.rope_dim + dim)
    return query_matrices + key_matrices + N * attention.value_dim * dim, attention.q_rank + rank + biases


def _score_flops(model: Model, layer: int, sequence_length: int, causal_half: bool) -> float:
    """FLOPs per token of queries times keys and of probabilities times values."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        window, extra = 0, 0
        sizes = attention.nope_dim + attention.rope_dim + attention.value_dim
    else:
        # A sink is one more key; queries, keys and values get eight more dimensions, of which one is used (moe/attention.py).
        window, extra = attention.windows[layer % len(attention.windows)], int(attention.sinks)
        sizes = 2 * (attention.head_dim + 8 * extra)
    keys = _keys_seen(sequence_length, window) if causal_half else sequence_length
    return 2 * (keys + extra) * attention.num_heads * sizes


def _keys_seen(sequence_length: int, window: int) -> float:
    """Mean over positions of the keys a token sees, itself included; window 0 means all before it."""
    S, w = sequence_length, min(window or sequence_length, sequence_length)
    return (w * (w + 1) / 2 + (S - w) * w) / S


def _sum(pairs: Iterable[tuple[str, Number]]) -> dict[str, Number]:
    """Add values by name, in the order of first appearance."""
    sums: dict[str, Number] = {}
    for name, value in pairs:
        sums[name] = sums[name] + value if name in sums else value
    return sums
