"""moe/train/meters.py and ledger.py, moe/cost/charges.py, moe/analysis/ledger*.py: against closed forms, counters that are turned
by hand, torch's own count of FLOPs, runs that are cut off, and sums worked by hand.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_counters import RANGE, FakeNvml, powercap, turn
from test_layouts import torchrun
from tiny_runs import tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe import cli, parallel
from moe.analysis.ledger import account, cost_of_knowing, describe, of_arms, project, read_ledger
from moe.analysis.ledger_prices import describe_next, equal_loss, has_tail, next_nats, tail, tokens_to
from moe.config.load import dump
from moe.config.schema import Cost
from moe.cost import flops_per_step
from moe.cost.charges import Graded, charge, planned_charge, rates_of
from moe.data import prepare
from moe.errors import ConfigError, UserError
from moe.train import flops, loop, resume, train
from moe.train.ledger import Meters
from moe.train.meters import Integrator, ProcessorModel, Zeus, meters, nvml_meter, rapl, read_all
from moe.train.step import build_state, train_step

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------------------------- meters


def test_rapl_adds_packages_and_memory_once_and_follows_a_counter_that_starts_again(tmp_path):
    tree = powercap(tmp_path)
    counters = rapl(tree)
    assert [(c.part, c.source) for c in counters] == [
        ("cpu", "RAPL intel-rapl:0 (package-0)"),
        ("memory", "RAPL intel-rapl:0:1 (dram)"),
        ("cpu", "RAPL intel-rapl:1 (package-1)"),
    ]
    turn(tree, "intel-rapl:0", 4_000_000)  # 3 J
    turn(tree, "intel-rapl:0:0", 400_000_000)  # cores: part of the package
    turn(tree, "intel-rapl:0:1", 350_000)  # 0.25 J
    turn(tree, "intel-rapl:2", 900_000_000)  # the whole platform
    assert read_all(counters) == pytest.approx({"cpu": 3.0, "memory": 0.25})
    turn(tree, "intel-rapl:0", RANGE - 1_000_000)
    assert read_all(counters)["cpu"] == pytest.approx((RANGE - 5_000_000) * 1e-6)
    turn(tree, "intel-rapl:0", 2_000_000)  # past its range: 1 J to the end and 2 J from 0
    turn(tree, "intel-rapl:1", 2_500_000)
    assert read_all(counters) == pytest.approx({"cpu": 3.5, "memory": 0.0})


def test_a_counter_that_only_root_may_read_is_no_counter(tmp_path):
    tree = powercap(tmp_path)
    (tree / "intel-rapl:0" / "energy_uj").unlink()
    assert [c.source for c in rapl(tree)] == ["RAPL intel-rapl:0:1 (dram)", "RAPL intel-rapl:1 (package-1)"]
    assert rapl(tmp_path / "nowhere") == []


def test_a_counter_that_fails_later_makes_the_energy_unknown_and_stops_nothing(tmp_path):
    tree = powercap(tmp_path / "powercap")
    counters = rapl(tree)
    (tree / "intel-rapl:1" / "energy_uj").unlink()
    assert read_all(counters) == {"cpu": None, "memory": 0.0}
    write_ledger(tmp_path / "run", start_line(), step_line(1, 1), step_line(1, 2, joules=None))
    found = account(tmp_path / "run")
    assert found["joules"] is None and found["gco2e"] is None and found["seconds"]["value"] == 20.0


@pytest.mark.parametrize(
    "watts, joules, tolerance",
    [
        (lambda t: 40.0, 400.0, 1e-12),
        (lambda t: 3 * t, 150.0, 1e-12),  # a trapezoid is exact for a line
        (lambda t: 100 * math.sin(math.pi * t / 10), 2000 / math.pi, 1e-3),
        (lambda t: 80 * math.exp(-t / 4), 320 * (1 - math.exp(-2.5)), 1e-3),
    ],
)
def test_the_integral_of_sampled_power_is_the_closed_form(watts, joules, tolerance):
    times = np.sort(np.random.default_rng(0).uniform(0, 10, 199))
    clock = iter([0.0, 0.0, *np.repeat([*times, 10.0], 2)])
    now = [0.0]

    def tick():
        now[0] = float(next(clock))
        return now[0]

    meter = Integrator("gpu", "estimated", "sampled", lambda: (tick(), watts(now[0]))[1], tick)
    assert sum(meter.read() for _ in range(200)) == pytest.approx(joules, rel=tolerance)


def test_the_processor_model_is_idle_power_all_the_time_and_busy_power_while_it_computes():
    clock, busy = iter([0.0, 10.0]), iter([1.0, 16.0])
    model = ProcessorModel(3.5, threads=2, clock=lambda: next(clock), busy=lambda: next(busy))
    # 10 s of two threads at 0.74 W, and 15 s of processor time at 3.5 - 0.74 W more
    assert model.read() == pytest.approx(14.8 + 41.4)
    assert model.grade == "estimated"


def test_nvml_counts_energy_or_samples_power_or_says_that_it_cannot():
    library = FakeNvml(millijoules=5_000)
    meter = nvml_meter(library, "GPU-1")
    library.millijoules = 9_500
    assert meter.grade == "measured" and meter.read() == pytest.approx(4.5)
    old = FakeNvml(millijoules=None, milliwatts=250_000)
    meter = nvml_meter(old, "GPU-1")
    meter.clock, meter.last = iter([2.0]).__next__, (0.0, 250.0)
    old.milliwatts = 350_000
    assert meter.grade == "estimated" and meter.read() == pytest.approx(600.0)
    assert nvml_meter(FakeNvml(None, None), "GPU-1") is None
    assert nvml_meter(FakeNvml(), "GPU-of-another") is None
    assert nvml_meter(object(), "GPU-1") is None  # a library without these functions


def test_zeus_windows_follow_one_another_without_gaps():
    class Monitor:
        energy, open = 0.0, 0.0

        def begin_window(self, key, sync_execution):
            assert not sync_execution
            self.open = self.energy

        def end_window(self, key, sync_execution):
            used, self.open = self.energy - self.open, math.nan
            return SimpleNamespace(gpu_energy={0: used})

    monitor = Monitor()
    meter = Zeus(monitor)
    found = []
    for monitor.energy in (10.0, 25.0, 25.0):
        found.append(meter.read())
    assert found == [10.0, 15.0, 0.0]


def test_a_run_with_counters_does_not_model_what_they_count(tmp_path):
    tree = powercap(tmp_path / "powercap")
    run = tiny_run(tmp_path, f"cost.powercap={tree}")
    ranks = parallel.start("cpu")
    assert [(m.part, m.grade) for m in meters(run, ranks)] == [
        ("cpu", "measured"),
        ("memory", "measured"),
        ("cpu", "measured"),
    ]
    without = tiny_run(tmp_path, "cost.powercap=")
    assert [(m.part, m.grade) for m in meters(without, ranks)] == [("cpu", "estimated"), ("memory", "estimated")]
    running = Meters(run, ranks)
    turn(tree, "intel-rapl:1", 8_000_000)
    seconds, joules = running.read()
    assert seconds > 0 and joules == pytest.approx({"cpu": 6.0, "memory": 0.0})


# -------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    "overrides, times",
    [
        (("model.moe.backend=torch",), 1.0),
        (("model.moe.backend=reference",), 1.0),
        (("model.moe=null",), 1.0),
        # one more forward pass of everything but the head
        (("train.activation_checkpointing=true",), None),
    ],
)
def test_counted_flops_are_the_formula_where_attention_hides_nothing(tmp_path, overrides, times):
    run = tiny_run(tmp_path, "model.backend=torch", *overrides)
    state = build_state(run, parallel.start("cpu"), prepare(run.data))
    with sdpa_kernel(SDPBackend.MATH), flops.counter(run) as counter:
        train_step(state, 0)
    if times is None:
        assert 1.15 < counter.get_total_flops() / flops_per_step(run) < 4 / 3
    else:
        assert counter.get_total_flops() == pytest.approx(times * flops_per_step(run), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ charges


def test_energy_carbon_and_money_worked_by_hand():
    cost = Cost(region="FRA", pue=1.25, price_per_hour=2.0, price_per_kwh=0.2)
    # 7.2 MJ are 2 kWh at the plug, 2.5 kWh with the building, 140 g in France; 3 device hours
    found = charge(Graded(7.2e6, "measured", "counter"), Graded(3 * 3600, "measured", "clock"), rates_of(cost, "cpu"))
    assert (found.kwh.value, found.kwh.grade) == (pytest.approx(2.5), "measured")
    assert (found.gco2e.value, found.gco2e.grade) == (pytest.approx(140.0), "assumed")
    assert (found.dollars.value, found.dollars.grade) == (pytest.approx(6.0 + 0.5), "measured")


def test_what_is_not_known_is_not_made_up():
    hour = Graded(3600, "measured", "clock")
    nothing = charge(None, hour, rates_of(Cost(price_per_kwh=0.3), "cpu"))
    assert (nothing.kwh, nothing.gco2e, nothing.dollars) == (None, None, None)
    assert charge(None, hour, rates_of(Cost(), "cpu")).dollars is None
    own = charge(Graded(3.6e6, "estimated", "model"), hour, rates_of(Cost(price_per_kwh=0.3), "cpu"))
    assert (own.dollars.value, own.dollars.grade) == (pytest.approx(0.3), "assumed")
    assert own.kwh.grade == "assumed"  # a PUE of 1 is nobody's measurement
    with pytest.raises(ConfigError, match=r"cost.region \('XXX'\) must be one of ARE, ARG"):
        rates_of(Cost(region="XXX"), "cpu")


def test_a_plan_of_eight_h100_for_a_day():
    found = planned_charge(Cost(region="SWE", pue=1.2), "NVIDIA H100 80GB HBM3", 8, 86_400)
    assert found.kwh.value == pytest.approx(8 * 0.7 * 24 * 1.2)  # 700 W boards
    assert found.gco2e.value == pytest.approx(8 * 0.7 * 24 * 1.2 * 41)
    assert found.dollars.value == pytest.approx(8 * 24 * 3.99) and found.dollars.grade == "assumed"


# ---------------------------------------------------------------------------------------------------- ledgers of runs


def start_line(attempt=1, rank=0, *, joules_known=True, cost=None, world_size=1):
    rates = rates_of(cost or Cost(region="FRA", pue=1.5, price_per_hour=3.6), "cpu").as_json()
    grade = {"part": "cpu", "grade": "measured", "source": "RAPL"}
    line = {"kind": "start", "rank": rank, "world_size": world_size, "device": "cpu", "meters": [grade]}
    return {"schema_version": 1, "attempt": attempt, **line, "complete": joules_known, "rates": rates}


def work_line(attempt, phase, step, seconds, joules, **fields):
    line = {"kind": "work", "phase": phase, "step": step, "seconds": seconds, "joules": {"cpu": joules}}
    return {"schema_version": 1, "attempt": attempt, **line, "peak_memory_bytes": 100 * attempt, **fields}


def step_line(attempt, step, seconds=10.0, joules=3600.0):
    return work_line(attempt, "step", step, seconds, joules, tokens=64, flops=1e6, flops_grade="measured")


def write_ledger(folder, *rows, rank=0):
    folder.mkdir(parents=True, exist_ok=True)
    name = "ledger.jsonl" if rank == 0 else f"ledger-rank{rank}.jsonl"
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_account_of_a_known_run_worked_by_hand(tmp_path):
    first = [start_line(1), work_line(1, "setup", 0, 20.0, 0.0), step_line(1, 1), step_line(1, 2), step_line(1, 3)]
    second = [start_line(2), step_line(2, 2), step_line(2, 3), step_line(2, 4)]
    saved = work_line(2, "save", 4, 20.0, 14400.0, bytes_written=700)
    write_ledger(tmp_path / "run", *first, *second, saved, work_line(2, "end", 4, 0.0, 0.0, bytes_kept=300))
    found = account(tmp_path / "run")
    # 20 s of set-up, 6 steps of 10 s, 20 s of saving; 6 times 1 Wh and 4 Wh, half as much again for the building
    assert found["seconds"] == {"value": 100.0, "grade": "measured", "source": "wall clock"}
    assert found["joules"]["value"] == 36_000.0 and found["joules"]["grade"] == "measured"
    assert found["kwh"]["value"] == pytest.approx(0.015)
    assert found["gco2e"]["value"] == pytest.approx(0.84) and found["gco2e"]["grade"] == "assumed"
    assert found["dollars"]["value"] == pytest.approx(0.1)  # 100 s at 3.6 dollars an hour
    assert (found["steps"], found["repeated_steps"], found["repeated_seconds"]) == (6, 2, 20.0)
    assert (found["tokens"], found["flops"]["value"], found["attempts"]) == (384, 6e6, 2)
    assert (found["checkpoint_bytes_written"], found["checkpoint_bytes_kept"]) == (700, 300)
    assert found["peak_memory_bytes"] == 200 and found["status"] == "unfinished"
    assert found["phases"] == {"setup": 20.0, "step": 60.0, "save": 20.0, "end": 0.0}


def test_devices_add_up_and_the_clock_does_not(tmp_path):
    write_ledger(tmp_path, start_line(world_size=2), step_line(1, 1, 1800.0))
    write_ledger(tmp_path, start_line(rank=1, world_size=2), step_line(1, 1, 1800.0), rank=1)
    found = account(tmp_path)
    assert (found["seconds"]["value"], found["device_hours"]["value"], found["ranks"]) == (1800.0, 1.0, 2)
    assert found["flops"]["value"] == 2e6 and found["steps"] == 1 and found["joules"]["value"] == 7200.0
    assert found["dollars"]["value"] == pytest.approx(3.6)


def test_a_project_counts_each_run_once_and_knows_what_it_does_not_know(tmp_path):
    write_ledger(tmp_path / "a" / "one", start_line(), step_line(1, 1))
    write_ledger(tmp_path / "a" / "two", start_line(), step_line(1, 1))
    twice = project([tmp_path / "a", tmp_path / "a" / "one", tmp_path])
    assert twice["total"]["runs"] == 2 and twice["total"]["joules"]["value"] == 7200.0
    assert "2 run(s), 2 of them not finished" in describe(twice)
    write_ledger(tmp_path / "b", start_line(joules_known=False), step_line(1, 1))
    total = project([tmp_path])["total"]
    assert total["joules"] is None and total["gco2e"] is None and total["dollars"]["value"] == pytest.approx(0.03)
    dearer = project([tmp_path / "a"], Cost(region="POL", price_per_hour=36.0))["total"]
    assert dearer["dollars"]["value"] == pytest.approx(0.2) and dearer["gco2e"]["value"] == pytest.approx(0.002 * 662)
    with pytest.raises(UserError, match=r"holds no ledger.jsonl, at any depth"):
        project([tmp_path / "a" / "one" / "nothing"])


def test_a_comparison_says_what_the_twins_cost(tmp_path):
    for name, seconds in (("sparse-seed0", 30.0), ("dense-seed0", 10.0), ("total-seed0", 80.0)):
        write_ledger(tmp_path / name, start_line(), step_line(1, 1, seconds))
    folders = {arm: [tmp_path / f"{arm}-seed0"] for arm in ("sparse", "dense", "total")}
    found = of_arms(folders)
    assert found["arms"]["total"]["seconds"]["value"] == 80.0 and found["total"]["dollars"]["value"] == pytest.approx(
        0.12
    )
    assert "All 3 runs took 120.0 s (measured)" in cost_of_knowing(found) and "75% of the time" in cost_of_knowing(
        found
    )
    assert of_arms({**folders, "hash": [tmp_path / "hash-seed0"]}) is None


def test_damage_is_named_and_a_cut_off_last_line_is_not_damage(tmp_path):
    write_ledger(tmp_path, start_line(), step_line(1, 1))
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text() + '{"schema_version": 1, "att')
    assert account(tmp_path)["steps"] == 1
    write_ledger(tmp_path, step_line(1, 1))
    with pytest.raises(UserError, match="attempt 1 has 0 lines of kind 'start'"):
        account(tmp_path)
    with pytest.raises(UserError, match=r"holds no ledger.jsonl: give the folder of a run"):
        account(tmp_path / "nowhere")


class Killed(BaseException):
    """Ends a run on the spot, as nothing in it expects."""


def killed_at(count: int):
    """train_step, except that its count-th call never comes to be."""
    calls = iter(range(1, 1000))

    def step(*arguments, **named):
        if next(calls) == count:
            raise Killed
        return train_step(*arguments, **named)

    return step


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the dead leave their files open
def test_a_run_that_dies_twice_and_is_resumed_counts_every_step_that_was_done_once(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "train.steps=10", "checkpoint.every_steps=3", "cost.price_per_hour=1.0", "cost.region=POL")
    out = tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", killed_at(5))  # after step 4; step 3 is saved
    with pytest.raises(Killed):
        train(run, out)
    monkeypatch.setattr(loop, "train_step", killed_at(6))  # after step 8; step 6 is saved
    with pytest.raises(Killed):
        resume(out)
    monkeypatch.setattr(loop, "train_step", train_step)
    resume(out)
    found = account(out)
    done = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in done] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 7, 8, 9, 10]
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    work = [row for row in lines if row["kind"] == "work" and row["phase"] == "step" and "tokens" in row]
    assert [(row["attempt"], row["step"]) for row in work] == [(row["attempt"], row["step"]) for row in done]
    seen = {0: 0} | {row["step"]: row["tokens"] for row in done}
    tokens = [seen[row["step"]] - seen[row["step"] - 1] for row in done]
    assert [row["tokens"] for row in work] == tokens
    assert (found["attempts"], found["steps"], found["tokens"]) == (3, 13, sum(tokens))
    # the two steps in which it died took time too, and did nothing
    assert sum(row.get("phase") == "step" for row in lines) == 15
    assert found["flops"]["grade"] == "measured"
    assert [row["flops"] for row in work] == pytest.approx([flops_per_step(run)] * 13, rel=0.1)
    assert found["seconds"]["value"] == pytest.approx(sum(row["seconds"] for row in lines if row["kind"] == "work"))
    assert found["seconds"]["value"] > sum(row["step_seconds"] for row in done)
    assert found["dollars"]["value"] == pytest.approx(found["seconds"]["value"] / 3600)
    assert found["gco2e"]["value"] == pytest.approx(found["joules"]["value"] / 3.6e6 * 662)
    folders = [path for path in (out / "checkpoints").rglob("*") if path.is_file()]
    assert found["checkpoint_bytes_kept"] == sum(path.stat().st_size for path in folders)
    # 4 saved, the last 2 kept; meta.json is not among the bytes written
    assert found["checkpoint_bytes_written"] == pytest.approx(2 * found["checkpoint_bytes_kept"], rel=0.02)
    assert found["status"] == "finished"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_sigkill_loses_at_most_the_step_that_it_hits(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(dump(tiny_run(tmp_path, "train.steps=10", "checkpoint.every_steps=3"))))
    out = tmp_path / "run"
    crash = [sys.executable, str(HERE / "crash_run.py")]
    for arguments in (
        ["step", "5", "--", str(config), f"out={out}"],
        ["write", "2", "--", "--resume", str(out)],
        ["step", "100", "--", "--resume", str(out)],
    ):
        subprocess.run([*crash, *arguments], check=False, timeout=200, capture_output=True)
    done = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = account(out)
    assert (found["attempts"], found["steps"]) == (3, len(done))
    assert found["repeated_steps"] == len(done) - 10 > 0


@pytest.mark.full
@pytest.mark.timeout(300)
def test_two_ranks_count_together_what_one_process_counts(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(dump(tiny_run(tmp_path, "train.steps=1"))))
    out = tmp_path / "two"
    settings = ["train.micro_rows=2", "parallel.shard=2", "parallel.expert=2"]
    torchrun(2, "-m", "moe.train", str(config), f"out={out}", *settings)
    alone = train(tiny_run(tmp_path, "train.steps=1"), tmp_path / "one")
    two, one = (
        [row["flops"] for a in read_ledger(folder) for row in a.work if row["phase"] == "step"]
        for folder in (out, alone)
    )
    assert len(two) == 2 and sum(two) == one[0]
    found = account(out)
    assert found["ranks"] == 2 and found["device_hours"]["value"] > found["seconds"]["value"] / 3600


# ------------------------------------------------------------------------------------------------------------- prices


def write_curve(folder, steps, tokens_of, loss_of):
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {"schema_version": 1, "attempt": 1, "step": s, "loss": 1.0, "tokens": tokens_of(s), "step_seconds": 1.0}
            )
            + "\n"
            for s in steps
        )
    )
    (folder / "evals.jsonl").write_text(
        "".join(
            json.dumps(
                {"schema_version": 1, "attempt": 1, "step": s, "final": False, "rows": 1, "tokens": 1, "bytes": 1}
                | {"loss": loss_of(tokens_of(s)), "bits_per_byte": 1.0}
            )
            + "\n"
            for s in steps
        )
    )


def falling(level, slope):
    return lambda tokens: level - slope * math.log(tokens)


def test_the_next_hundredth_of_a_nat_costs_what_the_line_in_log_tokens_says(tmp_path):
    write_ledger(tmp_path, start_line(), *(step_line(1, s, seconds=36.0) for s in range(1, 11)))
    write_curve(tmp_path, range(1, 11), lambda s: 64 * s, falling(8.0, 0.25))
    found = next_nats(tmp_path, 0.01)
    # e^(0.01/0.25) - 1 = 4.081 % more tokens than the 640 that took 360 s
    assert found["slope"] == pytest.approx(0.25) and found["tokens"][1] == pytest.approx(640 * 0.0408108, rel=1e-4)
    assert found["seconds"][1] == pytest.approx(360 * 0.0408108, rel=1e-4)
    assert found["dollars"][1] == pytest.approx(0.36 * 0.0408108, rel=1e-4)
    assert has_tail(tmp_path)


def test_the_slope_of_a_noisy_tail_is_inside_its_interval_as_often_as_it_says():
    tokens, random = np.arange(1.0, 41.0), np.random.default_rng(0)
    lines = 3 - 0.02 * np.log(tokens) + random.normal(0, 0.01, (400, 40))
    tails = [tail(tokens, line) for line in lines]
    covered = np.mean([t.low <= 0.02 <= t.high for t in tails])
    assert abs(covered - 0.9) < 3 * math.sqrt(0.09 / 400)
    with pytest.raises(UserError, match="needs 4 evaluations in the last half of training, found 2"):
        tail(tokens[:3], tokens[:3])


def test_a_loss_that_does_not_fall_has_no_price(tmp_path):
    write_ledger(tmp_path, start_line(), step_line(1, 1))
    write_curve(tmp_path, range(1, 11), lambda s: 64 * s, falling(2.0, -0.1))
    found = next_nats(tmp_path)
    assert found["tokens"] == [None, None, None] and "unbounded s" in describe_next(found)


def test_cost_at_equal_loss_worked_by_hand(tmp_path):
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    for folder, seconds in ((sparse, 20.0), (dense, 10.0)):
        write_ledger(folder, start_line(), *(step_line(1, s, seconds=seconds) for s in range(1, 11)))
    write_curve(sparse, range(1, 11), lambda s: 64 * s, falling(8.0, 0.2))
    write_curve(dense, range(1, 11), lambda s: 64 * s, falling(8.1, 0.2))
    found = equal_loss(sparse, dense)
    # dense is 0.1 behind: e^0.5 times the tokens, each at half the time
    assert found["extrapolated"] and found["dense_tokens"] == pytest.approx(640 * math.exp(0.5))
    assert found["ratios"]["seconds"] == pytest.approx(math.exp(0.5) / 2)
    assert found["ratios"]["flops"] == pytest.approx(math.exp(0.5))
    back = equal_loss(dense, sparse)
    assert not back["extrapolated"] and back["dense_tokens"] == pytest.approx(640 * math.exp(-0.5), rel=1e-9)
    tokens = np.array([1.0, 2.0, 4.0, 8.0])
    assert tokens_to(tokens, np.array([4.0, 3.0, 3.5, 2.0]), 3.25) == (pytest.approx(2 ** (2 + 1 / 6)), False)


def test_a_comparison_is_priced_at_equal_loss_over_its_pairs(tmp_path, capsys):
    for seed, behind in ((0, 0.1), (1, 0.2)):
        for arm, seconds, level in (("sparse", 20.0, 8.0), ("dense", 10.0, 8.0 + behind)):
            folder = tmp_path / f"{arm}-seed{seed}"
            write_ledger(folder, start_line(), *(step_line(1, s, seconds=seconds) for s in range(1, 11)))
            write_curve(folder, range(1, 11), lambda s: 64 * s, falling(level, 0.2))
    names = {arm: [f"{arm}-seed{seed}" for seed in (0, 1)] for arm in ("sparse", "dense")}
    (tmp_path / "compare.json").write_text(json.dumps({"schema_version": 1, "arms": names}))
    assert cli.main(["ledger", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    # e^(0.1/0.2) and e^(0.2/0.2) times the tokens, each at half the time
    assert found["ratios"]["seconds"]["mean"] == pytest.approx(math.exp(0.75) / 2)
    assert found["ratios"]["flops"]["values"] == pytest.approx([math.exp(0.5), math.exp(1)])
    assert found["next"]["dense"]["seconds"] == pytest.approx(100 * math.expm1(0.05), rel=1e-6)
    assert cli.main(["ledger", str(tmp_path)]) == 0
    assert "at equal loss dense costs 1.06 [" in capsys.readouterr().out
    (tmp_path / "dense-seed1" / "evals.jsonl").write_text("")
    assert cli.main(["ledger", str(tmp_path)]) == 0
    assert "dense-seed1 has no evaluation during training" in capsys.readouterr().out


def test_work_done_again_is_in_the_price_and_said(tmp_path):
    for folder, attempts in (("sparse", (range(1, 7), range(5, 11))), ("dense", (range(1, 11),))):
        rows = [[start_line(n), *(step_line(n, s) for s in steps)] for n, steps in enumerate(attempts, 1)]
        write_ledger(tmp_path / folder, *(row for attempt in rows for row in attempt))
        write_curve(tmp_path / folder, range(1, 11), lambda s: 64 * s, falling(8.0, 0.2))
    found = equal_loss(tmp_path / "sparse", tmp_path / "dense")
    assert found["repeated_share"] == pytest.approx(2 / 12) and found["ratios"]["seconds"] == pytest.approx(10 / 12)


def test_the_command_prints_a_project_and_refuses_what_it_cannot_compare(tmp_path, capsys):
    for folder in ("a", "b"):
        write_ledger(tmp_path / folder, start_line(), *(step_line(1, s) for s in range(1, 9)))
        write_curve(tmp_path / folder, range(1, 9), lambda s: 64 * s, falling(8.0, 0.2))
    assert cli.main(["ledger", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["runs"] == 2
    assert cli.main(["ledger", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--region", "SWE"]) == 0
    printed = capsys.readouterr().out
    assert (
        "SWE, Our World in Data 2023" in printed
        and "the next 0.01 nats cost" in printed
        and "1 × the seconds" in printed
    )
    assert cli.main(["ledger", str(tmp_path), "--against", str(tmp_path / "b")]) == 2
    assert "compares one run with a dense one" in capsys.readouterr().err
