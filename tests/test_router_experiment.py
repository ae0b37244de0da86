"""scripts/experiments/routers: its plan against the registry, and its page against differences planted in fake runs."""

import runpy
import sys
from pathlib import Path

import pytest
from fake_runs import config, write_run

from moe.config.load import known_routers
from moe.files import write_json

FOLDER = Path(__file__).parents[1] / "scripts/experiments"
BITS = {"topk": (2.0, 2.1, 1.9), "hash": (2.2, 2.3, 2.11), "expert_choice": (1.8, 1.91, 1.7), "dense": (2.0, 2.2, 1.8)}
SPEED = {
    "topk": [1000, 900, 1100],
    "hash": [1250, 1125, 1375],
    "expert_choice": [500, 450, 550],
    "dense": [2000, 1800, 2200],
}


@pytest.fixture
def script(monkeypatch):
    """The two modules, as running the script would find them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = runpy.run_path(str(FOLDER / "routers.py"))
    yield names
    sys.modules.pop("routers_report", None)


def test_every_router_is_trained_on_the_same_steps(script):
    arms = script["arms"]()
    assert {name for name in arms if "+" not in name} == set(known_routers())
    assert next(iter(arms)) == "topk"
    plans = {arm: script["plan"](Path("out"), arm, 1, 30).run for arm in [*arms, "dense"]}
    assert len({(run.seed, run.train, run.data, run.evaluation) for run in plans.values()}) == 1
    assert plans["dense"].model.moe is None
    assert plans["topk+default_vector"].model.moe.router.estimator == "default_vector"


def test_the_page_ranks_what_the_runs_hold(script, tmp_path):
    for arm, values in BITS.items():
        for seed, bits in enumerate(values):
            write_run(tmp_path / f"{arm}-seed{seed}", config(sparse=arm != "dense", seed=seed), bits=bits, rows=8)
    write_json(tmp_path / "timing.json", {"schema_version": 1, "tokens_per_step": 100, "tokens_per_cpu_second": SPEED})
    page = script["write_report"](tmp_path, list(BITS), 3, "topk", "the command", tmp_path / "docs").read_text()
    ranked = [line.split("|")[2].strip() for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert ranked == ["`expert_choice` †", "`topk`", "`dense`", "`hash`"]
    # differences -0.2, -0.2, -0.21: mean -0.2033 and 4.3027·0.005774/√3 = 0.0143 to either side
    assert "| 4 | `hash` | 3 | 2.2033 | -0.2033 [-0.2177, -0.1890] |" in page
    assert "| 80 | 0.80 |" in page, "1000 tokens of 100 a step per second against 1250"
    assert "Interval above 0 (causal): none. Interval below 0: `hash`." in page
    assert (tmp_path / "docs/routers.png").stat().st_size > 10_000
