"""Bytes that one rank of a layout sends in an optimizer step, by purpose: closed forms, measured by tests/test_traffic.py.

Collectives count as in their bandwidth-optimal forms, per rank of n: an all-gather or reduce-scatter of N bytes sends
N·(n-1)/n, an all-reduce twice that, an all-to-all what is not for the sender itself. Routing is taken as uniform: K
different experts of E for each token. Left out: sums of scalars, statistics at log steps, checkpoints.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe.config.layout import Layout
from moe.config.schema import LatentAttention, Run, expert_dim, is_moe_layer
from moe.cost.shares import accumulation, needs_first_pass, stage_parameters, tokens_per_pass
from moe.cost.stages import stages_of

Operation = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send"]
FLOAT32, INT32, INT64 = 4, 4, 8
BUCKET_BYTES = 64 * 2**20
"""Of gradients that are summed together (moe/parallel/ranks.py)."""
EXCHANGE = ("dispatch", "combine", "combine, backward", "dispatch, backward", "dispatch, again", "combine, again")
"""Purposes of the transfers between experts' ranks, in the order of a step."""
SHARDING = (
    "parameters, gathered",
    "gradients, scattered",
    "experts, gathered",
    "experts' gradients, scattered",
)
COPIES = ("vectors and routers, summed", "gradients, summed over copies", "experts' gradients, summed over copies")


@dataclass(frozen=True)
class Transfer:
    """What one rank sends for one purpose in a step."""

    purpose: str
    operation: Operation
    ranks: int
    """Size of the group."""
    stride: int
    """Distance of neighbours of the group, in global ranks: from a node's size on, each sits in a node of its own."""
    calls: float
    """Collectives in a step."""
    sent: float
    """Bytes to other ranks in a step."""


def sent_bytes(transfers: Iterable[Transfer]) -> dict[str, float]:
    """Bytes by purpose, in the order of first appearance."""
    sums: dict[str, float] = {}
    for transfer in transfers:
        sums[transfer.purpose] = sums.get(transfer.purpose, 0.0) + transfer.sent
    return sums


def expected_groups(experts: int, chosen: float, groups: int) -> float:
    """Expected number of `groups` equal groups that hold at least one of `chosen` experts, drawn without replacement.

    A group of E/G experts is missed with probability C(E - E/G, K) / C(E, K); K need not be whole.
    """
    others = experts - experts / groups
    if chosen > others:
        return float(groups)
    lg = math.lgamma
    missed = math.exp(lg(others + 1) + lg(experts - chosen + 1) - lg(others - chosen + 1) - lg(experts + 1))
    return groups * (1 - missed)


def traffic(run: Run, layout: Layout, stage: int = 0) -> list[Transfer]:
    """Everything that a rank of one pipeline stage sends in a step; purposes with nothing to send are left out."""
    blocks = stages_of(run, layout)[stage]
    transfers = [
        *_exchange(run, layout, blocks),
        *_sharded(run, layout, blocks),
        *_replicated(run, layout, blocks),
        *_context(run, layout, blocks),
        *_tensor(run, layout, blocks),
        *_pipeline(run, layout, stage),
    ]
    return [transfer for transfer in transfers if transfer.ranks > 1 and transfer.sent]


# ------------------------------------------------------------------------------------------------------------ experts


def units_per_token(run: Run, layout: Layout) -> float:
    """Vectors that a token sends to experts' ranks, its own included: one per rank, per routed row, or per slot."""
    moe = run.model.moe
    assert moe is not None
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    match run.parallel.dispatch:
        case "deduplicated":
            return expected_groups(moe.num_experts, rows, layout.expert)
        case "rows":
            return rows
        case "capacity":
            tokens = tokens_per_pass(run, layout)
            slots = max(1, math.ceil(run.parallel.dispatch_capacity_factor * rows * tokens / moe.num_experts - 1e-9))
            return moe.num_experts * slots / tokens


def _exchange(run: Run, layout: Layout, blocks: range) -> Iterable[Transfer]:
    """Tokens to experts and back. Beside the units go a float32 weight per row, an int32 place if units are shared, counts.

    A recomputed block asks for its tokens again, not for the counts.
    """
    moe, n = run.model.moe, layout.expert
    if moe is None or n == 1:
        return
    passes, size = accumulation(run, layout), _itemsize(run)
    units, rows = units_per_token(run, layout), moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    shared, fixed = run.parallel.dispatch == "deduplicated", run.parallel.dispatch == "capacity"
    away = tokens_per_pass(run, layout) * (n - 1) / n
    vectors, weights = away * units * expert_dim(run.model) * size, away * (units if fixed else rows) * FLOAT32
    there = vectors + weights + away * rows * INT32 * shared
    counts = (n - 1) * (moe.num_experts // n + (not fixed)) * INT64
    again = passes * run.train.activation_checkpointing
    forward = passes + passes * needs_first_pass(run, layout)
    layers = sum(is_moe_layer(run.model, layer) for layer in blocks)
    for purpose, times, sent in (
        ("dispatch", forward, there + counts),
        ("combine", forward, vectors),
        ("combine, backward", passes, vectors),
        ("dispatch, backward", passes, vectors + weights),
        ("dispatch, again", again, there),
        ("combine, again", again, vectors),
    ):
        yield Transfer(purpose, "all_to_all", n, layout.tensor, layers * times, layers * times * sent)


# --------------------------------------------------------------------------------------------------------- parameters


def _sharded(run: Run, layout: Layout, blocks: range) -> Iterable[Transfer]:
    """FSDP2: matrices are gathered in the type of products, in forward and in backward, and their gradients reduced in float32.

    What is around the blocks stays whole between forward and backward, so it is gathered once.
    """
    passes, size, n = accumulation(run, layout), _itemsize(run), layout.dense_shards
    forward = passes + passes * needs_first_pass(run, layout)
    *held, around = stage_parameters(run.model, blocks)
    matrices, outside = sum(part.matrices_on(layout.tensor) for part in held), around.matrices_on(layout.tensor)
    gathered = (forward + passes) * matrices + forward * outside
    calls = (forward + passes) * len(held) + forward
    yield _ring("parameters, gathered", "all_gather", n, layout.tensor, calls, size * gathered)
    scattered = passes * FLOAT32 * (matrices + outside)
    yield _ring("gradients, scattered", "reduce_scatter", n, layout.tensor, passes * (len(held) + 1), scattered)
    n, stride, mine = layout.expert_shard, layout.expert * layout.tensor, sum(part.experts for part in held)
    layers = sum(part.experts > 0 for part in held)
    times = forward + passes
    yield _ring("experts, gathered", "all_gather", n, stride, times * layers, times * size * mine / layout.expert)
    scattered = passes * FLOAT32 * mine / layout.expert
    yield _ring("experts' gradients, scattered", "reduce_scatter", n, stride, passes * layers, scattered)


def _replicated(run: Run, layout: Layout, blocks: range) -> Iterable[Transfer]:
    """Gradients are summed over copies: in buckets after the backward pass, or (HSDP) after each reduce-scatter."""
    held, passes = stage_parameters(run.model, blocks), accumulation(run, layout)
    ranks = layout.stage_ranks // layout.tensor
    matrices = FLOAT32 * sum(part.matrices_on(layout.tensor) for part in held) / layout.dense_shards
    experts = FLOAT32 * sum(part.experts for part in held) / (layout.expert * layout.expert_shard)
    biases = FLOAT32 * sum(part.expert_biases for part in held) / layout.expert
    whole = FLOAT32 * sum(part.whole for part in held) + (biases if layout.expert == 1 else 0)
    experts += biases if layout.expert > 1 and layout.expert_shard == 1 else 0
    buckets = math.ceil(whole / BUCKET_BYTES)
    yield _ring("vectors and routers, summed", "all_reduce", ranks, layout.tensor, buckets, 2 * whole)
    n, stride = ranks // layout.dense_shards, layout.dense_shards * layout.tensor
    calls = passes * len(held) if layout.dense_shards > 1 else math.ceil(matrices / BUCKET_BYTES)
    times = passes if layout.dense_shards > 1 else 1
    yield _ring("gradients, summed over copies", "all_reduce", n, stride, calls, 2 * times * matrices)
    n, stride = layout.expert_replicate, layout.expert * layout.expert_shard * layout.tensor
    calls = passes * len(held) if layout.expert_shard > 1 else math.ceil(experts / BUCKET_BYTES)
    times = passes if layout.expert_shard > 1 else 1
    yield _ring("experts' gradients, summed over copies", "all_reduce", n, stride, calls, 2 * times * experts)
    if biases and layout.expert > 1 and layout.expert_shard > 1:
        calls = math.ceil(biases / BUCKET_BYTES)
        for ranks, step in ((n, stride), (layout.expert_shard, layout.expert * layout.tensor)):
            yield _ring("experts' biases, summed", "all_reduce", ranks, step, calls, 2 * biases)


def _ring(purpose: str, operation: Operation, n: int, stride: int, calls: int, size: float) -> Transfer:
    """A collective over n ranks in which each sends (n-1)/n of `size` bytes."""
    return Transfer(purpose, operation, n, stride, calls, size * (n - 1) / n)


# -------------------------------------------------------------------------------------------------------- activations


def _context(run: Run, layout: Layout, blocks: range) -> Iterable[Transfer]:
    """Ulysses: queries, keys and values change from tokens to heads before attention, its output back after it."""
    n, attention = layout.context, run.model.attention
    if n == 1:
        return
    if isinstance(attention, LatentAttention):
        key = attention.nope_dim + attention.rope_dim
        there, back = attention.num_heads * (2 * key + attention.value_dim), attention.num_heads * attention.value_dim
    else:
        back = attention.num_heads * attention.head_dim
        # key heads are repeated until they can be shared out
        there = back + 2 * math.lcm(attention.num_kv_heads, n) * attention.head_dim
    times = accumulation(run, layout) * len(blocks) * (3 if run.train.activation_checkpointing else 2)
    sent = times * tokens_per_pass(run, layout) * (there + back) * _itemsize(run) / layout.tensor * (n - 1) / n
    yield Transfer("heads for tokens", "all_to_all", n, layout.tensor, 2 * times, sent)


def _tensor(run: Run, layout: Layout, blocks: range) -> Iterable[Transfer]:
    """Row-parallel outputs are summed in forward, column-parallel inputs' gradients in backward (arXiv 1909.08053)."""
    n, moe = layout.tensor, run.model.moe
    vectors = accumulation(run, layout) * tokens_per_pass(run, layout) * run.model.dim * _itemsize(run)
    with_experts = sum(is_moe_layer(run.model, layer) for layer in blocks)
    shared = moe is not None and moe.shared_hidden > 0
    sums = 2 * len(blocks) - (0 if shared else with_experts)
    times = (3 if run.train.activation_checkpointing else 2) * sums
    yield Transfer(
        "partial sums", "all_reduce", n, 1, times * accumulation(run, layout), times * vectors * 2 * (n - 1) / n
    )


def _pipeline(run: Run, layout: Layout, stage: int) -> Iterable[Transfer]:
    """Hidden states to the next stage and their gradients to the one before, each with one float32 of losses."""
    vectors = tokens_per_pass(run, layout) * run.model.dim * _itemsize(run) + FLOAT32
    ends = (stage < layout.pipeline - 1) + (stage > 0)
    calls = ends * accumulation(run, layout)
    yield Transfer("stage boundaries", "send", layout.pipeline, layout.stage_ranks, calls, calls * vectors)


def _itemsize(run: Run) -> int:
    return 2 if run.train.precision == "bfloat16" else FLOAT32
