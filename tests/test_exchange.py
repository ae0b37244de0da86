"""Tokens that travel to other ranks' experts: values, gradients and costs against one process that has all experts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from exchange_cases import D, E, anywhere, experts_of, routing_of
from test_layouts import torchrun
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe.experts.means import output_sums
from moe.parallel.exchange import Exchange
from moe.routing import Tokens, plan

CASES = Path(__file__).parent / "exchange_cases.py"


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_awkward_routings_equal_one_process(ranks):
    errors = json.loads(torchrun(ranks, str(CASES)))
    assert len(errors) >= 25
    assert {case: error for case, error in errors.items() if error > 1e-12} == {}


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def sent(group, way: str, tokens: int = 40, top_k: int = 3):
    """(routing, arrival) of random choices; with one rank, all that is sent comes here."""
    generator = torch.Generator().manual_seed(3)
    expert_TK = anywhere(tokens, top_k, generator)
    routing = routing_of(expert_TK, torch.rand(tokens, top_k, generator=generator), "output")
    exchange = Exchange(group, E, way, 1.5)
    return expert_TK, exchange, exchange.start(torch.randn(tokens, D), plan(routing), training=True)


def test_a_token_travels_once_to_a_rank_that_holds_several_of_its_experts(alone):
    expert_TK, _, arrival = sent(alone, "deduplicated")
    assert arrival.units_UD.shape[0] == int((expert_TK < E).any(1).sum())
    assert arrival.weight_R.shape[0] == int((expert_TK < E).sum())


def test_without_deduplication_every_row_travels(alone):
    expert_TK, _, arrival = sent(alone, "rows")
    assert arrival.units_UD.shape[0] == int((expert_TK < E).sum())


def test_fixed_sizes_depend_on_the_capacity_alone(alone):
    _, _, arrival = sent(alone, "capacity")
    assert arrival.units_UD.shape[0] == E * -(-3 * 40 * 1.5 // E)


def test_evaluation_drops_nothing_where_training_has_fixed_sizes(alone):
    exchange = Exchange(alone, E, "capacity", 0.1)
    dispatch = plan(routing_of(torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1), "output"))
    training = exchange.start(torch.randn(40, D), dispatch, training=True)
    evaluation = exchange.start(torch.randn(40, D), dispatch, training=False)
    assert int(training.statistics["undelivered_rows"]) == 39
    assert int(evaluation.statistics["undelivered_rows"]) == 0
    assert training.units_UD.sum().isfinite() and evaluation.units_UD.sum().isfinite()


def test_means_of_outputs_miss_no_row_where_training_has_fixed_sizes(alone):
    """All tokens choose one expert, of which `capacity` delivers one row in ten; its mean is over every row all the same."""
    whole, short = experts_of(None), experts_of(Exchange(alone, E, "capacity", 0.1))
    x_TD = torch.randn(40, D, dtype=torch.float64)
    routing = routing_of(torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1, dtype=torch.float64), "output")
    tokens = Tokens.of_hidden(x_TD.view(1, 40, D))
    sums = [output_sums(experts, None, x_TD, routing, tokens, stride=1) for experts in (whole, short)]
    torch.testing.assert_close(sums[1]["output_sum_ED"], sums[0]["output_sum_ED"], rtol=1e-12, atol=1e-12)
    assert int(sums[1]["output_rows_E"][0]) == 40


@pytest.mark.parametrize("way", ["capacity", "deduplicated"])
def test_only_exact_sizes_are_read_back_from_the_device(way):
    """Fake tensors have no values: reading one raises. Exact sizes read one, the sizes; fixed sizes none."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        exchange = Exchange(dist.group.WORLD, E, way, 2.0)
        with FakeTensorMode(allow_non_fake_inputs=True):
            dispatch = plan(routing_of(torch.zeros(40, 2, dtype=torch.int64), torch.ones(40, 2), "output"))
            if way == "capacity":
                arrival = exchange.start(torch.randn(40, D), dispatch, training=True)
                local = exchange.local(arrival, dispatch)
                y_TD = exchange.finish(arrival.units_UD, arrival, 40)
                assert y_TD.shape == (40, D) and local.token_P.shape == arrival.weight_R.shape
            else:
                with pytest.raises(DataDependentOutputException):
                    exchange.start(torch.randn(40, D), dispatch, training=True)
    finally:
        dist.destroy_process_group()
