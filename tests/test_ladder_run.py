"""`moe ladder RECIPE`: its rungs against counts of parameters, its answers against fake trainers whose law is known, and the
coverage of its intervals over many synthetic ladders.
"""

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import fake_runs
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from moe.analysis.ladder import Ladder
from moe.analysis.ladder_answer import Target, Tax, answer, expected_width, line_scatter
from moe.analysis.promise import digest
from moe.analysis.published import LAWS
from moe.cli import main
from moe.config.load import dump, load
from moe.config.schema import LatentAttention
from moe.cost import parameters
from moe.errors import TrainingStopped, UserError
from moe.experiments.ladder import climb
from moe.experiments.ladder_plan import Options
from moe.experiments.rungs import active_size, dense_of, rungs, shrink, tokens_of, with_budget

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "quickstart.py")
FAKE = (sys.executable, fake_runs.__file__)
WIDE = ["model.dim=256", "model.num_layers=8", "model.attention.num_heads=8", "model.attention.num_kv_heads=8",
        "model.attention.head_dim=32", "model.moe.expert_hidden=352", "train.steps=600",
        "evaluation.rows=32", "evaluation.final_rows=64"]  # fmt: skip
WIDTHS = (1 / 6, 1 / 4, 1 / 3)
OPTIONS = Options(widths=WIDTHS, timing_rounds=3, break_even=0.01)


# ------------------------------------------------------------------------------------------------------------- rungs


@pytest.mark.parametrize("recipe", ["quickstart", "olmoe_1b_7b", "qwen3_30b_a3b", "deepseek_v2_lite"])
def test_rungs_of_shipped_recipes_shrink_in_size_and_share_their_active_parameters(recipe):
    target = load(ROOT / "recipes" / f"{recipe}.py")
    built = rungs(target, (1 / 4, 1 / 3, 1 / 2), (16, 32, 64), tokens=0, tokens_per_parameter=1000)
    sizes = [rung.size for rung in built]
    assert sizes == sorted(sizes) and sizes[-1] < active_size(target.model) / 3
    assert sizes[-1] / sizes[0] > 5
    for rung in built:
        for experts, run in rung.sparse.items():
            assert run.model.moe.num_experts == experts and run.model.moe.top_k == target.model.moe.top_k
            assert active_size(run.model) == pytest.approx(rung.size, rel=0.02)
            assert replace(run, model=rung.dense.model) == rung.dense
        assert rung.tokens == pytest.approx(1000 * rung.size, rel=0.05)


def test_the_dense_twin_has_the_active_experts_as_one_feed_forward_layer():
    run = load(RECIPE)
    twin = dense_of(run)
    assert (twin.model.moe, twin.model.ffn_hidden) == (None, 256)
    router = parameters(run.model).components["router"]
    assert parameters(run.model).active - parameters(twin.model).total == router


def test_layers_without_experts_and_latent_attention_shrink_too():
    target = load(ROOT / "recipes" / "deepseek_v2_lite.py")
    half = shrink(target.model, 0.5)
    assert half.moe.first_dense == 1 and half.num_layers == 14
    assert isinstance(half.attention, LatentAttention) and half.attention.kv_rank == target.model.attention.kv_rank / 2
    assert half.init_std == pytest.approx(target.model.init_std * math.sqrt(2))
    assert half.moe.shared_hidden == target.model.moe.shared_hidden / 2


def test_rate_and_batch_follow_the_compute_by_the_published_powers():
    target = load(RECIPE, ["train.batch_rows=64", "train.micro_rows=16"])
    same = with_budget(target, target, tokens_of(target))
    assert (same.train.steps, same.train.batch_rows) == (800, 64)
    assert same.train.optimizer.lr == target.train.optimizer.lr
    less = with_budget(target, target, tokens_of(target) / 16)
    assert less.train.optimizer.lr == pytest.approx(target.train.optimizer.lr * 16**0.125, rel=2e-3)
    # 64 / 16^0.3271 = 25.8 rows, in whole micro-batches of 16
    assert (less.train.batch_rows, less.train.micro_rows) == (32, 16)
    assert tokens_of(less) == pytest.approx(tokens_of(target) / 16, rel=0.02)
    assert less.train.schedule.warmup_steps == round(40 * less.train.steps / 800)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"overrides": ["model.moe=null"]}, "has no expert layers"),
        ({"widths": (0.25, 0.5)}, "found 2 and 3"),
        ({"experts": (2, 4, 8)}, r"--experts \(2\) must be more than top_k \(2\)"),
        ({"widths": (0.5, 0.5001, 0.25)}, "round to the same size"),
        ({"widths": (0.5, 1.5, 0.25)}, "below 1"),
        ({"tokens": 1e5, "tokens_per_parameter": 3.0}, "not both"),
        ({"tokens": 1000.0}, "d40 would train . steps"),
        ({"timing_rounds": 0}, "give it as --tax"),
        ({"max_share": 0.001}, "of the target run's FLOPs, --max-share is 0.1%"),
        ({"overrides": ["model.moe.expert_widths=[64,64,64,64,64,64,64,64]"]}, "expert by expert"),
    ],
)  # fmt: skip
def test_what_cannot_be_climbed_is_refused_before_anything_is_written(tmp_path, change, message):
    change = dict(change)
    overrides = change.pop("overrides", WIDE)
    options = Options(**{"widths": WIDTHS, "tax": 0.0, **change})
    with pytest.raises(UserError, match=message):
        climb(RECIPE, overrides, tmp_path / "out", options, console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- with a fake trainer


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A ladder of fake runs that was stopped by a failing run, and then finished; what was started in each try."""
    folder, events = tmp_path_factory.mktemp("ladder"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_GAIN", "0.06")
        patch.setenv("FAKE_EVENTS", str(folder / "events"))

        def call(modes, options=OPTIONS):
            patch.setenv("FAKE_MODES", json.dumps(modes))
            (folder / "events").write_text("")
            printed = io.StringIO()
            try:
                climb(RECIPE, WIDE, folder / "out", options, jobs=3, console=Console(file=printed, width=300),
                      train_command=FAKE, timing_command=(*FAKE, "--timing"))  # fmt: skip
            finally:
                lines = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
                events.append([(kind, name) for kind, name, *_ in lines])
            return printed.getvalue()

        with pytest.raises(TrainingStopped, match="d88-e8-seed100 failed"):
            call({"d88-e8-seed100": "crash"})
        said = call({})
        yield folder / "out", events, said, call


def test_finished_rungs_are_reused_after_a_failure(climbed):
    _, events, said, _ = climbed
    first = {name for kind, name in events[0] if kind == "end"}
    again = {name for kind, name in events[1] if kind == "start"}
    assert "d88-e8-seed100" in again and not first & again
    assert len(first) >= 8, "those of the smaller sizes"
    assert "timing: already measured, reused" in said


def test_the_answer_is_the_known_law_less_the_published_optimism(climbed, monkeypatch):
    out, _, said, _ = climbed
    monkeypatch.setenv("FAKE_GAIN", "0.06")
    record = json.loads((out / "ladder.json").read_text())
    found, target = record["answer"], load(RECIPE, WIDE)
    size = fake_runs.active_size(dump(target.model))
    assert found["target"]["size"] == size == active_size(target.model)
    truth = fake_runs.law_gain(size, 4)
    linear = found["forms"]["linear"]
    assert linear["before"] == pytest.approx(truth, abs=2e-6)
    assert linear["gain"] == pytest.approx(truth * (1 - 0.0523 * found["reach"]), rel=1e-4)
    assert linear["optimism"]["source"] == "published"
    assert found["low"] < truth < found["high"]
    # fakes take 100/70 of the dense time; the truth's dense law is a power of size, and compute nearly of size squared
    assert found["net"]["tax"]["mean"] == pytest.approx(10 / 7)
    loss = 5 * size**-0.1
    assert found["dense_law"]["loss"] == pytest.approx(loss, rel=0.03)
    for row in found["check"]["runs"]:
        assert row["line"] == pytest.approx(row["gain"], abs=2e-6)
    assert "GO: the low end" in said or "NO-GO: the low end" in said


def test_one_ladder_says_go_or_no_go_as_the_break_even_and_the_tax_have_it(climbed, monkeypatch):
    _, events, _, call = climbed
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **rest: path.write_bytes(b"\x89PNG"))
    options = Options(widths=WIDTHS, timing_rounds=0)
    verdicts = [
        call({}, replace(options, tax=tax, break_even=even)).count("NO-GO:")
        for tax, even in ((1.05, 0.0), (1.05, 0.3), (4.0, 0.0))
    ]
    assert verdicts == [0, 1, 1]
    assert not any(kind == "start" for tries in events[2:] for kind, _ in tries)


@pytest.mark.full
def test_each_size_is_tuned_on_its_dense_run_which_is_then_its_first_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **rest: path.write_bytes(b"\x89PNG"))
    monkeypatch.setenv("FAKE_EVENTS", str(tmp_path / "events"))
    monkeypatch.delenv("FAKE_GAIN", raising=False)
    monkeypatch.setenv("FAKE_MODES", "{}")
    options = Options(widths=WIDTHS, timing_rounds=2, seeds=2, lr_grid=(0.001, 0.003, 0.01))
    console, commands = (
        Console(file=io.StringIO(), width=200),
        {"train_command": FAKE, "timing_command": (*FAKE, "--timing")},
    )
    for _ in range(2):
        climb(RECIPE, WIDE, tmp_path / "out", options, jobs=3, console=console, **commands)
    assert (tmp_path / "events").read_text().count('"start"') == 30
    record = json.loads((tmp_path / "out" / "ladder.json").read_text())
    # the fake's best rate is 0.003; 3 sizes of 4 arms and 2 seeds, and two more rates each
    assert record["plan"]["runs"] == 30 == len(list((tmp_path / "out").glob("*/run.json")))
    rates = {
        json.loads(path.read_text())["run"]["train"]["optimizer"]["lr"]
        for path in (tmp_path / "out").glob("*-seed*.json")
    }
    assert rates == {0.003}
    assert {row["run"] for row in record["runs"] if row["experts"] is None} >= {"d40-lr-0.003", "d40-dense-seed101"}
    assert "the best of 0.001, 0.003, 0.01" in (tmp_path / "out" / "ladder.md").read_text()


def test_the_page_the_curves_and_the_share_are_there(climbed, capsys):
    out, *_ = climbed
    page, record = (out / "ladder.md").read_text(), json.loads((out / "ladder.json").read_text())
    assert f"{record['cost']['share']:.2%} of the target run" in page
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert main(["ladder", "fit", str(out / "curves.csv"), "--top-k", "2", "--routing-frequency", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["routers"]["sparse"]["runs"] == 9


def test_a_promise_takes_its_numbers_from_the_ladder_and_seals_its_digest(climbed, tmp_path, capsys):
    out, *_ = climbed
    record = json.loads((out / "ladder.json").read_text())
    path = tmp_path / "promise.json"
    assert main(["promise", RECIPE, *WIDE, "--from-ladder", str(out), "--out", str(path)]) == 0
    made = json.loads(path.read_text())
    assert made["ladder"] == digest(record) and made["contract"] == "active_parameters"
    # one byte per token here: bits are nats over ln 2
    assert made["low"] == pytest.approx(record["answer"]["low"] / math.log(2))
    assert made["error_rate"] == 0.1 and "12 runs of 3 sizes" in made["because"]
    for arguments, message in (
        (
            [RECIPE, *WIDE, "train.batch_rows=32", "--from-ladder", str(out)],
            "is about another model, data or training",
        ),
        ([RECIPE, *WIDE, "--from-ladder", str(out), "--gain", "1"], "leave out --gain"),
        ([RECIPE, *WIDE], "a promise needs --gain, --low and --high"),
        ([RECIPE, *WIDE, "--from-ladder", str(tmp_path)], "ladder.json does not exist"),
    ):
        capsys.readouterr()
        assert main(["promise", *arguments, "--out", str(tmp_path / "other.json")]) == 2
        assert message in capsys.readouterr().err


def test_a_recipe_may_stand_where_a_command_does(capsys):
    assert main(["ladder", RECIPE, *WIDE, "--widths", "1/6,1/4,1/3", "--dry-run"]) == 0
    assert "12 runs (1 seed(s))" in capsys.readouterr().out
    assert main(["ladder", RECIPE, "--widths", "half"]) == 2
    assert "must be shares with commas between" in capsys.readouterr().err
    assert main(["ladder", "fitt"]) == 2


# ------------------------------------------------------------------------------------------------------------ coverage


def synthetic(
    random: np.random.Generator, noise: float, bent: bool
) -> tuple[Ladder, Target, dict[float, float], float]:
    """A ladder whose truth is a published law with other constants, or a line with a bend; and the true gain at the target."""
    target, experts = 10 ** random.uniform(7, 9), (2, 4, 8)
    sizes, chosen = target * np.array([1 / 64, 1 / 27, 1 / 8]), int(random.choice(experts))
    law = replace(LAWS["s-base"], b=-0.12 * random.uniform(0.8, 1.2), c=0.0105 * random.uniform(0.7, 1.3))
    slope, bend = random.uniform(0, 0.06), abs(random.normal()) * 0.001

    def gain(size, E):
        if not bent:
            return law.loss(size, 1.0) - law.loss(size, E)
        away = np.log(size / 1e6)
        return 0.07 * np.log(E) * (1 - slope * away - bend * away**2)

    size_R, experts_R = (grid.ravel() for grid in np.meshgrid(sizes, np.array(experts, float)))
    dense = {float(n): float(law.loss(n, 1.0)) + noise * random.normal() for n in sizes}
    dense_R = np.array([dense[n] for n in size_R])
    sparse_R = law.loss(size_R, 1.0) - gain(size_R, experts_R) + noise * random.normal(size=size_R.size)
    ladder = Ladder(size_R, experts_R, np.full(size_R.size, "t"), dense_R, dense_R - sparse_R)
    compute = {float(n): 120 * n**2 for n in sizes}
    return ladder, Target(target, chosen, 120 * target**2), compute, float(gain(target, chosen))


def covered(bent: bool, noise: float, ladders: int, seed: int) -> float:
    random, inside = np.random.default_rng(seed), 0
    for _ in range(ladders):
        ladder, target, compute, truth = synthetic(random, noise, bent)
        found = answer(ladder, compute, target, Tax(1.2, 1.1, 1.3))
        inside += found["low"] <= truth <= found["high"]
    return inside / ladders


def test_intervals_cover_the_truth_of_synthetic_ladders():
    assert covered(bent=True, noise=0.005, ladders=8, seed=1) >= 6 / 8


@pytest.mark.full
@pytest.mark.parametrize("noise", [0.001, 0.003, 0.01])
@pytest.mark.parametrize("bent", [False, True])
def test_intervals_cover_85_per_cent_of_many(bent, noise):
    assert covered(bent, noise, ladders=100, seed=0) >= 0.85


def test_a_long_ladder_measures_its_own_optimism_and_the_law_answers_for_experts_that_have_no_rung():
    sizes, experts = 1e8 * np.array([1 / 216, 1 / 64, 1 / 27, 1 / 8]), np.array([2.0, 4, 8, 16, 32])
    size_R, experts_R = (grid.ravel() for grid in np.meshgrid(sizes, experts))
    law = LAWS["hash"]
    dense_R = law.loss(size_R, 1.0)
    gain_R = dense_R - law.loss(size_R, experts_R)
    ladder = Ladder(size_R, experts_R, np.full(size_R.size, "t"), dense_R, gain_R)
    compute = {float(n): 120 * n**2 for n in sizes}
    own = answer(ladder, compute, Target(1e8, 8.0, 1.2e18), Tax(1.0, 1.0, 1.0))
    assert {form["optimism"]["source"] for form in own["forms"].values()} == {"this ladder"}
    between = answer(ladder, compute, Target(1e8, 12.0, 1.2e18), Tax(1.0, 1.0, 1.0))
    assert (between["form"], between["forms"]["linear"]) == ("law", None)
    # the dense model of this truth is the law's own, which is no exact power of size beside it
    assert between["forms"]["law"]["before"] == pytest.approx(float(law.loss(1e8, 1.0) - law.loss(1e8, 12.0)), rel=1e-3)


def test_the_expected_width_is_what_the_answers_of_noisy_ladders_have():
    random, sizes = np.random.default_rng(0), np.array([1e6, 3e6, 9e6])
    expected = expected_width(sizes, 9e7, seeds=1, confidence=0.9)
    assert expected[0] == pytest.approx(math.log(10) * 0.1779)
    found = []
    for _ in range(200):
        size_R, experts_R = (grid.ravel() for grid in np.meshgrid(sizes, [2.0, 4.0, 8.0]))
        gain_R = 0.1 + 0.01 * math.sqrt(2) * random.normal(size=size_R.size)
        found.append(line_scatter(Ladder(size_R, experts_R, np.full(9, "t"), 3 + 0 * gain_R, gain_R), 9e7, 0.9) ** 2)
    assert math.sqrt(np.mean(found)) == pytest.approx(expected[1] * 0.01, rel=0.1)
    assert expected_width(sizes, 9e7, seeds=4, confidence=0.9)[1] == pytest.approx(expected[1] / 2)


def test_the_answer_names_what_widens_its_interval():
    for noise, name in ((0.0, "what back-tests missed by"), (0.05, "the scatter of this ladder's runs")):
        ladder, target, compute, _ = synthetic(np.random.default_rng(5), noise, bent=True)
        found = answer(ladder, compute, target, Tax(1.0, 1.0, 1.0))["interval_from"]
        assert max(found, key=found.get) == name and sum(found.values()) == pytest.approx(1)


def test_no_go_where_the_sparse_models_lose_and_a_short_ladder_is_refused():
    ladder, target, compute, _ = synthetic(np.random.default_rng(3), 0.0, bent=True)
    loss = replace(ladder, gain_R=-ladder.gain_R)
    found = answer(loss, compute, target, Tax(1.0, 1.0, 1.0))
    # optimism is taken off a loss too: it gets larger, not smaller
    assert found["forms"]["linear"]["gain"] < found["forms"]["linear"]["before"] < 0
    assert found["net"]["verdict"] == "no-go" and found["multiplier"]["value"] < 1
    with pytest.raises(UserError, match="3 sizes and 3 numbers of experts, found 2 and 3"):
        answer(ladder.take(ladder.size_R < ladder.size_R.max()), compute, target, Tax(1.0, 1.0, 1.0))
