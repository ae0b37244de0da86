"""The command: read what is asked, predict, compile, measure, print, plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moe.errors import UserError
from moe.profile.facts import compiled_facts, measured_seconds
from moe.profile.inputs import Routing, machine_of, routing_of, shape_of
from moe.profile.record import record_of
from moe.profile.tables import show
from moe_triton.prediction import Kernel, predict
from moe_triton.roofline import Machine, Shape

Json = dict[str, Any]


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
    record = record_of(shape, machine, rows, predictions, slowest, compiled, measured)
    if out is not None:
        _plot(shape, machine, predictions[slowest], measured, rows, out)
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(record))
    else:
        show(record, console)
        if out is not None:
            console.print(f"plot: {out}", soft_wrap=True, highlight=False)
    return record


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
