"""Every router's losses, gradients and state in other layouts of an optimizer step: they must be the same.

Float64, rows of unequal padding and targets (rank_cases.py). Every loss is a sum over the step's tokens or rows and state
changes once per step, so nothing may depend on ranks, accumulation, recomputation or rows that are only padding.
"""

import json
from pathlib import Path

import pytest
import torch
from loss_matrix import LONG, cases, compared, state_cases
from rank_cases import ROWS, run_of, steps
from test_layouts import torchrun

from moe.config.load import known_routers
from moe.parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


FIRST = {name.split()[0]: config for name, config in reversed(list(cases()))}
"""Each router's first case: scope `global` where it takes that."""


def test_every_router_has_a_case():
    assert sorted(FIRST) == known_routers()


@pytest.mark.parametrize("name", FIRST)
def test_the_layout_of_a_step_changes_nothing(name):
    whole = steps(run_of(FIRST[name], ROWS, False), ALONE, 2)
    pieces = steps(run_of(FIRST[name], ROWS // 2, True, 2 * ROWS), ALONE, 2)
    assert max(compared(pieces, whole).values()) < 1e-10


@pytest.mark.parametrize("name", ["quantile", "default vectors"])
def test_state_after_twenty_steps_is_the_same(name):
    config = dict(state_cases())[name]
    whole = steps(run_of(config, ROWS, False), ALONE, LONG)
    pieces = steps(run_of(config, ROWS // 2, False, 2 * ROWS), ALONE, LONG)
    assert all(buffer.abs().sum() > 0 for key, buffer in whole.buffers.items() if "router" in key)
    assert max(compared(pieces, whole).values()) < 1e-10


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_loss_with_spread_parameters():
    found = json.loads(torchrun(2, str(Path(__file__).parent / "loss_matrix.py"), "spread", timeout=900))
    assert len(found) == 3 * (len(list(cases())) + len(list(state_cases())))
    wrong = {case: errors for case, errors in found.items() if max(errors.values()) >= 1e-10}
    assert not wrong


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_loss_in_every_layout(ranks):
    found = json.loads(torchrun(ranks, str(Path(__file__).parent / "loss_matrix.py"), timeout=900))
    assert len(found) == 12 * len(list(cases())) + len(list(state_cases()))
    wrong = {case: errors for case, errors in found.items() if max(errors.values()) >= 1e-10}
    assert not wrong
