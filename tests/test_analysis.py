"""Statistics against scipy, published numbers and simulation; the reader of runs against files written by hand."""

import json
import math

import fake_runs
import numpy as np
import pytest
from scipy import stats

from moe.analysis.paired import evaluation_noise, paired_gain, t_interval
from moe.analysis.plots import MAX_COLUMNS, load_ratio
from moe.analysis.rows import FinalRows, read_final_rows, read_lines, read_run
from moe.analysis.summaries import differences, measured_flops, routing_health, rows_per_position, timing_summary
from moe.errors import UserError

# ------------------------------------------------------------------------------------------------------- statistics

# Hours of sleep gained with two drugs (Student 1908, table I, as in R's `sleep`); t.test(paired = TRUE) there prints
# mean difference 1.58, 95 percent confidence interval 0.7001142 2.4598858.
FIRST_DRUG = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND_DRUG = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_interval_is_that_of_students_own_example():
    interval = paired_gain(SECOND_DRUG, FIRST_DRUG)
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert interval.verdict == "ahead"


@pytest.mark.parametrize(
    ("values", "quantile"), [((1.0, 3.0), 12.706), ((1.0, 2.0, 3.0), 4.303), ((1.0, 1.0, 2.0, 3.0, 3.0), 2.776)]
)
def test_interval_uses_the_quantile_of_the_printed_t_table(values, quantile):
    interval = t_interval(values)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low)
    # The table has three decimals.
    standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert (interval.high - interval.mean) / standard_error == pytest.approx(quantile, abs=5e-4)


def test_interval_equals_scipys_paired_test():
    random = np.random.default_rng(0)
    dense, sparse = random.normal(2.8, 0.05, 7), random.normal(2.7, 0.05, 7)
    theirs = stats.ttest_rel(dense, sparse).confidence_interval(0.9)
    ours = paired_gain(list(dense), list(sparse), confidence=0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_interval_of_three_seeds_covers_the_truth_nineteen_times_in_twenty():
    draws = np.random.default_rng(1).normal(0.05, 0.02, (2000, 3))
    intervals = [t_interval(row) for row in draws.tolist()]
    covered = np.mean([i.low is not None and i.high is not None and i.low <= 0.05 <= i.high for i in intervals])
    # 95 % ± 4 standard errors of a share of 2000.
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.08, 0.09, 0.07), "ahead"),
        ((-0.08, -0.09, -0.07), "behind"),
        ((0.08, 0.30, 0.02), "undecided"),
        ((0.5,), "undecided"),
        ((0.0, 0.0, 0.0), "undecided"),
    ],
)
def test_verdict_names_a_winner_only_if_the_interval_excludes_zero(gains, verdict):
    assert t_interval(gains).verdict == verdict


def test_one_seed_has_no_interval():
    interval = t_interval([0.08])
    assert (interval.mean, interval.deviation, interval.low, interval.high) == (0.08, None, None, None)


def test_unpaired_or_non_finite_values_are_refused():
    with pytest.raises(UserError, match="found 2 and 1"):
        paired_gain([1.0, 2.0], [1.0])
    with pytest.raises(UserError, match="finite"):
        paired_gain([math.nan], [1.0])


def rows_of(nats, sizes):
    return FinalRows(np.asarray(nats, float), np.asarray(sizes, float), np.asarray(sizes, float))


def test_evaluation_noise_of_equal_rows_is_the_standard_error_of_the_mean():
    random = np.random.default_rng(2)
    dense, sparse = random.normal(200, 30, 50), random.normal(190, 30, 50)
    noise = evaluation_noise(rows_of(dense, [128] * 50), rows_of(sparse, [128] * 50))
    per_row = (dense - sparse) / 128 / math.log(2)
    assert noise.gain == pytest.approx(per_row.mean())
    assert noise.standard_error == pytest.approx(stats.sem(per_row))
    low, high = stats.t.interval(0.95, 49, per_row.mean(), stats.sem(per_row))
    assert noise.half_width == pytest.approx((high - low) / 2)


def test_evaluation_noise_of_unequal_rows_agrees_with_the_bootstrap():
    random = np.random.default_rng(3)
    sizes = random.integers(40, 300, 400)
    dense, sparse = sizes * random.gamma(30, 0.06, 400), sizes * random.gamma(30, 0.058, 400)
    noise = evaluation_noise(rows_of(dense, sizes), rows_of(sparse, sizes))
    picks = random.integers(0, 400, (4000, 400))
    gains = (dense - sparse)[picks].sum(1) / sizes[picks].sum(1) / math.log(2)
    # The bootstrap's own relative error with 4000 draws is 1 / sqrt(8000) = 1.1 %.
    assert noise.standard_error == pytest.approx(gains.std(), rel=0.05)


def test_evaluation_noise_refuses_different_rows():
    with pytest.raises(UserError, match="different rows"):
        evaluation_noise(rows_of([1, 2], [10, 10]), rows_of([1, 2], [10, 11]))


# ----------------------------------------------------------------------------------------------------------- reading


def by_step(row):
    return (row["step"],)


def line(step, value, attempt=1, **more):
    return json.dumps({"schema_version": 1, "attempt": attempt, "step": step, "value": value, **more})


FIELDS = {"step": (int,), "value": (int, float)}


def test_last_attempt_of_a_step_wins_and_steps_are_sorted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([line(1, 10), line(2, 20), line(3, 30), line(2, 21, attempt=2), line(4, 41, attempt=2)]))
    rows = read_lines(path, FIELDS, by_step)
    assert [(row["step"], row["value"]) for row in rows] == [(1, 10), (2, 21), (3, 30), (4, 41)]


def test_earlier_attempt_written_later_does_not_win(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, 10, attempt=2) + "\n" + line(1, 11, attempt=1) + "\n")
    assert [row["value"] for row in read_lines(path, FIELDS, by_step)] == [10]


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_truncated_last_line_is_ignored(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, 10) + "\n" + line(2, 20)[:-cut])
    assert [row["step"] for row in read_lines(path, FIELDS, by_step)] == [1]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (line(2, 20)[:-5], "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        (line("2", 20), "'step' must be int"),
        (line(True, 20), "'step' must be int"),
        (line(2, None), "'value' must be int or float"),
        ('{"schema_version": 1, "attempt": 1, "step": 2}', "'value' is missing"),
        ('{"schema_version": 1, "step": 2, "value": 3}', "'attempt' is missing"),
        ('{"schema_version": 9, "attempt": 1, "step": 2, "value": 3}', "schema_version is 9, this version reads 1"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path, bad, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([line(1, 10), bad, line(3, 30)]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2") as caught:
        read_lines(path, FIELDS, by_step)
    assert says in str(caught.value)


def test_complete_last_line_that_is_malformed_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, 10) + "\n" + line(2, 20)[:-5] + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_lines(path, FIELDS, by_step)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evals.jsonl", "summary.json"])
def test_missing_file_is_named(tmp_path, name):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=20), bits=2.7, rows=8)
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{name} does not exist"):
        read_run(run)


def test_what_was_not_finite_is_read_as_nan(tmp_path):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=20), bits=2.7, rows=8)
    final = {"step": 20, "final": True, "rows": 8, "tokens": 8, "bytes": 8, "loss": None, "bits_per_byte": None}
    fake_runs.write_lines(run / "evals.jsonl", [final], attempt=2)
    assert math.isnan(read_run(run).final_bits)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut"])
def test_damaged_final_rows_are_an_error(tmp_path, content):
    (tmp_path / "final_rows.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"final_rows\.npz"):
        read_final_rows(tmp_path / "final_rows.npz")


def test_final_rows_of_unequal_length_or_with_pickles_are_an_error(tmp_path):
    path = tmp_path / "final_rows.npz"
    np.savez(path, nats_row=np.ones(3), bytes_row=np.ones(2), tokens_row=np.ones(3))
    with pytest.raises(UserError, match="one entry per validation row"):
        read_final_rows(path)
    objects = np.array([{}], dtype=object)
    np.savez(path, nats_row=objects, bytes_row=objects, tokens_row=objects)
    with pytest.raises(UserError, match="readable"):
        read_final_rows(path)


def test_layer_that_changes_its_number_of_experts_is_an_error(tmp_path):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=20), bits=2.7, rows=8)
    row = json.loads((run / "routing.jsonl").read_text().splitlines()[-1])
    fake_runs.write_lines(run / "routing.jsonl", [row | {"step": 999, "counts": [1, 2, 3]}])
    with pytest.raises(UserError, match="8 experts at first and 3 at step 999"):
        read_run(run)


# --------------------------------------------------------------------------------------------------------- summaries


def test_measured_rows_replace_expected_ones_in_the_flops(tmp_path):
    run = fake_runs.write_run(tmp_path / "run", fake_runs.config(steps=20), bits=2.7, rows=8)
    positions = 32 * 128
    # Layer 0: 1.5 rows a position, layer 1: 2 of which half are dropped, layer 2: 0.25.
    loads = {0: ([3 * positions // 2, 0], 0.0), 1: ([positions, positions], 0.5), 2: ([positions // 4, 0], 0.0)}
    lines = [json.loads(text) for text in (run / "routing.jsonl").read_text().splitlines()]
    (run / "routing.jsonl").unlink()
    for row in lines:
        row["counts"], row["drop_rate"] = loads[row["layer"]]
    fake_runs.write_lines(run / "routing.jsonl", lines)
    rows = read_run(run)
    assert rows_per_position(rows) == {0: 1.5, 1: 1.0, 2: 0.25}
    # One row: gate, up and down of 96 × 256, 2 FLOPs each, forward once and backward twice = 442,368 FLOPs.
    assert measured_flops(rows, 1.0) == pytest.approx(2_400_000 + (0.5 + 0 - 0.75) * 442_368)
    assert measured_flops(rows, None) == 2_400_000


def test_routing_health_averages_the_last_tenth_of_each_seed(tmp_path):
    runs = []
    for seed in (0, 1):
        run = fake_runs.write_run(tmp_path / str(seed), fake_runs.config(seed=seed, steps=100), bits=2.7, rows=8)
        lines = [json.loads(text) for text in (run / "routing.jsonl").read_text().splitlines()]
        (run / "routing.jsonl").unlink()
        for row in lines:
            row["max_vio"] = (100.0 if row["step"] <= 90 else row["step"] / 100) + seed
        fake_runs.write_lines(run / "routing.jsonl", lines)
        runs.append(read_run(run))
    health = routing_health(runs)
    assert [entry["layer"] for entry in health] == [0, 1, 2]
    # Logged every 5 steps: the last tenth are steps 95 and 100, whose mean is 0.975 for seed 0 and 1.975 for seed 1.
    assert health[0]["max_vio"] == pytest.approx([1.475, 0.975, 1.975])
    assert (health[0]["experts"], health[0]["logged_steps"]) == (8, 2)


def test_load_ratio_is_one_at_balance():
    steps, ratio = load_ratio([{"step": 5, "counts": [4, 2, 1, 1]}, {"step": 10, "counts": [2, 2, 2, 2]}])
    assert steps.tolist() == [5, 10]
    assert ratio.tolist() == [[2, 1, 0.5, 0.5], [1, 1, 1, 1]]


def test_long_runs_are_averaged_for_the_heat_map():
    rows = [{"step": i, "counts": [i % 2, 1 - i % 2]} for i in range(10 * MAX_COLUMNS)]
    steps, ratio = load_ratio(rows)
    assert ratio.shape == (MAX_COLUMNS, 2)
    assert steps[0] == 4.5
    assert np.allclose(ratio, 1)


def test_differences_name_nested_fields_of_either_side():
    left = {"a": 1, "model": {"moe": {"top_k": 2}, "dim": 8}}
    right = {"a": 1, "model": {"moe": None, "dim": 16}}
    assert differences(left, right) == [("model.moe.top_k", 2, None), ("model.dim", 8, 16)]


def test_speed_ratio_is_the_median_of_the_rounds_ratios():
    # Round by round 0.5, 1, 2, whatever the machine's speed in that round.
    summary = timing_summary({"sparse": [50, 10, 400], "dense": [100, 10, 200], "threads": 2})
    assert (summary["ratio"], summary["low"], summary["high"], summary["rounds"]) == (1.0, 0.75, 1.5, 3)
