"""What `moe show` prints of a run, before anything is built: settings, sizes, FLOPs, memory, and each layer."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moe import cost
from moe.config.layout import Layout, resolve
from moe.config.load import dump, resolve_router, router_name
from moe.config.schema import (
    GroupedQueryAttention,
    Model,
    Run,
    balances,
    expert_widths,
    ffn_hidden,
    is_moe_layer,
    layer_experts,
)
from moe.config.words import dotted, typed
from moe.cost.shares import needs_first_pass, stage_parameters

MIN_WIDTH = 110
"""Columns below which the table of layers would break its cells."""


def show(run: Run, notices: list[str], ranks: int = 0) -> None:
    """Print a run's plan; every line under `settings` can be typed as an override.

    ranks: processes to lay the run out over, 0 for the fewest that its `parallel` sizes need. Raises ConfigError for a
    layout that breaks a rule.
    """
    layout = resolve(run, ranks or fewest_ranks(run))
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    for text in [*notices, *warnings(run, layout)]:
        console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print("settings", style="bold")
    for line in settings(dump(run)):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    for title, rows in (
        ("size", _size(run)),
        ("cost", _cost(run)),
        ("layout", _layout(run, layout)),
        ("memory per rank" if layout.world_size > 1 else "memory", _memory(run, layout)),
        ("router", _router(run)),
    ):
        if rows:
            console.print(_pairs(title, rows))
    console.print(_layers(run))


def fewest_ranks(run: Run) -> int:
    """Processes that the sizes in `parallel` ask for, with as few copies as the expert group allows."""
    sizes = run.parallel
    copies = sizes.replicate or max(1, sizes.expert // (sizes.shard * sizes.context))
    return sizes.pipeline * copies * sizes.shard * sizes.context * sizes.tensor


def settings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """A plain config as lines a.b.c=value, lists of plain values whole."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from settings(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from settings(item, (*path, index))
    else:
        yield f"{dotted(path)}={typed(value)}"


def warnings(run: Run, layout: Layout) -> list[str]:
    """What the user should know of a valid run: a router that sees the future, a first pass that costs time."""
    moe = run.model.moe
    if moe is None:
        return []
    texts = []
    if not resolve_router(router_name(moe.router)).Router.causal:
        texts.append(
            f"router {router_name(moe.router)} is not causal: which experts a token gets depends on later tokens of "
            "its row, so the training loss is a little too good, and generation routes otherwise"
        )
    if needs_first_pass(run, layout):
        texts.append(
            "balance scope global over several micro-batches needs a first forward pass without gradient, for the "
            "counts: about a third more FLOPs; micro_rows=batch_rows or scope=sequence does without"
        )
    if any(balance.scope == "micro_batch" for _, balance in balances(moe.router)):
        texts.append("balance scope micro_batch depends on micro_rows and on the number of processes")
    return texts


# ----------------------------------------------------------------------------------------------------------- tables


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table


def _size(run: Run) -> list[tuple[str, str]]:
    count = cost.parameters(run.model)
    unequal = run.model.moe is not None and len(set(expert_widths(run.model.moe))) > 1
    active = "parameters, active per token" + (" (expected under uniform routing)" if unequal else "")
    rows = [("parameters, total", _number(count.total)), (active, _number(count.active))]
    return rows + [(f"  {name}", _number(total)) for name, total in count.components.items()]


def _cost(run: Run) -> list[tuple[str, str]]:
    length = run.data.sequence_length
    per_token = cost.train_flops_per_token(run.model, length)
    tokens = cost.tokens_per_step(run)
    shares = cost.flops_by_component(run.model, length)
    forward = sum(shares.values())
    return [
        ("training FLOPs per token", _number(per_token)),
        ("  forward", ", ".join(f"{name} {value / forward:.1%}" for name, value in shares.items())),
        ("tokens per step", _number(tokens)),
        ("tokens, whole run", _number(tokens * run.train.steps)),
        ("FLOPs, whole run", _number(tokens * run.train.steps * per_token)),
    ]


def _layout(run: Run, layout: Layout) -> list[tuple[str, str]]:
    """Sizes, and where each group of parameters is; nothing for one rank."""
    if layout.world_size == 1:
        return []
    held = stage_parameters(run.model, range(run.model.num_layers))
    matrices, whole, experts = (sum(getattr(part, name) for part in held) for name in ("matrices", "whole", "experts"))
    copies = layout.stage_ranks // (layout.tensor * layout.dense_shards)
    stages = f"; blocks of {layout.pipeline} stages" if layout.pipeline > 1 else ""
    rows = [
        ("ranks", f"{layout.world_size}: {layout.describe()}"),
        ("rows per pass", f"{run.train.micro_rows} on each of {layout.data_ranks} ranks that see different rows"),
        (
            "matrices",
            _placed(matrices, {"shard · context": layout.dense_shards, "tensor": layout.tensor}, copies) + stages,
        ),
        ("norms, biases, routers", f"{_number(whole)}: whole on every rank, in float32{stages}"),
    ]
    if layout.pipeline > 1:
        blocks = ", ".join(f"{held.start}-{held.stop - 1}" for held in cost.stages_of(run, layout))
        rows.insert(1, ("blocks of the stages", f"{blocks}; schedule {run.parallel.pipeline_schedule}"))
    if experts:
        cuts = {"expert": layout.expert, "expert_shard": layout.expert_shard}
        rows.append(("experts", _placed(experts, cuts, layout.expert_replicate) + stages))
    return rows


def _placed(number: int, cuts: dict[str, int], copies: int) -> str:
    """How many parameters, how they are cut, and what a rank holds."""
    parts = [f"{count} over {name}" for name, count in cuts.items() if count > 1]
    pieces = 1
    for count in cuts.values():
        pieces *= count
    cut = f"cut into {' times '.join(parts)}, " if parts else "whole on every rank, "
    return f"{_number(number)}: {cut}{copies} cop{'y' if copies == 1 else 'ies'}, {_number(number / pieces)} on a rank"


def _memory(run: Run, layout: Layout) -> list[tuple[str, str]]:
    parts = {name: value for name, value in cost.memory_bytes(run, layout).items() if value}
    rows = [(name.replace("_", " "), value) for name, value in parts.items()]
    return [(name, f"{value / 2**20:,.1f} MiB") for name, value in [("all", sum(parts.values())), *rows]]


def _router(run: Run) -> list[tuple[str, str]]:
    moe = run.model.moe
    if moe is None:
        return []
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    pairs = [
        ("source", moe.router.source or "not stated"),
        ("rows per token", f"{rows:g} expected, of top_k={moe.top_k} and num_experts={moe.num_experts}"),
    ]
    for name, balance in balances(moe.router):
        weight = f"{balance.weight:g} (1.0 is balance), or {balance.weight / moe.top_k:g} where f is not divided by K"
        pairs.append((name, f"weight {weight}; scope {balance.scope}; mean over expert layers"))
    return pairs


def _layers(run: Run) -> Table:
    table = Table(title="layers (FLOPs: forward)", title_justify="left", title_style="bold", box=SIMPLE)
    for header in ("layer", "attention", "feed-forward", "parameters", "active", "FLOPs/token"):
        table.add_column(header, justify="left" if header in ("layer", "attention", "feed-forward") else "right")
    counts = cost.parameters(run.model).layers
    flops = cost.flops_by_layer(run.model, run.data.sequence_length)
    rows = [
        (
            _attention(run.model, layer),
            _feed_forward(run.model, layer),
            _number(sum(counts[layer].values())),
            _number(sum(counts[layer].values()) - _idle(run.model, layer, counts[layer])),
            _number(sum(flops[layer].values())),
        )
        for layer in range(run.model.num_layers)
    ]
    for row, group in groupby(range(len(rows)), key=lambda layer: rows[layer]):
        first, *rest = group
        table.add_row(f"{first}-{rest[-1]}" if rest else str(first), *row)
    return table


def _attention(model: Model, layer: int) -> str:
    attention = model.attention
    if not isinstance(attention, GroupedQueryAttention):
        return f"latent, {attention.num_heads} heads, rank {attention.kv_rank}"
    window = attention.windows[layer % len(attention.windows)]
    reach = f", window {window}" if window else ""
    return f"{attention.num_heads}/{attention.num_kv_heads} heads of {attention.head_dim}{reach}"


def _feed_forward(model: Model, layer: int) -> str:
    if not is_moe_layer(model, layer):
        return f"dense {ffn_hidden(model, layer)}"
    moe = layer_experts(model, layer)
    shared = f" + shared {moe.shared_hidden}{' gated' if moe.shared_gate else ''}" if moe.shared_hidden else ""
    latent = f" in latent {moe.latent_dim}" if moe.latent_dim else ""
    widths = expert_widths(moe)
    width = str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
    kind = f" {moe.activation}" if moe.activation != "swiglu" else ""
    biased = " with biases" if moe.expert_bias else ""
    return f"{moe.top_k} of {moe.num_experts}{kind} experts of {width}{biased}{latent}{shared}"


def _idle(model: Model, layer: int, counts: dict[str, int]) -> int:
    """Parameters of the experts that a token does not use; of mean width, where they differ."""
    experts = counts.get("experts", 0)
    if not experts:
        return 0
    moe = layer_experts(model, layer)
    return experts - round(moe.top_k * experts / moe.num_experts)


def _number(value: float) -> str:
    """1,234 in full; from a million on with a letter: 12.34 M."""
    for unit, letter in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3f} {letter}"
    return f"{value:,.0f}"
