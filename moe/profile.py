"""`moe profile`: what the expert layer's kernels cost on a named chip, predicted, compiled, and measured if there is a GPU.

The prediction is moe_triton.prediction's: counted from the tiles that the tuning table gives, for a routing that is uniform,
Zipf-distributed or recorded by a run. Beside it stand the compiler's facts about the same launches, and the floors of two
other published dataflows. Times are measured only where the process sees a GPU.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moe.analysis.rows import read_routing
from moe.config.load import load
from moe.config.schema import expert_dim, expert_widths
from moe.errors import ConfigError, UserError
from moe_triton import roofline
from moe_triton.prediction import Kernel, predict
from moe_triton.roofline import MACHINES, Machine, Shape

Json = dict[str, Any]
SHAPE = re.compile(r"\s*\d+\s*(,\s*\d+\s*){4}")
WIDTH = 132
"""Columns below which the tables would break their cells."""
SMALL = 1024
"""Sizes from twice this on are compiled with the same remainder: masks and alignment, so the facts, stay the same."""
LEFT_OUT = (
    "left out of the prediction: launch latency, a tile's prologue and epilogue, how far triton's main loop stays below "
    "the rate of large products, loads that do not hide, clocks under power"
)


@dataclass(frozen=True)
class Routing:
    """Rows per expert, and where they come from."""

    counts_LE: tuple[tuple[float, ...], ...]
    """One tuple per layer of the record; one in all for a made-up routing."""
    layers: tuple[int, ...]
    """True indices of the layers; empty for a made-up routing."""
    origin: str


def profile(
    target: str,
    overrides: Sequence[str] = (),
    *,
    chip: str = "h100",
    routing: str = "uniform",
    out: Path | None = None,
    as_json: bool = False,
    trace: Path | None = None,
    console: Console | None = None,
) -> Json:
    """Print (and return) the profile of one expert layer.

    target: a recipe, or the shape "T,D,F,E,K". chip: a key of MACHINES. routing: "uniform", "zipf" or a run's routing.jsonl.
    out: the roofline plot (.png, .svg, .pdf). as_json prints JSON in place of tables. trace: Chrome trace of the measured
    step, on a GPU. Raises UserError for what is unknown or does not fit together.
    """
    shape = shape_of(target, overrides)
    machine = machine_of(chip)
    rows = routing_of(routing, shape)
    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(
            f"the plot's file must end in .png, .svg or .pdf, not {out.suffix or 'nothing'}: e.g. {out.stem}.png"
        )
    predictions = [predict(shape, machine, counts) for counts in rows.counts_LE]
    seconds = [sum(kernel.seconds for kernel in kernels) for kernels in predictions]
    slowest = seconds.index(max(seconds))
    compiled = compiled_facts(shape, machine.chip.arch)
    measured = measured_seconds(shape, rows.counts_LE[slowest], trace)
    record = _record(shape, machine, rows, predictions, slowest, compiled, measured)
    if out is not None:
        _plot(shape, machine, predictions[slowest], measured, rows, out)
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(record))
    else:
        _print(record, console)
        if out is not None:
            console.print(f"plot: {out}", soft_wrap=True, highlight=False)
    return record


# --------------------------------------------------------------------------------------------------------------- input


def shape_of(target: str, overrides: Sequence[str] = ()) -> Shape:
    """The expert layer of a recipe (T: the tokens of a micro-batch), or of the text "T,D,F,E,K"."""
    if SHAPE.fullmatch(target):
        if overrides:
            raise ConfigError(
                f"a shape ({target}) has no settings to override ({overrides[0]}): change the shape itself"
            )
        T, D, F, E, K = (int(part) for part in target.split(","))
        if min(T, D, F, E, K) < 1 or K > E:
            raise ConfigError(f"the shape T,D,F,E,K = {target} must be positive, with K ({K}) at most E ({E})")
        return Shape(T, D, F, E, K)
    if re.fullmatch(r"[\d\s,]+", target):
        count = len(target.split(","))
        raise ConfigError(f"a shape is five numbers T,D,F,E,K, and {target} has {count}: e.g. 32768,2048,1024,64,8")
    run = load(target, overrides)
    moe = run.model.moe
    if moe is None:
        raise ConfigError(f"{target} has no expert layers: profile a sparse recipe, or a shape T,D,F,E,K")
    widths = set(expert_widths(moe))
    if len(widths) > 1:
        raise ConfigError(
            f"moe profile describes the grouped kernels, which take experts of one width, and the experts of {target} have "
            f"{len(widths)} ({min(widths)} to {max(widths)}): profile a shape T,D,F,E,K, or set model.moe.expert_widths=[]"
        )
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    T = run.train.micro_rows * run.data.sequence_length
    return Shape(T, expert_dim(run.model), min(widths), moe.num_experts, rows)


def machine_of(chip: str) -> Machine:
    """A chip by name. Raises ConfigError listing the known ones."""
    if chip not in MACHINES:
        raise ConfigError(f"chip {chip!r} is not in the table of the roofline: use one of {', '.join(MACHINES)}")
    return MACHINES[chip]


def routing_of(routing: str, shape: Shape) -> Routing:
    """Rows per expert: "uniform", "zipf", or those of the last step in a routing.jsonl."""
    if routing == "uniform":
        return Routing((tuple(roofline.uniform_counts(shape)),), (), "uniform: experts drawn at random")
    if routing == "zipf":
        return Routing((tuple(roofline.zipf_counts(shape)),), (), "zipf: experts drawn with probability 1/rank")
    path = Path(routing)
    if not path.is_file():
        raise ConfigError(
            f"routing {routing!r} must be uniform, zipf, or the routing.jsonl of a run, which does not exist"
        )
    rows = read_routing(path)
    if not rows:
        raise UserError(f"{path} holds no line: train at least logging.routing_every steps.")
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    experts = len(last[0]["counts"])
    if experts != shape.E:
        raise ConfigError(
            f"{path} counts {experts} experts and the shape has {shape.E}: profile the recipe that the run was made from"
        )
    counts = tuple(tuple(map(float, row["counts"])) for row in last)
    if not all(sum(layer) > 0 for layer in counts):
        raise UserError(
            f"{path}: at step {last[0]['step']} a layer has no rows at all, so there is nothing to profile."
        )
    return Routing(counts, tuple(row["layer"] for row in last), f"{path}, step {last[0]['step']}")


# ------------------------------------------------------------------------------------------------------------ compiled


def compiled_facts(shape: Shape, target: str) -> list[Json] | str:
    """What the compiler makes of each launch for a target; a sentence where this process cannot compile."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from moe_triton import compile_only, measure  # needs triton, which not every platform has
    from moe_triton.targets import nearest

    if compile_only.INTERPRETING:
        return "TRITON_INTERPRET is set, so nothing is compiled"
    D, F = (size if size < 2 * SMALL else SMALL + size % SMALL for size in (shape.D, shape.F))
    rows = max(1, min(round(shape.R / shape.E), 128))
    with compile_only.compiling(nearest(target).name) as launches:
        inputs = measure.arguments(Shape(2 * rows, D, F, 2, 1), [rows, rows], "cpu")
        measure.step(inputs, inputs["x_TD"].detach())
    facts = {launch.kernel: compile_only.facts(launch, nearest(target).name) for launch in launches}
    return [
        {
            "kernel": measure.short_name(fact.kernel),
            "target": fact.target,
            "registers": fact.registers,
            "spills": fact.spills,
            "shared": fact.shared,
            "matrix": fact.matrix,
            "num_warps": fact.num_warps,
            "num_stages": fact.num_stages,
        }
        for fact in facts.values()
    ]


# ------------------------------------------------------------------------------------------------------------ measured


def measured_seconds(shape: Shape, counts: Sequence[float], trace: Path | None) -> dict[str, float] | None:
    """Median seconds of every kernel on this process's GPU; None without one, or without triton."""
    if find_spec("triton") is None:
        return None
    from moe_triton.measure import kernel_seconds  # needs triton, which not every platform has

    return kernel_seconds(shape, counts, trace)


# -------------------------------------------------------------------------------------------------------------- output


def _record(
    shape: Shape,
    machine: Machine,
    routing: Routing,
    predictions: list[list[Kernel]],
    slowest: int,
    compiled: list[Json] | str,
    measured: dict[str, float] | None,
) -> Json:
    kernels = predictions[slowest]
    floors = {flow: roofline.floor_seconds(shape, machine, flow) for flow in roofline.FLOWS}
    return {
        "schema_version": 1,
        "shape": {**asdict(shape), "R": shape.R},
        "chip": {
            "name": machine.name,
            "arch": machine.chip.arch,
            "flops": machine.flops,
            "bandwidth": machine.bandwidth,
            "vendor_flops": machine.chip.bf16,
            "basis": machine.basis,
        },
        "routing": {
            "origin": routing.origin,
            "layer": routing.layers[slowest] if routing.layers else None,
            "layers": len(routing.layers),
            "mean_seconds": sum(sum(kernel.seconds for kernel in layer) for layer in predictions) / len(predictions),
        },
        "kernels": [
            {
                "name": kernel.name,
                "pass": "backward" if kernel.backward else "forward",
                "config": kernel.config,
                "flops": kernel.flops,
                "tile_flops": kernel.tile_flops,
                "bytes": kernel.bytes,
                "floor_bytes": kernel.floor_bytes,
                "intensity": kernel.intensity,
                "tiles": kernel.tiles,
                "tile_share": kernel.tile_share,
                "wave_share": kernel.wave_share,
                "bound": kernel.bound,
                "floor_seconds": kernel.floor_seconds,
                "seconds": kernel.seconds,
                "l2_seconds": kernel.l2_seconds,
                "measured_seconds": (measured or {}).get(kernel.name),
            }
            for kernel in kernels
        ],
        "seconds": sum(kernel.seconds for kernel in kernels),
        "l2_bound_seconds": sum(max(kernel.seconds, kernel.l2_seconds or 0.0) for kernel in kernels)
        if machine.l2_bandwidth
        else None,
        "floor_seconds": {flow: {"forward": fwd, "backward": bwd} for flow, (fwd, bwd) in floors.items()},
        "useful_flops": roofline.useful_flops(shape),
        "saved_bytes": {flow: roofline.saved_bytes(shape, flow) for flow in (*floors, "recompute_hidden")},
        "launches": {
            "routing": roofline.ROUTING_LAUNCHES,
            "forward": sum(not kernel.backward for kernel in kernels),
            "backward": sum(kernel.backward for kernel in kernels) + roofline.SMALL_LAUNCHES,
        },
        "left_out": LEFT_OUT,
        "compiled": compiled,
        "measured": measured,
    }


def _print(record: Json, console: Console) -> None:
    console.width = max(console.width, WIDTH)
    shape, chip = record["shape"], record["chip"]
    sizes = ", ".join(f"{letter} {value:g}" for letter, value in shape.items())
    routing = record["routing"]
    if routing["layer"] is not None:
        routing = {"origin": f"{routing['origin']}, layer {routing['layer']}, the slowest of {routing['layers']}"}
    for line in (
        f"expert layer: {sizes}; bfloat16, forward and backward",
        f"chip: {chip['name']} ({chip['arch']}), {chip['flops'] / 1e12:.0f} TFLOP/s and {chip['bandwidth'] / 1e12:.1f} TB/s "
        f"({chip['basis']})",
        f"routing: {routing['origin']}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_costs(record))
    for line in _totals(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if isinstance(record["compiled"], str):
        console.print(f"compiled: nothing, since {record['compiled']}", markup=False, soft_wrap=True)
    else:
        console.print(_compiled(record["compiled"], chip["arch"]))


def _costs(record: Json) -> Table:
    table = Table(box=SIMPLE)
    headers = "kernel|tile|GFLOP|GB|FLOP/byte|tiles|useful|busy|floor ms|predicted ms|bound|% of floor"
    for header in headers.split("|"):
        table.add_column(header, justify="left" if header in ("kernel", "tile", "bound") else "right")
    if record["measured"]:
        table.add_column("measured ms", justify="right")
    for kernel in record["kernels"]:
        config = kernel["config"]
        tile = f"{config['BLOCK_M']}×{config['BLOCK_N']}×{config['BLOCK_K']}" if config else "-"
        measured = kernel["measured_seconds"]
        table.add_row(
            kernel["name"],
            tile,
            f"{kernel['flops'] / 1e9:,.0f}",
            f"{kernel['bytes'] / 1e9:.2f}",
            f"{kernel['intensity']:.0f}" if kernel["flops"] else "-",
            f"{kernel['tiles']:,}" if config else "-",
            f"{kernel['tile_share']:.1%}" if config else "-",
            f"{kernel['wave_share']:.1%}" if config else "-",
            f"{kernel['floor_seconds'] * 1e3:.3f}",
            f"{kernel['seconds'] * 1e3:.3f}",
            kernel["bound"],
            f"{kernel['floor_seconds'] / kernel['seconds']:.0%}",
            *([f"{measured * 1e3:.3f}" if measured else "-"] if record["measured"] else []),
        )
    return table


def _totals(record: Json) -> list[str]:
    flops, seconds = record["useful_flops"], record["seconds"]
    floors = {flow: both["forward"] + both["backward"] for flow, both in record["floor_seconds"].items()}
    saved = record["saved_bytes"]
    launches = record["launches"]
    lines = [
        f"predicted: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} useful TFLOP/s, {floors['ours'] / seconds:.0%} of the "
        f"floor ({floors['ours'] * 1e3:.2f} ms: useful FLOPs at that rate, every tensor moved once)",
        "same products in other dataflows, floors: "
        + ", ".join(
            f"{flow} {floors[flow] * 1e3:.2f} ms ({floors[flow] / floors['ours']:.2f}x)" for flow in list(floors)[1:]
        ),
        "saved for backward: "
        + ", ".join(f"{flow} {size / 2**20:,.0f} MiB" for flow, size in saved.items())
        + "; indices and router weights beside",
        f"launches: {launches['routing']} routing, {launches['forward']} forward, {launches['backward']} backward",
        record["left_out"],
    ]
    if record["l2_bound_seconds"]:
        share = floors["ours"] / record["l2_bound_seconds"]
        lines.insert(
            1,
            f"if L2 feeds no more than assumed, these tiles need {record['l2_bound_seconds'] * 1e3:.2f} ms, "
            f"{share:.0%} of the floor",
        )
    if record["routing"]["layer"] is not None:
        lines.insert(
            1, f"mean over the {record['routing']['layers']} layers: {record['routing']['mean_seconds'] * 1e3:.2f} ms"
        )
    if record["measured"] is None:
        lines.append("measured: nothing, since this process sees no GPU")
    return lines


def _compiled(facts: list[Json], arch: str) -> Table:
    table = Table(title=f"compiled for {facts[0]['target'] if facts else arch}", title_justify="left", box=SIMPLE)
    for header in ("kernel", "warps", "stages", "registers", "spills", "shared KiB", "matrix instructions"):
        table.add_column(header, justify="left" if header in ("kernel", "matrix instructions") else "right")
    for fact in facts:
        table.add_row(
            fact["kernel"],
            str(fact["num_warps"]),
            str(fact["num_stages"]),
            str(fact["registers"]),
            str(fact["spills"]),
            f"{fact['shared'] / 1024:.1f}",
            ", ".join(f"{name} ×{count}" for name, count in fact["matrix"].items()) or "-",
        )
    return table


def _plot(
    shape: Shape,
    machine: Machine,
    kernels: list[Kernel],
    measured: dict[str, float] | None,
    routing: Routing,
    path: Path,
) -> None:
    from moe.analysis.roofline_plot import Point, Roof, plot_roofline  # matplotlib takes a second to import

    points = [
        Point(
            kernel.name,
            kernel.intensity,
            kernel.flops / kernel.seconds,
            kernel.flops / measured[kernel.name] if measured and kernel.name in measured else None,
        )
        for kernel in kernels
    ]
    roof = Roof(machine.name, machine.flops, machine.bandwidth, machine.chip.bf16)
    sizes = f"T {shape.T}, D {shape.D}, F {shape.F}, E {shape.E}, K {shape.K:g}"
    plot_roofline(roof, points, f"{machine.name}: {sizes}; {routing.origin.split(':')[0]} routing", path)
