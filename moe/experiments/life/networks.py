"""Networks L(n, m), many at once: per step of the game 3×3 filters with ReLU and 1×1 filters with ReLU, then one sigmoid filter.

| layer, per step | filters | parameters of L(1, m) |
| --- | --- | --- |
| 3×3, ReLU | 2m | 2m·(9 + 1) |
| 1×1, ReLU | m | m·(2m + 1) |
| 1×1, sigmoid, once at the end | 1 | m + 1 |

That is 2n + 1 layers, and m = 1 suffices: `by_hand` writes the solution down. A network's parameters are one row of
`value_QP`, layer after layer, weights [I, O] before biases [O]; the logits are computed here, the sigmoid is in the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.experiments.life.rule import neighbours
from moe.random import stable_seed


@dataclass(frozen=True)
class Shape:
    """L(n, m)."""

    steps: int
    """n, steps of the game."""
    width: int
    """m, times as many filters as suffice."""

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """(cells that a filter sees, channels in, filters) of each layer."""
        found, channels = [], 1
        for _ in range(self.steps):
            found += [(9, channels, 2 * self.width), (1, 2 * self.width, self.width)]
            channels = self.width
        return [*found, (1, channels, 1)]

    @property
    def sizes(self) -> list[int]:
        """Parameters of each tensor: weights and biases of every layer in turn."""
        return [size for cells, inputs, filters in self.layers for size in (cells * inputs * filters, filters)]

    @property
    def parameters(self) -> int:
        """P, weights and biases."""
        return sum(self.sizes)


def split(shape: Shape, value_QP: Tensor) -> list[Tensor]:
    """Views of each layer's weights [Q, cells·I, O] and biases [Q, 1, O], in turn."""
    parts, Q = value_QP.split(shape.sizes, 1), len(value_QP)
    views = []
    for i, (cells, inputs, filters) in enumerate(shape.layers):
        views += [parts[2 * i].view(Q, cells * inputs, filters), parts[2 * i + 1].view(Q, 1, filters)]
    return views


def first_values(shape: Shape, seeds: list[int]) -> Tensor:
    """value_QP at the start: uniform within ±1/√(inputs of a filter), torch's own for a convolution; a function of each seed."""
    bounds = [(cells * inputs) ** -0.5 for cells, inputs, _ in shape.layers for _ in range(2)]
    bound_P = torch.cat([torch.full((size,), bound) for size, bound in zip(shape.sizes, bounds, strict=True)])
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(stable_seed(seed, "life", shape.steps, shape.width))
        rows.append((torch.rand(shape.parameters, generator=generator) * 2 - 1) * bound_P)
    return torch.stack(rows)


def by_hand(steps: int) -> Tensor:
    """value_P of an L(n, 1) that plays n steps without an error.

    With z = 2·(living neighbours) + cell, alive next means 5 ≤ z ≤ 7: relu(1 - relu(5 - z) - relu(z - 7)) is 1 then, else 0.
    """
    count = torch.full((9,), 2.0)
    count[4] = 1.0
    one_step = [torch.stack([-count, count], 1).flatten(), torch.tensor([5.0, -7.0, -1.0, -1.0, 1.0])]
    return torch.cat([*one_step * steps, torch.tensor([2.0, -1.0])])


def logits(shape: Shape, parts: list[Tensor], board_QNC: Tensor) -> Tensor:
    """Logits [Q, N·C] that each cell of boards [Q, N, C] is alive after n steps; `parts` are those of `split`."""
    Q, N, C = board_QNC.shape
    around, hidden = neighbours(round(C**0.5)), board_QNC.unsqueeze(-1)
    for step in range(shape.steps):
        patch_QTI = hidden[:, :, around].view(Q, N * C, -1)
        hidden = one_step(parts[4 * step : 4 * step + 4], patch_QTI).view(Q, N, C, -1)
    return torch.baddbmm(parts[-1], hidden.view(Q, N * C, -1), parts[-2]).squeeze(-1)


def one_step(parts: list[Tensor], patch_QTI: Tensor) -> Tensor:
    """Both layers of a step on patches [Q, T, 9·channels], nine cells outermost: [Q, T, m]."""
    weight_QIO, bias_Q1O, narrow_QIO, narrow_bias_Q1O = parts
    hidden_QTO = torch.baddbmm(bias_Q1O, patch_QTI, weight_QIO).relu()
    return torch.baddbmm(narrow_bias_Q1O, hidden_QTO, narrow_QIO).relu()
