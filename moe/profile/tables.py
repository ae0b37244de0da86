"""A profile on the console."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
WIDTH = 132
"""Columns below which the tables would break their cells."""


def show(record: Json, console: Console) -> None:
    """Print a profile as tables."""
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
        console.print(compiled_table(record["compiled"], chip["arch"]))


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


def compiled_table(facts: list[Json], arch: str) -> Table:
    """The compiler's facts, a row for each kernel."""
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
