"""Reuse of trained models: upcycling against its alternatives, and the storage of variants. See --help.

Upcycling, for each seed: recipes/upcycle.py:dense for N steps, then N more, as it is or as its upcycled forms, whose FLOPs per
token are the dense model's (`fine_grained`); and the sparse model from scratch for N and for 2N steps.
Storage: the sparse model of seed 0, and ten variants of it, each fine-tuned (ESFT) on one package of the standard library.
"""

import argparse
import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe import hf
from moe.analysis.paired import t_interval
from moe.config.load import load
from moe.files import write_json, write_text
from moe.surgery import store
from moe.surgery.esft import fine_tune
from moe.surgery.start import begin_run, read_run
from moe.surgery.upcycle import Change, upcycle
from moe.train import resume, train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/upcycle.py"
PACKAGES = (
    "asyncio",
    "email",
    "unittest",
    "multiprocessing",
    "tkinter",
    "idlelib",
    "xml",
    "distutils",
    "lib2to3",
    "importlib",
)
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
    if not (folder / "summary.json").is_file():
        if not (folder / "run.json").is_file():
            start()
        if not (folder / "summary.json").is_file():
            resume(folder)
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    return next(row["bits_per_byte"] for row in reversed(rows) if row["final"])


def arms(out: Path, seed: int, steps: int) -> dict[str, float]:
    """Bits per byte of every arm of one seed."""
    base = out / f"dense-seed{seed}"
    first = load(f"{RECIPE}:dense", settings("reuse-dense", seed, steps, 3e-3))
    if not (base / "summary.json").is_file():
        (resume(base) if (base / "run.json").is_file() else train(first, base))
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


def variants(out: Path, base: Path, steps: int) -> dict[str, Any]:
    """Ten fine-tuned variants in a store, and what they weigh there and as whole files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    place, rows = out / "store", []
    whole = out / "hf-base"
    if not whole.exists():
        hf.export_run(base, whole)
    if "base" not in store.names(place):
        store.put(place, "base", base)
    for package in PACKAGES:
        folder = out / f"variant-{package}"
        if not (folder / "origin.json").is_file():
            sources = json.dumps(
                [{"name": "files", "paths": [str(library / package / "**/*.py")], "on_bad_file": "skip"}]
            )
            task = [
                f"data.sources={sources}",
                "data.validation_fraction=0.2",
                f"train.steps={steps}",
                "train.optimizer.lr=1e-3",
                "train.schedule.warmup_steps=2",
                "train.batch_rows=8",
                "train.micro_rows=8",
                "evaluation.rows=16",
                "evaluation.final_rows=16",
            ]
            fine_tune(base, folder, task)
        if package not in store.names(place):
            store.put(place, package, folder)
        receipt = json.loads((folder / "origin.json").read_text())
        rows.append(
            {
                "package": package,
                **{key: receipt[key] for key in ("loss_before", "loss_after", "trained", "parameters")},
            }
        )
    export_bytes = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    checkpoint = sum(p.stat().st_size for p in base.glob("checkpoints/*/*") if p.is_file())
    return {
        "variants": rows, "store_bytes": store.size(place), "store_base_bytes": store.size(place, "base"),
        "export_bytes": export_bytes, "checkpoint_bytes": checkpoint // len(list(base.glob("checkpoints/step_*"))),
    }  # fmt: skip


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


def page(results: dict[int, dict[str, float]], stored: dict[str, Any], command: str) -> str:
    """docs/experiments/reuse.md below its hand-written text."""
    lines = [f"`{command}`", "", *(upcycling(results) if results else [])]
    n, eleven = len(stored["variants"]), stored["export_bytes"] * (1 + len(stored["variants"]))
    lines += ["## Storage", "", "| what | bytes | share |", "| --- | --- | --- |"]
    checkpoints = stored["checkpoint_bytes"] * (1 + n)
    for what, size in (
        (f"{n + 1} training checkpoints", checkpoints),
        (f"{n + 1} whole exports, float32", eleven),
        ("the store, base alone", stored["store_base_bytes"]),
        (f"the store, base and {n} variants", stored["store_bytes"]),
    ):
        lines.append(f"| {what} | {size:,} | {size / eleven:.1%} |")
    lines += ["", "| variant | numbers trained | loss on its text before | after |", "| --- | --- | --- | --- |"]
    for row in stored["variants"]:
        share = row["trained"] / row["parameters"]
        lines.append(
            f"| {row['package']} | {row['trained']:,} ({share:.1%}) | {row['loss_before']:.4f} | {row['loss_after']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, fine-tune, report."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/reuse", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reuse"), help="folder of the runs")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the upcycling; 0 for the storage alone, which then needs --base"
    )
    parser.add_argument("--base", type=Path, help="sparse run to fine-tune, by default the upcycled one of seed 0")
    parser.add_argument("--variant-steps", type=int, default=30, help="of each fine-tuning")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    results = {}
    for seed in range(given.seeds):
        results[seed] = arms(given.out, seed, given.steps)
        print(seed, results[seed], flush=True)
    stored = variants(given.out, given.base or given.out / "copy-seed0", given.variant_steps)
    command = f"bash scripts/experiments/reuse --seeds {given.seeds} --steps {given.steps}"
    if given.base:
        command += f" --base runs/pruning/{given.base.name} --variant-steps {given.variant_steps}"
    folder = ROOT / "docs/experiments"
    write_json(
        folder / "reuse.json", {"schema_version": 1, "command": command, "upcycling": results, "storage": stored}
    )
    mark = "<!-- what follows is written by scripts/experiments/reuse -->"
    path = folder / "reuse.md"
    before = path.read_text(encoding="utf-8").split(mark)[0].rstrip() if path.exists() else "# Reusing trained models"
    write_text(path, f"{before}\n\n{mark}\n\n{page(results, stored, command)}\n")
    print(path)


if __name__ == "__main__":
    main()
