"""8-bit products against quantising and dequantising in plain torch (moe_triton.reference), and against exact values.

The quantised bits are torch's own cast of x / scale. A product of given operands has at most twice the error of plain
float32. The whole FFN is no farther from the exact result than twice the reference that rounds its operands in float64, and
near that reference itself; how far that is, is the price of the format.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ffn_cases import Case, inputs_of, rms, rows_of
from torch import Tensor
from triton.runtime.errors import InterpreterError

from moe_triton import ffn, reference
from moe_triton.low_precision import FORMATS, formats, product, quantize
from moe_triton.low_precision import ffn as low
from moe_triton.plan import routing_plan
from moe_triton.tiles import Weights

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
TYPES = pytest.mark.parametrize("dtype", [FN, FNUZ], ids=["e4m3fn", "e4m3fnuz"])
PRECISIONS = pytest.mark.parametrize("precision", FORMATS)


def through(values: Tensor, scales: Tensor) -> Tensor:
    """The real numbers that a quantised [rows, K] stands for."""
    return values.double() * scales.double().repeat_interleave(values.shape[1] // scales.shape[1], dim=1)


def awkward(rows: int, columns: int) -> Tensor:
    """Rows of very different sizes, with zeros, ties between two 8-bit values, tiny numbers and a row of zeros."""
    x = torch.randn(rows, columns) * 10 ** torch.linspace(-20, 20, rows)[:, None]
    x[0] = torch.linspace(-448, 448, columns)
    x[0, -1] = 448
    x[1] = 0
    x[2] = torch.arange(columns) * 2.0**-10 - columns * 2.0**-11  # below the least normal value once 448 is in the row
    x[2, 0] = 448
    x[3, ::3] = -1e-30
    return x


@TYPES
@PRECISIONS
@pytest.mark.parametrize("columns", [97, 256])
def test_rows_are_quantised_to_the_bits_of_torchs_cast(precision, columns, dtype):
    x = awkward(37, columns)
    form = FORMATS[precision]
    values, scales = quantize.quantize_rows(x, form, dtype)
    assert values.shape == (37, -(-columns // 128) * 128) and scales.shape == (37, form.scales(values.shape[1]))
    block = 128 if form.blocked else columns
    for i, part in enumerate(x.split(block, dim=1)):
        largest = part.abs().amax(1)
        scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
        assert scales[:, i].equal(scale)
        limit = torch.finfo(dtype).max
        cast = (part / scale[:, None]).clamp(-limit, limit).to(dtype)
        ours = values[:, i * block : i * block + part.shape[1]]
        assert ours.float().equal(cast.float()), (ours.float() - cast.float()).abs().max()
    assert not values[:, columns:].float().any()
    (rounded,) = reference.rounded([x], precision, dtype=dtype)
    torch.testing.assert_close(through(values, scales)[:, :columns].float(), rounded, rtol=1e-6, atol=0)


@TYPES
@PRECISIONS
def test_weights_are_quantised_along_either_dimension_and_joined(precision, dtype):
    form, (E, A, B) = FORMATS[precision], (2, 150, 97)
    gate, up = torch.randn(E, A, B), 3 * torch.randn(E, A, B)
    sides = quantize.quantize_weights([gate.mT, up.mT], form, dtype)  # contraction over A
    assert sides.values.shape == (E, 2, B, 256)
    joined = quantize.quantize_weights([gate, up], form, dtype, joined=True)  # over B, one after the other
    assert joined.values.shape == (E, 1, A, 256)
    for e in range(E):
        for s, weight in enumerate((gate, up)):
            scales = sides.scales[e, s].repeat_interleave(128 if form.blocked else 1, dim=0)[:B]
            (wanted,) = reference.rounded([weight[e].t()], precision, weight=True, dtype=dtype)
            torch.testing.assert_close(through(sides.values[e, s], scales)[:, :A].float(), wanted)
        scales = joined.scales[e, 0].repeat_interleave(128 if form.blocked else 1, dim=0)[:A]
        found = through(joined.values[e, 0], scales).float()
        wanted = reference.rounded([gate[e], up[e]], precision, weight=True, dtype=dtype)
        torch.testing.assert_close(found[:, :B], wanted[0])
        torch.testing.assert_close(found[:, 128 : 128 + B], wanted[1])
        assert not found[:, B:128].any()


@PRECISIONS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(precision, bad):
    x = torch.randn(3, 200)
    x[1, 150] = bad
    values, scales = quantize.quantize_rows(x, FORMATS[precision], FN)
    found = through(values, scales)
    assert found[1, 128:200].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [FN, pytest.param(FNUZ, marks=pytest.mark.full)], ids=["e4m3fn", "e4m3fnuz"])
@PRECISIONS
@pytest.mark.parametrize("gather", [False, True])
def test_a_product_of_given_operands(precision, gather, dtype):
    case = Case(T=20, D=140, F=70, E=3, K=2, routing="empty_middle")
    form, (token_R, expert_R, token_offsets) = FORMATS[precision], rows_of(case)
    plan = routing_plan(token_R, expert_R, token_offsets, num_experts=case.E)
    P = len(token_R)
    x = torch.randn(case.T if gather else P, case.D) * torch.rand(1)
    w = torch.randn(case.E, 2, case.F, case.D)
    a = quantize.quantize_rows(x, form, dtype)
    b = quantize.quantize_weights([w[:, 0].contiguous(), w[:, 1].contiguous()], form, dtype)
    out = product.fp8_rows(a, b, plan, form, x, gather=gather)
    rows, exact, rough = through(*a), torch.zeros(P, 2 * case.F).double(), torch.zeros(P, 2 * case.F)
    for p in range(int(plan.offsets_E1[-1])):
        e = int(expert_R[plan.row_P[p]])
        row = rows[plan.token_P[p] if gather else p]
        for s in range(2):
            weight = through(
                b.values[e, s], b.scales[e, s].repeat_interleave(128 if form.blocked else 1, dim=0)[: case.F]
            )
            exact[p, s * case.F : (s + 1) * case.F] = weight @ row
            rough[p, s * case.F : (s + 1) * case.F] = weight.float() @ row.float()
    computed = slice(0, int(plan.offsets_E1[-1]))
    error, allowed = out[computed].double() - exact[computed], rough[computed].double() - exact[computed]
    assert rms(error) <= 2 * rms(allowed) + 2**-24 * rms(exact) and rms(exact) > 1e4 * rms(error)


def run(case: Case, precision: str, function) -> dict[str, Tensor]:
    """y and every gradient of one implementation, in float64."""
    torch.manual_seed(1)
    rows = rows_of(case)
    inputs = inputs_of(case, rows)
    dy = torch.randn(case.T, case.D).to(case.dtype)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y, dy = function(case, precision, rows, inputs, dy)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach().double(), **{k: g.double() for k, g in zip(inputs, gradients, strict=True)}}


def ours(case, precision, rows, inputs, dy):
    token_R, expert_R, token_offsets = rows
    arguments = (inputs["x"], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"], token_R, expert_R)
    options = {"num_experts": case.E, "activation": case.activation, "recompute": case.recompute}
    return ffn.expert_ffn(*arguments, inputs["weight"], token_offsets, precision=precision, **options), dy


def in_float64(case, precision, rows, inputs, dy):
    token_R, expert_R, _ = rows
    token_P, row_P, _, offsets_E1, _ = reference.routing_plan(token_R, expert_R, num_experts=case.E, tile_rows=16)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    weights = (wide.get("w_gate"), wide["w_up"], wide["w_down"])
    rest = (token_P, wide["weight"][row_P], offsets_E1)
    y = reference.expert_ffn(wide["x"], *weights, *rest, activation=case.activation, precision=precision)
    return y, dy.double()


SMALL = Case(T=24, D=140, F=40, E=3, K=2)
TINY = Case(T=10, D=40, F=20, E=2, K=2)
CASES = [
    SMALL,
    replace(SMALL, routing="empty_middle", activation="relu2", recompute="hidden"),
    replace(SMALL, T=20, D=97, F=47, E=5, routing="ragged", activation="geglu", dtype=torch.bfloat16),
    replace(SMALL, T=7, D=70, F=140, E=2, K=1, routing="one", dtype=torch.float16),
]


@pytest.mark.parametrize(
    "case, precision",
    [
        pytest.param(case, precision, marks=() if (i + j) % 4 == 0 else pytest.mark.full, id=f"{case}-{precision}")
        for i, case in enumerate(CASES)
        for j, precision in enumerate(FORMATS)
    ],
)
def test_the_ffn_errs_as_rounded_operands_do(case, precision):
    found, rounded = run(case, precision, ours), run(case, precision, in_float64)
    exact = run(case, "native", in_float64)
    for name, value in exact.items():
        price, error = (rms(of[name] - value) / rms(value) for of in (rounded, found))
        # e4m3 keeps three bits after the first, so that rounding alone errs by 2 to 3 % in the mean square
        assert 0.002 < price < 0.15, (name, price)
        assert error <= 2 * price, (name, error, price)
        # sums that are rounded otherwise move an operand to the next 8-bit value now and then
        apart = rms(found[name] - rounded[name]) / rms(value)
        assert apart < (0.02 if case.dtype == torch.float32 else 0.35) * price, (name, apart, price)


def test_no_tokens_and_experts_without_rows():
    case = replace(TINY, T=0)
    found = run(case, "fp8_row", ours)
    assert all(not value.any() for value in found.values())
    found = run(replace(TINY, routing="empty_first"), "fp8_block", ours)
    assert not found["w_up"][0].any() and not found["w_down"][0].any() and found["w_up"][1].any()


@pytest.mark.full
@PRECISIONS
def test_two_runs_are_bitwise_equal_and_recomputing_changes_nothing(precision):
    first = run(TINY, precision, ours)
    for again in (run(TINY, precision, ours), run(replace(TINY, recompute="hidden"), precision, ours)):
        assert all(first[name].equal(value) for name, value in again.items())


def test_x_and_the_pre_activations_are_kept_and_nothing_in_8_bits():
    rows = rows_of(SMALL)
    inputs = {name: tensor.bfloat16().requires_grad_() for name, tensor in inputs_of(SMALL, rows).items()}
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        ours(SMALL, "fp8_block", rows, inputs, None)
    parameters = {t.data_ptr() for t in inputs.values()} - {inputs["x"].data_ptr()}
    floats = [t for place, t in kept.items() if t.is_floating_point() and place not in parameters]
    assert sum(t.nbytes for t in floats) == 2 * SMALL.T * SMALL.D + 4 * len(rows[0]) * SMALL.F


def test_launches(launches):
    rows = rows_of(TINY)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(TINY, rows).items()}
    launches.clear()
    y, _ = ours(TINY, "fp8_row", rows, inputs, None)
    forward = [name for name in launches if not name.startswith("plan")]
    assert forward == [
        *("quantize_rows_kernel", "quantize_weight_kernel", "quantize_weight_kernel", "fp8_rows_kernel"),
        *("activate_quantize_kernel", "quantize_weight_kernel", "fp8_rows_kernel", "combine_fwd_kernel"),
    ]
    launches.clear()
    y.sum().backward()
    assert launches == [
        *("quantize_rows_kernel", "quantize_weight_kernel", "fp8_rows_kernel", "activate_bwd_quantize_kernel"),
        *("w_down_bwd_kernel", "w_up_bwd_kernel", "quantize_weight_kernel", "fp8_rows_kernel"),
        *("combine_fwd_kernel", "row_weight_bwd_kernel"),
    ]


@pytest.mark.full
def test_compiles_as_one_graph():
    rows = rows_of(SMALL)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(SMALL, rows).items()}
    plan = routing_plan(rows[0], rows[1], rows[2], num_experts=SMALL.E)
    weights = (inputs["w_gate"], inputs["w_up"], inputs["w_down"])

    def layer(x: Tensor) -> Tensor:
        return ffn.planned_ffn(x, Weights(*weights), inputs["weight"], plan, precision="fp8_row")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for function in (layer, compiled):
        function(inputs["x"]).sum().backward()
    y = layer(inputs["x"])
    assert compiled(inputs["x"]).equal(y)


def test_meta_tensors_give_shapes_without_data():
    rows = rows_of(SMALL)
    inputs = {name: tensor.to("meta").requires_grad_() for name, tensor in inputs_of(SMALL, rows).items()}
    y, _ = ours(SMALL, "fp8_row", tuple(t.to("meta") for t in rows), inputs, None)
    y.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs.values())


def test_what_it_cannot_do_is_refused_by_name():
    rows = rows_of(SMALL)
    inputs = inputs_of(replace(SMALL, biased=True), rows)
    plan = routing_plan(rows[0], rows[1], rows[2], num_experts=SMALL.E)
    weights = Weights(*(inputs[name] for name in ("w_gate", "w_up", "w_down")))
    arguments = (inputs["x"], weights, inputs["weight"], plan)
    with pytest.raises(ValueError, match="weight_on='output'"):
        ffn.planned_ffn(*arguments, precision="fp8_row", weight_on="input")
    with pytest.raises(ValueError, match="unknown: use 'native' or one of fp8_row, fp8_block"):
        ffn.planned_ffn(*arguments, precision="fp4")
    biased = weights._replace(b_gate_EF=inputs["b_gate"], b_up_EF=inputs["b_up"], b_down_ED=inputs["b_down"])
    with pytest.raises(ValueError, match="takes no biases"):
        ffn.planned_ffn(inputs["x"], biased, *arguments[2:], precision="fp8_block")


@pytest.mark.parametrize(
    "target, dtype", [("sm_89", FN), ("sm_90", FN), ("sm_100", FN), ("sm_120", FN), ("gfx942", FNUZ), ("gfx950", FN)]
)
def test_each_machine_has_its_8_bit_type(target, dtype):
    assert formats.fp8_dtype(target) == dtype
    assert (
        formats.constants(dtype) == {"LIMIT": 448.0, "LEAST": 2**-9}
        if dtype == FN
        else {"LIMIT": 240.0, "LEAST": 2**-10}
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "gfx90a"])
def test_a_machine_without_8_bit_products_is_refused_by_name(target):
    with pytest.raises(ValueError, match=f"{target} has none: use precision='native'"):
        formats.fp8_dtype(target)


@pytest.mark.full
@PRECISIONS
def test_the_ffn_in_the_type_of_gfx942(precision, monkeypatch):
    monkeypatch.setattr(low, "fp8_dtype", lambda target: FNUZ)
    monkeypatch.setattr(reference.rounded, "__kwdefaults__", {"weight": False, "dtype": FNUZ})
    test_the_ffn_errs_as_rounded_operands_do(SMALL, precision)


BUGS = {
    "values are cut instead of rounded": ("quantize.py", "bits + 0x7FFFF + ((bits >> 20) & 1)", "bits"),
    "the scale of the weight is forgotten": (
        "product.py",
        "acc *= a_scale[:, None] * b_scale[None, :]",
        "acc *= a_scale[:, None]",
    ),
    "every block has the first block's scale": ("product.py", "block = start // SCALE_BLOCK", "block = 0"),
    "every segment is the first": (
        "product.py",
        "b_ptr += (expert * SEGMENTS + segment) * (N * K)",
        "b_ptr += expert * SEGMENTS * (N * K)",
    ),
    "dgate is not weighted": ("activation.py", "dgate * weight[:, None]", "dgate"),
    "ds is of the weighted hidden rows": (
        "activation.py",
        "dweight = tl.sum(dhidden * hidden, axis=1)",
        "dweight = tl.sum(dhidden * hidden * weight[:, None], axis=1)",
    ),
    "dgate is scaled by its own maximum, and the scale is dup's": (
        "activation.py",
        "            largest = tl.maximum(largest, tl.max(magnitude(dgate), axis=1))\n        largest = tl.maximum(largest,",
        "            pass\n        largest = tl.maximum(largest,",
    ),
    "the second weight of a sum is the first again": (
        "quantize.py",
        "            sources[-1],\n",
        "            sources[0],\n",
    ),
}


@pytest.fixture
def check_copy(tmp_path, monkeypatch):
    """Run the criterion above with a copy of the package's operator, with one replacement made in one of its files."""

    def run_copy(name: str, file: str = "", old: str = "", new: str = "") -> None:
        (tmp_path / name).mkdir()
        for path in Path(low.__file__).parent.glob("*.py"):
            text = path.read_text().replace("moe_triton.low_precision", name).replace("moe_triton::", f"{name}::")
            if path.name == file:
                assert old in text, f"{file} has no {old!r} any more"
                text = text.replace(old, new)
            (tmp_path / name / path.name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(ffn, "fp8_ffn", importlib.import_module(name).fp8_ffn)
        for precision in FORMATS:
            test_the_ffn_errs_as_rounded_operands_do(SMALL, precision)

    yield run_copy
    for module in [module for module in sys.modules if module.startswith("low_mutant")]:
        del sys.modules[module]


@pytest.mark.full
def test_an_unchanged_copy_passes(check_copy):
    check_copy("low_mutant")


@pytest.mark.full
@pytest.mark.parametrize("index", range(len(BUGS)), ids=list(BUGS))
def test_a_bug_is_noticed(check_copy, index):
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        check_copy(f"low_mutant_{index}", *list(BUGS.values())[index])
    assert "any more" not in str(caught.value)
