"""The benchmarks' arithmetic against scipy and by hand: slopes and intervals, hundreds of steps, what counts as reproduced."""

import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny_runs import tiny_run

from moe.data import Corpus
from moe.train import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_flat  # noqa: E402
import bench_layer_page  # noqa: E402
import bench_layer_peers  # noqa: E402
import bench_memory  # noqa: E402
import bench_metrics  # noqa: E402
import bench_repeat  # noqa: E402
from bench_common import Ratio, has_markers, options, parse, ratios_of_passes, write_between  # noqa: E402


def test_a_slope_and_its_interval_are_those_of_scipy():
    values = [3.0, 4.5, 3.9, 5.0, 6.2, 5.1]
    found = bench_flat.slope(values)
    truth = stats.linregress(np.arange(6) * 0.1, values)
    reach = stats.t.ppf(0.975, 4) * truth.stderr
    assert found == pytest.approx((truth.slope - reach, truth.slope, truth.slope + reach))


def test_hundreds_of_a_run_of_even_pace():
    # a look every 50 steps: 10 ms of processor time a step, a MiB more every 100 steps
    seen = [(step, 5 + 0.01 * step, (100 + step // 100) * bench_flat.MIB) for step in range(0, 301, 50)]
    per_step, held = bench_flat.hundreds(seen, 300)
    assert per_step == pytest.approx([10, 10, 10])
    assert held == [101, 102, 103]


def test_a_figure_is_reproduced_where_the_intervals_meet():
    former = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0], "gone": [0.0, 0.0, 0.0]}
    count, apart = bench_repeat.compare(former, {"a": [3.0, 4.0, 5.0], "b": [3.1, 4.0, 5.0], "new": [0.0, 0.0, 0.0]})
    assert count == 2
    assert [line.split(":")[0] for line in apart] == ["b"]


def test_spread_is_over_rounds_and_over_processes():
    ones = [1.0] * 5
    assert ratios_of_passes([[1.0, 5.0, 5.0, 5.0, 9.0]], [ones]) == (3, 5, 7)  # one process: quartiles
    assert ratios_of_passes([[1.0], [5.0], [5.0], [5.0], [9.0]], [[1.0]] * 5) == (1, 5, 9)  # medians reach further
    within = ratios_of_passes([[2.0, 8.0, 3.0], [8.0, 2.0, 3.0]], [[1.0] * 3, [1.0] * 3])  # medians do not
    assert within == (2, 3, 8)


PASS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from bench_common import in_passes

def measure(rounds, place):
    with open(place, "a") as file:
        print(os.getpid(), list(rounds), file=file)
    if rounds.stop == 5:
        time.sleep(600)
    if rounds.stop == 7:
        sys.exit("ours and theirs differ")
    return len(rounds)

if __name__ == "__main__":
    print(in_passes(int(sys.argv[3]), 2, measure, sys.argv[2]))
"""


@pytest.fixture
def passes(tmp_path):
    """The command that shares rounds out in two passes, without their number, and where each pass writes."""
    script, place = tmp_path / "script.py", tmp_path / "place"
    script.write_text(PASS)
    place.touch()
    return [sys.executable, str(script), str(ROOT / "scripts"), str(place)], place


def test_rounds_are_shared_out_among_fresh_processes(passes):
    command, place = passes
    done = subprocess.run([*command, "3"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 2]"
    first, second = (line.split(maxsplit=1) for line in place.read_text().splitlines())
    assert (first[1], second[1]) == ("[0]", "[1, 2]") and first[0] != second[0]


def test_a_pass_that_refuses_ends_the_benchmark_with_its_message(passes):
    done = subprocess.run([*passes[0], "7"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("ours and theirs differ\n")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for a process in /proc")
def test_a_pass_ends_with_the_process_that_started_it(passes):
    command, place = passes

    def wait_for(what):
        end = time.monotonic() + 60
        while not what():
            assert time.monotonic() < end
            time.sleep(0.05)

    with subprocess.Popen([*command, "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_for(lambda: len(place.read_text().splitlines()) == 2)
        run.kill()
    last = Path("/proc") / place.read_text().splitlines()[-1].split()[0] / "stat"

    def is_gone():
        try:
            return last.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(is_gone)


def test_passes_are_at_most_as_many_as_rounds(monkeypatch, capsys):
    for given, passes in ((["--rounds", "3"], 3), ([], 6), (["--passes", "2"], 2)):
        monkeypatch.setattr(sys, "argv", ["bench", *given])
        assert parse(options("", rounds=12, passes=6), "bench").passes == passes
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "3", "--passes", "4"])
    with pytest.raises(SystemExit):
        parse(options("", rounds=12, passes=6), "bench")
    assert "--passes 4: at least 1, and a round for each (--rounds 3)" in capsys.readouterr().err


def test_only_what_is_between_the_markers_is_renewed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x begin -->\nold\n<!-- x end -->\nafter\n")
    assert has_markers(page, "x")
    assert not has_markers(page, "y")
    write_between(page, "x", "new\n")
    assert page.read_text() == "before\n<!-- x begin -->\n\nnew\n\n<!-- x end -->\nafter\n"


def test_an_unknown_part_is_refused_before_anything_is_measured():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/benchmarks"), "--part", "layers"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown part 'layers': one of first-line clone step layer metrics" in done.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--write", "README.md"], "must be a page with the lines <!-- bench_x begin --> and <!-- bench_x end -->"),
        (["--json", "nowhere/at/all.json"], "there is no folder nowhere/at"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_measured(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_x.py", *given])
    with pytest.raises(SystemExit):
        parse(options("What it does.", rounds=3), "bench_x")
    assert said in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(bench_layer_peers.PEERS, "x", bench_layer_peers.PEERS["st-moe"]._replace(module="no_such_moe"))
    assert bench_layer_peers.missing(["x"]).endswith("not installed: pip install st-moe-pytorch")
    assert "x" not in bench_layer_peers.installed()


def test_the_table_of_peers_has_what_each_reached_and_dropped():
    half, twice = Ratio(0.4, 0.5, 0.6), Ratio(1.9, 2.0, 2.1)
    one = bench_layer_page.Row((8, 4, 2, 2, 1), "float32", 1, "same", "ours", twice, Ratio(1, 1, 1), 1.0)
    other = replace(one, contender="st-moe", share=half, ours=twice, dropped=0.0625)
    assert bench_layer_page.peers_table([one]) == []
    assert bench_layer_page.peers_table([one, other])[2] == (
        "| float32 | 8, 4, 2, 2, 1 | 2.00 [1.90, 2.10] | 0.50 [0.40, 0.60], drops 6.2% | 2.00 [1.90, 2.10] |"
    )


def test_every_function_that_is_timed_is_found_where_the_trainer_looks_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_metrics, "EVERY", 2)
    ticks = count()
    settings = ["train.steps=6", "logging.routing_every=2", "evaluation.probe_rows=0"]
    with bench_metrics.Timers(lambda: float(next(ticks))) as timers:
        train(tiny_run(tmp_path, *settings), tmp_path / "run")
    rounds = timers.shares()
    assert len(rounds) == 2
    # a tick a look at the clock: each call takes one, so ms are 1,000 times the calls per step; statistics: 2 layers, 1 step in 2
    calls = {kind: milliseconds / 1000 for kind, (milliseconds, _) in rounds[0].items()}
    assert calls == {
        "statistics of routing": 2,
        "sums of losses and statistics": 1,
        "router weights": 1,
        "lines of metrics and routing, console, alarms": 1.5,
        "ledger, meters included": 1,
        bench_metrics.BATCHES: 1,
    }
    assert Corpus.train_batch.__qualname__ == "Corpus.train_batch"
    assert not hasattr(Corpus.train_batch, "__wrapped__")


def test_every_run_of_the_memory_table_changes_what_it_says():
    base = bench_memory.run_of("as it is")
    assert (base.model.dim, base.model.num_layers, base.train.micro_rows) == (256, 4, 8)
    assert bench_memory.run_of("no experts").model.moe is None
    assert bench_memory.run_of("32 rows in 4 micro-batches").train.batch_rows == 32
    assert bench_memory.run_of("S 1024, 2 rows").data.sequence_length == 1024
    assert all(bench_memory.run_of(case) != base for case in bench_memory.CASES if case != "as it is")
