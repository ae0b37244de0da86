"""Tiny runs that fail midway, and healthy ones beside them: does the forecast notice? `bash scripts/experiments/failures`.

A text of random facts (two letters fix the next, mostly) that a small dense model cannot hold and a sparse one holds
better, so that 240 steps show a gain. Past runs of other sizes and seeds calibrate the forecast; then ten healthy runs, and
runs whose router is frozen, whose experts are tied, whose capacity is cut at half of the training. The faults live here and
not in the product. Seeds and sizes are in `plans`; finished runs are reused, others begin again; failures_report.py judges.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from failures_report import write_report

from moe.config.load import load
from moe.cost import dense_twin
from moe.experiments.compare import Planned, state_of
from moe.model import Transformer
from moe.train import loop, resume, train

ROOT = Path(__file__).parents[2]
STEPS, MIDWAY, EVERY = 240, 120, 8
PAST = {28: (0, 1, 2), 40: (0, 1), 48: (0, 1)}
"""Seeds of each past size: 21 sparse runs, of which an alarm at 5 % needs 19."""
EXPERTS = (4, 8, 16)
NEW_SIZE = 36
NEW = [(experts, seed) for seed in (10, 12, 11, 13, 14) for experts in (8, 16)]
"""Experts and seed of the healthy runs; two of a seed share a dense twin."""
FAULTY, WSD_RUNS = [(8, 10), (16, 11), (8, 12)], [(8, 10), (16, 11), (8, 12)]
LETTERS, SURE, TEXT = 40, 0.75, 1_500_000
WSD = ("train.schedule=wsd", "train.schedule.warmup_steps=12", "train.schedule.decay_steps=60")
Change = Callable[[Transformer, int], None]
"""Acts on the model after each step (from 1)."""


def write_text(folder: Path) -> Path:
    """750 documents of letters: after the letters a, b comes fact[a, b] with probability SURE, else any."""
    path = folder / "facts.jsonl"
    if not path.exists():
        random = np.random.default_rng(0)
        fact = random.integers(LETTERS, size=(LETTERS, LETTERS)).tolist()
        other, sure = random.integers(LETTERS, size=TEXT).tolist(), (random.random(TEXT) < SURE).tolist()
        letters, a, b = [], 0, 1
        for i in range(TEXT):
            a, b = b, fact[a][b] if sure[i] else other[i]
            letters.append(chr(48 + b))
        text = "".join(letters)
        lines = [json.dumps({"text": text[i : i + 2000]}) + "\n" for i in range(0, TEXT, 2000)]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    return path


def settings(out: Path, dim: int, experts: int, seed: int) -> dict[str, Any]:
    """A healthy sparse run; the widths give every number of experts the same dense twin."""
    return {
        "name": f"failures-{dim}-{experts}",
        "seed": seed,
        "model": {
            "vocab_size": 257,
            "dim": dim,
            "num_layers": 2,
            "ffn_hidden": 2 * dim,
            "attention": {
                "name": "grouped_query", "num_heads": 2, "num_kv_heads": 2, "head_dim": dim // 2, "windows": [2],
            },
            "moe": {
                "num_experts": experts,
                "top_k": 2,
                "expert_hidden": dim - (3 if experts == 16 else 1),
                "router": {"name": "topk", "balance": {"weight": 0.001}, "z_weight": 0.001},
            },
            "init_std": 0.1,
        },
        "data": {
            "sources": [{"name": "files", "paths": [str(write_text(out))]}],
            "sequence_length": 64,
            "validation_fraction": 0.2,
            "cache_dir": str(out / "cache"),
        },
        "train": {
            "steps": STEPS,
            "batch_rows": 16,
            "micro_rows": 16,
            "optimizer": {"lr": 0.012},
            "schedule": {"name": "cosine", "warmup_steps": 12},
            "device": "cpu",
            "threads": 1,
        },
        "evaluation": {"every_steps": EVERY, "rows": 64, "final_rows": 64, "probe_rows": 0},
        "logging": {"console": "off", "routing_every": 8},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the faults


def frozen() -> Change:
    """From the middle on, the router's weights are put back after every step."""
    kept: dict[int, torch.Tensor] = {}

    def change(model: Transformer, step: int) -> None:
        for index, layer in model.moe_layers():
            weight = layer.router.weight_ED.data
            if step == MIDWAY:
                kept[index] = weight.clone()
            elif step > MIDWAY:
                weight.copy_(kept[index])

    return change


def redrawn() -> Change:
    """In the middle the router is replaced by a random one of the same size, and stays that."""
    kept: dict[int, torch.Tensor] = {}

    def change(model: Transformer, step: int) -> None:
        for index, layer in model.moe_layers():
            weight = layer.router.weight_ED.data
            if step == MIDWAY:
                drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
                kept[index] = drawn * weight.square().mean().sqrt()
            if step >= MIDWAY:
                weight.copy_(kept[index])

    return change


def tied() -> Change:
    """From the middle on, all experts of a layer are kept at their mean."""

    def change(model: Transformer, step: int) -> None:
        for _, layer in model.moe_layers() if step >= MIDWAY else ():
            for weight in layer.experts.parameters():
                weight.data.copy_(weight.data.mean(0, keepdim=True).expand_as(weight))

    return change


def cut() -> Change:
    """From the middle on, experts hold a quarter of their balanced load; the rest is dropped."""

    def change(model: Transformer, step: int) -> None:
        for _, layer in model.moe_layers() if step == MIDWAY else ():
            layer.router.config = replace(layer.router.config, capacity_factor=0.25)

    return change


FAULTS: dict[str, Callable[[], Change]] = {"frozen": frozen, "redrawn": redrawn, "tied": tied, "cut": cut}


@contextmanager
def injected(change: Change | None) -> Iterator[None]:
    """The trainer with `change` after every step, for as long as the context lasts."""
    one_step = loop.train_step

    def train_step(state: Any, step: int, **options: Any) -> Any:
        result = one_step(state, step, **options)
        if change is not None:
            change(state.model, step + 1)
        return result

    with patch.object(loop, "train_step", train_step):
        yield


# ------------------------------------------------------------------------------------------------------------ the runs


@dataclass(frozen=True)
class Trial:
    """One run: what it is for, its settings, and what goes wrong in it."""

    kind: str
    """past, healthy, wsd, or the name of a fault."""
    planned: Planned
    dense: Path
    """Folder of its dense twin."""
    fault: Callable[[], Change] | None = None


def trial(out: Path, kind: str, dim: int, experts: int, seed: int) -> tuple[Trial, Trial]:
    """A sparse run and its dense twin."""
    run = load(settings(out, dim, experts, seed), list(WSD) if kind == "wsd" else [])
    dense = dense_twin(run)
    group, part = ("past", "past") if kind == "past" else ("new", "wsd" if kind == "wsd" else "cosine")
    twin = Planned(out / group / f"dense-{part}-{dim}-seed{seed}", replace(dense, name=f"failures-dense-{dim}"))
    planned = Planned(out / group / f"{kind}-{dim}-{experts}-seed{seed}", run)
    return Trial(kind, planned, twin.directory, FAULTS.get(kind)), Trial("dense", twin, twin.directory)


def plans(out: Path) -> list[Trial]:
    """Every run once, in the order of training: each dense twin before its sparse runs."""
    wanted = [("past", dim, experts, seed) for dim, seeds in PAST.items() for seed in seeds for experts in EXPERTS]
    new = [*((kind, FAULTY[:2]) for kind in FAULTS), ("healthy", NEW), ("wsd", WSD_RUNS)]
    new += [(kind, FAULTY[2:]) for kind in FAULTS]
    wanted += [(kind, NEW_SIZE, *run) for kind, runs in new for run in runs]
    found: dict[Path, Trial] = {}
    for one in wanted:
        sparse, dense = trial(out, *one)
        found.setdefault(dense.planned.directory, dense)
        found[sparse.planned.directory] = sparse
    return list(found.values())


def train_one(one: Trial) -> None:
    """Train a run that is not finished, with its fault."""
    state = state_of(one.planned)
    with injected(one.fault() if one.fault is not None else None):
        if state == "fresh":
            train(one.planned.run, one.planned.directory)
        elif state == "resume":  # nothing is saved before the end, so this begins with the first step
            resume(one.planned.directory)


def main() -> None:
    """Train what is missing, then write the page."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/failures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/failures"), help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=0, help="begin no run after this many; 0 for no limit")
    parser.add_argument("--only", default="", help="kind of run: past, healthy, wsd or a fault, with their dense twins")
    parser.add_argument("--report", action="store_true", help="only write the page from what is there")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    trials, started = plans(given.out), time.monotonic()
    chosen = {one.dense for one in trials if one.kind == given.only}
    for number, one in enumerate(trials, 1):
        wanted = one.kind == given.only or (one.kind == "dense" and one.planned.directory in chosen)
        if given.report or (given.only and not wanted) or state_of(one.planned) == "finished":
            continue
        if given.seconds and time.monotonic() - started > given.seconds:
            sys.exit(f"{given.seconds:.0f} s are over at run {number} of {len(trials)}: call again to go on")
        clock = time.monotonic()
        train_one(one)
        print(f"{number}/{len(trials)} {one.planned.directory.name}: {time.monotonic() - clock:.0f} s", flush=True)
    if not given.only:
        print(write_report(given.out, trials, ROOT / "docs/experiments"))


if __name__ == "__main__":
    main()
