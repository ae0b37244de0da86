"""Peak memory of training processes on a CPU against the plan's prediction, each in a fresh process.

    python scripts/bench_memory.py [--rounds 3] [--only WORD ...] [--json FILE] [--write docs/benchmarks.md]

Each run is a recipe of four layers changed in one way: more experts, more of them per token, wider ones, longer rows, a larger
vocabulary with all logits and with chunks, micro-batches, recomputation, bfloat16, no experts at all. It trains three steps
and ends with its evaluation and its checkpoint. Predicted is `moe.cost.totals.process_bytes`: the step's plan (`moe show`), the
copy that a checkpoint is written from, and the libraries. Measured is the process's peak resident set, from its summary.json;
each run is made `--rounds` times, as many at once as there are cores (at most 4).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_common import Ratio, keep, machine, options, parse, spread_of_passes

from moe import cost
from moe.backend import compiled
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.cost.totals import PROCESS_BYTES, process_bytes
from moe_cpu.experts import computes

NAME = "bench_memory"
ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
LIMIT = 0.1
"""Largest deviation from the plan that docs/benchmarks.md does not point at."""
BASE = [
    "model.dim=256",
    "model.num_layers=4",
    "model.ffn_hidden=1024",
    "model.attention.head_dim=64",
    "model.moe.expert_hidden=512",
    "model.document_mask=false",
    "data.sequence_length=256",
    "train.batch_rows=8",
    "train.micro_rows=8",
    "train.steps=3",
    "train.threads=1",
    "train.schedule.warmup_steps=1",
    "evaluation.every_steps=0",
    "evaluation.rows=8",
    "evaluation.final_rows=8",
    "evaluation.probe_rows=0",
    "logging.console=off",
]
CASES = {
    "as it is": [],
    "E 64, K 8, F 256": ["model.moe.num_experts=64", "model.moe.top_k=8", "model.moe.expert_hidden=256"],
    "K 4": ["model.moe.top_k=4"],
    "F 2048": ["model.moe.expert_hidden=2048"],
    "S 1024, 2 rows": ["data.sequence_length=1024", "train.batch_rows=2", "train.micro_rows=2"],
    "S 1024, 2 rows, documents apart": [
        "data.sequence_length=1024",
        "train.batch_rows=2",
        "train.micro_rows=2",
        "model.document_mask=true",
    ],
    "V 16,384, all logits": ["model.vocab_size=16384", "train.loss_chunk=0"],
    "V 16,384, loss_chunk 256": ["model.vocab_size=16384", "train.loss_chunk=256"],
    "32 rows in 4 micro-batches": ["train.batch_rows=32"],
    "32 rows, recomputed": ["train.batch_rows=32", "train.micro_rows=32", "train.activation_checkpointing=true"],
    "bfloat16": ["train.precision=bfloat16"],
    "bfloat16, 20 steps": ["train.precision=bfloat16", "train.steps=20"],
    "bfloat16, no experts": ["train.precision=bfloat16", "model.moe=null"],
    "no experts": ["model.moe=null"],
}
"""What is changed in each run, of T 2,048, D 256, four layers, F 512, E 8, K 2, S 256, V 257, float32, AdamW."""


def peak_of(case: str) -> int:
    """Train a case in a process of its own: peak bytes."""
    with tempfile.TemporaryDirectory() as place:
        recipe, out = Path(place) / "run.json", Path(place) / "run"
        recipe.write_text(json.dumps(dump(run_of(case))), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "moe", "train", str(recipe), f"out={out}"], check=True)
        peak = json.loads((out / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    print(f"{case}: peak {peak / MIB:,.0f} MiB", file=sys.stderr, flush=True)
    return peak


def measure(cases: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each case the peaks of all its processes, and the plan's bytes by purpose."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        peaks = list(pool.map(peak_of, cases * rounds))
    return {
        case: {
            "peaks": peaks[index :: len(cases)],
            "predicted": predicted(run_of(case)),
            "plan": cost.memory_bytes(run_of(case)),
        }
        for index, case in enumerate(cases)
    }


def predicted(run: Run) -> int:
    """Peak bytes of the run's process on this machine."""
    native = compiled(run.model.backend) and computes(getattr(torch, run.train.precision))
    return process_bytes(run, native=native)


def run_of(case: str) -> Run:
    """The run of a case."""
    changed = {setting.partition("=")[0] for setting in CASES[case]}
    without = "model.moe=null" in CASES[case]
    kept = [one for one in BASE if one.partition("=")[0] not in changed and not (without and "model.moe." in one)]
    return load(ROOT / "recipes/smoke.py", [*kept, *CASES[case]])


def ratio(one: dict[str, Any]) -> Ratio:
    """Peak over prediction, over a case's processes."""
    return spread_of_passes([[peak / one["predicted"]] for peak in one["peaks"]])


def page(found: dict[str, dict[str, Any]], facts: dict[str, str]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [
        "| run | step's plan, MiB | predicted, MiB | peak, MiB | peak / predicted |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, one in found.items():
        plan, peak = sum(one["plan"].values()) / MIB, statistics.median(one["peaks"]) / MIB
        lines.append(f"| {case} | {plan:,.0f} | {one['predicted'] / MIB:,.0f} | {peak:,.0f} | {ratio(one)} |")
    far = [case for case, one in found.items() if abs(ratio(one).middle - 1) > LIMIT]
    lines += [
        "",
        f"Further off than {LIMIT:.0%}: {'; '.join(far) if far else 'none'}. {PROCESS_BYTES / MIB:,.0f} MiB of each "
        "prediction are Python, torch and the other libraries.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train every case, print, and write what is asked for."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="runs whose names hold one of these")
    arguments = parse(parser, NAME)
    cases = [case for case in CASES if any(word in case for word in arguments.only)]
    if not cases:
        parser.error(f"--only {' '.join(arguments.only)} must be in the name of a run: {'; '.join(CASES)}")
    if arguments.write and len(cases) < len(CASES):
        parser.error("--write is for all runs: without --only")
    found = measure(cases, arguments.rounds)
    facts = {**machine(), "processes of each run": str(arguments.rounds)}
    text = page(found, facts)
    print(text)
    figures = {case: ratio(one) for case, one in found.items()}
    keep(arguments, NAME, text, {"facts": facts, "figures": figures, "runs": found})


if __name__ == "__main__":
    main()
