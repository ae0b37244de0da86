"""Reuse of trained models: upcycling against its alternatives, and the storage of variants. See --help.

Upcycling, for each seed: recipes/upcycle.py:dense for N steps, then N more, as it is or as its upcycled forms, whose FLOPs per
token are the dense model's (`fine_grained`); and the sparse model from scratch for N and for 2N steps.
Distillation: dense students of a sparse teacher (reuse_distil.py).
Storage: the sparse model of seed 0, and ten variants of it by ESFT and by LoRA, each fine-tuned on one package of the standard
library (reuse_variants.py).
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reuse_distil import section, students
from reuse_variants import storage, variants

from moe.analysis.paired import t_interval
from moe.config.load import load
from moe.experiments.planned import Planned, state_of
from moe.files import write_json, write_text
from moe.surgery.start import begin_run, read_run
from moe.surgery.upcycle import Change, upcycle
from moe.train import resume, train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/upcycle.py"
ARMS = ("dense", "copy", "noise", "drop", "scratch", "scratch, twice the steps")


def settings(name: str, seed: int, steps: int, lr: float, warmup: int = 10) -> list[str]:
    """Overrides of every run here."""
    return [
        f"name={name}-seed{seed}", f"seed={seed}", f"train.steps={steps}", f"train.optimizer.lr={lr}",
        f"train.schedule.warmup_steps={warmup}", "train.threads=1", "train.device=cpu", "evaluation.every_steps=0",
        "evaluation.final_rows=512", "evaluation.probe_rows=0", "logging.routing_every=100", "logging.console=off",
    ]  # fmt: skip


def finished(folder: Path, start: Callable[[], object]) -> float:
    """Final bits per byte of the run in `folder`, which is started or gone on with if need be."""
    if not (folder / "run.json").is_file():
        start()
    if state_of(Planned(folder, load(folder / "run.json"))) != "finished":
        resume(folder)
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    return next(row["bits_per_byte"] for row in reversed(rows) if row["final"])


def arms(out: Path, seed: int, steps: int) -> dict[str, float]:
    """Bits per byte of every arm of one seed."""
    base = out / f"dense-seed{seed}"
    first = load(f"{RECIPE}:dense", settings("reuse-dense", seed, steps, 3e-3))
    finished(base, lambda: train(first, base))
    result = {}
    further = settings("reuse-on", seed + 1000, steps, 1.5e-3)
    folder = out / f"dense-on-seed{seed}"
    run = load(f"{RECIPE}:dense", further)
    result["dense"] = finished(folder, lambda: begin_run(folder, run, read_run(base).tensors, {"source": str(base)}))
    for method in ("copy", "noise", "drop"):
        place = out / f"{method}-seed{seed}"
        change = Change(method=method)  # type: ignore[arg-type]
        result[method] = finished(
            place, lambda p=place, c=change: upcycle(base, f"{RECIPE}:fine_grained", p, c, further)
        )
    for name, times in (("scratch", 1), ("scratch, twice the steps", 2)):
        place = out / f"scratch{times}-seed{seed}"
        fresh = load(f"{RECIPE}:fine_grained", settings("reuse-scratch", seed, times * steps, 3e-3))
        result[name] = finished(place, lambda p=place, r=fresh: train(r, p))
    return result


def upcycling(results: dict[int, dict[str, float]]) -> list[str]:
    """The table of the arms."""
    lines = [f"## Upcycling, {len(results)} seeds", ""]
    lines += [
        "| arm | bits per byte, mean | better than training the dense model on by (95 %) |",
        "| --- | --- | --- |",
    ]
    for arm in ARMS:
        values = [found[arm] for found in results.values()]
        gain = t_interval([found["dense"] - found[arm] for found in results.values()])
        interval = "" if gain.low is None else f" ({gain.low:+.4f} to {gain.high:+.4f})"
        shown = "" if arm == "dense" else f"{gain.mean:+.4f}{interval}"
        lines.append(f"| {arm} | {sum(values) / len(values):.4f} | {shown} |")
    return [*lines, ""]


def page(results: dict[str, Any], steps: int) -> str:
    """docs/experiments/reuse.md below its hand-written text."""
    lines = [f"`{results['command']}`", ""]
    if results["upcycling"]:
        lines += upcycling(results["upcycling"])
    if results["distillation"]:
        lines += section(results["distillation"], 2 * steps)
    return "\n".join([*lines, *storage(results["storage"])])


def main() -> None:
    """Train, fine-tune, report."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/reuse", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reuse"), help="folder of the runs")
    parser.add_argument(
        "--seeds", type=int, default=5, help="of the upcycling; 0 for the storage alone, which then needs --base"
    )
    parser.add_argument("--distil-seeds", type=int, default=3, help="of the distillation")
    parser.add_argument("--base", type=Path, help="sparse run to fine-tune, by default the upcycled one of seed 0")
    parser.add_argument("--variant-steps", type=int, default=30, help="of each fine-tuning")
    parser.add_argument("--steps", type=int, default=800, help="N; a distillation takes 2N")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    upcycled, distilled = {}, {}
    for seed in range(given.seeds):
        upcycled[seed] = arms(given.out, seed, given.steps)
        print(seed, upcycled[seed], flush=True)
    for seed in range(given.distil_seeds):
        distilled[seed] = students(given.out, seed, settings("reuse-distil", seed, 2 * given.steps, 3e-3))
        print(seed, distilled[seed], flush=True)
    stored = variants(given.out, given.base or given.out / "copy-seed0", given.variant_steps)
    command = f"bash scripts/experiments/reuse --seeds {given.seeds} --distil-seeds {given.distil_seeds} --steps {given.steps}"
    if given.base:
        command += f" --base runs/pruning/{given.base.name} --variant-steps {given.variant_steps}"
    folder = ROOT / "docs/experiments"
    results = {
        "schema_version": 2, "command": command, "upcycling": upcycled, "distillation": distilled, "storage": stored,
    }  # fmt: skip
    write_json(folder / "reuse.json", results)
    mark = "<!-- what follows is written by scripts/experiments/reuse -->"
    path = folder / "reuse.md"
    before = path.read_text(encoding="utf-8").split(mark)[0].rstrip() if path.exists() else "# Reusing trained models"
    write_text(path, f"{before}\n\n{mark}\n\n{page(results, given.steps)}\n")
    print(path)


if __name__ == "__main__":
    main()
