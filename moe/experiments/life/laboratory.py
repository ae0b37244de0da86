"""All parts of the laboratory, one after the other; each leaves a file, and a second call goes on after the last one.

A part's file holds the settings it was made with: it is made again if they changed. `results.json` then holds all parts, and
moe/analysis/life_page.py turns it into a page and a figure.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.life import Densities, ExpertArm, Flips, Growing, Life, Pruning, check_life
from moe.config.load import dump
from moe.experiments.life.exact import board_accuracy, is_exact, right_of_512
from moe.experiments.life.experts import train_layer
from moe.experiments.life.networks import Shape, by_hand, first_values
from moe.experiments.life.pruning import prune
from moe.experiments.life.training import Task, train
from moe.files import write_json
from moe.random import stable_seed

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Part:
    """One file of results."""

    name: str
    settings: Any
    """Everything that its result depends on, as JSON holds it."""
    work: Callable[[], dict]


def run(life: Life, out: Path, say: Callable[[str], None]) -> Path:
    """Do what is not done yet, one line per part; returns the path of results.json. Raises ConfigError."""
    check_life(life)
    before = torch.get_num_threads()
    torch.set_num_threads(life.threads)
    try:
        results = [_done(part, out, say) for part in _parts(life)]
    finally:
        torch.set_num_threads(before)
    record = {"schema_version": SCHEMA_VERSION, "life": dump(life), "parts": results}
    write_json(out / "results.json", record)
    return out / "results.json"


def _done(part: Part, out: Path, say: Callable[[str], None]) -> dict:
    """A part's result: from its file if that was made with the same settings, else worked out and written."""
    path = out / f"{part.name}.json"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        if found.get("settings") == part.settings:
            say(f"{part.name}: reused")
            return found
    start = time.monotonic()
    found = {"name": part.name, "settings": part.settings, **part.work()}
    # times differ from run to run: they are printed, and stay out of the files
    write_json(path, found)
    say(f"{part.name}: {time.monotonic() - start:.0f} s: {found['summary']}")
    return json.loads(path.read_text("utf-8"))


def _parts(life: Life) -> Iterator[Part]:
    """Every part in the order of the page; its settings are its own and those that all parts share."""
    common = {k: v for k, v in dump(life).items() if k in ("seed", "board", "density", "boards", "threads")}

    def part(name: str, spec: Any, work: Callable[..., dict], **more: Any) -> Part:
        return Part(name, {**common, **dump(spec), **more}, lambda: work(life, spec, **more))

    for spec in life.growing:
        for width in spec.widths:
            yield part(f"growing-{spec.steps}-{width}", spec, _grow, width=width)
    for i, spec in enumerate(life.densities):
        yield part(f"densities-{i}", spec, _densities)
    for i, spec in enumerate(life.flips):
        yield part(f"flips-{i}", spec, _flips)
    for spec in life.pruning:
        yield part(f"pruning-{spec.width}", spec, _prune)
    for i, spec in enumerate(life.experts):
        yield part(f"experts-{i}", spec, _experts)


def _task(life: Life, spec: Growing | Pruning | Flips | Densities, density: float | None = None) -> Task:
    return Task(life.board, life.boards, life.density if density is None else density, spec.updates, spec.lr)


def _seeds(life: Life, count: int, *purpose: object) -> list[int]:
    return [stable_seed(life.seed, *purpose, q) for q in range(count)]


def _judged(shape: Shape, value_QP: Tensor, side: int) -> dict:
    """Which networks are exact, and how much of random boards they get right."""
    right = board_accuracy(shape, value_QP, side=side, seed=0)
    return {"exact": is_exact(shape, value_QP, side=side, seed=0).tolist(), "accuracy": right.tolist()}


def _grow(life: Life, spec: Growing, *, width: int) -> dict:
    shape, seeds = Shape(spec.steps, width), _seeds(life, spec.networks, "growing", spec.steps, width)
    value_QP = train(shape, first_values(shape, seeds), seeds, _task(life, spec))
    found = _judged(shape, value_QP, life.board)
    summary = f"{sum(found['exact'])} of {spec.networks} networks exact"
    return {"summary": summary, "parameters": shape.parameters, **found}


def _densities(life: Life, spec: Densities) -> dict:
    shape, rows = Shape(1, spec.width), []
    for density in spec.densities:
        # the same first values at every density
        seeds = _seeds(life, spec.networks, "densities", spec.width)
        value_QP = train(shape, first_values(shape, seeds), seeds, _task(life, spec, density))
        rows.append({"density": density, "right": right_of_512(shape, value_QP).tolist()})
    summary = ", ".join(f"{row['density']}: {row['right'].count(512)}" for row in rows)
    return {"summary": f"of {spec.networks} networks exact at density {summary}", "rows": rows}


def _flips(life: Life, spec: Flips) -> dict:
    shape, rows = Shape(1, 1), []
    for count in spec.counts:
        seeds = _seeds(life, spec.networks, "flips", count)
        start_QP = by_hand(1).repeat(spec.networks, 1)
        for start_P, seed in zip(start_QP, seeds, strict=True):
            generator = torch.Generator().manual_seed(stable_seed(seed, "which"))
            start_P[torch.randperm(shape.parameters, generator=generator)[:count]] *= -1
        value_QP = train(shape, start_QP, seeds, _task(life, spec))
        rows.append({"flipped": count, "right": right_of_512(shape, value_QP).tolist()})
    summary = ", ".join(f"{row['flipped']}: {row['right'].count(512)}" for row in rows)
    return {"summary": f"of {spec.networks} networks exact with signs flipped {summary}", "rows": rows}


def _prune(life: Life, spec: Pruning) -> dict:
    seeds, rows, smallest = _seeds(life, spec.networks, "pruning", spec.width), [], None
    for row, value_QP in prune(spec, _task(life, spec), seeds):
        rows.append(row)
        exact = [q for q, right in enumerate(row["right"]) if right == 512]
        if exact and row["arm"] == "magnitude":
            smallest = {"network": exact[0], "kept": row["kept"], "values": value_QP[exact[0]].tolist()}
    last = [row for row in rows if row["round"] == spec.rounds]
    summary = ", ".join(f"{row['arm']} {row['right'].count(512)}" for row in last)
    left = f"{last[0]['kept']} of {Shape(1, spec.width).parameters} parameters left"
    return {
        "summary": f"{left}, of {spec.networks} exact: {summary}",
        "parameters": Shape(1, spec.width).parameters,
        "rows": rows,
        "smallest": smallest,
    }


def _experts(life: Life, spec: ExpertArm) -> dict:
    tokens = life.boards * life.board**2
    rows = [train_layer(spec, seed, tokens, life.density) for seed in range(life.seed, life.seed + spec.layers)]
    solved = sum(row["right"] == 512 for row in rows)
    return {"summary": f"{spec.label}: {solved} of {spec.layers} layers exact", "rows": rows}
