"""Would the block-sparse suite notice? Each seeded bug is written into a copy of the package, and its checks must fail.

The copy is a package of another name, so that its operators register beside the real ones.
"""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import block_sparse_cases
import pytest
import torch
from block_sparse_cases import NAMES, check_builder, check_ffn, check_product
from triton.runtime.errors import InterpreterError

import moe_triton

pytestmark = pytest.mark.full

KERNELS, GLU, FFN, TOPOLOGY = (f"block_sparse/{name}.py" for name in ("triton_path", "glu_kernels", "ffn", "topology"))
BUGS = {
    "column indices have sixteen bits": (
        KERNELS,
        "column = tl.load(column_index_ptr + block)",
        "column = tl.load(column_index_ptr + block).to(tl.int16)",
    ),
    "tiles of the dense operand have sixteen bits": (
        KERNELS,
        "_bounds(tl.load(other_index_ptr + place), dense_bounds_ptr",
        "_bounds(tl.load(other_index_ptr + place).to(tl.int16), dense_bounds_ptr",
    ),
    "ragged rows are not masked": (KERNELS, "(m < m_end) & used, n < n_end", "(m >= 0) & used, n < n_end"),
    "ragged columns are not masked": (KERNELS, "(m < m_end) & used, n < n_end", "(m < m_end) & used, n >= 0"),
    "the transposed index is not used": (
        KERNELS,
        "block = tl.load(block_index_ptr + place).to(tl.int64)",
        "block = tl.cast(place, tl.int64)",
    ),
    "blocks are not transposed": (
        KERNELS,
        "s_at = k_in[None, :] * BLOCK_M + m_in[:, None]",
        "s_at = m_in[:, None] * BLOCK_M + k_in[None, :]",
    ),
    "empty rows are not written": (
        KERNELS,
        "    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)\n",
        "    if first == last:\n        return\n    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)\n",
    ),
    "the last step of a block row is left out": (KERNELS, "last * STEPS):", "last * STEPS - 1):"),
    "values outside the matrix are read": (
        KERNELS,
        "s = tl.load(s_at, mask=m_inside[:, None] & k_inside[None, :], other=0.0)",
        "s = tl.load(s_at)",
    ),
    "tokens are not gathered": (KERNELS, "m = tl.load(a_row_ptr + m, mask=m_inside, other=0)", "m = m % 9"),
    "the weight is lost in the gradient of up": (
        GLU,
        "tl.store(dup_ptr + at, (dup * weight[:, None])",
        "tl.store(dup_ptr + at, (dup)",
    ),
    "the gradient of the weight sums the last columns only": (
        GLU,
        "dweight += tl.sum(dhidden",
        "dweight = tl.sum(dhidden",
    ),
    "dx lacks the up product": (FFN, "dx_PD += products", "products"),
    "tiles cross the end of an expert": (TOPOLOGY, "(tile - _at(first_tile, expert)) * block", "tile * 0"),
    "the places of the transposed index are off by a row": (
        TOPOLOGY,
        "+ down * _at(columns",
        "+ (down + 1) * _at(columns",
    ),
}


def copied(folder: Path, name: str, bug: tuple[str, str, str] | None) -> ModuleType:
    """block_sparse of a copy of moe_triton under another name, with one replacement made in one file."""
    source = Path(moe_triton.__file__).parent
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / name).rglob("*.py"):
        text = path.read_text()
        if bug is not None and path == folder / name / bug[0]:
            assert text.count(bug[1]) >= 1, f"{path.name} has no {bug[1]!r} any more"
            text = text.replace(bug[1], bug[2])
        path.write_text(text.replace("moe_triton", name))
    return importlib.import_module(f"{name}.block_sparse")


def far_column(package: ModuleType) -> None:
    """One block at column 32768 of 16, both ways."""
    topology = package.from_mask(torch.arange(32_769).unsqueeze(0) == 32_768, 16)
    a, b = torch.randn(16, 2), torch.randn(2, 16 * 32_769)
    values = package.sdd(a, b, topology, backend="triton")
    torch.testing.assert_close(values[0], a @ b[:, -16:])
    torch.testing.assert_close(package.dsd(values, topology, b.t(), backend="triton"), values[0] @ b[:, -16:].t())


def outside_is_ignored(package: ModuleType) -> None:
    """What a block holds outside of a ragged matrix may be anything."""
    topology = package.from_mask(torch.ones(1, 2, dtype=torch.bool), 16, (16, 27))
    values, x = torch.randn(2, 16, 16), torch.randn(27, 3)
    wanted = values.transpose(0, 1).flatten(1)[:, :27] @ x
    values[1, :, 11:] = float("nan")
    torch.testing.assert_close(package.dsd(values, topology, x, backend="triton"), wanted)


@pytest.fixture
def check_copy(tmp_path, monkeypatch):
    """Run the checks of the suite with a copy's operators in place of the package's."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name: str, bug: tuple[str, str, str] | None) -> None:
        package = copied(tmp_path, name, bug)
        for member in package.__all__:
            if hasattr(block_sparse_cases, member):
                monkeypatch.setattr(block_sparse_cases, member, getattr(package, member))
        far_column(package)
        outside_is_ignored(package)
        for product in NAMES:
            check_product(product, (16, 4, 6, (9, 13), 17), torch.float32, "triton")
        check_builder("routing", 16, "triton")
        check_ffn(((47, 16, 0, 33, 5), 16, 33, 3, "uniform"), torch.float32, "triton", "output")
        check_ffn(((64, 20), 32, 9, 2, "nowhere"), torch.float32, "triton", "output")

    yield run
    for name in [name for name in sys.modules if name.startswith("mutant")]:
        del sys.modules[name]


def test_an_unchanged_copy_passes(check_copy):
    check_copy("mutant_sparse_none", None)


@pytest.mark.parametrize("index", range(len(BUGS)), ids=list(BUGS))
def test_bug_is_noticed(check_copy, index):
    with pytest.raises((AssertionError, InterpreterError, IndexError)) as caught:
        check_copy(f"mutant_sparse_{index}", list(BUGS.values())[index])
    assert "any more" not in str(caught.value)
