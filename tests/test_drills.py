"""Two drills of the default tier, a fault and a healthy run, each a real tiny training run; scripts/drills runs all of them."""

from pathlib import Path

import pytest
from drills.cases import faults, healthy
from drills.run import Outcome, diagnose_again, drill, plan
from drills.sizes import HELD_OUT_SIZE, SIZES, TUNING_SIZES
from drills.tables import BEGIN, END, alarmed, named_first, threshold_table, write_tables

from moe.analysis.doctor import RULES, examine
from moe.experiments.probe import probe


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One prepared corpus for all drills."""
    return tmp_path_factory.mktemp("cache")


def test_half_the_experts_dropped_midway_are_named_with_their_step(tmp_path, cache):
    outcome = drill("half", faults()["half the experts dropped midway"], "small", 1, tmp_path / "run", cache)
    assert named_first(outcome)
    assert outcome.layers == [0, 1]
    assert outcome.delay is not None and outcome.delay <= 30
    again = diagnose_again("half", faults()["half the experts dropped midway"], "small", 1, tmp_path / "run")
    assert (again.named, again.alarms) == (outcome.named, outcome.alarms), (
        "rows alone give the same alarms at the same steps"
    )


def test_a_healthy_run_is_not_alarmed_and_its_router_earns_its_keep(tmp_path, cache):
    assert not alarmed(drill("topk", healthy()["topk"], "small", 1, tmp_path / "run", cache))
    lost = {line["kind"]: line for line in probe(tmp_path / "run", rows=16) if line["layer"] is None}
    assert lost["random"]["low"] > 0 and lost["hash"]["low"] > 0 and lost["merged"]["low"] > 0
    assert examine(tmp_path / "run")[1] == [], "the doctor reads the probes and has nothing to say"


@pytest.mark.full
@pytest.mark.parametrize("name", faults())
def test_an_injected_fault_is_named_first_or_explained(name, tmp_path, cache):
    outcome = drill(name, faults()[name], "small", 4, tmp_path / "run", cache)
    assert outcome.expected in outcome.named


def test_there_are_ten_of_each_over_several_routers_and_sizes():
    assert len(faults()) >= 10 and len(healthy()) >= 10
    assert {case.cause for case in faults().values()} <= set(RULES)
    assert {case.size for case in healthy().values()} == set(TUNING_SIZES) == set(SIZES) - {HELD_OUT_SIZE}
    runs = plan([0, 1, 2])
    assert len(set(runs)) == len(runs) == (len(faults()) + len(healthy())) * 4


def test_the_page_has_the_thresholds_as_they_are():
    page = (Path(__file__).parents[1] / "docs/doctor.md").read_text("utf-8")
    assert threshold_table() in page, "scripts/drills --write docs/doctor.md renews the table"


def outcome(case: str, expected: str | None, named: list[str], seed: int = 1) -> Outcome:
    """An outcome without a run."""
    alarms = [(70, cause) for cause in named]
    return Outcome(case, expected, "small", seed, named, alarms, [0], 60, 1.0)


def test_the_tables_count_and_judge(tmp_path):
    page = tmp_path / "doctor.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    right = [outcome("tied", "redundancy", ["redundancy", "churn"]) for _ in range(4)]
    text, passed = write_tables([*right, outcome("tied", "redundancy", ["churn"], seed=2)], page)
    assert passed and "| seeds 1 and 2 | 4 of 5 | 0 of 0 |" in text
    assert "| tied | redundancy | redundancy 4, churn 1 | 10 (4 of 5) |" in text
    assert (
        page.read_text().startswith("before\n")
        and page.read_text().endswith("after\n")
        and "stale" not in page.read_text()
    )
    assert not write_tables([*right, outcome("topk", None, ["dead"])], None)[1], "one of one healthy runs is too many"
