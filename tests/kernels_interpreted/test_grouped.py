"""The grouped product in its four forms against float64 and against torch's own grouped_mm, with both gradients.

Errors are at most twice those of the same loop in plain torch at that type. Memory is poisoned with NaN, so a row that is
not written shows. Then what values cannot show: repeatability, tracing, kept tensors, refusals, and that a bug is noticed.
"""

import importlib
import mmap
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from covering import covering
from ffn_cases import UNIT, rms
from torch import Tensor
from triton.runtime.errors import InterpreterError

from moe_triton import grouped, reference
from moe_triton.grouped import kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ENDS = {
    "uneven": [5, 6, 41, 45],
    "empty_first": [0, 7, 40, 45],
    "empty_middle": [19, 19, 19, 45],
    "empty_last": [16, 32, 45, 45],
    "one": [0, 45, 45, 45],
    "short": [3, 20, 20, 33],
    "nothing": [0, 0, 0, 0],
    "no_rows": [0, 0],
    "single": [45],
}
"""Ends of groups; the ragged dimension has 45 elements, and none in "no_rows"."""


@dataclass(frozen=True)
class Case:
    """One point: contraction D or ragged, outputs F wide."""

    form: str
    ends: str = "uneven"
    D: int = 20
    F: int = 24
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    gradient: str = "dense"
    offsets: torch.dtype = torch.int32

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in vars(self).values())


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        wider[..., 1:-2] = tensor
        return wider[..., 1:-2]
    if layout == "strided":  # no dimension of stride 1
        wider = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wider[..., ::2] = tensor
        return wider[..., ::2]
    return tensor


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """a, b of unit-scale results, and offs."""
    G, D, F = len(ENDS[case.ends]), case.D, case.F
    R = 0 if case.ends == "no_rows" else 45
    a_shape, b_shape = {
        "2d×3d": ((R, D), (G, D, F)),
        "3d×2d": ((G, F, D), (D, R)),
        "2d×2d": ((D, R), (R, F)),
        "3d×3d": ((G, 19, D), (G, D, F)),
    }[case.form]
    scale = 3.0 if case.form == "2d×2d" else max(D, 1) ** 0.5
    a = laid_out(torch.randn(a_shape).to(case.dtype), case.layout)
    b = laid_out((torch.randn(b_shape) / scale).to(case.dtype), case.layout)
    if case.layout == "expanded":  # one matrix for all groups, one row for all
        a, b = (t[:1].expand_as(t) if t.shape[0] else t for t in (a, b))
    offs = None if case.form == "3d×3d" else torch.tensor(ENDS[case.ends], dtype=case.offsets)
    return a, b, offs


def plain(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """The loop in torch at the operands' own type; written apart from moe_triton.reference."""
    if offs is None:
        return torch.bmm(a, b)
    bounds = [0, *offs.tolist()]
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j, :] for i, j in pairwise(bounds)])
    if a.dim() == 2:
        out = a.new_zeros(a.shape[0], b.shape[2])
        for g, (i, j) in enumerate(pairwise(bounds)):
            out = out.index_add(0, torch.arange(i, j), a[i:j] @ b[g])
        return out
    return plain(b.t(), a.mT, offs).t()


def gradient_like(out: Tensor, kind: str) -> Tensor:
    """The result's gradient: dense, one number for all, one row for all, or transposed."""
    if kind == "expanded":
        return torch.randn(()).to(out.dtype).expand_as(out)
    if kind == "rows":
        return torch.randn(out.shape[-1]).to(out.dtype).expand_as(out)
    if kind == "transposed":
        return torch.randn(out.mT.shape).to(out.dtype).mT
    return torch.randn(out.shape).to(out.dtype)


def results(function, a: Tensor, b: Tensor, dout: Tensor) -> list[Tensor]:
    """out, da and db."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    out = function(a, b)
    return [out.detach(), *torch.autograd.grad(out, (a, b), dout)]


def check(case: Case, function=None) -> None:
    """Assert that results are right to twice plain torch's error, far from zero, exactly zero where they must be."""
    function = function or grouped.grouped_mm
    a, b, offs = inputs_of(case)
    dout = gradient_like(plain(a, b, offs), case.gradient)
    ours = results(lambda a, b: function(a, b, offs=offs), a, b, dout)
    rough = results(lambda a, b: plain(a, b, offs), a, b, dout)
    exact = results(lambda a, b: plain(a, b, offs), a.double(), b.double(), dout.double())
    for name, value, near, true in zip(("out", "da", "db"), ours, rough, exact, strict=True):
        assert value.shape == true.shape and value.dtype == case.dtype and value.is_contiguous(), name
        value, near = value.double(), near.double()
        assert not value[true == 0].any(), f"{name} must be exactly zero there"
        scale = rms(true)
        tolerance = 2 * rms(near - true) + UNIT[case.dtype] * (1 + 3 / max(true.numel(), 1) ** 0.5) * scale
        assert rms(value - true) <= tolerance, f"{name}: error {rms(value - true):.3g}, tolerance {tolerance:.3g}"
        assert scale == 0 or scale >= 30 * tolerance, f"{name}: a tolerance of {tolerance:.3g} says little"


FORMS = ("2d×3d", "3d×2d", "2d×2d", "3d×3d")
SOME = {
    "rows, odd sizes": Case("2d×3d", D=41, F=37),
    "columns, odd sizes": Case("3d×2d", D=33, F=21),
    "sums, odd sizes": Case("2d×2d", D=33, F=47),
    "whole, odd sizes": Case("3d×3d", D=33, F=47),
    "rows, some of no group, one gradient for all": Case(
        "2d×3d", "short", 40, 24, BF16, "transposed", "expanded", torch.int64
    ),
    "columns, some of no group": Case("3d×2d", "short", 24, 40, BF16, "transposed", "expanded", torch.int64),
    "sums, some of no group": Case("2d×2d", "short", 24, 40, BF16, "transposed", "rows", torch.int64),
    "rows, first group empty": Case("2d×3d", "empty_first", 20, 40, F16),
    "columns, middle group empty": Case("3d×2d", "empty_middle", 20, 20, F16, gradient="transposed"),
    "sums, last group empty": Case("2d×2d", "empty_last", 20, 20, F16),
    "sums of nothing": Case("2d×2d", "nothing", 20, 33, gradient="rows"),
    "no rows": Case("2d×3d", "no_rows", 20, 33),
    "all rows to one group": Case("2d×3d", "one", 20, 33, layout="sliced"),
    "a matrix for all groups": Case("2d×3d", "uneven", 7, 9, layout="expanded"),
    "no dimension of stride 1": Case("2d×2d", "uneven", 7, 9, layout="strided"),
    "one element": Case("2d×3d", "single", 1, 1),
}
PAIRS = covering(
    {
        "form": FORMS,
        "ends": list(ENDS),
        "shape": [(64, 32), (97, 47), (1, 1), (130, 70)],
        "dtype": [F32, F16, BF16],
        "layout": ["contiguous", "transposed", "sliced", "strided", "expanded"],
        "gradient": ["dense", "expanded", "rows", "transposed"],
        "offsets": [torch.int32, torch.int64],
    }
)


@pytest.mark.parametrize("case", SOME.values(), ids=SOME.keys())
def test_values_and_gradients(case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("combination", PAIRS, ids=lambda c: "-".join(map(str, c.values())))
def test_values_and_gradients_of_every_pair(combination):
    D, F = combination.pop("shape")
    check(Case(D=D, F=F, **combination))


@pytest.mark.parametrize("form", FORMS)
def test_torchs_own_operator_gives_the_same_where_it_runs(form):
    a, b, offs = inputs_of(Case(form, "uneven", 16, 48))
    # torch wants rows of 16 bytes: 48 instead of 45 elements along the ragged dimension, the last 3 past the last offset
    more = {"2d×3d": (0, 0), "3d×2d": (0, 3), "2d×2d": (3, 3), "3d×3d": (0, 0)}[form]
    pad = torch.nn.functional.pad
    theirs = torch.nn.functional.grouped_mm(
        pad(a, (0, more[0])), pad(b, (0, 0, 0, 3)) if form == "2d×2d" else pad(b, (0, more[1])), offs=offs
    )
    ours = grouped.grouped_mm(a, b, offs=offs)
    assert rms(theirs[..., : ours.shape[-1]]) > 0.3
    torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_plain_loop(form):
    a, b, offs = inputs_of(Case(form, "short", 7, 5, torch.float64))
    dout = torch.randn_like(plain(a, b, offs))
    ours = results(lambda a, b: reference.grouped_mm(a, b, offs=offs), a, b, dout)
    for value, true in zip(ours, results(lambda a, b: plain(a, b, offs), a, b, dout), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives(form):
    G, K = 2, 3
    offs = None if form == "3d×3d" else torch.tensor([2, 4], dtype=torch.int32)
    shapes = {  # the fifth row or column belongs to no group
        "2d×3d": ((5, K), (G, K, 2)),
        "3d×2d": ((G, 2, K), (K, 5)),
        "2d×2d": ((2, 5), (5, 3)),
        "3d×3d": ((G, 2, K), (G, K, 2)),
    }[form]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(a, b):
        return grouped.grouped_mm(a, b, offs=offs)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_float32_result_of_float16_operands_keeps_what_float16_would_round():
    a, b, offs = inputs_of(Case("2d×3d", dtype=F16))
    exact = plain(a.double(), b.double(), offs)
    out = grouped.grouped_mm(a.requires_grad_(), b, offs=offs, out_dtype=F32)
    assert out.dtype == F32 and rms(out.detach().double() - exact) < 1e-6 * rms(exact)
    out.sum().backward()
    assert a.grad.dtype == F16


def test_one_tensor_as_both_operands_and_used_twice():
    a = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    offs = torch.tensor([5, 12], dtype=torch.int32)
    out = grouped.grouped_mm(a, a, offs=offs)
    loss = (out * out).sum() + grouped.grouped_mm(a, out, offs=offs).sum()
    (gradient,) = torch.autograd.grad(loss, a, retain_graph=True)
    (again,) = torch.autograd.grad(loss, a)
    parts = torch.stack([a[:, :5] @ a[:5], a[:, 5:] @ a[5:]])
    more = torch.cat([a[:5] @ parts[0], a[5:] @ parts[1]])
    (wanted,) = torch.autograd.grad((parts * parts).sum() + more.sum(), a)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.equal(again)


def test_two_runs_are_bitwise_equal_and_groups_do_not_touch_each_other():
    a, b, offs = inputs_of(Case("2d×3d"))
    out = grouped.grouped_mm(a, b, offs=offs)
    assert out.equal(grouped.grouped_mm(a, b, offs=offs))
    changed = b.clone()
    changed[2] = torch.nan
    other = grouped.grouped_mm(a, changed, offs=offs)
    assert other[6:41].isnan().all() and other[:6].equal(out[:6]) and other[41:].equal(out[41:])


def test_one_launch_forward_and_two_backward_without_a_schedule_or_a_fill(launches):
    a, b, offs = inputs_of(Case("2d×3d"))
    out = grouped.grouped_mm(a.requires_grad_(), b.requires_grad_(), offs=offs)
    assert launches == ["grouped_rows_kernel"]
    out.sum().backward()
    assert launches == ["grouped_rows_kernel", "grouped_rows_kernel", "grouped_inner_kernel"]


def test_only_the_operands_are_kept():
    a, b, offs = inputs_of(Case("2d×3d"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped.grouped_mm(a.requires_grad_(), b.requires_grad_(), offs=offs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (a, b, offs)}


def test_offsets_beyond_the_operand_stay_inside_it():
    a, b, _ = inputs_of(Case("2d×3d"))
    offs = torch.tensor([-3, 20, 45, 1 << 20], dtype=torch.int32)  # the conftest's bounds check would raise
    wanted = plain(a, b, torch.tensor([0, 20, 45, 45]))
    torch.testing.assert_close(grouped.grouped_mm(a, b, offs=offs), wanted)


@pytest.mark.parametrize("form", FORMS[:3])
def test_offsets_of_elements_beyond_32_bits(form):
    rows, stride = 40, 1 << 26
    memory = torch.frombuffer(
        mmap.mmap(-1, (rows * stride + 64) * 2), dtype=F16
    )  # pages that nobody touches cost nothing
    far = memory.as_strided((rows, 24), (stride, 1))
    near = torch.randn(rows, 24).to(F16)
    far.copy_(near)
    offs = torch.tensor([13, 40], dtype=torch.int32)
    other = torch.randn(2, 24, 8).to(F16) if form != "2d×2d" else torch.randn(40, 8).to(F16)
    arguments = {
        "2d×3d": lambda t: (t, other),
        "3d×2d": lambda t: (other.mT, t.t()),
        "2d×2d": lambda t: (t.t(), other),
    }[form]
    ours = grouped.grouped_mm(*arguments(far), offs=offs)
    assert ours.equal(grouped.grouped_mm(*arguments(near), offs=offs)) and rms(ours.double()) > 1


@pytest.mark.full
def test_the_operator_passes_torchs_own_checks():
    a, b, offs = inputs_of(Case("2d×3d", "short", 10, 6))
    a.requires_grad_()
    b.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moe_triton.grouped_mm.default, (a, b, offs, F32), test_utils=checks)


def test_the_operator_compiles_as_one_graph():
    a, b, offs = inputs_of(Case("2d×3d", "short", 10, 6))
    compiled = torch.compile(grouped.grouped_mm, fullgraph=True, backend="aot_eager")
    expected = results(lambda a, b: grouped.grouped_mm(a, b, offs=offs), a, b, torch.ones(45, 6))
    for value, wanted in zip(
        results(lambda a, b: compiled(a, b, offs=offs), a, b, torch.ones(45, 6)), expected, strict=True
    ):
        assert value.equal(wanted)


@pytest.mark.parametrize("form", FORMS)
def test_meta_tensors_give_shapes_without_data(form):
    a, b, offs = inputs_of(Case(form))
    meta = [t.to("meta").requires_grad_() for t in (a, b)]
    out = grouped.grouped_mm(*meta, offs=None if offs is None else offs.to("meta"), out_dtype=F32)
    assert out.shape == plain(a, b, offs).shape
    out.sum().backward()
    assert meta[0].grad.shape == a.shape and meta[1].grad.shape == b.shape


@pytest.mark.parametrize(
    "shapes, offs, message",
    [
        (((4, 3), (2, 5, 6)), [2, 4], "3 columns"),
        (((4, 3), (2, 3, 6)), None, "needs offs"),
        (((2, 4, 3), (2, 3, 6)), [2, 4], "takes no offs"),
        (((4, 3), (2, 3, 6)), [2, 3, 4], "one number of groups"),
        (((4,), (2, 3, 6)), [2, 4], "2 or 3"),
        (((4, 3), (2, 3, 6)), [2.0, 4.0], "int32 or int64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(shapes, offs, message):
    a, b = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        grouped.grouped_mm(a, b, offs=None if offs is None else torch.tensor(offs))


def test_operands_of_two_types_are_refused():
    with pytest.raises(ValueError, match="one float type"):
        grouped.grouped_mm(torch.zeros(4, 3), torch.zeros(2, 3, 6).half(), offs=torch.tensor([2, 4]))


BUGS = {
    "rows past the last end are not written": ("mask=in_out)\n        return", "mask=in_out & False)\n        return"),
    "the last row of each group is skipped": ("exists = first + row < end", "exists = first + row + 1 < end"),
    "every group gets the first matrix": ("b_ptr += group.to(tl.int64) * stride_bg + (", "b_ptr += ("),
    "the second tile repeats the first": ("start + (tile - (after - tiles)) * BLOCK_M", "start"),
    "a group begins at the first row": ("first = _end(ends_ptr, group - 1, K, group > 0)", "first = 0"),
    "an empty group is not written": (
        "    out_ptr += group.to(tl.int64) * M",
        "    if depth == 0:\n        return\n    out_ptr += group.to(tl.int64) * M",
    ),
    "the sum's last block is not masked": ("in_k = start + tl.arange(0, BLOCK_K) < depth", "in_k = start + k >= 0"),
    "columns are not masked": ("in_n = n_tile * BLOCK_N + n < N", "in_n = n >= 0"),
}


@pytest.fixture
def check_copy(tmp_path, monkeypatch):
    """Run the criterion on a copy of the package under another name, with one replacement made in its kernels."""

    def run(name: str, old: str = "", new: str = "") -> None:
        (tmp_path / name).mkdir()
        for path in Path(kernels.__file__).parent.glob("*.py"):
            text = path.read_text().replace("moe_triton.grouped", name).replace("moe_triton::", f"{name}::")
            if path.name == "kernels.py":
                assert old in text, f"kernels.py has no {old!r} any more"
                text = text.replace(old, new)
            (tmp_path / name / path.name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        copy = importlib.import_module(name)
        for case in (*(Case(form, "short", 20, 40) for form in FORMS[:3]), Case("2d×2d", "empty_middle", 40, 20)):
            check(case, copy.grouped_mm)

    yield run
    for module in [module for module in sys.modules if module.startswith("grouped_mutant")]:
        del sys.modules[module]


@pytest.mark.full
def test_an_unchanged_copy_passes(check_copy):
    check_copy("grouped_mutant")


@pytest.mark.full
@pytest.mark.parametrize("index", range(len(BUGS)), ids=list(BUGS))
def test_a_bug_is_noticed(check_copy, index):
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        check_copy(f"grouped_mutant_{index}", *list(BUGS.values())[index])
    assert "any more" not in str(caught.value)
