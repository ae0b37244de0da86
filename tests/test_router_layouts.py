"""Every router's default settings: one optimizer step in one piece against the same in four, with recomputed blocks.

Float64, rows of unequal padding and targets (rank_cases.py). Losses, gradients and router state must be the same, because
every loss is a sum over the step's tokens or rows and state changes once per step.
"""

import pytest
import torch
from rank_cases import ROWS, difference, run_of, steps

from moe.config.load import known_routers, resolve_router
from moe.parallel import Ranks


@pytest.mark.parametrize("name", known_routers())
def test_the_layout_of_a_step_changes_nothing(name):
    config = resolve_router(name).Config()
    alone = Ranks(0, 1, torch.device("cpu"))
    whole = steps(run_of(config, ROWS, False), alone)
    pieces = steps(run_of(config, ROWS // 4, True), alone)
    assert difference(torch.tensor(pieces.losses), torch.tensor(whole.losses)) < 1e-10
    for key, grad in whole.grads.items():
        assert difference(pieces.grads[key], grad) < 1e-10, key
    for key, state in whole.buffers.items():
        assert difference(pieces.buffers[key].double(), state.double()) < 1e-10, key
