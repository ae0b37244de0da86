"""What only a GPU can show of the kernels, in stages ordered by value; scripts/gpu_check says how to run it.

A stage is a list of named items. Each item's result is one line of the record as soon as it is there, so a run that is cut
off loses one item, and the next run goes on with the first item that has no line from this device. Failures are lines too.
Exit code: 0 if every item passed, 1 if one failed, 3 if the time was over before the last one. `--rehearse` replaces the device
by the compile-only driver: every stage runs, no value is compared, and the record is in a temporary folder unless named.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gpu_stages
import torch
from gpu_stages import STAGES, Check, Json

from moe_triton.compile_only import compiling

ROOT = Path(__file__).resolve().parents[1]


def run_stage(check: Check, stage: str) -> bool:
    """Run the items of a stage that have no result yet, until its time is over; whether all of them have one now."""
    started = time.monotonic()
    for item, run in STAGES[stage](check):
        if check.done(stage, item):
            continue
        if time.monotonic() - started > check.seconds:
            print(f"{stage}: time is over before {item!r}; call again to go on", flush=True)
            return False
        begun = time.monotonic()
        try:
            result = {"ok": True, **run()}
        except AssertionError as error:
            # in a rehearsal outputs are unwritten memory, so the suite's criterion, and that alone, may fail
            result = {"ok": check.rehearse and stage == "parity", "error": str(error)[:2000]}
        except Exception as error:
            message, trace = f"{type(error).__name__}: {str(error)[:1500]}", traceback.format_exc()[-3000:]
            result = {"ok": False, "error": message, "trace": trace}
        result["wall_seconds"] = round(time.monotonic() - begun, 2)
        check.add(stage, item, result)
        print(f"{stage}: {item}: {outcome(result)} ({result['wall_seconds']} s)", flush=True)
        if not check.rehearse:
            torch.cuda.empty_cache()
    return True


def read_record(record: Path) -> list[Json]:
    """The lines of an earlier run; one that was cut off in the middle of its last line loses that line."""
    lines = record.read_text().splitlines() if record.exists() else []
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{record}, line {number}: not JSON: delete the line") from None
            record.write_text("".join(f"{whole}\n" for whole in lines[:-1]))
    return results


def outcome(result: Json) -> str:
    """An item's result in a word or a sentence."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    return "ok" if result["ok"] else f"FAILED: {result['error']}"


def markdown(check: Check) -> str:
    """The page of results: those of this device and these versions."""
    by_stage = {stage: [line for line in check.latest() if line["stage"] == stage] for stage in STAGES}
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


def _kernel_rows(line: Json) -> list[list[str]]:
    rows = []
    for name, kernel in line.get("kernels", {}).items():
        seconds = kernel["measured"]
        if seconds:
            rates = [f"{kernel['flops'] / seconds / 1e12:.0f}", f"{kernel['bytes'] / seconds / 1e12:.2f}"]
            rows.append([line["item"], name, f"{seconds * 1e3:.3f}", f"{kernel['predicted'] * 1e3:.3f}", *rates])
    return rows


def publish(check: Check) -> None:
    """Write the page, and copy page and record to $OUT (at most six files, the trace and tuned.json included)."""
    page = check.record.with_suffix(".md")
    page.write_text(markdown(check))
    out = os.environ.get("OUT")
    if out and not check.rehearse:
        for path in (page, check.record):
            shutil.copy(path, out)
    print(f"results: {page}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)}; by default all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a driver that launches nothing")
    parser.add_argument("--minutes", type=float, default=8, help="for each stage")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("--record", type=Path, help="by default docs/gpu_results.jsonl")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}: the stages are {', '.join(STAGES)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("this process sees no GPU: run it where torch.cuda.is_available(), or with --rehearse")
    with ExitStack() as stack:
        record = arguments.record
        if record is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory()) if arguments.rehearse else ROOT / "docs"
            record = Path(folder, "gpu_results.jsonl")
        device = "cpu" if arguments.rehearse else "cuda"
        check = Check(arguments.rehearse, device, record, arguments.minutes * 60, arguments.retry)
        check.lines = read_record(record)
        launches: list[Any] = stack.enter_context(compiling("sm_90")) if arguments.rehearse else []
        if arguments.child == ["races"]:
            gpu_stages.awkward_step(check)
            return 0
        if arguments.child:
            gpu_stages.compile_share(check, *arguments.child)
            return 0
        complete = all([run_stage(check, stage) for stage in arguments.stages or STAGES])
        publish(check)
        if arguments.rehearse:
            names = sorted({launch.kernel for launch in launches})
            print(f"rehearsed: {len(launches)} launches of {len(names)} kernels compiled: {', '.join(names)}")
    failed = [line for line in check.latest() if not line["ok"]]
    for line in failed:
        print(f"{line['stage']}, {line['item']}: {outcome(line)}")
    return 1 if failed else 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
