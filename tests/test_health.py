"""Figures of routing health: closed forms and simulation, brute force on a tiny model, every layout, one sick layer of fourteen."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rank_cases
import torch
from drills.cases import Case
from drills.sizes import base
from rank_cases import ROUTERS, ROWS, UnevenCorpus, run_of
from tiny_runs import tiny_dict, tiny_run

from moe.balance import score_statistics
from moe.config.load import load
from moe.metrics import (
    coactivation,
    dead_experts_floor,
    load_cv_floor,
    mutual_information,
    overlap,
    router_weight_row,
    routing_row,
)
from moe.model import IGNORE, Transformer
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.routers.topk import Config as TopK
from moe.routing import Tokens
from moe.train import train
from moe.train.health import every_output, measure, watching
from moe.train.step import State, train_step

# ------------------------------------------------------------------------------------------------------ closed forms


def statistics(counts, *, scores=None, tokens: int = 4) -> dict[str, np.ndarray]:
    """Summed statistics of a layer with the given loads."""
    E = len(counts)
    scores = np.full(E, 1 / E) if scores is None else np.asarray(scores)
    return {
        "counts_E": np.asarray(counts),
        "kept_E": np.asarray(counts),
        "share_sum_E": scores * tokens,
        "entropy_sum": np.array(tokens * 0.5),
        "margin_sum": np.array(tokens * 0.25),
        "token_sum": np.array(tokens),
        "logit_square_sum": np.array(tokens * 9.0),
        "lse_square_sum": np.array(tokens * 5.9545258),
        "logit_max": np.array(4.0),
    }


def test_the_load_fixture_has_its_known_figures():
    row = routing_row(statistics([4, 2, 1, 1]))
    assert row["max_vio"] == pytest.approx(1.0)
    assert row["load_cv"] == pytest.approx(0.6124, abs=5e-5)
    assert row["load_entropy"] == pytest.approx(0.875)
    assert (row["logit_rms"], row["logsumexp_square"], row["margin"]) == (3.0, 5.9545258, 0.25)
    assert row["tokens_per_expert"] == 2.0


@pytest.mark.parametrize(("E", "k"), [(8, 2), (64, 8), (5, 1)])
def test_total_collapse_has_its_closed_form(E, k):
    row = routing_row(statistics([100] * k + [0] * (E - k)))
    assert row["load_cv"] == pytest.approx(math.sqrt((E - k) / k))
    assert row["effective_experts"] == pytest.approx(k)
    assert row["dead_experts"] == E - k


def test_balance_value_is_one_at_balance_and_the_upper_bound_at_collapse():
    assert routing_row(statistics([5, 5, 5, 5]))["balance_value"] == pytest.approx(1.0)
    collapsed = routing_row(statistics([20, 0, 0, 0], scores=[0.7, 0.1, 0.1, 0.1]))
    assert collapsed["balance_value"] == pytest.approx(2.8)


def test_routing_information_is_the_entropy_of_the_mean_less_the_mean_entropy():
    p_TE = np.random.default_rng(0).dirichlet(np.full(6, 0.3), size=50)
    given = statistics([10] * 6, scores=p_TE.mean(0), tokens=50)
    given["entropy_sum"] = -(p_TE * np.log(p_TE)).sum()
    divergence = (p_TE * np.log(p_TE / p_TE.mean(0))).sum(1).mean()
    assert routing_row(given)["routing_information"] == pytest.approx(divergence / math.log(6))


def test_scores_of_experts_that_cost_nothing_count_in_entropies_and_not_in_balance():
    """Two experts and two others with half of the scores: what two experts alone show at balance, and at collapse."""
    row = routing_row({**statistics([4, 4]), "share_sum_E": np.full(4, 0.25) * 4})
    assert row["balance_value"] == pytest.approx(1.0)
    assert row["router_entropy"] == pytest.approx(0.5 / math.log(4))
    assert row["routing_information"] == pytest.approx(1 - 0.5 / math.log(4))
    row = routing_row({**statistics([8, 0]), "share_sum_E": np.array([0.3, 0.1, 0.3, 0.3]) * 4})
    assert row["balance_value"] == pytest.approx(1.5)


@pytest.mark.parametrize("router", ["longcat", "moe_plus_plus"])
def test_a_run_with_experts_that_cost_nothing_is_trained_logged_and_evaluated(router, tmp_path):
    train(tiny_run(tmp_path, f"model.moe.router={router}", "logging.routing_every=1"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "routing.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["counts"]) == 4 and 0 <= row["router_entropy"] <= 1 for row in rows)


@pytest.mark.parametrize(("E", "rows"), [(8, 512), (64, 8192), (128, 2048)])
def test_floors_of_the_load_are_what_a_perfect_router_shows(E, rows):
    loads = np.random.default_rng(0).multinomial(rows, np.full(E, 1 / E), size=2000)
    cv = np.sqrt((loads.std(1) / loads.mean(1)) ** 2).mean()
    assert load_cv_floor(E, rows) == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(("E", "rows"), [(64, 256), (256, 512), (16, 64)])
def test_floor_of_dead_experts_is_what_a_perfect_router_shows(E, rows):
    loads = np.random.default_rng(1).multinomial(rows, np.full(E, 1 / E), size=4000)
    dead = (loads < 0.01 * rows / E).sum(1).mean()
    assert dead_experts_floor(E, rows) == pytest.approx(dead, rel=0.1, abs=0.02)


def test_row_cosine_and_conditioning_against_all_pairs():
    w = np.random.default_rng(0).normal(size=(7, 12)) + 0.5
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j]
    row = router_weight_row(w, w * 1.5)
    assert row["row_cosine"] == pytest.approx(np.mean(pairs))
    mean = w.mean(0)
    assert row["conditioning"] == pytest.approx(max(np.linalg.norm(w - mean, axis=1)) / np.linalg.norm(mean))
    assert row["router_change"] == pytest.approx(1 / 3)
    assert router_weight_row(np.tile(w[:1], (4, 1)), w[:4])["row_cosine"] == pytest.approx(1.0)


def test_floor_of_row_cosine_is_its_deviation_over_random_rows():
    random = np.random.default_rng(0)
    rows = [router_weight_row(w, w) for w in random.normal(size=(2000, 8, 32))]
    assert np.std([row["row_cosine"] for row in rows]) == pytest.approx(rows[0]["row_cosine_floor"], rel=0.1)


def test_information_is_one_for_a_deterministic_map_and_its_floor_for_independence():
    assert mutual_information(np.diag([5, 9, 2]))[0] == pytest.approx(1.0)
    assert mutual_information(np.outer([1, 2, 3], [4, 5]))[0] == pytest.approx(0.0, abs=1e-12)
    random = np.random.default_rng(0)
    draws = [random.multinomial(3000, np.full(8 * 40, 1 / 320)).reshape(8, 40) for _ in range(200)]
    found, floors = zip(*(mutual_information(draw) for draw in draws), strict=True)
    assert np.mean(found) == pytest.approx(np.mean(floors), rel=0.1)


def test_coactivation_finds_the_pair_and_knows_chance():
    random = np.random.default_rng(0)
    chosen = np.array([random.permutation(12)[:3] for _ in range(4000)])
    table = np.zeros((4000, 12), bool)
    np.put_along_axis(table, chosen, True, 1)
    share, chance, _ = coactivation(table.T.astype(int) @ table, table.sum(0))
    assert share < chance < 0.25, "random choices stay below the chance level, near 2/11"
    table[:, 5] |= table[:, 9]
    share, chance, pair = coactivation(table.T.astype(int) @ table, table.sum(0))
    assert pair == (9, 5) and share == 1.0 and share > chance


def test_overlap_of_k_choices_is_the_share_kept():
    now, before = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool), np.array([[1, 0, 1, 0], [0, 1, 1, 0]], bool)
    assert overlap(now, before) == 0.75


# ----------------------------------------------------------------------------------------------- measured on a model


ALONE = Ranks(0, 1, torch.device("cpu"))


def state_of(router, micro_rows: int = ROWS, recompute: bool = False, ranks: Ranks = ALONE) -> State:
    """A float64 model of two expert layers, two steps trained."""
    run = run_of(router, micro_rows, recompute)
    model = Transformer(run.model, seed=1, dtype=torch.float64, recompute=recompute).double()
    state = State(run, ranks, UnevenCorpus(), model, model, build_optimizer(model, run.train.optimizer))  # type: ignore[arg-type]
    for step in range(2):
        train_step(state, step)
    return state


def flat(rows: list[dict]) -> np.ndarray:
    """All numbers of some lines."""
    values: list[float] = []
    for row in rows:
        for _, value in sorted(row.items()):
            values += np.ravel(np.array(np.nan if value is None else value, dtype=float)).tolist()
    return np.array(values)


def test_gradients_at_the_router_are_those_of_the_two_losses(tmp_path):
    state = state_of(TopK(balance=replace(TopK().balance, weight=1.0), z_weight=0.1))
    rows = measure(state, 2, tmp_path)
    batch = state.corpus.train_batch(1, range(ROWS), batch_rows=ROWS, seed=0)
    tokens = Tokens.of(batch.ids_BS, valid_BS=batch.valid_BS, document_BS=batch.document_BS)
    count = (batch.targets_BS != IGNORE).sum().float()
    given = {"tokens": tokens, "step_targets": count}
    weights = [layer.router.weight_ED for _, layer in state.model.moe_layers()]
    lm = torch.autograd.grad(state.model(batch.ids_BS, batch.targets_BS, **given).loss, weights)
    for row, grad in zip(rows, lm, strict=True):
        assert row["lm_gradient"] == pytest.approx(grad.norm().item(), rel=1e-9)
    output = state.model(batch.ids_BS, batch.targets_BS, **given)
    everything = torch.autograd.grad(output.objective, weights)
    # without z-loss the balance gradient is what is left of the objective's; with it, the difference is the z-loss's
    bare = state_of(TopK(balance=replace(TopK().balance, weight=1.0), z_weight=0.0))
    row = measure(bare, 2, tmp_path / "bare")[0]
    weights = [layer.router.weight_ED for _, layer in bare.model.moe_layers()]
    output = bare.model(batch.ids_BS, batch.targets_BS, **given)
    lm, both = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (output.loss, output.objective))
    assert row["balance_gradient"] == pytest.approx((both[0] - lm[0]).norm().item(), rel=1e-9)
    assert everything[0].isfinite().all()


def test_tables_count_the_choices_of_the_whole_batch(tmp_path):
    state = state_of(ROUTERS["global"])
    rows = measure(state, 2, tmp_path)
    batch = state.corpus.train_batch(1, range(ROWS), batch_rows=ROWS, seed=0)
    tokens = Tokens.of(batch.ids_BS, valid_BS=batch.valid_BS, document_BS=batch.document_BS)
    routing = state.model(batch.ids_BS, tokens=tokens).routing
    valid = batch.valid_BS.flatten()
    for row, layer in zip(rows, routing, strict=True):
        experts = layer.selection.expert_R.view(-1, 2)[valid].numpy()
        ids, sources = batch.ids_BS.flatten()[valid].numpy(), (torch.arange(ROWS) % 2).repeat_interleave(rank_cases.S)
        for name, labels, size in (("token", ids, 40), ("source", sources[valid].numpy(), 2)):
            table = np.zeros((4, size))
            for label, pair in zip(labels, experts, strict=True):
                table[pair, label] += 1
            joint = table / table.sum()
            apart = np.outer(joint.sum(1), joint.sum(0))
            expected = (joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum()
            per = joint.sum(1) if name == "token" else joint.sum(0)
            assert row[f"{name}_information"] == pytest.approx(expected / -(per * np.log(per)).sum())
        i, j = row["coactivation_pair"]
        together = sum(i in pair and j in pair for pair in experts.tolist())
        assert row["coactivation"] == pytest.approx(together / (experts == i).sum())


@pytest.mark.parametrize("name", ROUTERS)
def test_health_does_not_depend_on_accumulation_or_recomputation(name, tmp_path):
    state, other = state_of(ROUTERS[name]), state_of(ROUTERS[name], ROWS // 4, True)
    # AdamW makes whole steps of gradients that are nothing but rounding, so both get the same weights
    other.model.load_state_dict(state.model.state_dict())
    whole, pieces = measure(state, 2, tmp_path / "whole"), measure(other, 2, tmp_path / "pieces")
    assert np.allclose(flat(pieces), flat(whole), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_what_only_a_log_reads_is_measured_in_logged_steps_alone():
    quiet, logged = state_of(ROUTERS["loss_free"]), state_of(ROUTERS["loss_free"])
    without, with_all = train_step(quiet, 2), train_step(logged, 2, maxima=True)
    assert set(without.statistics[0][1]) == {"counts_E", "kept_E", "token_sum"}
    assert {"share_sum_E", "entropy_sum", "logit_max", "lse_square_sum"} <= set(with_all.statistics[0][1])
    assert (without.loss, without.losses, without.grad_norm) == (with_all.loss, with_all.losses, with_all.grad_norm)
    assert torch.equal(quiet.model.state_dict()["embedding.weight"], logged.model.state_dict()["embedding.weight"])


def test_statistics_of_scores_are_those_of_their_definitions():
    logits = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[3, 1] = logits[3, 4] = 9.0
    share, valid = logits.softmax(1), torch.arange(40) % 4 > 0
    tokens = replace(Tokens.of(torch.zeros(1, 40, dtype=torch.int64)), valid_T=valid)
    found = score_statistics(share, logits, tokens)
    top = share[valid].sort(1, descending=True).values
    assert found["entropy_sum"] == pytest.approx(torch.special.entr(share[valid]).sum().item())
    assert found["margin_sum"] == pytest.approx((top[:, 0] - top[:, 1]).sum().item())
    assert torch.allclose(found["share_sum_E"], share[valid].sum(0))
    assert found["logit_square_sum"] == pytest.approx(logits[valid].square().mean(1).sum().item())
    assert found["lse_square_sum"] == pytest.approx(logits[valid].logsumexp(1).square().sum().item())
    assert found["logit_max"] == logits[valid].abs().max()


def test_measuring_changes_nothing(tmp_path):
    state, twin = state_of(ROUTERS["loss_free"]), state_of(ROUTERS["loss_free"])
    measure(state, 2, tmp_path)
    for key, value in state.model.state_dict().items():
        assert torch.equal(value, twin.model.state_dict()[key]), key
    assert train_step(state, 2).loss == train_step(twin, 2).loss


def test_outputs_of_experts_are_those_of_each_alone():
    state = state_of(ROUTERS["global"])
    _, layer = state.model.moe_layers()[0]
    x = torch.randn(5, 16, dtype=torch.float64)
    experts = layer.experts
    for e in range(4):
        alone = (torch.nn.functional.silu(x @ experts.w_gate_EDF[e]) * (x @ experts.w_up_EDF[e])) @ experts.w_down_EFD[
            e
        ]
        assert torch.allclose(every_output(layer, x)[e], alone)


def test_churn_and_saturation_compare_with_the_choices_kept_on_disk(tmp_path):
    state = state_of(ROUTERS["global"])
    first = measure(state, 1, tmp_path)
    assert [row["churn"] for row in first] == [None, None]
    again = measure(state, 2, tmp_path)
    assert [(row["churn"], row["churn_since"]) for row in again] == [(0.0, 1), (0.0, 1)]
    with torch.no_grad():
        state.model.moe_layers()[1][1].router.weight_ED.mul_(-1)
    last = measure(state, 3, tmp_path)
    assert last[0]["churn"] == 0.0 and last[1]["churn"] > 0.5, "k best of 4 become the k worst"
    assert last[1]["saturation"] == [[1, 1 - last[1]["churn"]], [2, 1 - last[1]["churn"]]]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_logs_the_same_figures(tmp_path):
    given = ("train.steps=3", "logging.routing_every=1", "evaluation.every_steps=3")
    out = [train(load(tiny_dict(tmp_path), [*given, f"train.compile={on}"]), tmp_path / on) for on in ("false", "true")]
    for log in ("routing", "health"):
        eager, compiled = ([json.loads(line) for line in (o / f"{log}.jsonl").read_text().splitlines()] for o in out)
        assert len(eager) == len(compiled) > 0
        assert np.allclose(flat(compiled), flat(eager), rtol=2e-3, atol=2e-4, equal_nan=True), log


# ------------------------------------------------------------------------------------------- one sick layer of fourteen

SICK, DENSE, DEPTH = 9, 2, 14


def _only_sick(change):
    def act(model: Transformer, step: int) -> None:
        change(dict(model.moe_layers())[SICK], step, model)

    return act


def collapsed(layer, step: int, model: Transformer) -> None:
    """Two router rows outweigh the others, along what hidden states share; experts are large, but the last is silent."""
    if step == 0:
        with torch.no_grad(), watching(model) as seen:
            model(torch.tensor([list(Path(__file__).read_bytes()[:512])]))
        shared = next(one.x_TD.mean(0) for one in seen if one.module is layer)
        for row, scale in enumerate((1.0, 0.9, -1.0, -0.9)):
            layer.router.weight_ED.data[row] = 20 * scale * shared / shared.norm()
        layer.experts.w_down_EFD.data *= 3
    layer.experts.w_down_EFD.data[-1] = 0


def rounded(forward: Callable) -> Callable:
    """A router that sees hidden states in bfloat16, but for those that come in float64."""

    def with_rounding(x_TD, tokens, replay=None):
        return forward(x_TD if x_TD.dtype == torch.float64 else x_TD.bfloat16().float(), tokens, replay)

    return with_rounding


def same() -> Callable:
    """Router rows alike, rounded, experts alike; the choice is turned round at every step."""
    first: list[torch.Tensor] = []

    def change(layer, step: int, model: Transformer) -> None:
        weight = layer.router.weight_ED.data
        if step == 0:
            first.append(weight.clone())
            layer.router.forward = rounded(layer.router.forward)
        apart = first[0] - first[0].mean(0)
        weight.copy_(first[0].mean(0) + (0.02 if step % 2 else -0.02) * apart)
        for part in layer.experts.parameters():
            part.data[1:] = part.data[:1]

    return change


EXPECTED = {
    "collapsed": (
        collapsed,
        {
            "routing": "-load_entropy -effective_experts +load_cv +max_vio +dead_experts +drop_rate +logit_max +logit_rms "
            "+logsumexp_square +router_rms +margin -router_entropy +balance_value",
            "health": "+coactivation +expert_rms -token_information",
        },
    ),
    "same": (
        same(),
        {
            "routing": "+row_cosine -conditioning -routing_information +router_change",
            "health": "+output_cosine +output_cosine_max +churn -lm_gradient +gradient_ratio +rounding_flips",
        },
    ),
}


@pytest.mark.parametrize("sickness", EXPECTED)
def test_every_metric_of_a_layer_names_the_sick_one_of_fourteen(sickness, tmp_path):
    change, metrics = EXPECTED[sickness]
    overrides = (
        f"model.num_layers={DEPTH}",
        f"model.moe.first_dense={DENSE}",
        f"model.moe.router.capacity_factor={1.5 if sickness == 'collapsed' else 0}",
        "train.steps=8",
        "train.schedule.warmup_steps=0",
        "train.batch_rows=8",
        "train.micro_rows=8",
        "train.optimizer.lr=0.0001",
        "evaluation.every_steps=5",
        "logging.routing_every=1",
    )
    settings = base("small", 0, tmp_path)
    (text,) = settings["data"]["sources"]
    halves = (text["paths"][::2], text["paths"][1::2])
    settings["data"]["sources"] = [text | {"paths": paths} for paths in halves]
    run = load(settings, overrides)
    with Case(None, change=_only_sick(change)).injected():
        out = train(run, tmp_path / "run")
    for log, names in metrics.items():
        last = last_rows(out / f"{log}.jsonl")
        assert sorted(last) == list(range(DENSE, DEPTH)), "layers have their true index"
        for signed in names.split():
            sign, name = (1 if signed[0] == "+" else -1), signed[1:]
            values = {layer: sign * row[name] for layer, row in last.items()}
            assert max(values, key=lambda layer: values[layer]) == SICK, (
                name,
                str({layer: round(float(value), 3) for layer, value in values.items()}),
            )
    if sickness == "collapsed":
        last = last_rows(out / "health.jsonl")
        norms = {layer: min(row["output_norms"]) for layer, row in last.items()}
        assert norms.pop(SICK) == 0.0 and min(norms.values()) > 0


def last_rows(path: Path) -> dict[int, dict]:
    """The last line of each layer."""
    return {row["layer"]: row for row in map(json.loads, path.read_text().splitlines())}
