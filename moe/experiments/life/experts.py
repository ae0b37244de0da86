"""The same task for an expert layer of this package: a neighbourhood is a token of ten numbers, nine cells and a 1.

The layer's output goes through one linear map to a logit. Token ids, which only routers by id read, are the number of living
cells among the nine. A layer is trained alone, because routers and backends know no second network.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from moe.config.life import ExpertArm
from moe.experiments.life.rule import all_neighbourhoods, next_cell
from moe.experiments.life.training import rate
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.random import stable_seed
from moe.routing import Routing, Tokens

INIT_STD = 0.5
LOOK_EVERY = 25
"""Updates between two looks at all neighbourhoods."""


class Cells(nn.Module):
    """An expert layer between nine cells and a logit."""

    def __init__(self, arm: ExpertArm, seed: int):
        super().__init__()
        self.layer = MoELayer(arm.moe, 10, layer=0, seed=seed, init_std=INIT_STD)
        self.head = nn.Linear(10, 1)
        generator = torch.Generator().manual_seed(stable_seed(seed, "life head"))
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, 10, generator=generator) * INIT_STD)
            self.head.bias.zero_()

    def forward(self, nine_T9: Tensor, update: int) -> tuple[Tensor, Routing]:
        """Logits [T] that each cell is alive next, and the routing."""
        x_1TD = nn.functional.pad(nine_T9, (0, 1), value=1.0).unsqueeze(0)
        ids_1T = nine_T9.sum(1).long().unsqueeze(0)
        y_1TD, routing = self.layer(x_1TD, Tokens.of(ids_1T, step=update))
        return self.head(y_1TD[0]).squeeze(1), routing


def train_layer(arm: ExpertArm, seed: int, tokens: int, density: float) -> dict:
    """Train one layer; a row with its right answers of 512, the first look that found all right, and its final loads."""
    model = Cells(arm, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=arm.lr, fused=True)
    generator = torch.Generator().manual_seed(stable_seed(seed, "life cells"))
    solved = None
    for update in range(arm.updates):
        optimizer.param_groups[0]["lr"] = rate(update, arm.updates, arm.lr)
        nine_T9 = (torch.rand(tokens, 9, generator=generator) < density).float()
        said_T, routing = model(nine_T9, update)
        loss = binary_cross_entropy_with_logits(said_T, next_cell(nine_T9).float()) + auxiliary_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.layer.update(routing.statistics)
        if solved is None and (update + 1) % LOOK_EVERY == 0 and _look(model, update)[0] == 512:
            solved = update + 1
    right, counts_E = _look(model, arm.updates)
    return {"seed": seed, "right": right, "first_solved": solved, "loads": counts_E}


@torch.no_grad()
def _look(model: Cells, update: int) -> tuple[int, list[int]]:
    """Right answers in all 512 neighbourhoods, and how many of these each expert takes."""
    model.eval()
    said_T, routing = model(all_neighbourhoods(), update)
    model.train()
    return int((said_T > 0).eq(next_cell(all_neighbourhoods())).sum()), routing.statistics["counts_E"].tolist()
