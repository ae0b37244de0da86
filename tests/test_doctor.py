"""The doctor's rules on histories written by hand: the cause, its layers and its first step, and silence where nothing is wrong."""

import json
import math

import fake_runs
import numpy as np
import pytest

from moe.analysis.doctor import EXPLAINS, RULES, as_json, diagnose, report
from moe.analysis.finding import lasting
from moe.analysis.history import LONGEST, History, read_history
from moe.analysis.thresholds import THRESHOLDS
from moe.cli import main

E, K, STEPS, TOKENS, LAYERS = 16, 2, 400, 4096, (0, 2, 3, 7)


def config() -> dict:
    """A run of 16 experts in blocks 0, 2, 3 and 7."""
    run = fake_runs.config(steps=STEPS)
    run["model"]["moe"] |= {"num_experts": E, "top_k": K}
    run["train"]["schedule"] = {"name": "cosine", "warmup_steps": 10}
    run["logging"] = {"routing_every": 10}
    return run


def healthy(seed: int = 0) -> History:
    """A history whose loads are multinomial, a perfect router's; loss falling, churn settling."""
    random = np.random.default_rng(seed)
    history = History(config())
    for step in range(1, STEPS + 1):
        loss = fake_runs.bits_at(step, STEPS, 2.0)
        history.add("metrics", {"step": step, "loss": loss, "tokens": step * TOKENS, "losses": {"balance": 1.01}})
        for layer in LAYERS if step % 10 == 0 else ():
            history.add("routing", routing_row(step, layer, random.multinomial(TOKENS * K, np.full(E, 1 / E))))
        for layer in LAYERS if step % 50 == 0 else ():
            history.add("health", health_row(step, layer))
    return history


def routing_row(step: int, layer: int, counts: np.ndarray) -> dict:
    """A line of routing.jsonl with the given loads."""
    share = counts / counts.sum()
    entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    return {
        "step": step,
        "layer": layer,
        "counts": counts.tolist(),
        "tokens": TOKENS,
        "tokens_per_expert": float(counts.mean()),
        "effective_experts": math.exp(entropy),
        "max_vio": float(share.max() * E - 1),
        "max_vio_floor": 0.08,
        "drop_rate": 0.0,
        "router_entropy": 0.7,
        "balance_value": 1.01,
        "logit_max": 6.0,
        "logit_rms": 1.5,
        "row_cosine": 0.1,
        "row_cosine_floor": 0.01,
        "router_change": 0.02,
    }


def health_row(step: int, layer: int) -> dict:
    """A line of health.jsonl of a run in order."""
    return {
        "step": step,
        "layer": layer,
        "gradient_ratio": 0.3,
        "output_norms": [1 + 0.02 * e for e in range(E)],
        "output_cosine": 0.1,
        "output_cosine_max": 0.5,
        "output_cosine_pair": [1, 2],
        "expert_rms": 0.1,
        "rounding_flips": 0.0,
        "churn": 0.4 if step < 200 else 0.15,
        "churn_by_chance": 1 - K / E,
    }


def skewed(onto: int, of: int = TOKENS * K) -> np.ndarray:
    """Loads on the first `onto` experts alone."""
    return np.array([of // onto] * onto + [0] * (E - onto))


def routing(history: History, layer: int, since: int, change) -> None:
    """Change a layer's routing rows from a step on; `change` takes and returns fields."""
    for row in history.routing[layer]:
        if row["step"] >= since:
            row |= change(row)


def health(history: History, layer: int, since: int, **fields) -> None:
    """Set fields of a layer's health rows from a step on."""
    for row in history.health[layer]:
        if row["step"] >= since:
            row |= fields


@pytest.mark.parametrize("seed", range(5))
def test_a_perfect_router_is_left_alone(seed):
    assert diagnose(healthy(seed)) == []


def test_collapse_names_its_layers_its_step_and_its_size():
    history = healthy()
    for layer in (3, 7):
        routing(history, layer, 200, lambda row: routing_row(row["step"], row["layer"], skewed(2) + 40))
        health(history, layer, 200, gradient_ratio=0.004)
    history.config["model"]["moe"]["router"]["balance"]["weight"] = 1e-4
    (finding,) = diagnose(history)
    assert (finding.cause, finding.layers, finding.since, finding.sure) == ("collapse", (3, 7), 200, "certain")
    assert "layers 3 and 7 collapsed onto 2.9 of 16 experts" in finding.what
    assert "0.0001" in finding.why and "0.004" in finding.why
    assert "balance.weight=0.01" in finding.change


def test_a_collapse_in_the_first_tenth_of_a_run_is_a_phase():
    history = healthy()
    for rows in (history.metrics, *history.routing.values(), *history.health.values()):
        rows[:] = [row for row in rows if row["step"] <= 40]
    routing(history, 3, 0, lambda row: routing_row(row["step"], row["layer"], skewed(2)))
    assert not [finding for finding in diagnose(history) if finding.cause == "collapse"]


def test_a_collapse_that_healed_is_over():
    history = healthy()
    for row in history.routing[3]:
        if row["step"] <= 250:
            row |= routing_row(row["step"], 3, skewed(2) + 40)
    assert diagnose(history) == []


def test_experts_that_stop_at_once_were_cut_off_rather_than_collapsed():
    history = healthy()
    routing(history, 2, 210, lambda row: routing_row(row["step"], 2, skewed(8)))
    finding = diagnose(history)[0]
    assert (finding.cause, finding.layers, finding.since) == ("dead", (2,), 210)
    assert "8, 9, 10" in finding.what and "at once" not in finding.why and "until then" in finding.why


def test_one_expert_that_fades_is_dead():
    history = healthy()
    fading = np.full(E, TOKENS * K // E)
    for row in history.routing[7]:
        fading[5] = max(0, TOKENS * K // E - 3 * row["step"])
        row |= routing_row(row["step"], 7, fading)
    finding = diagnose(history)[0]
    assert (finding.cause, finding.layers, finding.since) == ("dead", (7,), 170)


@pytest.mark.parametrize(
    ("cause", "rows", "change"),
    [
        ("utility_dead", "health", {"output_norms": [1.0] * 15 + [0.01]}),
        ("redundancy", "health", {"output_cosine": 0.97}),
        ("redundancy", "health", {"output_cosine_max": 0.999}),
        ("precision", "health", {"rounding_flips": 0.06}),
        ("balance_dominates", "health", {"gradient_ratio": 200.0}),
        ("over_constrained", "health", {"gradient_ratio": 5.0}),
        ("churn", "health", {"churn": 0.7}),
        ("router_frozen", "routing", {"router_change": 0.0}),
        ("rows_aligned", "routing", {"row_cosine": 0.98}),
        ("drops", "routing", {"drop_rate": 0.4}),
        ("starvation", "routing", {"tokens_per_expert": 12.0}),
        ("padding_counted", "routing", {"tokens": TOKENS + 900}),
    ],
)
def test_each_cause_is_named_with_its_layer_and_step(cause, rows, change):
    history = healthy()
    if rows == "health":
        health(history, 3, 250, **change)
    else:
        routing(history, 3, 250, lambda _: change)
    (finding,) = diagnose(history)
    assert (finding.cause, finding.layers, finding.since) == (cause, (3,), 250)
    assert finding.what and finding.why and finding.change


def test_utility_dead_needs_a_load_that_looks_fine():
    history = healthy()
    health(history, 3, 0, output_norms=[1.0] * 15 + [0.01])
    routing(history, 3, 0, lambda row: {"counts": [*row["counts"][:-1], 0]})
    assert "utility_dead" not in [finding.cause for finding in diagnose(history)]


def test_logits_that_grow_without_end_are_named():
    history = healthy()
    routing(history, 3, 0, lambda row: {"logit_rms": 1.02 ** row["step"], "logit_max": 4 * 1.02 ** row["step"]})
    (finding,) = diagnose(history)
    assert (finding.cause, finding.layers) == ("logit_growth", (3,))


def test_a_loss_that_rises_again_is_a_learning_rate_that_is_too_high():
    history = healthy()
    for row in history.metrics[250:]:
        row["loss"] += 2.0
    health(history, 3, 0, output_cosine=0.97)
    first, second = diagnose(history)
    assert first.cause == "learning_rate" and "lr=0.003" in first.why
    assert (second.cause, second.consequence_of) == ("redundancy", ("learning_rate",)), "the consequence comes second"


@pytest.mark.parametrize(("factor", "says"), [(K, "not divided by K"), (len(LAYERS), "layers are summed")])
def test_a_balance_loss_in_another_convention_is_converted(factor, says):
    history = healthy()
    for row in history.metrics:
        row["losses"]["balance"] *= factor
    (finding,) = diagnose(history)
    assert finding.cause == "convention" and says in finding.why
    assert f"0.01 there is {0.01 * factor:g} here" in finding.change


def test_what_the_probe_found_is_read():
    history = healthy()
    history.probes = [
        {"step": STEPS, "number": 0, "kind": "random", "mean": 0.001, "low": -0.002, "high": 0.004},
        {"step": STEPS, "number": 1, "kind": "hash", "mean": 0.2, "low": 0.15, "high": 0.25},
    ]
    (finding,) = diagnose(history)
    assert finding.cause == "uninformative" and "random" in finding.what
    history.probes[0]["low"] = 0.0005
    assert diagnose(history) == []


def test_single_points_of_noise_neither_begin_nor_end_a_condition():
    bad = [False, True, False, False, True, True, True, False, True, True, True]
    assert lasting([(10 * i, flag) for i, flag in enumerate(bad)], 3) == 40
    assert lasting([(i, i == 9) for i in range(10)], 3) is None
    assert lasting([(0, True)], 3) is None


def test_older_logs_without_the_newer_fields_are_read(tmp_path):
    run = fake_runs.config()
    run["logging"] = {"routing_every": 5}
    out = fake_runs.write_run(tmp_path / "run", run, bits=2.0)
    assert [finding.cause for finding in diagnose(read_history(out))] == ["dead"], "fake runs starve one expert"


def test_the_command_says_it_in_words_and_json_and_in_its_exit_code(tmp_path, capsys):
    out = fake_runs.write_run(tmp_path / "run", fake_runs.config() | {"logging": {}}, bits=2.0)
    assert main(["doctor", str(out)]) == 1
    assert (
        "1. dead: 1 expert(s) get less than 1 % of a balanced load (layer 2: 7), since step" in capsys.readouterr().out
    )
    assert main(["doctor", str(out)]) == 1
    assert "Not probed yet" in capsys.readouterr().out
    assert main(["doctor", str(out), "--json"]) == 1
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["findings"][0]["cause"] == "dead" and parsed["findings"][0]["layers"] == [2]
    assert main(["doctor", str(tmp_path / "none")]) == 2
    dense = fake_runs.write_run(tmp_path / "dense", fake_runs.config(sparse=False) | {"logging": {}}, bits=2.0)
    assert main(["doctor", str(dense)]) == 2
    assert "is a dense run" in capsys.readouterr().err


def test_a_healthy_run_is_reported_as_such():
    history = healthy()
    assert report(history, diagnose(history)) == "step 400 of 400, 4 expert layers: nothing wrong found."
    assert as_json(history, [])["healthy"] is True


def test_long_histories_are_thinned_and_keep_their_ends():
    history = History(config())
    for step in range(3 * LONGEST):
        history.add("metrics", {"step": step})
    steps = [row["step"] for row in history.metrics]
    assert len(steps) <= LONGEST and steps[0] == 0 and steps[-1] == 3 * LONGEST - 1 and steps == sorted(steps)


def test_every_threshold_has_a_source_and_every_cause_a_place():
    assert all(threshold.source and threshold.meaning for threshold in THRESHOLDS.values())
    known = {*RULES, "over_constrained"}
    assert {cause for causes in EXPLAINS.values() for cause in causes} | set(EXPLAINS) <= known
