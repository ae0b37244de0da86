"""Training of many networks at once: each has first values, boards and a loss of its own, and their gradients never meet."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moe.experiments.life.networks import Shape, logits, split
from moe.experiments.life.rule import play
from moe.random import stable_seed

WARMUP = 50
FLOOR = 0.02
"""The learning rate rises over WARMUP updates and falls along a cosine to this share of its largest value."""
CHUNK = 25
"""Updates whose boards are drawn at once; the draws do not depend on it."""


@dataclass(frozen=True)
class Task:
    """What a batch is."""

    side: int
    boards: int
    density: float
    updates: int
    lr: float


def rate(update: int, updates: int, lr: float) -> float:
    """Learning rate of an update, counted from 0."""
    fall = 0.5 * (1 + math.cos(math.pi * update / updates))
    return lr * min(1.0, (update + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * fall)


def random_boards(seeds: list[int], task: Task) -> Callable[[int], Tensor]:
    """A function from the update, asked in order, to boards [Q, N, C] of 0 and 1; network q's are a function of its seed."""
    generators = [torch.Generator().manual_seed(stable_seed(seed, "life boards")) for seed in seeds]
    drawn = torch.empty(len(seeds), CHUNK, task.boards, task.side**2)

    def boards(update: int) -> Tensor:
        if update % CHUNK == 0:
            for row, generator in zip(drawn, generators, strict=True):
                row.uniform_(generator=generator)
        return (drawn[:, update % CHUNK] < task.density).float()

    return boards


def train(shape: Shape, start_QP: Tensor, seeds: list[int], task: Task, keep_QP: Tensor | None = None) -> Tensor:
    """value_QP after training with Adam on the mean cross-entropy of each network's cells; parameters outside keep_QP stay 0."""
    start_QP = start_QP if keep_QP is None else start_QP * keep_QP
    parts = [part.clone().requires_grad_() for part in split(shape, start_QP)]
    kept = None if keep_QP is None else split(shape, keep_QP)
    optimizer = torch.optim.Adam(parts, lr=task.lr, fused=True)
    draw = random_boards(seeds, task)
    for update in range(task.updates):
        optimizer.param_groups[0]["lr"] = rate(update, task.updates, task.lr)
        board_QNC = draw(update)
        truth_QT = play(board_QNC, shape.steps).flatten(1)
        said_QT = logits(shape, parts, board_QNC)
        optimizer.zero_grad()
        (binary_cross_entropy_with_logits(said_QT, truth_QT, reduction="sum") / truth_QT.shape[1]).backward()
        if kept is not None:
            for part, mask in zip(parts, kept, strict=True):
                assert part.grad is not None
                part.grad.mul_(mask)
        optimizer.step()
    return torch.cat([part.detach().flatten(1) for part in parts], 1)
