"""The doctor inside the trainer: the same findings as offline, each said once, in the file, on the console and in the mirrors."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import test_doctor
import tiny_runs
from drills.cases import Case, tied

from moe.analysis.doctor import examine
from moe.train import resume, train
from moe.train.alarms import Alarms
from moe.train.mirrors import Mirrors


def lines(out: Path) -> list[dict]:
    """alarms.jsonl."""
    return [json.loads(line) for line in (out / "alarms.jsonl").read_text().splitlines()]


OVERRIDES = (
    "train.steps=8",
    "train.optimizer.lr=0.001",
    "logging.routing_every=1",
    "logging.console=plain",
    "evaluation.every_steps=2",
    "checkpoint.every_steps=4",
)


@pytest.fixture(scope="module")
def tied_run(tmp_path_factory) -> tuple[Path, str, dict[str, float]]:
    """A run whose experts are tied: its folder, what it printed and what its mirrors were sent."""
    folder = tmp_path_factory.mktemp("tied")
    sent: dict[str, float] = {}

    class Recording(Mirrors):
        def send(self, row: dict, step: int) -> None:
            for name, fields in row.items():
                if isinstance(fields, dict):
                    sent.update({f"{name}/{key}": value for key, value in fields.items()})

    said: list[str] = []
    with (
        Case(None, change=tied).injected(),
        patch("moe.train.runlog.Mirrors", Recording),
        patch("moe.train.console.Console.say", lambda self, message: said.append(message)),
    ):
        out = train(tiny_runs.tiny_run(folder, *OVERRIDES), folder / "run")
    return out, "\n".join(said), sent


def test_an_alarm_is_written_said_and_mirrored_once(tied_run):
    out, printed, sent = tied_run
    found = [row for row in lines(out) if row["cause"] == "redundancy"]
    assert len(found) == 1, "it holds at every evaluation, and is raised at the first"
    (row,) = found
    assert (row["schema_version"], row["attempt"], row["step"], row["layers"], row["since"]) == (1, 1, 2, [0, 1], 2)
    assert row["what"] and row["why"] and row["change"]
    assert printed.count("ALARM at step 2: redundancy: all 2 expert layers: all experts alike") == 1
    assert sent["alarms/redundancy/step"] == 2


def test_what_was_raised_live_is_what_the_doctor_says_afterwards(tied_run):
    out, _, _ = tied_run
    assert {finding.cause for finding in examine(out)[1]} <= {row["cause"] for row in lines(out)}


def test_a_resumed_run_does_not_raise_what_it_raised_before(tmp_path):
    run = tiny_runs.tiny_run(tmp_path, *OVERRIDES)
    with Case(None, change=tied).injected():
        out = train(run, tmp_path / "run")
        before = len(lines(out))
        resume(out, ["train.steps=12"])
    assert [row for row in lines(out)[before:] if row["cause"] == "redundancy"] == []


def test_an_alarm_is_raised_again_when_it_spreads_and_when_it_returns(tmp_path):
    history = test_doctor.healthy()
    alarms = Alarms(tiny_runs.tiny_run(tmp_path), tmp_path, 0)
    alarms.history = history
    assert alarms.look(400) == []
    test_doctor.routing(history, 3, 250, lambda _: {"drop_rate": 0.4})
    assert [finding.layers for finding in alarms.look(400)] == [(3,)]
    assert alarms.look(400) == []
    test_doctor.routing(history, 7, 250, lambda _: {"drop_rate": 0.4})
    assert [finding.layers for finding in alarms.look(400)] == [(3, 7)]
    for layer in (3, 7):
        test_doctor.routing(history, layer, 250, lambda _: {"drop_rate": 0.0})
    assert alarms.look(400) == []
    test_doctor.routing(history, 3, 250, lambda _: {"drop_rate": 0.4})
    assert [finding.layers for finding in alarms.look(400)] == [(3,)]
