"""`moe plan`: which layout to train a recipe with on so many GPUs of a kind, before any is rented.

Everything here is predicted: memory and traffic counted (`moe.cost.memory`, `moe.cost.traffic`), time from rates
(`moe.cost.step_time`); docs/scaling.md says how far off that was for published trainings.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moe.config.load import load
from moe.config.schema import Run
from moe.config.words import typed
from moe.cost.charges import Charge, Graded, planned_charge
from moe.cost.search import SIZES, Found, Plan, search, usable_memory
from moe.cost.step_time import OURS, Assumptions, Cluster
from moe.cost.totals import totals as totals_of
from moe.errors import ConfigError, UserError
from moe_triton.roofline import MACHINES

Json = dict[str, Any]
GIB = 2**30
WIDTH = 118
"""Columns below which the tables would break their cells."""
HONEST = (
    "predicted, not measured: docs/scaling.md has the model, its constants and its errors against published trainings "
    "(within 36 % for ten of eleven); plans within 3 % of each other are not told apart"
)


def plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    gpu: str = "h100",
    network: float = 0.0,
    imbalance: float = 1.0,
    top: int = 5,
    as_json: bool = False,
    console: Console | None = None,
) -> Json:
    """Print (and return) the best layouts of a recipe on `gpus` GPUs.

    gpu: a machine of the roofline table. network: GB/s of each GPU to other nodes, 0 for the vendor's system. imbalance:
    rows of the fullest rank over the mean. Raises ConfigError if no layout is allowed, UserError if none fits.
    """
    run = load(recipe, overrides)
    cluster = cluster_of(gpu, network)
    assume = replace(OURS, imbalance=imbalance)
    found = search(run, gpus, cluster, held={text.partition("=")[0] for text in overrides}, assume=assume)
    if not found.plans:
        raise UserError(_nothing_fits(run, gpus, gpu, found, cluster))
    record = _record(recipe, overrides, run, gpus, gpu, cluster, assume, found, top)
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(record))
    else:
        console.width = max(console.width, WIDTH)
        _print(record, console)
    return record


def cluster_of(gpu: str, network: float = 0.0) -> Cluster:
    """GPUs by name, with the vendor's links unless `network` (GB/s) says otherwise. Raises ConfigError for an unknown one."""
    if gpu not in MACHINES:
        raise ConfigError(f"gpu {gpu!r} is not in the table of the roofline: use one of {', '.join(MACHINES)}")
    cluster = Cluster.of(MACHINES[gpu])
    return replace(cluster, links=replace(cluster.links, network=network * 1e9)) if network else cluster


def typed_overrides(plan: Plan, run: Run) -> list[str]:
    """What to type after the recipe: the settings that differ from those that it has already."""
    paths = [("parallel", name) for name in SIZES] + [("train", "micro_rows"), ("train", "activation_checkpointing")]
    pairs = [(path, getattr(getattr(plan.run, path[0]), path[1])) for path in paths]
    return [
        f"{part}.{name}={typed(value)}" for (part, name), value in pairs if value != getattr(getattr(run, part), name)
    ]


def _nothing_fits(run: Run, gpus: int, gpu: str, found: Found, cluster: Cluster) -> str:
    assert found.smallest is not None
    least, layout = found.smallest
    room = usable_memory(cluster) / GIB
    return (
        f"{run.name} does not fit {gpus} {gpu}: the leanest layout ({layout.describe()}) needs {least / GIB:,.1f} GiB per "
        f"GPU, and {room:,.1f} GiB can be used: take more GPUs or larger ones, or a smaller train.micro_rows, sequence or model"
    )


# -------------------------------------------------------------------------------------------------------------- record


def _record(
    recipe: str,
    overrides: Sequence[str],
    run: Run,
    gpus: int,
    gpu: str,
    cluster: Cluster,
    assume: Assumptions,
    found: Found,
    top: int,
) -> Json:
    return {
        "recipe": recipe,
        "overrides": list(overrides),
        "name": run.name,
        "gpus": gpus,
        "gpu": gpu,
        "network_bytes_per_second": cluster.links.network,
        "node_bytes_per_second": cluster.links.node,
        "gpus_per_node": cluster.links.joined,
        "memory_usable": usable_memory(cluster),
        "assumptions": asdict(assume),
        "layouts": len(found.plans),
        "layouts_refused": found.refused,
        "variants_too_large": found.too_large,
        "plans": [plan_record(plan, run, gpus, gpu) for plan in found.plans[:top]],
    }


def plan_record(plan: Plan, run: Run, gpus: int, gpu: str) -> Json:
    """One plan as plain values: what to type, memory, traffic, time, and the whole run's totals."""
    return {
        "type": typed_overrides(plan, run),
        "layout": {name: getattr(plan.layout, name) for name in (*SIZES, "expert_shard", "expert_replicate")},
        "micro_rows": plan.run.train.micro_rows,
        "activation_checkpointing": plan.run.train.activation_checkpointing,
        "memory_bytes": plan.memory,
        "memory_total": plan.memory_total,
        "sent_bytes": plan.sent,
        "sent_total": sum(plan.sent.values()),
        "seconds": plan.step.parts,
        "step_seconds": plan.step.seconds,
        "tokens_per_second": plan.step.tokens_per_second,
        "mfu": plan.step.mfu,
        "whole_run": whole_run(plan, gpus, gpu),
    }


def whole_run(plan: Plan, gpus: int, gpu: str) -> Json:
    """Totals of all steps, and what they cost at the recipe's `cost.*`: graded numbers, null where a rate is not known.

    FLOPs and checkpoints include evaluations and saves; time, and what follows from it, the steps only. Energy takes every
    board at its limit all the time, so it is an upper bound.
    """
    seconds = plan.run.train.steps * plan.step.seconds
    used = totals_of(plan.run, plan.layout)
    cost = planned_charge(plan.run.cost, MACHINES[gpu].chip.name, gpus, seconds)
    return {
        "steps": plan.run.train.steps,
        "tokens": plan.run.train.steps * plan.run.train.batch_rows * plan.run.data.sequence_length,
        "days": seconds / 86400,
        "gpu_hours": gpus * seconds / 3600,
        "flops": used.flops,
        "checkpoints": used.checkpoints,
        "checkpoint_bytes": used.checkpoint_bytes,
        "bytes_written": used.bytes_written,
        "bytes_kept": used.bytes_kept,
        **{name: None if value is None else asdict(value) for name, value in cost_items(cost)},
    }


def cost_items(cost: Charge) -> list[tuple[str, Graded | None]]:
    """The parts of a charge by name."""
    return [("kwh", cost.kwh), ("gco2e", cost.gco2e), ("dollars", cost.dollars)]


# -------------------------------------------------------------------------------------------------------------- tables


def _print(record: Json, console: Console) -> None:
    best, *_ = record["plans"]
    head = (
        f"{record['name']} on {record['gpus']} {record['gpu']}, {record['gpus_per_node']} to a node: "
        f"{record['layouts']} layouts fit, {record['variants_too_large']} variants of layouts do not, "
        f"{record['layouts_refused']} layouts break a rule"
    )
    console.print(head, style="bold", soft_wrap=True, highlight=False)
    console.print(_plans(record))
    total, room = best["memory_total"] / GIB, record["memory_usable"] / GIB
    for title, rows in (
        (f"memory per GPU, plan 1: {total:.1f} GiB of {room:.1f} usable", _shares(best["memory_bytes"], GIB, "GiB")),
        (
            f"sent by each GPU per step, plan 1: {best['sent_total'] / 1e9:,.2f} GB",
            _shares(best["sent_bytes"], 1e9, "GB"),
        ),
        (f"step of plan 1: {best['step_seconds']:.3f} s", _shares(best["seconds"], 1e-3, "ms")),
        ("whole run, plan 1", totals(best)),
    ):
        if rows:
            console.print(title, style="bold", highlight=False)
            console.print(_pairs(rows))
    console.print("start plan 1 with", style="bold")
    console.print(f"  {command(record, best)}", soft_wrap=True, highlight=False, markup=False)
    console.print(HONEST, soft_wrap=True, highlight=False, style="dim")


def totals(best: Json) -> list[tuple[str, str]]:
    """Rows about the whole run."""
    run = best["whole_run"]
    return [
        ("steps", f"{run['steps']:,}"),
        ("tokens", f"{run['tokens']:,}"),
        ("days", f"{run['days']:,.2f}"),
        ("GPU hours", f"{run['gpu_hours']:,.0f}"),
        ("FLOPs executed", f"{run['flops']:.4g}"),
        (
            f"{run['checkpoints']:,} checkpoint(s)",
            f"{run['checkpoint_bytes'] / GIB:,.2f} GiB each, {run['bytes_kept'] / GIB:,.2f} kept, "
            f"{run['bytes_written'] / GIB:,.2f} written",
        ),
        ("kWh, at most", _graded(run["kwh"])),
        ("gCO2e, at most", _graded(run["gco2e"])),
        ("US dollars", _graded(run["dollars"])),
    ]


def _graded(entry: Json | None) -> str:
    """A number, how it is known and from where."""
    return "unknown" if entry is None else f"{entry['value']:,.2f}  {entry['grade']}: {entry['source']}"


def command(record: Json, best: Json) -> str:
    """The torchrun line of a plan, for the node that all others know as $HEAD."""
    per_node = min(record["gpus"], record["gpus_per_node"])
    nodes = -(-record["gpus"] // per_node)
    where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 " if nodes > 1 else "--standalone "
    words = [record["recipe"], *record["overrides"], *best["type"]]
    return f"torchrun {where}--nproc-per-node {per_node} -m moe.train {' '.join(words)}"


def _plans(record: Json) -> Table:
    table = Table(box=SIMPLE)
    for header in ("", "layout", "rows", "recompute", "GiB", "GB sent", "step s", "tokens/s", "MFU"):
        table.add_column(header, justify="left" if header in ("layout", "recompute") else "right")
    for number, row in enumerate(record["plans"], 1):
        sizes = " ".join(f"{name}={row['layout'][name]}" for name in SIZES if row["layout"][name] > 1)
        table.add_row(
            str(number),
            sizes or "one GPU",
            str(row["micro_rows"]),
            "yes" if row["activation_checkpointing"] else "no",
            f"{row['memory_total'] / GIB:.1f}",
            f"{row['sent_total'] / 1e9:,.1f}",
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
        )
    return table


def _shares(values: dict[str, float], unit: float, name: str) -> list[tuple[str, str]]:
    total = sum(values.values())
    rows = sorted(((key, value) for key, value in values.items() if value > 0), key=lambda row: -row[1])
    return [(key.replace("_", " "), f"{value / unit:,.2f} {name}  {value / total:.0%}") for key, value in rows]


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table
