"""Lottery tickets of scripts/experiments/pruning: single weights and blocks removed from its model in rounds, with both controls.

A round removes half of the weights that are left, the smallest first, goes back to step REWIND and trains to the end; the controls
train as many weights elsewhere (the same share of each matrix), and the same places from other first weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe.analysis.paired import t_interval
from moe.config.schema import Run
from moe.hf.quantised import rounded, widened
from moe.model import Transformer
from moe.surgery.masked import train_masked
from moe.surgery.ticket import magnitude_masks, prunable, random_masks, retrain

REWIND = 60
"""Step whose weights the kept ones go back to: the end of warm-up (an early step is better than the first: arXiv 1912.05671)."""
LEVELS = {1: (0.5, 0.25, 0.125), 4: (0.5,)}
"""Shares of the weights that stay, by the side of the blocks that go together."""
CONTROLS = ("ticket", "random mask", "reinitialised")


class Measure(Protocol):
    """Evaluates weights of the run, and keeps the result under a name."""

    def __call__(self, way: str, keep: float, block: int, tensors: Mapping[str, Tensor] | None) -> bool:
        """Measure and keep; without tensors, whether that is already there."""
        ...


def search(run: Run, folder: Path, measure: Measure) -> None:
    """Every level of one seed; `folder` keeps each level's mask and weights, so that a second call goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    first = Transformer(run.model, seed=run.seed).state_dict()
    other = Transformer(run.model, seed=run.seed + 1).state_dict()
    ones = {name: torch.ones(first[name].shape, dtype=torch.bool) for name in prunable(first)}

    def once(name: str, make: Any) -> Any:
        path = folder / f"{name}.pt"
        if not path.is_file():
            torch.save(make(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        return torch.load(path, weights_only=True)

    start = once("start", lambda: train_masked(run, first, {}, steps=range(REWIND)))
    whole = once("whole", lambda: retrain(run, start, ones, REWIND))
    if not measure("ticket", 1.0, 1, None):
        measure("ticket", 1.0, 1, whole)
    for block, levels in LEVELS.items():
        trained, masks = whole, ones
        for keep in levels:
            masks = magnitude_masks(trained, masks, keep, block)
            begin, places = start, masks
            trained = once(f"ticket-{block}-{keep}", lambda m=masks: retrain(run, start, m, REWIND))
            if block == 1 and not measure("ticket int8", keep, block, None):
                measure("ticket int8", keep, block, in_int8(trained))
            for way in CONTROLS if block == 1 else CONTROLS[:2]:
                if measure(way, keep, block, None):
                    continue
                if way == "ticket":
                    measure(way, keep, block, trained)
                    continue
                places = random_masks(masks, run.seed, block) if way == "random mask" else masks
                begin = start if way == "random mask" else other
                measure(way, keep, block, retrain(run, begin, places, REWIND))


def in_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices rounded as `moe quantise` rounds an export's, a scale for each output; what was 0 stays 0."""
    result = dict(tensors)
    for name in prunable(tensors):
        by_output = tensors[name].transpose(-1, -2) if tensors[name].ndim == 3 else tensors[name]
        values, scale = rounded(by_output.flatten(0, -2).bfloat16(), 8)
        again = widened(values, scale.bfloat16()).view(by_output.shape)
        result[name] = again.transpose(-1, -2).contiguous() if tensors[name].ndim == 3 else again
    return result


def stored_bytes(tensors: Mapping[str, Tensor], way: str, keep: float, block: int) -> int:
    """Bytes with the share `keep` of the matrices: kept weights, a bit for each place or block, and the rest in bfloat16."""
    matrices = [tensors[name] for name in prunable(tensors)]
    places = sum(matrix.numel() for matrix in matrices)
    others = sum(tensor.numel() for tensor in tensors.values()) - places
    each, scales = (
        (1, sum(m.numel() // m.shape[-1 if m.ndim == 2 else -2] for m in matrices)) if "int8" in way else (2, 0)
    )
    return round(each * keep * places + 2 * (others + scales)) + (places // (8 * block**2) if keep < 1 else 0)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The page's part, of the points whose way starts with `lottery`."""
    found: dict[tuple[str, float, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["way"].startswith("lottery "):
            key = (row["way"].removeprefix("lottery "), row["keep"], row["draw"])
            found.setdefault(key, {})[row["seed"]] = row
    if ("ticket", 1.0, 1) not in found:
        return []
    whole = found["ticket", 1.0, 1]
    lines = [
        f"### Single weights and blocks: lottery tickets, seeds {', '.join(str(seed) for seed in whole)}",
        "",
        f"The whole model, trained as long: {_mean(whole):.4f} bits per byte, {_bytes(whole):,} bytes in bfloat16. Bytes are "
        "counted, not those of a file: kept weights, a bit for each place, scales, and the rest in bfloat16.",
        "",
        "| kept | removed as | ticket | above the whole (95 %) | random mask above it | other first weights above it | bytes "
        "| in int8, above the whole | bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for block, levels in LEVELS.items():
        for keep in levels:
            ticket, small = found.get(("ticket", keep, block)), found.get(("ticket int8", keep, block))
            if ticket is None:
                continue
            cells = [_shown(ticket, whole)]
            cells += [_shown(found.get((way, keep, block)), ticket) for way in CONTROLS[1:]]
            cells += [f"{_bytes(ticket):,}", _shown(small, whole), f"{_bytes(small):,}" if small else ""]
            kind = "single weights" if block == 1 else f"blocks of {block} x {block}"
            lines.append(f"| {keep:.1%} | {kind} | {_mean(ticket):.4f} | {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(rows: dict[int, dict[str, Any]]) -> float:
    return float(np.mean([row["bits_per_byte"] for row in rows.values()]))


def _bytes(rows: dict[int, dict[str, Any]]) -> int:
    return next(iter(rows.values()))["bytes"]


def _shown(mine: dict[int, dict[str, Any]] | None, than: dict[int, dict[str, Any]]) -> str:
    if mine is None:
        return ""
    gap = t_interval([mine[seed]["bits_per_byte"] - than[seed]["bits_per_byte"] for seed in mine if seed in than])
    if gap.low is None or gap.high is None:
        return f"{gap.mean:+.4f}"
    return f"{gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
