"""Would the suite notice? Each seeded bug is written into a copy of the package, and the criterion of ffn_cases.py must fail.

The copy is a package of another name, so that its operators register beside the real ones.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ffn_cases
import pytest
from ffn_cases import Case, check
from triton.runtime.errors import InterpreterError

import moe_triton

pytestmark = pytest.mark.full

# Two column tiles of F, an expert without rows, rows that go nowhere, D and F that no tile divides.
CASE = Case(T=30, D=40, F=70, E=5, K=2, routing="empty_middle", biased=True)

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
        "if BIASED and column == 0:",
        "if BIASED:",
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
        "plan.py",
        "- within_block, mask=inside",
        "- within_block + 1, mask=inside",
    ),
    "the second tile of an expert begins at the first's rows": (
        "plan.py",
        "(first_row + tile * TILE_ROWS)",
        "(first_row + tile * 0)",
    ),
    "the bias of W_up is forgotten": ("up.py", "    up += tl.load(b_up_ptr", "    tl.load(b_up_ptr"),
}


def copied(folder: Path, name: str, bug: tuple[str, str, str] | None) -> ModuleType:
    """The ffn module of a copy of moe_triton under another name, with one replacement made in one file."""
    source = Path(moe_triton.__file__).parent
    (folder / name).mkdir()
    for path in source.glob("*.py"):
        text = path.read_text()
        if bug is not None and path.name == bug[0]:
            assert text.count(bug[1]) >= 1, f"{path.name} has no {bug[1]!r} any more"
            text = text.replace(bug[1], bug[2])
        (folder / name / path.name).write_text(text.replace("moe_triton", name))
    return importlib.import_module(f"{name}.ffn")


@pytest.fixture
def check_copy(tmp_path, monkeypatch):
    """Run the criterion with a copy's operator in place of the package's."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name: str, bug: tuple[str, str, str] | None) -> None:
        monkeypatch.setattr(ffn_cases, "ffn", copied(tmp_path, name, bug))
        check(CASE)
        check(replace(CASE, T=100, F=20, E=2, K=1, routing="uniform"))

    yield run
    for name in [name for name in sys.modules if name.startswith("mutant")]:
        del sys.modules[name]


def test_an_unchanged_copy_passes(check_copy):
    check_copy("mutant_none", None)


@pytest.mark.parametrize("index", range(len(BUGS)), ids=list(BUGS))
def test_bug_is_noticed(check_copy, index):
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        check_copy(f"mutant_{index}", list(BUGS.values())[index])
    assert "any more" not in str(caught.value)
