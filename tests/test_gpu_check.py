"""scripts/gpu_check, rehearsed without a GPU: every stage runs through the compile-only driver, none compares or times.

And what a GPU run needs of it: going on after a stop, telling failures, and a page of results, from made-up records.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set, so triton compiles nothing", allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from moe_triton.ffn import OPS  # noqa: E402

gpu_check: Any = import_module("gpu_check")
Check, STAGES, read_record = gpu_check.Check, gpu_check.STAGES, gpu_check.read_record


def page(check: Any) -> str:
    return gpu_check.markdown(check, STAGES)


def script(*arguments: object) -> subprocess.CompletedProcess:
    """Run it as a user does, with nothing on the path but what the script puts there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts/gpu_check"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)


@pytest.mark.timeout(600)
def test_a_rehearsal_runs_every_stage(tmp_path):
    record = tmp_path / "results.jsonl"
    first = script("--rehearse", "--record", record)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {line["stage"] for line in lines} == set(STAGES)
    assert all(line["ok"] for line in lines)
    for op in OPS:
        assert f"{op}_kernel" in first.stdout or f"{op}_fwd_kernel" in first.stdout
    bench = [line for line in lines if line["stage"] == "bench"]
    assert len(bench) == 12 and all(set(line["arms"]) == {"ours", "grouped_mm", "dense"} for line in bench), bench[0][
        "failed"
    ]
    assert (tmp_path / "results.md").read_text().startswith("# Kernels on a GPU")


def test_a_record_that_was_cut_off_loses_its_last_line_alone(tmp_path):
    record = tmp_path / "results.jsonl"
    record.write_text('{"stage": "facts"}\n{"stage": "par')
    assert read_record(record) == [{"stage": "facts"}]
    assert record.read_text() == '{"stage": "facts"}\n'
    assert read_record(tmp_path / "none.jsonl") == []
    record.write_text('{"stage": "par\n{"stage": "facts"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_record(record)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "sees no GPU: run it where"),
        (["--rehearse", "benches"], "unknown stage benches: the stages are facts, parity"),
    ],
)
def test_what_cannot_run_says_so(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert message in capsys.readouterr().err


@pytest.fixture
def check(tmp_path):
    return Check(rehearse=True, device="cpu", record=tmp_path / "results.jsonl", seconds=60)


def stage_of(monkeypatch, *items):
    monkeypatch.setitem(gpu_check.STAGES, "graph", lambda check: iter(items))


def wrong() -> dict:
    raise AssertionError("off by one")


def broken() -> dict:
    raise RuntimeError("out of luck")


def test_failures_are_results_and_run_again_only_when_asked(check, monkeypatch):
    stage_of(monkeypatch, ("good", dict), ("wrong", wrong), ("broken", broken))
    assert gpu_check.run_stage(check, "graph")
    assert [line["ok"] for line in check.latest()] == [True, False, False]
    assert "RuntimeError: out of luck" in check.latest()[2]["error"]
    stage_of(monkeypatch, ("good", broken), ("wrong", dict), ("broken", broken))
    assert gpu_check.run_stage(check, "graph")
    assert len(check.lines) == 3
    check.retry = True
    assert gpu_check.run_stage(check, "graph")
    assert [line["ok"] for line in check.latest()] == [True, True, False]
    assert "| graph | 2 | 1 | 0 |" in page(check)
    assert "graph, broken: FAILED: RuntimeError: out of luck" in page(check)


def test_a_stage_stops_when_its_time_is_over(check, monkeypatch):
    check.seconds = -1
    stage_of(monkeypatch, ("first", dict))
    assert not gpu_check.run_stage(check, "graph")
    assert check.lines == []


def test_results_of_another_device_do_not_count(check):
    check.lines = [{"stage": "graph", "item": "one", "on": "another device", "ok": True}]
    assert not check.done("graph", "one") and check.latest() == []


def test_the_page_has_times_rates_and_what_did_not_run(check):
    check.add(
        "bench",
        "OLMoE, uniform",
        {
            "ok": True,
            "useful_flops": 9.9e12,
            "floor_seconds": 0.0132,
            "arms": {
                "ours": {
                    "peak_bytes": 2**30,
                    "forward": [0.007, 0.007, 0.007, 20],
                    "both": [0.022, 0.0219, 0.0222, 20],
                },
                "dense": {"peak_bytes": None, "forward": [0.005, 0.005, 0.005, 20], "both": [0.015, 0.015, 0.015, 20]},
            },
            "failed": {"liger": "ModuleNotFoundError: No module named 'liger_kernel'"},
        },
    )
    kernel = {"measured": 0.004, "predicted": 0.0028, "flops": 2.2e12, "bytes": 4.4e9}
    check.add("kernels", "OLMoE", {"ok": True, "kernels": {"up": kernel}, "small": {}})
    times = {"ours": [0.02, 0.019, 0.021, 20]}
    check.add("product", "262144 × 6144 × 4096", {"ok": True, "products": times, "flops": 13.2e12})
    text = page(check)
    assert "| OLMoE, uniform | ours | 7.00 | 22.00 | 21.90 to 22.20 | 450 | 60% | 1.00 |" in text
    assert "| OLMoE, uniform | dense | 5.00 | 15.00 | 15.00 to 15.00 | 660 | - | - |" in text
    assert "| OLMoE, uniform | liger | ModuleNotFoundError" in text
    assert "| OLMoE | up | 4.000 | 2.800 | 550 | 1.10 |" in text
    assert "| 262144 × 6144 × 4096 | ours | 20.00 | 19.00 to 21.00 | 660 |" in text
