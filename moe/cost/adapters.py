"""What low-rank adapters add to a model: parameters, and products of theirs and of matrices that are frozen."""

from moe.config.schema import (
    GroupedQueryAttention,
    Model,
    expert_dim,
    ffn_hidden,
    is_moe_layer,
    layer_experts,
)

Shapes = list[tuple[int, int]]


def adapters(model: Model, layer: int) -> tuple[int, int, float]:
    """Parameters of a block's adapters, those that a token uses, and the weights that its vector is multiplied with.

    An adapter has rank·(in + out) of each. Those of experts count with the rows that a token sends, as if each row were
    multiplied with A and B; that they are added to whole matrices instead is work beyond the model's (`merging_flops`).
    """
    lora = model.lora
    if lora is None:
        return 0, 0, 0.0
    shapes: Shapes = []
    if "attention" in lora.targets:
        shapes += attention_shapes(model)
    if not is_moe_layer(model, layer):
        shapes += _swiglu(model.dim, ffn_hidden(model, layer)) if "ffn" in lora.targets else []
        count = _count(lora.rank, shapes)
        return count, count, count
    moe = layer_experts(model, layer)
    shapes += _swiglu(model.dim, moe.shared_hidden) if "shared" in lora.targets else []
    always = _count(lora.rank, shapes)
    if "experts" not in lora.targets:
        return always, always, always
    each = _count(lora.rank, _swiglu(expert_dim(model), moe.expert_hidden))
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    return always + each * moe.num_experts, always + each * moe.top_k, always + each * rows


def attention_shapes(model: Model) -> Shapes:
    """(in, out) of every matrix of attention."""
    attention, D = model.attention, model.dim
    if isinstance(attention, GroupedQueryAttention):
        H = attention.head_dim
        keys = (D, attention.num_kv_heads * H)
        return [(D, attention.num_heads * H), keys, keys, (attention.num_heads * H, D)]
    N, rank = attention.num_heads, attention.kv_rank
    query = N * (attention.nope_dim + attention.rope_dim)
    queries = [(D, attention.q_rank), (attention.q_rank, query)] if attention.q_rank else [(D, query)]
    keys_values = [(D, rank + attention.rope_dim), (rank, N * (attention.nope_dim + attention.value_dim))]
    return [*queries, *keys_values, (N * attention.value_dim, D)]


def _swiglu(dim: int, hidden: int) -> Shapes:
    return [(dim, hidden), (dim, hidden), (hidden, dim)] if hidden else []


def _count(rank: int, shapes: Shapes) -> int:
    return sum(rank * (inner + outer) for inner, outer in shapes)
