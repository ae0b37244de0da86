"""Prune a model trained here by 25, 50 and 75 % of its experts. `bash scripts/experiments/pruning --help`.

Trains recipes/smoke.py with 16 experts and 1,200 steps for each seed, prunes it in every way that `moe prune` knows, measures
bits per byte on the same validation rows, trains half-sized models on for as many steps as the control, the whole model, weighs
them, and looks for lottery tickets (pruning_tickets.py). Everything lies in one folder and is reused: `base-seed<n>/`,
`recovery/`, `tickets/`, and `points.jsonl`, a line per measurement. pruning_report.py turns them into docs/experiments/pruning.md.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pruning_report import write_report
from pruning_tickets import search, stored_bytes
from torch import Tensor

from moe import hf, parallel
from moe.config.load import load
from moe.cost import parameters
from moe.data import Corpus, prepare
from moe.experiments.planned import Planned, state_of
from moe.hf import quantised
from moe.surgery.prune import Plan, look, prune, pruned_model
from moe.surgery.scores import SCORES
from moe.surgery.start import Source, begin_run, model_of, read_run
from moe.train import resume, train
from moe.train.evaluate import evaluate

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/smoke.py"
KEEP = (0.75, 0.5, 0.25)
DRAWS = {0.75: 4, 0.5: 12, 0.25: 4}
"""Random choices of experts a seed, by the share that is kept; their mean is the control."""
RECOVERED = ("reap", "mean_norm", "frequency", "random", "merge", "cluster")


@dataclass(frozen=True)
class Point:
    """One pruned model: which seed's, how much of it, how chosen, and for how many steps trained on."""

    seed: int
    keep: float
    way: str
    """A score, `merge`, `cluster`, or `whole`."""
    draw: int = 0
    steps: int = 0

    @property
    def plan(self) -> Plan:
        """The plan of `moe prune`."""
        if self.way in ("merge", "cluster"):
            return Plan(keep=self.keep, method=self.way, rows=64, seed=self.draw)  # type: ignore[arg-type]
        return Plan(keep=self.keep, score=self.way, rows=64, seed=self.draw)  # type: ignore[arg-type]


def train_base(out: Path, seed: int, steps: int) -> Path:
    """The model that everything of this seed is cut from."""
    overrides = [
        f"name=pruning-base-seed{seed}",
        f"seed={seed}",
        "model.moe.num_experts=16",
        f"train.steps={steps}",
        f"train.schedule.warmup_steps={steps // 20}",
        "train.threads=1",
        "train.device=cpu",
        "evaluation.every_steps=0",
        "evaluation.final_rows=512",
        "evaluation.probe_rows=0",
        "logging.routing_every=50",
        "logging.console=off",
    ]
    planned = Planned(out / f"base-seed{seed}", load(str(RECIPE), overrides))
    state = state_of(planned)
    if state == "fresh":
        train(planned.run, planned.directory)
    elif state == "resume":
        resume(planned.directory)
    return planned.directory


def one_shot(seed: int) -> Iterator[Point]:
    """Every way without further training."""
    yield Point(seed, 1.0, "whole")
    for keep in KEEP:
        for way in (*SCORES, "merge", "cluster"):
            for draw in range(DRAWS[keep] if way == "random" else 1):
                yield Point(seed, keep, way, draw)


def recovered(seed: int, steps: int) -> Iterator[Point]:
    """Half and a quarter of the experts with further training, and the whole model with as much."""
    yield Point(seed, 1.0, "whole", steps=steps)
    yield from (Point(seed, 0.5, way, steps=steps) for way in RECOVERED)
    yield from (Point(seed, keep, "reap", steps=steps) for keep in (0.875, 0.75, 0.25))


class Points:
    """The measurements so far, appended as they come."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, point: Point) -> bool:
        """Whether this was measured before."""
        return any(all(row[name] == value for name, value in vars(point).items()) for row in self.rows)

    def add(self, point: Point, bits_per_byte: float, **fields: Any) -> None:
        """Keep a measurement."""
        self.rows.append({**vars(point), "bits_per_byte": bits_per_byte, **fields})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(
            f"seed {point.seed} keep {point.keep} {point.way} {point.draw} +{point.steps}: {bits_per_byte:.4f}",
            flush=True,
        )


def measure_one_shot(source: Source, corpus: Corpus, points: Points, seed: int, rows: int) -> None:
    """Prune and measure without training."""
    todo = [point for point in one_shot(seed) if not points.has(point)]
    if not todo:
        return
    ranks = parallel.start("cpu")
    uses = look(source, Plan(rows=64))
    for point in todo:
        model = source.model() if point.way == "whole" else pruned_model(source, uses, point.plan)
        result = evaluate(model, corpus, ranks, rows=rows, micro_rows=16)
        points.add(point, result.bits_per_byte, parameters=sum(p.numel() for p in model.parameters()))


def measure_recovered(source: Source, points: Points, out: Path, seed: int, steps: int, rows: int) -> None:
    """Prune, train on, measure. The recovery starts from the base's peak over three and ends at a tenth of that."""
    peak = source.run.train.optimizer.lr / 3
    overrides = [
        f"train.steps={steps}",
        f"train.optimizer.lr={peak}",
        "train.schedule.warmup_steps=10",
        f"seed={seed + 1000}",
    ]
    for point in recovered(seed, steps):
        if points.has(point):
            continue
        folder = out / "recovery" / f"seed{seed}-{point.way}-{round(100 * point.keep)}-{steps}"
        if not (folder / "run.json").is_file():
            if point.way == "whole":
                begin_run(
                    folder,
                    load(source.run, overrides),
                    source.tensors,
                    {"made_by": "control", "source": str(source.folder)},
                )
            else:
                prune(source.folder, folder, point.plan, overrides)
        run = load(folder / "run.json")
        if state_of(Planned(folder, run)) != "finished":
            resume(folder)
        model = read_run(folder).model()
        result = evaluate(model, prepare(run.data), parallel.start("cpu"), rows=rows, micro_rows=16)
        points.add(point, result.bits_per_byte, parameters=sum(p.numel() for p in model.parameters()))


def measure_sizes(points: Points, out: Path, seed: int, steps: int, rows: int) -> None:
    """Bytes and bits per byte of recovered models as bfloat16, int8 and int4 exports."""
    for point in recovered(seed, steps):
        if point.way not in ("whole", "reap"):
            continue
        folder = out / "recovery" / f"seed{seed}-{point.way}-{round(100 * point.keep)}-{steps}"
        for bits in (16, 8, 4):
            sized = replace(point, draw=bits, way=f"{point.way} size")
            if points.has(sized):
                continue
            run = load(folder / "run.json")
            export, small = folder / "hf", folder / f"int{bits}"
            if not (export / "config.json").is_file():
                hf.export_run(folder, export, dtype="bfloat16")
            if bits < 16 and not (small / "config.json").is_file():
                quantised.quantise(export, small, bits)
            place = export if bits == 16 else small
            model = hf.load(place)
            model.config = run.model
            result = evaluate(model, prepare(run.data), parallel.start("cpu"), rows=rows, micro_rows=16)
            size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
            points.add(sized, result.bits_per_byte, bytes=size, active=parameters(run.model).active)


def measure_tickets(source: Source, points: Points, out: Path, seed: int, rows: int) -> None:
    """Single weights and blocks removed, from the same recipe and seed as the experts' model."""
    corpus, ranks, run = prepare(source.run.data), parallel.start("cpu"), source.run

    def measure(way: str, keep: float, block: int, tensors: Mapping[str, Tensor] | None) -> bool:
        point = Point(seed, keep, f"lottery {way}", draw=block)
        if tensors is None:
            return points.has(point)
        result = evaluate(model_of(run, tensors), corpus, ranks, rows=rows, micro_rows=16)
        points.add(point, result.bits_per_byte, bytes=stored_bytes(tensors, way, keep, block))
        return True

    search(run, out / "tickets" / f"seed{seed}", measure)


def main() -> None:
    """Train, prune, measure, report."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/pruning", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recovered-seeds", type=int, default=3, help="of these, how many are trained on")
    parser.add_argument(
        "--ticket-seeds", type=int, default=3, help="of these, how many are searched for lottery tickets"
    )
    parser.add_argument("--steps", type=int, default=1200, help="of the models that are pruned")
    parser.add_argument("--recovery", type=int, default=200, help="steps of further training")
    parser.add_argument("--rows", type=int, default=512, help="validation rows")
    parser.add_argument("--report", action="store_true", help="only write the page from what is there")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    points = Points(given.out / "points.jsonl")
    if not given.report:
        given.out.mkdir(parents=True, exist_ok=True)
        folders = [train_base(given.out, seed, given.steps) for seed in range(given.seeds)]
        sources = [read_run(folder) for folder in folders]
        for seed, source in enumerate(sources):
            measure_one_shot(source, prepare(source.run.data), points, seed, given.rows)
        for seed, source in enumerate(sources[: given.recovered_seeds]):
            measure_recovered(source, points, given.out, seed, given.recovery, given.rows)
            measure_sizes(points, given.out, seed, given.recovery, given.rows)
        for seed, source in enumerate(sources[: given.ticket_seeds]):
            measure_tickets(source, points, given.out, seed, given.rows)
    command = (
        f"bash scripts/experiments/pruning --seeds {given.seeds} --steps {given.steps} --recovery {given.recovery}"
    )
    print(write_report(points.rows, command, ROOT / "docs/experiments"))


if __name__ == "__main__":
    main()
