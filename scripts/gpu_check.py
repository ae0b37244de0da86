"""What only a GPU can show of the kernels, in stages ordered by value; scripts/gpu_check says how to run it.

A stage is a list of named items. Each item's result is one line of the record as soon as it is there, so a run that is cut
off loses one item, and the next run goes on with the first item that has no line from this device. Failures are lines too.
Exit code: 0 if every item passed, 1 if one failed, 3 if the time was over before the last one. `--rehearse` replaces the device
by the compile-only driver: every stage runs, no value is compared, and the record is in a temporary folder unless named.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# works from a bare checkout: the package, and the interpreter's suite, whose cases run here on a GPU
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "tests/kernels_interpreted")]

import gpu_correct  # noqa: E402
import gpu_layouts  # noqa: E402
import gpu_speed  # noqa: E402
import torch  # noqa: E402
from gpu_page import markdown  # noqa: E402
from gpu_run import Check, Stage, outcome, read_record  # noqa: E402

from moe_triton.compile_only import compiling  # noqa: E402

STAGES: dict[str, Stage] = {
    "facts": gpu_speed.facts,
    "parity": gpu_correct.parity,
    "races": gpu_correct.races,
    "graph": gpu_correct.graph,
    "layouts": gpu_layouts.layouts,
    "bench": gpu_speed.bench,
    "product": gpu_speed.product,
    "kernels": gpu_speed.kernels,
    "peers": gpu_speed.peers,
    "tune": gpu_speed.tune,
}
"""In order of value."""


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


def publish(check: Check) -> None:
    """Write the page, and copy page and record to $OUT (at most six files, the trace and tuned.json included)."""
    page = check.record.with_suffix(".md")
    page.write_text(markdown(check, STAGES))
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
        if arguments.child:
            task, *rest = arguments.child
            {"races": gpu_correct.awkward_step, "compile": gpu_correct.compile_share}[task](check, *rest)
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
