"""The page of results that scripts/gpu_check writes: docs/gpu_results.md."""

import time
from collections.abc import Iterable

from gpu_run import Check, Json, outcome


def markdown(check: Check, stages: Iterable[str]) -> str:
    """The page of results: those of this device and these versions."""
    by_stage = {stage: [line for line in check.latest() if line["stage"] == stage] for stage in stages}
    text = [
        "# Kernels on a GPU",
        "",
        f"{check.key()}; {time.strftime('%Y-%m-%d')}. Written by `scripts/gpu_check` from `{check.record.name}`.",
        "Times are medians of 20, layers interleaved in one process, bfloat16; TFLOP/s counts useful FLOPs only.",
        "",
        *_table("stage | passed | failed | skipped", [_tally(stage, lines) for stage, lines in by_stage.items()]),
        *(f"{line['stage']}, {line['item']}: {outcome(line)}" for line in check.latest() if not line["ok"]),
    ]
    layers = [row for line in by_stage["bench"] + by_stage["peers"] for row in _layer_rows(line)]
    headers = "shape, routing | layer | forward ms | both ms | quartiles | TFLOP/s | of the floor | peak GiB"
    text += ["", "## Layers", "", *_table(headers, layers)]
    products = [row for line in by_stage["product"] for row in _product_rows(line)]
    text += [
        "",
        "## One product alone",
        "",
        *_table("rows × depth × columns | arm | ms | quartiles | TFLOP/s", products),
    ]
    rows = [row for line in by_stage["kernels"] for row in _kernel_rows(line)]
    headers = "shape | kernel | measured ms | predicted ms | TFLOP/s | TB/s"
    return "\n".join([*text, "", "## Kernels", "", *_table(headers, rows)]) + "\n"


def _table(headers: str, rows: list[list[str]]) -> list[str]:
    count = headers.count("|") + 1
    return [f"| {headers} |", "| --- " * count + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _tally(stage: str, lines: list[Json]) -> list[str]:
    skipped, failed = sum("skipped" in line for line in lines), sum(not line["ok"] for line in lines)
    return [stage, *map(str, (len(lines) - failed - skipped, failed, skipped))]


def _layer_rows(line: Json) -> list[list[str]]:
    rows = []
    for arm, found in line.get("arms", {}).items():
        both, low, high, _ = found["both"]
        rates = [f"{line['useful_flops'] / both / 1e12:.0f}", f"{line['floor_seconds'] / both:.0%}"]
        if arm == "dense":
            rates[1] = "-"  # it moves other bytes
        times = [f"{found['forward'][0] * 1e3:.2f}", f"{both * 1e3:.2f}", f"{low * 1e3:.2f} to {high * 1e3:.2f}"]
        peak = f"{found['peak_bytes'] / 2**30:.2f}" if found["peak_bytes"] is not None else "-"
        rows.append([line["item"], arm, *times, *rates, peak])
    return rows + [[line["item"], arm, why, *["-"] * 5] for arm, why in line.get("failed", {}).items()]


def _product_rows(line: Json) -> list[list[str]]:
    rows = []
    for arm, (seconds, low, high, _) in line.get("products", {}).items():
        times = [f"{seconds * 1e3:.2f}", f"{low * 1e3:.2f} to {high * 1e3:.2f}"]
        rows.append([line["item"], arm, *times, f"{line['flops'] / seconds / 1e12:.0f}"])
    return rows


def _kernel_rows(line: Json) -> list[list[str]]:
    rows = []
    for name, kernel in line.get("kernels", {}).items():
        seconds = kernel["measured"]
        if seconds:
            rates = [f"{kernel['flops'] / seconds / 1e12:.0f}", f"{kernel['bytes'] / seconds / 1e12:.2f}"]
            rows.append([line["item"], name, f"{seconds * 1e3:.3f}", f"{kernel['predicted'] * 1e3:.3f}", *rates])
    return rows
