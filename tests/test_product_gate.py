"""The compile gate of the grouped and the 8-bit products beyond their cases in test_compile_gate.py, without a GPU.

Every row of their tables on its own targets; that 8-bit operands reach e4m3 matrix instructions on sm_90, sm_100 and gfx942,
read from the compiler's text; that sm_80 is refused.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set, so triton compiles nothing", allow_module_level=True)

from moe_triton import grouped
from moe_triton.compile_only import SHAPES, compile_case, compiling, facts
from moe_triton.grouped import kernels, settings
from moe_triton.low_precision import FORMATS, compile_cases, formats, product
from moe_triton.low_precision.quantize import Quantized
from moe_triton.plan import RoutingPlan
from moe_triton.targets import TARGETS

FP8_TARGETS = ("sm_90", "sm_100", "gfx942")
# The type is written into the instruction's name, except on sm_100: there a kind stands for all 8-bit floats, the operands'
# types are in a descriptor, and the program's signature tells them.
E4M3 = {
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\.cta_group::\d\.kind::f8f6f4",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8",
}
TYPES = {"sm_90": "f8E4M3FN", "sm_100": "f8E4M3FN", "gfx942": "f8E4M3FNUZ"}


def product_of(precision: str, target: str, height: int, N: int, K: int):
    """Compile the product alone for row tiles of one height; the launch and its facts."""
    form, dtype, E, P = FORMATS[precision], formats.fp8_dtype(target), 4, 4 * height
    K = formats.padded(K)
    a = Quantized(torch.zeros(P, K).to(dtype), torch.zeros(P, form.scales(K)))
    scales = torch.zeros(E, 1, form.weight_rows(N), form.scales(K))
    b = Quantized(torch.zeros(E, 1, N, K).to(dtype), scales)
    index = torch.zeros(P, dtype=torch.int32)
    schedule = torch.zeros(2 * E, 2, dtype=torch.int32)
    plan = RoutingPlan(index, index, index, torch.zeros(E + 1, dtype=torch.int64), index, schedule, height)
    with compiling(target) as launches:
        product.fp8_rows(a, b, plan, form, torch.zeros(0, dtype=torch.bfloat16), gather=True)
    (launch,) = launches
    return launch, facts(launch, target)


@pytest.mark.parametrize("precision, target", [("fp8_row", "sm_90"), ("fp8_block", "sm_100"), ("fp8_row", "gfx942")])
def test_the_product_uses_e4m3_matrix_instructions(precision, target):
    launch, fact = product_of(precision, target, 128, *SHAPES["unaligned"])
    text = launch.asm["ptx" if "ptx" in launch.asm else "amdgcn"]
    assert re.search(E4M3[target], text), f"{target} has {fact.matrix}"
    assert re.search(rf"tt\.dot .*{TYPES[target]}>", launch.asm["ttir"])
    assert not fact.problems()


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize("target", FP8_TARGETS)
@pytest.mark.parametrize("precision", FORMATS)
def test_every_setting_of_the_8_bit_product(precision, target, height, shape):
    launch, fact = product_of(precision, target, height, *SHAPES[shape])
    text = launch.asm["ptx" if "ptx" in launch.asm else "amdgcn"]
    assert re.search(E4M3[target], text), fact.matrix
    assert not fact.problems()


@pytest.mark.full
def test_experts_with_few_rows_get_tiles_that_the_8_bit_instructions_take():
    case = next(case for case in compile_cases() if case.name == "fp8_row_few_rows")
    with compiling("sm_90") as launches:
        case.run(torch.bfloat16, *SHAPES["unaligned"])
    products = [launch for launch in launches if launch.kernel == "fp8_rows_kernel"]
    assert len(products) == 4 and {launch.constants["BLOCK_M"] for launch in products} == {product.LEAST_HEIGHT}
    assert all(re.search(E4M3["sm_90"], launch.asm["ptx"]) for launch in products)


def test_sm_80_is_refused_by_name():
    case = compile_cases()[0]
    assert case.targets == FP8_TARGETS
    with compiling("sm_80"), pytest.raises(ValueError, match="sm_80 has none: use precision='native'"):
        case.run(torch.bfloat16, *SHAPES["aligned"])


# ------------------------------------------------------------------------------------------- grouped products


def test_a_grouped_product_compiles_forward_and_backward():
    found = compile_case(grouped.compile_cases()[0], "sm_90", *SHAPES["unaligned"])
    assert {fact.kernel for fact in found} == {"grouped_rows_kernel", "grouped_inner_kernel"}
    assert not [problem for fact in found for problem in fact.problems()]


def rounds() -> list[tuple[str, str, int, int, str]]:
    """(operator, target, row of the table, height, shape): every row at each of its heights, on what it is for."""
    return [
        (op, target, i, height, shape)
        for op in settings.OPS
        for target in TARGETS
        for i, row in enumerate(settings.rows_for(op, target))
        for height in row.heights
        for shape in SHAPES
        if row.aligned == (shape == "aligned")
    ]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op, target, i, height, shape", rounds())
def test_every_row_of_the_grouped_table(monkeypatch, op, target, i, height, shape):
    row, pick = settings.rows_for(op, target)[i], settings.pick
    forced = {"BLOCK_M": height, **row.config}
    monkeypatch.setattr(settings, "pick", lambda o, **sizes: forced if o == op else pick(o, **sizes))
    (D, F), G, rows = SHAPES[shape], 8, 2048
    a, b = torch.zeros(rows, D, dtype=torch.bfloat16), torch.zeros(G, D, F, dtype=torch.bfloat16)
    ends = torch.arange(1, G + 1, dtype=torch.int32) * (rows // G)
    with compiling(target) as launches:
        if op == "rows":
            grouped.grouped_mm(a, b, offs=ends)
            grouped.grouped_mm(a, b.mT.contiguous().mT, offs=ends)
        else:
            grouped.grouped_mm(a.t(), a, offs=ends)
            grouped.grouped_mm(b.mT, b)
    compiled = [facts(launch, target) for launch in launches]
    assert all(fact.constants["BLOCK_M"] == height for fact in compiled) and len(compiled) == 2
    problems = [problem for fact in compiled for problem in fact.problems()]
    assert not problems, "\n".join(problems)


def test_every_row_of_the_grouped_table_gives_its_reason_and_is_reachable():
    for op in settings.OPS:
        for target in TARGETS:
            rows = settings.rows_for(op, target)
            for i, row in enumerate(rows):
                assert row.reason
                for earlier in rows[:i]:
                    shadows = earlier.aligned <= row.aligned and earlier.columns <= row.columns
                    assert not (shadows and set(row.heights) <= set(earlier.heights)), (op, target, row.reason)


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_120", "gfx950"])
@pytest.mark.parametrize("op", settings.OPS)
def test_every_size_has_a_row(op, target):
    for height in (16, 32, 64, 128):
        for columns in (1, 97, 256, 16384):
            for aligned in (False, True):
                sizes = {"height": height, "columns": columns, "aligned": aligned, "itemsize": 2}
                assert settings.pick(op, target=target, **sizes)["BLOCK_M"] == height


@pytest.mark.parametrize(
    "shape, ragged, wide",
    [
        ((64, 32), None, True),
        ((64, 97), None, False),
        ((64, 32), 0, True),
        ((64, 32), 1, False),
        ((3, 64, 32), None, True),
    ],
)
def test_wide_loads_follow_strides_and_the_ragged_dimension(shape, ragged, wide):
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    assert kernels._wide_loads(tensor, ragged) is wide
    flipped = None if ragged is None else 1 - ragged
    assert kernels._wide_loads(tensor.mT, flipped) is wide
    assert not kernels._wide_loads(tensor[..., 1:], ragged)
