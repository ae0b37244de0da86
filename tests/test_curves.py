"""Loss-curve files against what was written into them; every kind of broken file against its message and exit code."""

import numpy as np
import pytest
from curve_files import HEADER, SIZES, STEPS, gain, rows, write

from moe.analysis.curves import final_gains, gains, read_curves
from moe.cli import main
from moe.errors import DataError


@pytest.fixture(scope="module")
def exact():
    return rows()


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.gz"])
def test_gains_are_those_that_were_written(tmp_path, exact, name):
    found = gains(read_curves(write(tmp_path / name, exact)), 0.08)
    np.testing.assert_allclose(found.progress_S, np.arange(8, 101, 4) / 100)
    expected = [gain(n, e, found.progress_S) for n, e in zip(found.size_R, found.experts_R, strict=True)]
    np.testing.assert_allclose(found.gain_RS, expected, rtol=1e-9)
    assert set(found.label_R) == set(SIZES)
    np.testing.assert_array_equal(final_gains(read_curves(tmp_path / name)).gain_RS[:, 0], found.gain_RS[:, -1])


def test_dense_runs_of_one_size_are_averaged(tmp_path, exact):
    twins = [{**r, "hyper_id": f"{r['hyper_id']}b", "loss_validation": r["loss_validation"] + 0.02} for r in exact]
    lines = exact + [row for row in twins if row["router_type"] == "Dense"]
    both, one = (gains(read_curves(write(tmp_path / "c.csv", some)), 0.08) for some in (lines, exact))
    np.testing.assert_allclose(both.gain_RS, one.gain_RS + 0.01)


def test_losses_that_are_not_finite_are_left_out(tmp_path, exact):
    bad = {STEPS[3]: "nan", STEPS[10]: "", STEPS[11]: "inf"}
    lines = [{**r, "loss_validation": bad.get(r["step"], r["loss_validation"]) if r["hyper_id"] == 2 else r["loss_validation"]}
             for r in exact]  # fmt: skip
    curve = next(c for c in read_curves(write(tmp_path / "c.csv", lines)) if c.run == "2")
    assert curve.dropped == 3
    assert curve.step_S.size == STEPS.size - 1 - 3
    assert np.isfinite(curve.loss_S).all()


def test_a_run_that_ended_early_is_left_out_and_named(tmp_path, exact):
    lines = [r for r in exact if r["hyper_id"] != 5 or r["step"] <= 60_000]
    found = gains(read_curves(write(tmp_path / "c.csv", lines)), 0.08)
    assert "5" not in found.run_R
    assert found.left_out == ("5: ends before 95% of its training",)


def test_other_sparse_runs_are_not_mixed_in(tmp_path, exact):
    extra = [{**r, "hyper_id": "x", "k": 2} for r in exact if r["hyper_id"] == 2]
    extra += [{**r, "hyper_id": "wide", "flop_increase": 2.0} for r in exact if r["hyper_id"] == 1]
    path = write(tmp_path / "c.csv", exact + extra)
    assert {"x", "wide"}.isdisjoint(c.run for c in read_curves(path))
    assert [c.run for c in read_curves(path, top_k=2) if not c.is_dense] == ["x"]


def test_training_may_last_longer_at_larger_sizes(tmp_path, exact):
    lines = [{**r, "step": r["step"] * (2 if r["model_size_label"] == "600M" else 1)} for r in exact]
    twice, once = (gains(read_curves(write(tmp_path / "c.csv", some)), 0.08) for some in (lines, exact))
    np.testing.assert_allclose(twice.gain_RS, once.gain_RS)


def broken(exact, name):
    first = [r for r in exact if r["hyper_id"] <= 2]
    return {
        "column": (exact, [h for h in HEADER if h != "num_experts"]),
        "header only": ([], HEADER),
        "no dense": ([r for r in exact if r["router_type"] != "Dense"], HEADER),
        "no sparse": ([{**r, "k": 4} for r in exact], HEADER),
        "size": ([{**first[0], "dense_parameter_count": "nan"}, *first[1:]], HEADER),
        "experts": ([{**r, "num_experts": 2.5} for r in first], HEADER),
        "changing": ([*first, {**first[-1], "num_experts": 64}], HEADER),
        "loss": ([{**first[0], "loss_validation": "three"}, *first[1:]], HEADER),
        "all nan": ([{**r, "loss_validation": "nan"} for r in exact], HEADER),
        "few sizes": ([r for r in exact if r["model_size_label"] in ("15M", "40M")], HEADER),
        "few runs": ([r for r in exact if r["num_experts"] in (1, 8)], HEADER),
    }[name]


@pytest.mark.parametrize(
    "name, command, says",
    [
        ("column", "forecast backtest {} --hold-out 40M", "lacks the columns num_experts"),
        ("header only", "forecast backtest {} --hold-out 40M", "a header and no rows"),
        ("no dense", "ladder backtest {} --target 600M", "no dense run (router_type Dense)"),
        ("no sparse", "ladder fit {}", "(found: k=4 routing_frequency=0.5): choose with --top-k"),
        ("size", "ladder fit {}", "line 2: dense_parameter_count must be a finite number, found 'nan'"),
        ("experts", "ladder fit {}", "num_experts (2.5) a whole number"),
        ("changing", "ladder fit {}", "the run 2 changes its router, experts or size"),
        ("loss", "ladder fit {}", "line 2: loss_validation must be a number or empty, found 'three'"),
        ("all nan", "forecast backtest {} --hold-out 40M", "no run reaches the end of its training"),
        ("all nan", "ladder fit {}", "need 7 runs"),
        ("few sizes", "forecast backtest {} --hold-out 40M", "numbers of experts; found 0 (14 runs of 1 sizes)"),
        ("few sizes", "ladder backtest {} --target 40M", "has 1 smaller sizes in the file, a ladder needs 3"),
        ("few runs", "forecast backtest {} --hold-out 40M", "needs 19 finished sparse runs"),
        ("few runs", "ladder fit {}", "found 5, 5 and 1: add runs"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_paragraph_and_exit_code_2(tmp_path, capsys, exact, name, command, says):
    path = write(tmp_path / "c.csv", *broken(exact, name))
    assert main(command.format(path).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "content, says", [(b"", "none: the file is empty"), (b"\x1f\x8bx", "cannot be read"), (None, "does not exist")]
)
def test_a_file_that_is_no_csv(tmp_path, capsys, content, says):
    path = tmp_path / "c.csv"
    if content is not None:
        path.write_bytes(content)
    assert main(["ladder", "fit", str(path)]) == 2
    assert says in capsys.readouterr().err
    assert main(["ladder", "fit", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--hold-out", "7B"], "has the size '7B': the file's sizes are 15M, 40M, 100M, 250M, 600M"),
        (["--hold-out", "40M", "--anchor", "1.5"], "the anchor (1.5) must be a share of training between 0 and 1"),
        (["--hold-out", "40M", "--anchor", "0.001"], "no evaluation lies near 0.001 of training (the nearest at 0.04"),
        (["--hold-out", "40M", "--loss", "loss_c4"], "lacks the columns loss_c4"),
        (["--hold-out", "40M", "--fit-on", "larger"], "--fit-on ('larger') must be others or smaller"),
        ([], "Missing option '--hold-out'"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, capsys, exact, options, says):
    path = write(tmp_path / "c.csv", exact)
    assert main(["forecast", "backtest", str(path), *options]) == 2
    assert says in capsys.readouterr().err


def test_too_late_an_anchor_is_refused(tmp_path, exact):
    with pytest.raises(DataError, match="choose another"):
        gains(read_curves(write(tmp_path / "c.csv", exact)), 0.999)
