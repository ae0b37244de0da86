"""scripts/experiments/sparsity: its arms against the rules of the comparison, and its page against planted losses."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from moe.analysis.contracts import CONTRACTS, Arm, effective_size, judge
from moe.config.load import dump
from moe.cost import parameters, train_flops_per_token
from moe.files import write_json

FOLDER = Path(__file__).parents[1] / "scripts/experiments"
SIZE = {"active": 100.0, "total8": 200.0, "total16": 400.0}
LAW = {"active": 2.0, "total8": 1.8, "total16": 1.62}
"""Dense losses that follow a power law exactly: a tenth less for each doubling."""


@pytest.fixture
def script(monkeypatch):
    """The names of sparsity.py, as running the script would find them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield runpy.run_path(str(FOLDER / "sparsity.py"))
    sys.modules.pop("sparsity_report", None)


def test_arms_differ_in_what_they_are_compared_on_and_in_nothing_else(script):
    arms = {
        arm: script["arm_run"](arm, 80) for arm in ("active", "E4", "E8", "E16", "E32", "total8", "total16", "hash")
    }
    plain = [{part: dump(run)[part] for part in ("data", "train", "evaluation", "seed")} for run in arms.values()]
    assert all(one == plain[0] for one in plain)
    flops = {arm: train_flops_per_token(run.model, run.data.sequence_length) for arm, run in arms.items()}
    assert all(flops[arm] == pytest.approx(flops["active"], rel=0.02) for arm in ("E4", "E8", "E16", "E32", "hash"))
    totals = {arm: parameters(run.model).total for arm, run in arms.items()}
    assert totals["total8"] == pytest.approx(totals["E8"], rel=0.005)
    assert totals["total16"] == pytest.approx(totals["E16"], rel=0.005)


def _result(experts: int, sparse_loss: float, twin: str) -> dict:
    """What report.json says under `contracts`, of a sparse model with 50 parameters per expert."""

    def arm(name: str, loss: float, active: float, total: float) -> Arm:
        seeds = np.array([-0.01, 0.0, 0.01])
        return Arm(name, loss + seeds, {"active_parameters": active, "total_parameters": total, "flops": active})

    sparse = arm("sparse", sparse_loss, 100.0, 25.0 * experts)
    dense, total = (arm(name, LAW[name], SIZE[name], SIZE[name]) for name in ("active", twin))
    return {
        "seeds": [0, 1, 2],
        "contracts": [judge(contract, sparse, dense, total) for contract in CONTRACTS],
        "effective_size": effective_size(sparse, dense, total),
        "speed": {"why": "not timed"},
        "decomposition": [],
        "arms": {
            role: {"loss": one.loss_S.tolist(), **one.resources}
            for role, one in (("sparse", sparse), ("dense", dense), ("total", total))
        },
    }


def test_the_page_says_what_the_comparisons_hold(script, tmp_path):
    losses = {4: 1.95, 8: 1.9, 16: 1.85, 32: 1.8}
    for experts, loss in losses.items():
        folder = tmp_path / f"compare-E{experts}"
        folder.mkdir()
        write_json(
            folder / "report.json", {"schema_version": 1, "contracts": _result(experts, loss, script["TWINS"][experts])}
        )
    arms = ("active", "total8", "total16", *(f"E{experts}" for experts in losses))
    rates = {arm: {"value": 0.004, "grid": [0.004]} for arm in arms}
    write_json(tmp_path / "rates.json", {"schema_version": 1, "arms": rates})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "sparsity.md").write_text(
        "# Mine\n\nwords\n\n<!-- what follows is written by scripts/experiments/sparsity -->\nold\n"
    )
    advised = [{"arm": "E8", "setting": "x=1", "as_is": [2.0, 2.1, 2.2], "advised": [1.9, 2.0, 2.1]}]
    written = script["write_report"](tmp_path, script["EXPERTS"], script["TWINS"], advised, "the command", docs)
    page = Path(written).read_text()
    assert "* E8 with `x=1`: 1.900, 2.000, 2.100 bits per byte, better by +0.1000 [+0.1000, +0.1000]." in page
    assert page.startswith("# Mine\n\nwords\n") and "old" not in page
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in page.splitlines() if line.startswith("| equal")
    }
    assert [cell.split()[:2] for cell in rows["equal active parameters"]] == [
        ["win", "+0.050"], ["win", "+0.100"], ["win", "+0.150"], ["win", "+0.200"]
    ]  # fmt: skip
    # at equal total: 8 experts against 1.8, 16 against 1.62; 32 beyond the dense models by half their distance: 2·0.9³ = 1.458
    assert [cell.split()[:2] for cell in rows["equal total parameters"][1:]] == [
        ["loss", "-0.100"], ["loss", "-0.230"], ["loss", "-0.342"]
    ]  # fmt: skip
    assert rows["equal total parameters"][3].strip().endswith("†")
    assert rows["equal total parameters"][0].split()[0] == "win", "4 experts of 25 have the active model's size"
    assert "misses the middle one by +0.0000" in page or "misses the middle one by -0.0000" in page
    assert (docs / "sparsity.png").stat().st_size > 10_000
