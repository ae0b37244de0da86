"""How long an optimizer step takes on a layout of named GPUs: predicted from counted FLOPs, counted bytes and rates.

Per rank and forward pass: products at a share of the rate of large products, everything else at a share of the memory
bandwidth, a fixed time per block for launches; then the transfers of `moe.cost.traffic` at a share of the links' rates,
hidden behind computation where `Assumptions` says so; then the pipeline's bubble, the sums over copies and the update.
What the constants are worth: docs/scaling.md compares the result with published trainings.
"""

from dataclasses import dataclass
from functools import lru_cache

from moe.config.layout import Layout
from moe.config.schema import Model, Run, expert_dim, is_moe_layer
from moe.cost.counting import flops_by_layer, train_flops_per_token
from moe.cost.memory import block_bytes, masked
from moe.cost.shares import (
    accumulation,
    needs_first_pass,
    parameters_per_rank,
    stage_parameters,
    tokens_per_pass,
)
from moe.cost.stages import stages_of
from moe.cost.traffic import COPIES, EXCHANGE, SHARDING, Transfer, expected_groups, traffic, units_per_token
from moe_triton.chips import LINKS, Links
from moe_triton.roofline import Machine


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Constants of the prediction. Shares are of what the chip's or the link's table says."""

    product: float = 0.8
    """Of the rate of large products, that dense products reach in a training step."""
    expert_product: float = 0.7
    """The same of experts' products, on full tiles."""
    tile_rows: int = 128
    """Rows of a tile: an expert's last one is half empty on average."""
    attention: float = 0.6
    """The same of attention's two products; its backward has five (FlashAttention-2, arXiv 2307.08691)."""
    bandwidth: float = 0.8
    """Of the rate of large copies, that elementwise kernels reach."""
    passes_kept: float = 3.0
    """Times that what a block keeps for backward is moved: written in forward, read in backward, its gradient written."""
    passes_rows: float = 6.0
    """Times that a routed row of D moves: gathered and summed in forward; twice each in backward."""
    passes_logits: float = 6.0
    """Times that float32 logits move: cast, softmax, gradient."""
    block_seconds: float = 150e-6
    """Launches and gaps of one block's forward, and of its backward: eager kernels of a few microseconds."""
    node: float = 0.75
    """Of the node's links, in collectives and exchanges of many megabytes."""
    network: float = 0.8
    """Of the network's links, in collectives."""
    network_exchange: float = 0.6
    """Of the network's links, in all-to-all."""
    latency_seconds: float = 20e-6
    """Start of a collective, and again for each node that it spans beyond the first, up to 16."""
    hide_sharding: float = 0.9
    """Share of a pass's computation behind which FSDP's gathers and scatters can run."""
    hide_copies: float = 0.0
    """Share of a pass's computation behind which sums over copies can run."""
    hide_exchange: float = 0.0
    """Share of the exchange with experts' ranks that runs behind other computation; the shared expert hides some besides."""
    exchange_by_node: bool = False
    """Send a vector once per node, to be handed on there, rather than once per rank (DeepEP does)."""
    computing: float = 1.0
    """Of the multiprocessors, those that compute while others move bytes (DeepSeek-V3: 112 of 132)."""
    imbalance: float = 1.0
    """Rows of the fullest rank over the mean: experts' products, rows and exchange of a step wait for it."""
    update_bytes: int = 32
    """Moved per parameter by clipping (4) and a fused AdamW (28)."""
    virtual_stages: int = 1
    """Parts of the model per pipeline rank (interleaved 1F1B): the bubble is that many times smaller."""


OURS = Assumptions()
"""What the trainer of this project does: FSDP2 prefetches; exchange and sums over copies are waited for."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind and what joins them."""

    machine: Machine
    links: Links

    @classmethod
    def of(cls, machine: Machine) -> "Cluster":
        """The vendor's own system around a GPU."""
        return cls(machine, LINKS[machine.chip.name])


@dataclass(frozen=True)
class Step:
    """A predicted optimizer step."""

    parts: dict[str, float]
    """Seconds by purpose, of the slowest pipeline stage; what runs behind computation is not in it."""
    seconds: float
    tokens_per_second: float
    """Of all ranks."""
    mfu: float
    """Model FLOPs over the vendor's peak, as `moe train` reports it: recomputation does not count, scores in full."""


def predict_step(run: Run, layout: Layout, cluster: Cluster, assume: Assumptions = OURS) -> Step:
    """Time of one step, of the slowest pipeline stage."""
    stages = [_stage_seconds(run, layout, cluster, assume, stage) for stage in range(layout.pipeline)]
    parts = max(stages, key=lambda seconds: sum(seconds.values()))
    seconds = sum(parts.values())
    rate = run.train.batch_rows * run.data.sequence_length / seconds
    chip = cluster.machine.chip
    peak = (chip.bf16 or chip.fp16) if run.train.precision == "bfloat16" else chip.fp32
    flops = _flops_per_token(run.model, run.data.sequence_length)
    return Step(parts, seconds, rate, flops * rate / (peak * layout.world_size))


def _stage_seconds(run: Run, layout: Layout, cluster: Cluster, assume: Assumptions, stage: int) -> dict[str, float]:
    """Seconds of one stage by purpose, in a step."""
    passes = accumulation(run, layout)
    blocks = stages_of(run, layout)[stage]
    work = {name: passes * value for name, value in _computation(run, layout, cluster.machine, assume, blocks).items()}
    busy = sum(work.values())
    moves = traffic(run, layout, stage)
    share = _share_between_nodes(run, layout, cluster.links) if assume.exchange_by_node else 1.0
    seconds: dict[str, float] = {}
    for move in moves:
        outside = share if move.purpose in EXCHANGE else 1.0
        seconds[move.purpose] = seconds.get(move.purpose, 0.0) + transfer_seconds(move, cluster.links, assume, outside)
    exchange = sum(seconds.get(purpose, 0.0) for purpose in EXCHANGE) * assume.imbalance * (1 - assume.hide_exchange)
    sharding = sum(value for purpose, value in seconds.items() if purpose in SHARDING)
    copies = sum(value for purpose, value in seconds.items() if purpose in COPIES)
    waits = {
        "exchange": max(0.0, exchange - passes * _shared_seconds(run, layout, cluster, assume, blocks)),
        **{purpose: value for purpose, value in seconds.items() if purpose not in (*EXCHANGE, *SHARDING, *COPIES)},
        "FSDP, not hidden": max(0.0, sharding - assume.hide_sharding * busy),
    }
    per_pass = (busy + sum(waits.values())) / passes
    held = parameters_per_rank(layout, stage_parameters(run.model, blocks))
    update = held * assume.update_bytes / (cluster.machine.bandwidth * assume.bandwidth)
    return {
        **work,
        **waits,
        "pipeline bubble": per_pass * (layout.pipeline - 1) / assume.virtual_stages,
        "sums over copies": max(0.0, copies - assume.hide_copies * busy / passes),
        "update": update,
    }


# -------------------------------------------------------------------------------------------------------- computation


def _computation(run: Run, layout: Layout, machine: Machine, assume: Assumptions, blocks: range) -> dict[str, float]:
    """Seconds of a forward and backward pass by purpose, on one rank's tokens.

    `again` counts forward passes besides the one with gradient: recomputation, and a first pass for the balance loss.
    """
    tokens, again = (
        tokens_per_pass(run, layout),
        run.train.activation_checkpointing + needs_first_pass(run, layout),
    )
    rate = _rate(run, machine)
    products = experts = scores = moved = 0.0
    flops, halved = (_flops(run.model, run.data.sequence_length, half) for half in (False, True))
    for layer in blocks:
        parts = flops[layer]
        # A mask keeps fused kernels from skipping what the causal order excludes.
        attention = (flops if masked(run.model, layer) else halved)[layer]["scores"]
        dense = sum(value for name, value in parts.items() if name not in ("scores", "experts"))
        products += (3 + again) * dense * tokens / layout.tensor / (rate * assume.product)
        scores += (3.5 + again) * attention * tokens / layout.tensor / (rate * assume.attention)
        experts += _expert_seconds(run, layout, machine, assume, parts.get("experts", 0.0)) * (3 + again) / 3
        moved += _bytes_moved(run, layout, layer, assume) * (1 + again / 3)
    if blocks.stop == run.model.num_layers:
        head = 2 * run.model.vocab_size * run.model.dim
        products += (3 + needs_first_pass(run, layout)) * head * tokens / (rate * assume.product)
        moved += assume.passes_logits * 4 * tokens * run.model.vocab_size
    products, experts, scores = (value / assume.computing for value in (products, experts, scores))
    return {
        "dense products": products,
        "experts' products": experts,
        "attention": scores,
        "elementwise": moved / (machine.bandwidth * assume.bandwidth),
        "launches": (2 + again) * assume.block_seconds * len(blocks),
    }


@lru_cache(maxsize=16)
def _flops_per_token(model: Model, length: int) -> float:
    """`train_flops_per_token`, kept likewise."""
    return train_flops_per_token(model, length)


@lru_cache(maxsize=16)
def _flops(model: Model, length: int, causal_half: bool) -> tuple[dict[str, float], ...]:
    """`flops_by_layer`, kept for the many layouts of one search."""
    return flops_by_layer(model, length, causal_half=causal_half)


def _rate(run: Run, machine: Machine) -> float:
    """FLOP/s of large products in the run's type."""
    return machine.flops if run.train.precision == "bfloat16" else machine.chip.fp32 * machine.flops / _peak(machine)


def _peak(machine: Machine) -> float:
    return machine.chip.bf16 or machine.chip.fp16


def _expert_seconds(run: Run, layout: Layout, machine: Machine, assume: Assumptions, flops: float) -> float:
    """Forward and backward of one block's routed experts: the rank's tokens as if they stayed, plus part-filled tiles.

    With fp8 the products of forward and of the inputs' gradient run at the chip's higher rate, weights' gradients do not.
    """
    moe = run.model.moe
    if moe is None or not flops:
        return 0.0
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k) * tokens_per_pass(run, layout)
    # Rows of one expert: those of all ranks of the exchange group.
    each = rows * layout.expert / moe.num_experts
    filled = each / (each + assume.tile_rows / 2)
    faster = (machine.chip.fp8 or _peak(machine)) / _peak(machine) if moe.precision != "native" else 1.0
    seconds = flops * tokens_per_pass(run, layout) / (_rate(run, machine) * assume.expert_product * filled)
    return seconds * (1 + 2 / faster) * assume.imbalance


def _bytes_moved(run: Run, layout: Layout, layer: int, assume: Assumptions) -> float:
    """Bytes that one block's elementwise kernels move in forward and backward; recomputation is a third more."""
    size = 2 if run.train.precision == "bfloat16" else 4
    tokens = tokens_per_pass(run, layout)
    moved = assume.passes_kept * block_bytes(run.model, layer, size, tokens, layout.tensor)
    moe = run.model.moe
    if moe is not None and is_moe_layer(run.model, layer):
        rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
        moved += assume.passes_rows * rows * expert_dim(run.model) * size * assume.imbalance
    return moved * tokens


def _shared_seconds(run: Run, layout: Layout, cluster: Cluster, assume: Assumptions, blocks: range) -> float:
    """Shared experts of a pass, which compute while tokens travel."""
    flops = _flops(run.model, run.data.sequence_length, False)
    shared = sum(flops[layer].get("shared", 0.0) for layer in blocks)
    factor = 3 + run.train.activation_checkpointing
    tokens = tokens_per_pass(run, layout)
    return factor * shared * tokens / layout.tensor / (_rate(run, cluster.machine) * assume.product)


# ---------------------------------------------------------------------------------------------------------- transfers


def _share_between_nodes(run: Run, layout: Layout, links: Links) -> float:
    """Vectors per node over vectors per rank, expected under uniform routing."""
    moe, nodes = run.model.moe, layout.expert * layout.tensor / links.joined
    if moe is None or nodes <= 1:
        return 1.0
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    return expected_groups(moe.num_experts, rows, round(nodes)) / units_per_token(run, layout)


def transfer_seconds(move: Transfer, links: Links, assume: Assumptions = OURS, share_outside: float = 1.0) -> float:
    """Seconds of a transfer's calls of a step, one after the other.

    The group's ranks in one node reach each other by the node's links; the rest goes through each rank's own share of the
    network. In a ring over nodes what enters a node does so once, shared by the group's ranks there.
    """
    together = max(1, min(move.ranks, links.joined // move.stride))
    nodes = move.ranks / together
    if move.operation == "send":
        outside, inside = (move.sent, 0.0) if move.stride >= links.joined else (0.0, move.sent)
    elif move.operation == "all_to_all":
        outside = move.sent * (move.ranks - together) / (move.ranks - 1)
        inside = move.sent - outside
    else:
        whole = move.sent * move.ranks / (move.ranks - 1)
        outside = whole * (1 - together / move.ranks) / together
        inside = move.sent if together > 1 else 0.0
    network = assume.network_exchange if move.operation == "all_to_all" else assume.network
    start = assume.latency_seconds * min(16.0, nodes) * move.calls
    return max(inside / (links.node * assume.node), share_outside * outside / (links.network * network)) + start
