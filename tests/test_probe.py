"""Counterfactuals against exact cases: tied experts lose nothing, rows go where they are sent, intervals are Student's."""

import json

import numpy as np
import pytest
import tiny_runs
import torch
from drills.cases import Case, tied
from scipy import stats

from moe.analysis.paired import ratio_interval
from moe.cli import main
from moe.data import prepare
from moe.experiments.probe import Bench, _drop, _send, probe
from moe.model import Transformer
from moe.routing import Routing, Selection, Tokens
from moe.train import train


def routing_of(expert_R, weight_R, token_R, num_tokens: int, E: int = 4) -> Routing:
    """A routing of given rows."""
    token, expert = torch.tensor(token_R), torch.tensor(expert_R)
    offsets = torch.nn.functional.pad(torch.bincount(token, minlength=num_tokens).cumsum(0), (1, 0))
    return Routing(token, expert, torch.tensor(weight_R), offsets, E, Selection(token, expert))


def test_rows_are_sent_in_a_tokens_order_and_those_that_go_nowhere_stay():
    # token 0 has rows to experts 1 and 3, token 1 one dropped row and one to expert 2, token 2 none, token 3 one
    routing = routing_of([1, 3, 4, 2, 0], [0.6, 0.4, 0.0, 1.0, 1.0], [0, 0, 1, 1, 3], 4)
    orders = torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2], [0, 1, 2, 3], [1, 2, 3, 0]])
    sent = _send(routing, orders, torch.tensor([True, True, True, False]))
    assert sent.expert_R.tolist() == [2, 0, 4, 3, 0]
    assert torch.equal(sent.weight_R, routing.weight_R)


def test_dropped_experts_leave_their_weight_to_the_tokens_others():
    routing = routing_of([1, 3, 0, 2], [0.6, 0.4, 0.7, 0.3], [0, 0, 1, 1], 2)
    tokens = Tokens.of(torch.zeros(1, 2, dtype=torch.int64))
    left = _drop(torch.tensor([3, 0]))(routing, tokens)
    assert left.expert_R.tolist() == [1, 4, 4, 2]
    assert left.weight_R.tolist() == pytest.approx([1.0, 0.0, 0.0, 1.0])


def test_interval_is_students_for_rows_of_equal_length():
    difference = np.random.default_rng(0).normal(0.3, 1, 20)
    mean, low, high = ratio_interval(difference * 50, np.full(20, 50))
    expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.fixture(scope="module")
def tied_run(tmp_path_factory):
    """A short run whose experts are all the same."""
    folder = tmp_path_factory.mktemp("tied")
    run = tiny_runs.tiny_run(
        folder, "train.steps=6", "train.optimizer.lr=0.001", "logging.routing_every=1", "evaluation.every_steps=2"
    )
    with Case(None, change=lambda model, step: tied(model, step)).injected():
        return train(run, folder / "run")


def test_tied_experts_lose_nothing_by_any_routing_and_the_doctor_says_so(tied_run, capsys):
    lines = probe(tied_run, rows=4)
    found = {(line["kind"], line["layer"]): line for line in lines}
    assert set(found) == {
        *(("random", layer) for layer in (None, 0, 1)),
        *((kind, None) for kind in ("hash", "merged", "dropped", "alternative")),
    }
    for kind in ("random", "hash", "merged", "alternative"):
        assert found[kind, None]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["alternative", None]["regret"] == pytest.approx(0, abs=1e-6)
    assert len((tied_run / "probes.jsonl").read_text().splitlines()) == len(lines)
    assert main(["doctor", str(tied_run), "--json"]) == 1
    causes = [finding["cause"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert causes[0] == "redundancy" and "uninformative" in causes


def test_a_probe_leaves_the_model_as_it_was(tmp_path):
    run = tiny_runs.tiny_run(tmp_path)
    model = Transformer(run.model, seed=1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bench = Bench(model, prepare(run.data), 4, 2, torch.device("cpu"), 0)
    own, _ = bench.losses()
    lines = list(bench.counterfactuals())
    assert torch.equal(bench.losses()[0], own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [line["mean"] for line in bench.counterfactuals()] == [line["mean"] for line in lines], (
        "a draw is repeatable"
    )
    assert max(abs(line["mean"]) for line in lines) > 0


@pytest.mark.parametrize("router", ["expert_choice", "top_p", "moe_plus_plus", "remoe", "grin", "hash", "llama4"])
def test_routers_of_every_kind_can_be_probed(router, tmp_path):
    run = tiny_runs.tiny_run(tmp_path, f"model.moe.router={router}")
    bench = Bench(Transformer(run.model, seed=1).eval(), prepare(run.data), 4, 4, torch.device("cpu"), 0)
    assert all(np.isfinite(line["loss"]) for line in bench.counterfactuals())


def test_what_cannot_be_probed_is_refused_with_a_way_out(tmp_path, capsys):
    assert main(["probe", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    out = train(tiny_runs.tiny_run(tmp_path), tmp_path / "run")
    for path in (out / "checkpoints").iterdir():
        path.rename(out / path.name)
    assert main(["probe", str(out)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err
