"""Whether a network is right everywhere: in all 2^9 neighbourhoods of one step, or all 2^25 of two.

Two steps see 5×5 cells. Its inner 3×3 states after one step are 512-row tables, and the second step's filters add nine of
them. Three rows of the 25 cells decide three of the nine, so the sum is over three tables of 2^15 rows, each for one place
of the window; the 2^10 choices of the outer rows are tried in turn, 2^15 neighbourhoods at a time.
"""

from functools import cache

import torch
from torch import Tensor

from moe.experiments.life.networks import Shape, logits, one_step, split
from moe.experiments.life.rule import CENTRE, all_neighbourhoods, next_cell, play

SCREEN_BOARDS = 64
"""Random boards at three densities that a network for two steps must pass before all neighbourhoods are tried."""
DENSITIES = (0.2, 0.38, 0.6)


@torch.no_grad()
def right_of_512(shape: Shape, value_QP: Tensor) -> Tensor:
    """How many of the 512 neighbourhoods each network for one step gets right, int64 [Q]."""
    nine = all_neighbourhoods()
    return (neighbourhood_logits(shape, value_QP) > 0).eq(next_cell(nine)).sum(1)


@torch.no_grad()
def neighbourhood_logits(shape: Shape, value_QP: Tensor) -> Tensor:
    """Logits [Q, 512] of a network for one step in every neighbourhood."""
    assert shape.steps == 1
    parts = split(shape, value_QP)
    hidden_QTO = one_step(parts[:4], all_neighbourhoods().expand(len(value_QP), -1, -1))
    return torch.baddbmm(parts[5], hidden_QTO, parts[4]).squeeze(-1)


@torch.no_grad()
def board_accuracy(shape: Shape, value_QP: Tensor, *, side: int, seed: int) -> Tensor:
    """Share of the cells of random boards, the same for all networks, that each gets right, float32 [Q]."""
    generator = torch.Generator().manual_seed(seed)
    boards = [(torch.rand(SCREEN_BOARDS, side * side, generator=generator) < d).float() for d in DENSITIES]
    board_NC = torch.cat(boards)
    truth_T = play(board_NC, shape.steps).flatten() > 0
    said_QT = logits(shape, split(shape, value_QP), board_NC.expand(len(value_QP), -1, -1)) > 0
    return said_QT.eq(truth_T).float().mean(1)


def is_exact(shape: Shape, value_QP: Tensor, *, side: int, seed: int) -> Tensor:
    """Which networks are right in every neighbourhood there is, bool [Q]; for one or two steps."""
    if shape.steps == 1:
        return right_of_512(shape, value_QP) == 512
    passed = board_accuracy(shape, value_QP, side=side, seed=seed) == 1
    for q in passed.nonzero().flatten().tolist():
        passed[q] = first_error(shape, value_QP[q]) is None
    return passed


@torch.no_grad()
def first_error(shape: Shape, value_P: Tensor) -> int | None:
    """The first of the 2^25 neighbourhoods, as bits row by row, that a network for two steps gets wrong; None if all are right."""
    assert shape.steps == 2
    parts = split(shape, value_P.unsqueeze(0))
    state_1PO = one_step(parts[:4], all_neighbourhoods().unsqueeze(0))
    weight_9IO = parts[4].view(9, shape.width, -1)
    tables = [_rows_of_three(torch.stack([state_1PO[0] @ w for w in weight_9IO[3 * i : 3 * i + 3]])) for i in range(3)]
    tables[0] = tables[0] + parts[5].view(-1)
    for outer, truth in enumerate(_two_steps()):
        first, last = outer % 32, outer // 32
        # dimensions: second, third and fourth row of cells, channels
        hidden = tables[0][first].unsqueeze(2) + tables[1] + tables[2][:, :, last].unsqueeze(0)
        hidden = hidden.view(-1, 2 * shape.width).relu_() @ parts[6][0] + parts[7][0]
        wrong = ((hidden.relu_() @ parts[8][0] + parts[9][0]).view(-1) > 0).ne(truth)
        if wrong.any():
            middle = int(wrong.nonzero()[0])
            rows = (first, middle // 1024, middle // 32 % 32, middle % 32, last)
            return sum(row << 5 * i for i, row in enumerate(rows))
    return None


def _rows_of_three(table_3PO: Tensor) -> Tensor:
    """Σ over three neighbouring columns of a table of neighbourhoods: [32, 32, 32, O] by the bits of three rows of five cells."""
    rows = torch.arange(32)
    total = torch.zeros(())
    for column, table_PO in enumerate(table_3PO):
        three = (rows >> column) & 7
        index = three.view(32, 1, 1) + 8 * three.view(1, 32, 1) + 64 * three.view(1, 1, 32)
        total = total + table_PO[index]
    return total


@cache
def _two_steps() -> list[Tensor]:
    """The centre of 5×5 cells after two steps, bool [2^15] for each of the 2^10 (first row + 32·last row)."""
    state_P1 = next_cell(all_neighbourhoods()).to(torch.uint8).unsqueeze(1)
    sums = _rows_of_three(state_P1.expand(3, -1, -1)).squeeze(-1)
    none = torch.zeros_like(state_P1)
    assert CENTRE == 4
    centre = _rows_of_three(torch.stack([none, state_P1, none])).squeeze(-1)
    found = []
    for outer in range(1024):
        alive = sums[outer % 32].unsqueeze(2) + sums + sums[:, :, outer // 32].unsqueeze(0)
        found.append(((alive == 3) | ((alive == 4) & (centre > 0))).view(-1))
    return found
