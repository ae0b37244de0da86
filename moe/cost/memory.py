"""Bytes of a training step on one rank: what is held throughout, and what the forward pass keeps for backward.

An estimate to plan with, not a promise: it counts what this model's operators save, with fused attention, the norms
saving two float32 tensors (as on the CPU; a fused GPU norm saves one), experts by the rule in docs/architecture.md,
and no allocator or library overhead. `tests/test_cost.py` holds it to within 10 % of what autograd saves.
"""

import math

from moe.config.layout import Layout
from moe.config.schema import (
    GroupedQueryAttention,
    LatentAttention,
    Model,
    MoE,
    Run,
    expert_dim,
    expert_widths,
    ffn_hidden,
    is_moe_layer,
    layer_experts,
)
from moe.cost.shares import (
    Held,
    accumulation,
    counted,
    parameters_per_rank,
    stage_parameters,
    tokens_per_pass,
)
from moe.cost.stages import stages_of
from moe.cost.traffic import units_per_token
from moe_triton.block_sizes import block_of, max_blocks

FLOAT32 = 4


def memory_bytes(run: Run, layout: Layout | None = None) -> dict[str, int]:
    """Bytes per rank of a step, by purpose, of the pipeline stage that needs most; their sum estimates the peak.

    Without a layout, those of one process that holds everything. parameters, gradients and optimizer (the
    averages) in float32; weight_casts: the copies of matrices that autograd keeps, in bfloat16 (or in the order in
    which `block_sparse` wants experts of one width, or with adapters added; then gradients and averages are the adapters', and
    gradients besides those of one layer's whole experts); gathered: what FSDP holds whole, the block in use and the next one
    in the type of products, one block's gradients in float32, and what is around the blocks; activations: what
    micro-batches keep for backward; masks: attention masks, for documents or windows; logits: log-probabilities and
    their gradient; exchange: vectors on their way to experts' ranks and back. With activation checkpointing only block
    inputs, routing choices and the largest block count. Experts keep x, both pre-activations of each routed row, and
    indices: D + 2·K·F elements per token. Where rows go is not known beforehand, so of experts of different widths F is
    the widest, `block_sparse` keeps as many whole blocks as the fullest routing needs, and every rank is taken to
    receive as many rows as it sends.
    """
    layout = layout or Layout()
    stages = [stage_memory(run, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda parts: sum(parts.values()))


def stage_memory(run: Run, layout: Layout, stage: int) -> dict[str, int]:
    """`memory_bytes` of one pipeline stage."""
    model, size, length = run.model, 2 if run.train.precision == "bfloat16" else FLOAT32, run.data.sequence_length
    blocks = stages_of(run, layout)[stage]
    last = stage == layout.pipeline - 1
    tokens, passes = tokens_per_pass(run, layout), _passes_held(run, layout, stage)
    kept = [tokens * block_bytes(model, layer, size, tokens, layout.tensor) for layer in blocks]
    counts = counted(model)
    casts = [_casts_held(model, layout, counts.layers[layer], size) for layer in blocks]
    # A mask is S x S whatever the number of ranks that share a row.
    masks = [tokens * layout.context * length * size if masked(model, layer) else 0 for layer in blocks]
    received = [_exchange_bytes(run, layout, layer, size) * tokens for layer in blocks]
    if run.train.activation_checkpointing:
        inputs = sum(size * model.dim + _choice_bytes(model, layer) for layer in blocks)
        activations = passes * tokens * inputs + max(kept)
        cast, mask, exchange = max(casts), max(masks), max(received)
    else:
        activations, cast, mask, exchange = passes * sum(kept), sum(casts), passes * sum(masks), passes * sum(received)
    whole_head = last and size != FLOAT32 and layout.dense_shards == 1
    shares = stage_parameters(model, blocks)
    held = parameters_per_rank(layout, shares)
    # Muon keeps one average of a block's matrices, and none of them is cut
    trained = held if model.lora is None else sum(counted(model).layers[layer].get("lora", 0) for layer in blocks)
    by_muon = run.train.optimizer.name == "muon"
    one_average = sum(part.matrices + part.experts for part in shares if part.layer >= 0) if by_muon else 0
    parts = {
        "parameters": FLOAT32 * held,
        "gradients": FLOAT32 * (trained + _merged_gradient(model)),
        "optimizer": FLOAT32 * (2 * trained - one_average),
        "weight_casts": cast + whole_head * size * model.vocab_size * model.dim,
        "gathered": _gathered_bytes(layout, shares, size),
        "activations": activations + last * passes * tokens * _norm_bytes(model.dim, size),
        "masks": mask,
        "logits": last * _logits_bytes(run, tokens, size),
        "exchange": exchange,
    }
    return {name: round(value) for name, value in parts.items()}


def _logits_bytes(run: Run, tokens: float, size: int) -> float:
    """Log-probabilities and their gradient; of a chunk of tokens, with the gradients kept of hidden states and head."""
    model, chunk = run.model, run.train.loss_chunk
    if not chunk or run.train.distil is not None:
        return tokens * model.vocab_size * 2 * FLOAT32
    kept = tokens * model.dim * size + (model.lora is None) * model.vocab_size * model.dim * FLOAT32
    return min(tokens, chunk) * model.vocab_size * 2 * FLOAT32 + kept


def _passes_held(run: Run, layout: Layout, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once: with 1F1B, one for itself and one per stage after it; with
    GPipe, all."""
    if layout.pipeline > 1 and run.parallel.pipeline_schedule == "gpipe":
        return accumulation(run, layout)
    return min(accumulation(run, layout), layout.pipeline - stage)


def _merged_gradient(model: Model) -> int:
    """Elements of the gradient of one layer's whole experts, which exists while adapters on them are differentiated."""
    if model.lora is None or "experts" not in model.lora.targets:
        return 0
    return max(layer.get("experts", 0) for layer in counted(model).layers)


def _casts_held(model: Model, layout: Layout, counts: dict[str, int], size: int) -> float:
    """Copies of one block's matrices that autograd keeps; of what FSDP gathers, the gathered copy is in `gathered`."""
    dense = {name: number for name, number in counts.items() if name != "experts"}
    kept = _cast_bytes(model, dense, size) / layout.tensor if layout.dense_shards == 1 else 0.0
    if layout.expert_shard == 1 and "experts" in counts:
        kept += _cast_bytes(model, {"experts": counts["experts"]}, size) / layout.expert
    return kept


def _gathered_bytes(layout: Layout, held: tuple[Held, ...], size: int) -> float:
    """What FSDP holds whole at the peak: two blocks and the gradients of one, and all of what is around the blocks."""
    if layout.dense_shards == 1:
        return 0.0
    *blocks, around = held
    experts = 1 / layout.expert if layout.expert_shard > 1 else 0.0
    largest = max(part.matrices_on(layout.tensor) + experts * part.experts for part in blocks)
    return (2 * size + FLOAT32) * largest + (size + FLOAT32) * around.matrices_on(layout.tensor)


def _exchange_bytes(run: Run, layout: Layout, layer: int, size: int) -> float:
    """Per token: vectors received, which experts' backward reads, and besides them those sent and those that return."""
    if layout.expert == 1 or not is_moe_layer(run.model, layer):
        return 0.0
    return 3 * units_per_token(run, layout) * expert_dim(run.model) * size


def masked(model: Model, layer: int) -> bool:
    """Whether the block passes an explicit mask, of which SDPA keeps a copy in the activations' type."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return model.document_mask
    return model.document_mask or attention.sinks or attention.windows[layer % len(attention.windows)] > 0


def _cast_bytes(model: Model, components: dict[str, int], size: int) -> int:
    """Bytes of the copies of one block's matrices that autograd keeps; experts with adapters are such a copy in any type."""
    if size != FLOAT32:
        return size * sum(n for name, n in components.items() if name not in ("norm", "router"))
    if model.lora is not None and "experts" in model.lora.targets:
        return size * components.get("experts", 0)
    moe = model.moe
    copies = moe is not None and moe.backend == "block_sparse" and len(set(expert_widths(moe))) == 1
    return size * 2 * components.get("experts", 0) // 3 if copies else 0


def block_bytes(model: Model, layer: int, size: int, tokens: int, tensor: int = 1) -> float:
    """Bytes per token that one block keeps for backward, masks apart, where a micro-batch has `tokens` of them."""
    kept = 2 * _norm_bytes(model.dim, size) + _attention_bytes(model.attention, size) / tensor
    if not is_moe_layer(model, layer):
        return kept + _swiglu_bytes(ffn_hidden(model, layer), size) / tensor
    moe = layer_experts(model, layer)
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    router_input = 0 if size == FLOAT32 else FLOAT32 * model.dim
    router = router_input + 2 * FLOAT32 * moe.num_experts + _choice_bytes(model, layer)
    shared = _swiglu_bytes(moe.shared_hidden, size) / tensor if moe.shared_hidden else 0
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
