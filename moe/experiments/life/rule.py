"""Conway's Game of Life on boards whose edges meet, and every neighbourhood of a cell.

A neighbourhood is nine cells, row by row, the cell itself fifth. A living cell stays alive with two or three living
neighbours, and a dead one comes alive with three: with the cell counted, a sum of 3, or of 4 around a living one.
"""

from functools import cache

import torch
from torch import Tensor

CENTRE = 4
"""Place of the cell itself among the nine."""


def next_cell(nine: Tensor) -> Tensor:
    """The rule: cells in the last dimension, [..., 9] of 0 and 1, to the cell's next state, bool."""
    alive = nine.sum(-1)
    return (alive == 3) | ((alive == 4) & (nine[..., CENTRE] > 0))


@cache
def neighbours(side: int) -> Tensor:
    """Index [side², 9] of the nine cells around each cell of a square board on a torus."""
    cell = torch.arange(side * side).view(side, side)
    shifted = [cell.roll((1 - row, 1 - column), (0, 1)) for row in range(3) for column in range(3)]
    return torch.stack(shifted, -1).view(-1, 9)


def play(board: Tensor, steps: int) -> Tensor:
    """Boards [..., C] of 0 and 1, C a square, after some steps; float32."""
    around = neighbours(round(board.shape[-1] ** 0.5))
    for _ in range(steps):
        board = next_cell(board[..., around]).float()
    return board


@cache
def all_neighbourhoods() -> Tensor:
    """The 512 neighbourhoods [512, 9], float32: place i of row p is bit i of p."""
    return ((torch.arange(512).unsqueeze(1) >> torch.arange(9)) & 1).float()
