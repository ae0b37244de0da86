"""The tuning table: every size has a row, every row a reason and a use. And the opt-in measuring, with a made-up clock.

That the rows compile is tests/test_compile_gate.py's to say; no test here needs a GPU, and none launches a kernel by default.
"""

import json
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

from moe_triton import autotune, plan, tuned_file, tuning
from moe_triton.targets import TARGETS, nearest


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_120", "sm_103", "gfx950"])
@pytest.mark.parametrize("op", tuning.OPS)
def test_every_size_has_a_row(op, target):
    for height in (16, 32, 64, 128):
        for D, F in ((2048, 1024), (64, 32), (97, 47), (2880, 2880), (1, 1), (8192, 16384)):
            config = tuning.pick(op, rows_per_expert=height, D=D, F=F, dtype=torch.bfloat16, target=target)
            assert config["BLOCK_M"] == (128 if op in ("w_down_bwd", "w_up_bwd") else height)
            assert {"BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages"} <= set(config)
            assert ("SLICES" in config) == (op in ("up", "hidden_bwd"))
            assert ("TMA" in config) == (op in ("up", "down", "input_bwd"))


def test_every_row_of_the_table_gives_its_reason_and_is_reachable():
    for row in tuning.TABLE:
        assert row.reason and set(row.targets) <= set(TARGETS) and set(row.ops) <= {*tuning.OPS, *tuning.BLOCK_OPS}
    for op in (*tuning.OPS, *tuning.BLOCK_OPS):
        for target in TARGETS:
            rows = tuning.rows_for(op, target)
            for i, row in enumerate(rows):
                shadowed = [
                    earlier
                    for earlier in rows[:i]
                    if earlier.aligned <= row.aligned
                    and earlier.columns <= row.columns
                    and set(row.heights) <= set(earlier.heights)
                ]
                assert not shadowed, (op, target, row.reason)


def test_operands_of_other_types_keep_the_bytes_of_a_step():
    sizes = {"rows_per_expert": 512, "D": 2048, "F": 1024, "target": "sm_90"}
    steps = {
        dtype: tuning.pick("down", dtype=dtype, **sizes)["BLOCK_K"]
        for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    }
    assert steps == {torch.bfloat16: 64, torch.float32: 32, torch.float8_e4m3fn: 128}


@pytest.mark.parametrize("rows, height", [(0.5, 16), (16, 16), (17, 32), (32, 32), (33, 64), (100, 128), (9999, 128)])
def test_height_follows_the_rows_of_an_expert(rows, height):
    assert tuning.tile_height(rows, "sm_90") == height


def test_the_plan_and_the_table_agree_on_heights():
    for R, E in ((0, 8), (7, 8), (64, 8), (256, 8), (300, 7), (2048, 8), (262144, 64)):
        assert plan.tile_rows(R, E) == tuning.tile_height(-(-R // E), "sm_90")


def test_unknown_operators_and_architectures_name_the_known():
    with pytest.raises(KeyError, match="the operators are up, down"):
        tuning.pick("upp", rows_per_expert=1, D=1, F=1, dtype=torch.bfloat16, target="sm_90")
    with pytest.raises(ValueError, match="the targets are sm_80"):
        nearest("xe_hpg")


@pytest.mark.parametrize("target", [*TARGETS, "sm_120"])
@pytest.mark.parametrize("op", tuning.BLOCK_OPS)
def test_every_block_has_a_row(op, target):
    for block in (16, 32, 64, 128):
        for aligned in (True, False):
            for dtype in (torch.bfloat16, torch.float32):
                config = tuning.pick_block(op, block=block, columns=97, aligned=aligned, dtype=dtype, target=target)
                assert config["BLOCK_M"] == block and ("BLOCK_N" in config) == (op == "dsd")
                assert op == "sdd" or block % config["BLOCK_K"] == 0


def test_descriptors_are_for_wide_aligned_layers_of_sm_90_and_later():
    def tma(op="down", target="sm_90", D=2048, F=1024, rows=512, dtype=torch.bfloat16, **options) -> int:
        return tuning.pick(op, rows_per_expert=rows, D=D, F=F, dtype=dtype, target=target, **options)["TMA"]

    assert all(tma(op, target) for op in ("up", "down", "input_bwd") for target in ("sm_90", "sm_100"))
    assert not tma(target="sm_80") and not tma(target="sm_120") and not tma(target="gfx942")
    assert not tma(D=512)  # narrow
    assert not tma(rows=64)  # few rows
    assert not tma(F=1023)  # rows that do not start at multiples of 16 bytes
    assert not tma(tma=False)  # a tensor that cannot be described
    assert not tma(dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- measuring

WHERE = {"D": 2048, "F": 1024, "dtype": torch.bfloat16, "target": "sm_90"}


def test_tuning_keeps_the_fastest_of_at_most_eight_and_never_measures_a_bucket_twice(tmp_path, monkeypatch):
    file, measured = tmp_path / "tuned.json", []

    def clock(run) -> float:
        run()
        config = tuning.pick("down", rows_per_expert=500, **WHERE)
        measured.append(config)
        return abs(config["num_stages"] - 4) + config["BLOCK_N"] / 1e4

    best = autotune.tune("down", lambda: None, clock, file, rows_per_expert=500, **WHERE)
    assert 2 <= len(measured) <= autotune.MAX_CANDIDATES and best["num_stages"] == 4
    assert best["BLOCK_N"] == min(config["BLOCK_N"] for config in measured if config["num_stages"] == 4)
    assert tuning.pick("down", rows_per_expert=500, **WHERE) != best  # opt-in
    monkeypatch.setenv(tuned_file.FILE_VARIABLE, str(file))
    assert tuning.pick("down", rows_per_expert=400, **WHERE) == best  # the same bucket
    assert tuning.pick("down", rows_per_expert=600, **WHERE) != best
    assert tuning.pick("down", rows_per_expert=500, **{**WHERE, "target": "sm_100"}) != best
    count = len(measured)
    assert autotune.tune("down", lambda: None, clock, file, rows_per_expert=511, **WHERE) == best
    assert len(measured) == count


def test_a_configuration_that_cannot_be_launched_never_wins(tmp_path):
    def clock(run) -> float:
        config = tuning.pick("down", rows_per_expert=500, **WHERE)
        return float("inf") if config["num_stages"] > 2 else 1.0

    file = tmp_path / "tuned.json"
    assert autotune.tune("down", lambda: None, clock, file, rows_per_expert=500, **WHERE)["num_stages"] == 2
    with pytest.raises(RuntimeError, match=r"none of \d configurations of up can be launched on sm_90"):
        autotune.tune("up", lambda: None, lambda run: float("inf"), file, rows_per_expert=500, **WHERE)


def test_a_file_of_another_triton_or_other_kernels_is_ignored_aloud(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned_file.write(file, {"a bucket": {"BLOCK_M": 64}})
    assert tuned_file.read(file) == {"a bucket": {"BLOCK_M": 64}}
    monkeypatch.setattr(tuned_file, "made_with", lambda: "triton 9.9.9, kernels 0")
    with pytest.warns(UserWarning, match=r"tuned.json was measured with triton .* and this is triton 9.9.9"):
        assert tuned_file.read(file) == {}


def test_the_hash_is_of_every_source(tmp_path, monkeypatch):
    package = tmp_path / "moe_triton"
    (package / "block_sparse").mkdir(parents=True)
    (package / "tuned_file.py").write_text("a")
    (package / "block_sparse/x.py").write_text("b")
    monkeypatch.setattr(tuned_file, "__file__", str(package / "tuned_file.py"))
    first = tuned_file.made_with.__wrapped__()
    (package / "block_sparse/x.py").write_text("c")
    assert tuned_file.made_with.__wrapped__() != first


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned_file.write(file, {"a": {"BLOCK_M": 64}})

    def crash(content, stream, **_):
        stream.write("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", crash)
        with pytest.raises(KeyboardInterrupt):
            tuned_file.write(file, {"b": {"BLOCK_M": 16}})
    assert tuned_file.read(file) == {"a": {"BLOCK_M": 64}} and list(tmp_path.iterdir()) == [file]


def test_the_command_line_names_what_is_wrong(capsys):
    for arguments, message in ((["32768,2048"], "five whole numbers T,D,F,E,K"), (["8,8,8,2,1"], "sees no GPU")):
        with pytest.raises(SystemExit):
            autotune.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_rehearsal_compiles_every_configuration_and_writes_the_file(tmp_path, capsys):
    file = tmp_path / "tuned.json"
    autotune.main(["1024,512,256,4,2", "--file", str(file), "--rehearse"])
    found = tuned_file.read(file)
    assert {key.split()[1] for key in found} == set(tuning.OPS) and all(key.startswith("sm_90 ") for key in found)
    assert "MOE_TRITON_TUNED names it" in capsys.readouterr().out
