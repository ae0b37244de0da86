"""Lottery tickets (Frankle & Carbin 2018, arXiv 1803.03635): which weights to keep, found by training, then trained again alone.

Each round trains, removes a share of the weights that are left, smallest first, and sets the others back to what they were at
step `rewind` of the first training (arXiv 1912.05671); the last round's mask is then trained once more. Weights are removed
one by one or in blocks, by magnitude over all matrices together. Controls keep as many weights: `random`, the same share of
each matrix at random; `reinitialised`, the same mask on other first weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe import parallel
from moe.config.load import load
from moe.config.schema import Run
from moe.data import prepare
from moe.errors import ConfigError
from moe.init import is_bias
from moe.model import Transformer
from moe.random import stable_seed
from moe.surgery.masked import train_masked
from moe.surgery.start import begin_run, model_of
from moe.train.evaluate import evaluate
from moe.train.record import require_free

Control = Literal["none", "random", "reinitialised"]


@dataclass(frozen=True)
class Search:
    """How a ticket is looked for."""

    keep: float = 0.2
    """Share of the prunable weights that stays in the end."""
    rounds: int = 3
    """Rounds of training and removing; each keeps the same share of what the last one left."""
    rewind: int = 0
    """Step of the first training that kept weights go back to."""
    block: int = 1
    """Side of the square blocks that are removed together; 1: single weights."""
    control: Control = "none"
    """What is trained in the end instead of the ticket."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1 or self.rounds < 1 or self.rewind < 0 or self.block < 1:
            raise ConfigError(
                f"keep ({self.keep}) must be between 0 and 1, rounds ({self.rounds}) and block ({self.block}) at least 1, "
                f"rewind ({self.rewind}) at least 0"
            )
        if self.control not in get_args(Control):
            raise ConfigError(f"control {self.control!r} is unknown: choose {', '.join(get_args(Control))}")


def prunable(tensors: Mapping[str, Tensor]) -> list[str]:
    """Matrices that weights are taken from: not embeddings, heads, routers, norms and biases."""
    fixed = ("embedding.", "head.", ".router.", "norm.")
    return [
        n
        for n, t in tensors.items()
        if t.ndim >= 2 and t.is_floating_point() and not is_bias(n) and not any(part in n for part in fixed)
    ]


def magnitude_masks(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: float, block: int
) -> dict[str, Tensor]:
    """Masks that keep the share `keep` of all blocks, those of largest root mean square among what `masks` leaves.

    Raises ConfigError for a matrix that blocks do not tile.
    """
    scores = {name: _block_scores(name, tensors[name] * masks[name], block) for name in masks}
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = max(1, round(keep * len(flat)))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: _spread(part.view(score.shape), block) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _block_scores(name: str, tensor: Tensor, block: int) -> Tensor:
    if tensor.shape[-1] % block or tensor.shape[-2] % block:
        raise ConfigError(
            f"{name} of shape {tuple(tensor.shape)} cannot be cut into blocks of {block}: use a divisor of its sides"
        )
    tiles = tensor.double().unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    return tiles.square().mean((-1, -3)).sqrt()


def _spread(kept: Tensor, block: int) -> Tensor:
    return kept.repeat_interleave(block, -1).repeat_interleave(block, -2)


def random_masks(masks: Mapping[str, Tensor], seed: int, block: int) -> dict[str, Tensor]:
    """As many blocks of each matrix, anywhere."""
    result = {}
    for name, mask in masks.items():
        kept = mask[..., ::block, ::block]
        generator = torch.Generator().manual_seed(stable_seed(seed, f"random mask {name}"))
        order = torch.randperm(kept.numel(), generator=generator)
        result[name] = _spread(kept.flatten()[order].view(kept.shape), block)
    return result


def find(source: str | Path, out: Path, search: Search, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look for a ticket of a recipe or run.json, train it (or its control), and write it as run `out`; returns the receipt.

    The receipt has validation bits per byte of the whole model, of the result, and the bytes of both, a pruned one as its
    kept weights and one bit for each place. Raises ConfigError before any training where rewind exceeds the steps.
    """
    require_free(out)
    run = load(source, overrides)
    if search.rewind >= run.train.steps:
        raise ConfigError(f"rewind ({search.rewind}) must be below train.steps ({run.train.steps})")
    first = Transformer(run.model, seed=run.seed).state_dict()
    masks = {name: torch.ones(first[name].shape, dtype=torch.bool) for name in prunable(first)}
    start = train_masked(run, first, {}, steps=range(search.rewind)) if search.rewind else first
    trained = train_masked(run, start, {}, steps=range(search.rewind, run.train.steps))
    whole = _bits(run, trained)
    for number in range(1, search.rounds + 1):
        masks = magnitude_masks(trained, masks, search.keep ** (number / search.rounds), search.block)
        if number < search.rounds:
            trained = retrain(run, start, masks, search.rewind)
    if search.control == "random":
        masks = random_masks(masks, run.seed, search.block)
    elif search.control == "reinitialised":
        start = Transformer(replace(run.model), seed=run.seed + 1).state_dict()
    result = retrain(run, start, masks, search.rewind)
    kept, places = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    others = sum(tensor.numel() for name, tensor in result.items() if name not in masks)
    receipt = {
        "made_by": "ticket",
        "source": str(source),
        "search": {name: getattr(search, name) for name in search.__dataclass_fields__},
        "kept": kept,
        "places": places,
        "bits_per_byte_whole": whole,
        "bits_per_byte": _bits(run, result),
        "bytes_whole": 4 * (places + others),
        "bytes": 4 * (kept + others) + places // (8 * search.block**2),
    }
    begin_run(out, run, result, receipt)
    return receipt


def retrain(run: Run, start: Mapping[str, Tensor], masks: Mapping[str, Tensor], rewind: int) -> dict[str, Tensor]:
    """Train what the masks keep of `start`, the weights of step `rewind`, to the end; the rest is 0 from there and stays it."""
    begin = {name: tensor * masks[name] if name in masks else tensor for name, tensor in start.items()}
    return train_masked(run, begin, masks, steps=range(rewind, run.train.steps))


def _bits(run: Run, tensors: Mapping[str, Tensor]) -> float:
    corpus = prepare(run.data)
    result = evaluate(
        model_of(run, tensors), corpus, parallel.start("cpu"), rows=run.evaluation.final_rows, micro_rows=8
    )
    return result.bits_per_byte


def describe(receipt: dict[str, Any], out: Path) -> str:
    """The receipt in words."""
    return (
        f"{out}: {receipt['kept']:,} of {receipt['places']:,} weights kept ({receipt['kept'] / receipt['places']:.1%}), "
        f"{receipt['bytes']:,} bytes of {receipt['bytes_whole']:,}\nbits per byte: {receipt['bits_per_byte_whole']:.4f} whole, "
        f"{receipt['bits_per_byte']:.4f} {'ticket' if receipt['search']['control'] == 'none' else receipt['search']['control']}"
    )
