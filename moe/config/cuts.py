"""Rules of cutting rows (parallel.context) and matrices (parallel.tensor) into equal parts, in words: rule, numbers, way out."""

from collections.abc import Iterator

from moe.config.schema import GroupedQueryAttention, Run, ffn_hidden, is_moe_layer


def cut_rows(run: Run, context: int) -> Iterator[str]:
    """What a run breaks whose rows are cut: nothing may look at a whole row but attention."""
    length, logging = run.data.sequence_length, run.logging
    if length % context:
        yield (
            f"data.sequence_length ({length}) must be divisible by parallel.context ({context}): "
            f"use data.sequence_length={_next(length, context)} or parallel.context={_divisor(length, context)}"
        )
    reason = run.model.moe.router.whole_rows(part=length // context) if run.model.moe is not None else ""
    if reason:
        yield (
            f"parallel.context ({context}) cuts each row into parts, and the router needs whole rows: {reason}, "
            "or parallel.context=1"
        )
    for name in ("record_routing", "replay_routing"):
        if getattr(logging, name):
            yield f"logging.{name} needs whole rows, and parallel.context is {context}: use context=1"


def cut_heads(run: Run, context: int, tensor: int) -> Iterator[str]:
    """What a run breaks whose heads are shared by context · tensor ranks, and key heads by tensor ranks."""
    attention = run.model.attention
    heads, ranks = attention.num_heads, context * tensor
    name = "parallel." + " · ".join(n for n, size in (("context", context), ("tensor", tensor)) if size > 1)
    if heads % ranks:
        yield (
            f"model.attention.num_heads ({heads}) must be divisible by {name} ({ranks}), whose ranks share the heads: "
            f"use num_heads={_next(heads, ranks)} or {name}={_divisor(heads, ranks)}"
        )
    if isinstance(attention, GroupedQueryAttention) and attention.num_kv_heads % tensor:
        kv_heads = attention.num_kv_heads
        yield (
            f"model.attention.num_kv_heads ({kv_heads}) must be divisible by parallel.tensor ({tensor}): "
            f"use num_kv_heads={_next(kv_heads, tensor)} or parallel.tensor={_divisor(kv_heads, tensor)}"
        )


def cut_matrices(run: Run, tensor: int, shards: int) -> Iterator[str]:
    """What a run breaks whose matrices are cut over tensor ranks, and their other dimension over `shards` ranks."""
    model = run.model
    attention, moe = model.attention, model.moe
    widths = {
        f"ffn_hidden of block {n}": ffn_hidden(model, n) for n in range(model.num_layers) if not is_moe_layer(model, n)
    }
    if moe is not None and moe.shared_hidden:
        widths["moe.shared_hidden"] = moe.shared_hidden
    wrong = {name: width for name, width in widths.items() if width % tensor}
    if wrong:
        name, width = next(iter(wrong.items()))
        yield (
            f"model.{name} ({width}) must be divisible by parallel.tensor ({tensor}): "
            f"use {_next(width, tensor)} or parallel.tensor={_divisor(width, tensor)}"
        )
    if isinstance(attention, GroupedQueryAttention) and attention.qk_norm == "full":
        yield (
            f"model.attention.qk_norm=full is over all {attention.num_heads} heads at once, and parallel.tensor ({tensor}) "
            "gives each rank some of them: use qk_norm=head or parallel.tensor=1"
        )
    inner = {"model.dim": model.dim}
    if not isinstance(attention, GroupedQueryAttention):
        inner |= {"model.attention.kv_rank": attention.kv_rank, "model.attention.q_rank": attention.q_rank}
    for name, size in inner.items():
        if size % shards:
            yield (
                f"{name} ({size}) must be divisible by shard · context ({shards}) where parallel.tensor ({tensor}) cuts "
                f"the other dimension: use {name}={_next(size, shards)} or parallel.tensor=1"
            )


def _next(number: int, parts: int) -> int:
    return -(-number // parts) * parts


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)
