"""Bytes of a training step on one rank: what is held throughout, and what the forward pass keeps for backward.

An estimate to plan with, not a promise: it counts what this model's operators save, with fused attention, the norms
saving two float32 tensors (as on the CPU; a fused GPU norm saves one), experts by the rule in docs/architecture.md,
and no allocator or library overhead. `tests/test_cost.py` holds it to within 10 % of what autograd saves.
"""

import math

from moe.config.schema import (
    GroupedQueryAttention,
    LatentAttention,
    Model,
    MoE,
    Run,
    expert_widths,
    ffn_hidden,
    is_moe_layer,
)
from moe.cost.counting import parameters
from moe_triton.block_sizes import block_of, max_blocks

FLOAT32 = 4


def memory_bytes(run: Run) -> dict[str, int]:
    """Bytes per rank of a step of plain data parallelism, by purpose; their sum estimates the peak.

    parameters, gradients and optimizer (Adam's two averages) in float32; weight_casts: the copies of matrices that
    autograd keeps, in bfloat16 (or in the order in which `block_sparse` wants experts of one width); activations: what one
    micro-batch keeps for backward; masks: attention masks, for documents or windows; logits: log-probabilities and their
    gradient. With activation checkpointing only block inputs, routing choices and the largest block count. Experts keep
    x, both pre-activations of each routed row, and indices: D + 2·K·F elements per token. Where rows go is not known
    beforehand, so of experts of different widths F is the widest, and `block_sparse` keeps as many whole blocks as the
    fullest routing needs.
    """
    model, train = run.model, run.train
    counts = parameters(model)
    tokens = train.micro_rows * run.data.sequence_length
    size = 2 if train.precision == "bfloat16" else FLOAT32
    blocks = [_block_bytes(model, layer, size, tokens) for layer in range(model.num_layers)]
    casts = [_cast_bytes(model, layer, size) for layer in counts.layers]
    masks = [run.data.sequence_length * size if _masked(model, layer) else 0 for layer in range(model.num_layers)]
    around = _norm_bytes(model.dim, size)
    if train.activation_checkpointing:
        kept = [size * model.dim + _choice_bytes(model, layer) for layer in range(model.num_layers)]
        held, cast, mask = sum(kept) + max(blocks), max(casts), max(masks)
    else:
        held, cast, mask = sum(blocks), sum(casts), sum(masks)
    head_cast = 0 if size == FLOAT32 else size * model.vocab_size * model.dim
    return {
        "parameters": FLOAT32 * counts.total,
        "gradients": FLOAT32 * counts.total,
        "optimizer": 2 * FLOAT32 * counts.total,
        "weight_casts": cast + head_cast,
        "activations": round(tokens * (held + around)),
        "masks": tokens * mask,
        "logits": tokens * model.vocab_size * 2 * FLOAT32,
    }


def _masked(model: Model, layer: int) -> bool:
    """Whether the block passes an explicit mask, of which SDPA keeps a copy in the activations' type."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return model.document_mask
    return model.document_mask or attention.sinks or attention.windows[layer % len(attention.windows)] > 0


def _cast_bytes(model: Model, components: dict[str, int], size: int) -> int:
    """Bytes of the copies of one block's matrices that autograd keeps."""
    if size != FLOAT32:
        return size * sum(n for name, n in components.items() if name not in ("norm", "router"))
    moe = model.moe
    copies = moe is not None and moe.backend == "block_sparse" and len(set(expert_widths(moe))) == 1
    return size * 2 * components.get("experts", 0) // 3 if copies else 0


def _block_bytes(model: Model, layer: int, size: int, tokens: int) -> float:
    """Bytes per token that one block keeps for backward, masks apart, where a micro-batch has `tokens` of them."""
    kept = 2 * _norm_bytes(model.dim, size) + _attention_bytes(model.attention, size)
    if not is_moe_layer(model, layer):
        return kept + _swiglu_bytes(ffn_hidden(model, layer), size)
    moe = model.moe
    assert moe is not None
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    router_input = 0 if size == FLOAT32 else FLOAT32 * model.dim
    router = router_input + 2 * FLOAT32 * moe.num_experts + _choice_bytes(model, layer)
    shared = _swiglu_bytes(moe.shared_hidden, size) if moe.shared_hidden else 0
    shared_gate = 2 * size * model.dim if moe.shared_gate else 0
    latent = 2 * size * moe.latent_dim  # what goes into the experts and what comes out of them
    return kept + router + 2 * size * _hidden_elements(moe, rows * tokens) / tokens + latent + shared + shared_gate


def _hidden_elements(moe: MoE, rows: float) -> float:
    """Elements of one pre-activation of all routed rows of a micro-batch."""
    widths = expert_widths(moe)
    if moe.backend != "block_sparse":
        return rows * max(widths)
    block = block_of(widths)
    return max_blocks(widths, math.ceil(rows), block) * block**2


def _choice_bytes(model: Model, layer: int) -> int:
    """Bytes per token of a block's routing: tokens, experts and order of its rows (int64), and their weights."""
    return 40 * model.moe.top_k if model.moe is not None and is_moe_layer(model, layer) else 0


def _norm_bytes(width: int, size: int) -> int:
    """An RMSNorm: its input and its normalised input in float32, and the result that the next product keeps."""
    return width * (2 * FLOAT32 + size) + FLOAT32


def _swiglu_bytes(hidden: int, size: int) -> int:
    """Gate, up, silu(gate), and their product."""
    return 4 * hidden * size


def _attention_bytes(attention: GroupedQueryAttention | LatentAttention, size: int) -> int:
    """Queries, keys, values, output, its log-sum-exp in float32, and what the norms keep."""
    N = attention.num_heads
    if isinstance(attention, LatentAttention):
        queries = N * (attention.nope_dim + attention.rope_dim)
        expanded = 2 * queries + N * (attention.nope_dim + 2 * attention.value_dim)
        ranks = [rank for rank in (attention.kv_rank, attention.q_rank) if rank]
        return size * expanded + sum(_norm_bytes(rank, size) for rank in ranks) + FLOAT32 * N
    queries, keys = N * attention.head_dim, attention.num_kv_heads * attention.head_dim
    norms = 0 if attention.qk_norm == "none" else 2 * FLOAT32 * (queries + keys)
    return size * 2 * (queries + keys) + norms + FLOAT32 * N
