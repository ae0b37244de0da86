"""Would the suite notice? Each seeded bug is written into a copy of the package, and the criterion of ffn_cases.py must fail.

Bugs in the scores and selection are for the criterion of topk_cases.py. The default tier takes every sixth bug.

The copy is a package of another name, so that its operators register beside the real ones.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ffn_cases
import pytest
import topk_cases
from ffn_cases import Case, check
from topk_cases import Choice
from triton.runtime.errors import InterpreterError

import moe_triton

# Two column tiles of F, an expert without rows, rows that go nowhere, D and F that no tile divides.
CASE = Case(T=30, D=40, F=70, E=5, K=2, routing="empty_middle", biased=True)

TOPK_CASES = [
    Choice(T=20, E=7, K=3, score="sigmoid", normalize=True, biased=True, scaling_factor=2.5),
    Choice(T=20, E=12, K=12, logits="tied"),
]

BUGS = {
    "the output is zero": ("combine.py", "total += value", "total += value * 0"),
    "one expert is dropped": ("down.py", "if expert >= 0:", "if (expert >= 0) and (expert != 1):"),
    "gate and up are swapped": ("up.py", "activate(gates[i], ups[i],", "activate(ups[i], gates[i],"),
    "the weight is applied twice": (
        "combine.py",
        "        total += value",
        "            value *= tl.load(weight_ptr + first + i, mask=computed, other=0).to(ACC)[:, None]\n        total += value",
    ),
    "ds has the wrong sign": ("hidden_backward.py", "dweight = tl.sum(dhidden", "dweight = -tl.sum(dhidden"),
    "the gather is the identity": (
        "hidden_backward.py",
        "token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)",
        "token = (first + row) % 30",
    ),
    "the last row of each expert is skipped": (
        "down.py",
        "            row = tl.arange(0, BLOCK_M)\n",
        "            row = tl.arange(0, BLOCK_M)\n"
        "            exists = first + row + 1 < tl.load(offsets_ptr + expert + 1)\n",
    ),
    "gradients of experts without rows are not written": (
        "weight_backward.py",
        "    _write(dw_down_ptr + expert * (F * D), at,",
        "    if num_rows == 0:\n        return\n    _write(dw_down_ptr + expert * (F * D), at,",
    ),
    "dX lacks the gate": (
        "input_backward.py",
        "dx = multiply_add(dgate, w, dx, UPCAST, PRECISION)",
        "pass",
    ),
    "hidden rows are not weighted for dW_down": ("hidden_backward.py", "        hidden *= weight[:, None]\n", ""),
    "ds sums the first column tile only": ("hidden_backward.py", "range(1, PARTS)", "range(1, 1)"),
    "ds counts the bias once per column tile": (
        "hidden_backward.py",
        "BIASED and column == 0",
        "BIASED",
    ),
    "rows that go nowhere are summed": (
        "combine.py",
        "computed = exists & (place < num_computed)",
        "computed = exists",
    ),
    "the last columns of D are not masked": (
        "up.py",
        "in_d = within(start + d, D, BLOCK_K)",
        "in_d = within(d, BLOCK_K, BLOCK_K)",
    ),
    "the slope of silu lacks its second term": (
        "activation.py",
        "sigmoid + x * sigmoid * (1 - sigmoid)",
        "sigmoid",
    ),
    "places within an expert start one late": (
        "plan_kernels.py",
        "- within_block, mask=inside",
        "- within_block + 1, mask=inside",
    ),
    "the second tile of an expert begins at the first's rows": (
        "plan_kernels.py",
        "(first_row + tile * TILE_ROWS)",
        "(first_row + tile * 0)",
    ),
    "the capacity is one row too large": (
        "plan_kernels.py",
        "earlier = place - capacity",
        "earlier = place - capacity - 1",
    ),
    "the capacity is of the whole batch": (
        "plan_kernels.py",
        "follows & (group == group_of_earlier)",
        "follows",
    ),
    "the bias of W_up is forgotten": ("up.py", "    up += tl.load(b_up_ptr", "    tl.load(b_up_ptr"),
}

TOPK_BUGS = {
    "of equals the higher expert is taken": (
        "topk_kernels.py",
        "best = tl.argmax(order, axis=1, tie_break_left=True)",
        "best = BLOCK_E - 1 - tl.argmax(tl.flip(order, 1), axis=1, tie_break_left=True)",
    ),
    "an expert is taken twice": ("topk_kernels.py", "tl.where(is_best, -(2 ** (BITS - 1)), order)", "order"),
    "the bias is in the weights": (
        "topk_kernels.py",
        "tl.sum(tl.where(is_best, score, 0.0), axis=1)",
        "tl.sum(tl.where(is_best, key, 0.0), axis=1)",
    ),
    "the bias chooses nobody": ("topk_kernels.py", "key = score + ", "key = score + 0 * "),
    "negative keys are in reverse order": (
        "topk_kernels.py",
        "bits ^= (bits >> (BITS - 1)) & (2 ** (BITS - 1) - 1)",
        "bits += 0",
    ),
    "the divisor has no gradient": ("topk_kernels.py", "(dscore - mean[:, None]) / total", "dscore / total"),
    "lanes past the last expert take part": (
        "topk_kernels.py",
        "tl.where(inside, bits, -(2 ** (BITS - 1)))",
        "tl.where(inside, bits, 2 ** (BITS - 1) - 2)",
    ),
    "the gradient of the scores is lost": (
        "topk_kernels.py",
        "        dscore += tl.load(dscore_ptr",
        "        tl.load(dscore_ptr",
    ),
    "softmax has a sigmoid's gradient": (
        "topk_kernels.py",
        "score * (dscore - tl.sum(score * dscore, axis=1)[:, None])",
        "dscore * score * (1 - score)",
    ),
    "the constant is applied forward only": ("topk_kernels.py", "dweight[:, None] * SCALE", "dweight[:, None]"),
}


def copied(folder: Path, name: str, bug: tuple[str, str, str] | None, module: str) -> ModuleType:
    """One module of a copy of moe_triton under another name, with one replacement made in one file."""
    source = Path(moe_triton.__file__).parent
    for path in source.rglob("*.py"):
        place, text = path.relative_to(source), path.read_text()
        if bug is not None and str(place) == bug[0]:
            assert text.count(bug[1]) >= 1, f"{place} has no {bug[1]!r} any more"
            text = text.replace(bug[1], bug[2])
        (folder / name / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / place).write_text(text.replace("moe_triton", name))
    return importlib.import_module(f"{name}.{module}")


@pytest.fixture
def check_copy(tmp_path, monkeypatch):
    """Run the criterion with a copy's operator in place of the package's."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name: str, bug: tuple[str, str, str] | None) -> None:
        monkeypatch.setattr(ffn_cases, "ffn", copied(tmp_path, name, bug, "ffn"))
        check(CASE)
        check(replace(CASE, T=100, F=20, E=2, K=1, routing="uniform"))
        check(replace(CASE, T=20, D=16, F=8, E=3, routing="zipf", capacity=2))

    def run_topk(name: str, bug: tuple[str, str, str] | None) -> None:
        monkeypatch.setattr(topk_cases, "topk", copied(tmp_path, name, bug, "topk"))
        for case in TOPK_CASES:
            topk_cases.check(case)

    yield {"ffn": run, "topk": run_topk}
    for name in [name for name in sys.modules if name.startswith("mutant")]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["ffn", "topk"])
def test_an_unchanged_copy_passes(check_copy, module):
    check_copy[module](f"mutant_none_{module}", None)


EVERY = [("ffn", bug) for bug in BUGS] + [("topk", bug) for bug in TOPK_BUGS]


@pytest.mark.parametrize(
    "module, bug",
    [pytest.param(*entry, marks=[pytest.mark.full] if i % 6 else [], id=entry[1]) for i, entry in enumerate(EVERY)],
)
def test_bug_is_noticed(check_copy, module, bug):
    name = f"mutant_{EVERY.index((module, bug))}"
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        check_copy[module](name, {**BUGS, **TOPK_BUGS}[bug])
    assert "any more" not in str(caught.value)
