"""Iterative magnitude pruning with rewinding (Frankle and Carbin 2019, arXiv 1803.03635), with its two controls.

Each round trains from the first values, keeps the largest parameters of every network, sets the others to 0 for good, and
starts over from the same first values. At every size the controls train as long on the same boards: a random mask with as
many parameters in every tensor and the same first values; and the same mask with new first values.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.config.life import Pruning
from moe.experiments.life.exact import right_of_512
from moe.experiments.life.networks import Shape, first_values
from moe.experiments.life.training import Task, train
from moe.random import stable_seed

ARMS = ("magnitude", "random mask", "new first values")


def kept_after(parameters: int, final_share: float, rounds: int) -> list[int]:
    """Parameters left after 0, 1, ..., `rounds` rounds: the same share is removed in each."""
    return [max(1, round(parameters * final_share ** (r / rounds))) for r in range(rounds + 1)]


def largest(value_QP: Tensor, keep_QP: Tensor, count: int) -> Tensor:
    """A mask of 0 and 1 of the `count` largest parameters by magnitude among those kept so far."""
    magnitude_QP = torch.where(keep_QP > 0, value_QP.abs(), -1.0)
    return torch.zeros_like(keep_QP).scatter_(1, magnitude_QP.topk(count, dim=1).indices, 1.0)


def shuffled(shape: Shape, keep_QP: Tensor, seed: int) -> Tensor:
    """A random mask with as many ones in every tensor of every network."""
    generator, parts = torch.Generator().manual_seed(stable_seed(seed, "life random mask")), []
    for part_QP in keep_QP.split(shape.sizes, 1):
        place_QP = torch.rand(part_QP.shape, generator=generator).argsort(1).argsort(1)
        parts.append((place_QP < part_QP.sum(1, keepdim=True)).float())
    return torch.cat(parts, 1)


def prune(spec: Pruning, task: Task, seeds: list[int]) -> Iterator[tuple[dict, Tensor]]:
    """For every size and arm a row (kept parameters, networks still exact, their places), and the networks value_QP."""
    shape = Shape(1, spec.width)
    first_QP = first_values(shape, seeds)
    keep_QP, trained_QP = torch.ones_like(first_QP), first_QP
    for number, count in enumerate(kept_after(shape.parameters, spec.final_share, spec.rounds)):
        if number:
            keep_QP = largest(trained_QP, keep_QP, count)
        boards = [stable_seed(seed, "pruning round", number) for seed in seeds]
        for arm in ARMS if number else ARMS[:1]:
            start_QP, mask_QP = first_QP, keep_QP
            if arm == "random mask":
                mask_QP = shuffled(shape, keep_QP, stable_seed(seeds[0], number))
            if arm == "new first values":
                start_QP = first_values(shape, [stable_seed(seed, "again", number) for seed in seeds])
            value_QP = train(shape, start_QP, boards, task, mask_QP)
            right = right_of_512(shape, value_QP).tolist()
            yield {"round": number, "kept": count, "arm": arm, "right": right}, value_QP
            if arm == "magnitude":
                trained_QP = value_QP
