"""The compile gate, without a GPU: every kernel, through its real wrapper, against the limits of four architectures.

Each operator module's `compile_cases()` run on CPU tensors under a stand-in driver that compiles and does not launch. A
launch must spill nothing, fit into shared memory, and use the matrix unit of its architecture where it multiplies. First,
toy kernels that must pass and toys that must fail show that the gate itself can tell; what it reads is compared with
another tool's reading of the same binary. Times and values are not looked at: they need a GPU and the interpreter.
"""

import os
import re
import subprocess
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set, so triton compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from moe_triton import plan, roofline, tuning
from moe_triton.compile_only import _NVIDIA_TOOLS, SHAPES, CompileCase, all_cases, compile_case, compiling, facts
from moe_triton.targets import TARGETS, nearest

CASES = [(module, case) for module, cases in all_cases().items() for case in cases]
IDS = [f"{module}-{case.name}" for module, case in CASES]
GATE_SHAPES = {**SHAPES, "ragged": (1000, 488)}
"""Ragged: aligned, but no multiple of a tile."""

# What the default suite compiles; the marker `full` has everything else.
SLICE = (
    ("ffn-swiglu", "sm_90", "aligned"),
    ("ffn-swiglu", "gfx942", "unaligned"),
    ("block_sparse-block_128", "sm_100", "aligned"),
)


# ------------------------------------------------------------------------------------------------------- toys


@triton.jit
def toy_fwd_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c = a·b."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = start + k < K
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :], mask=(m[:, None] < M) & in_k[None, :], other=0)
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :], mask=(n[None, :] < N) & in_k[:, None], other=0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


def toy(M: int, N: int, K: int, warps: int = 8, stages: int = 3, grid: int = 1, precision: str = "tf32") -> CompileCase:
    def run(dtype: torch.dtype, D: int, F: int) -> None:
        a, b, c = torch.empty(64, D, dtype=dtype), torch.empty(D, F, dtype=dtype), torch.empty(64, F, dtype=dtype)
        options = {"num_warps": warps, "num_stages": stages}
        toy_fwd_kernel[(grid, 2)](a, b, c, 64, F, D, M, N, K, precision, **options)

    return CompileCase("toy", True, run)


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_kernel_passes_on_every_target(target):
    (fact,) = compile_case(toy(64, 64, 32, stages=2, grid=5), target, *SHAPES["aligned"])
    assert fact.problems() == []
    assert fact.kernel == "toy_fwd_kernel" and fact.grid == (5, 2, 1) and fact.num_warps == 8
    assert fact.constants["BLOCK_M"] == 64 and fact.gemm
    # each operand has 64 × 32 elements of two bytes, and there is at least one copy of both
    assert 2 * 64 * 32 * 2 <= fact.shared <= 5 * 2 * 64 * 32 * 2
    assert list(fact.matrix) == [TARGETS[target].matrix]


def test_tiles_of_16_rows_use_the_small_matrix_unit():
    (fact,) = compile_case(toy(16, 64, 32, warps=4), "sm_90", *SHAPES["aligned"])
    assert list(fact.matrix) == ["mma.sync"] and fact.problems() == []


def test_too_much_shared_memory_fails_and_the_real_drivers_error_can_be_had():
    case = toy(128, 128, 64, stages=4)
    (fact,) = compile_case(case, "gfx942", *SHAPES["aligned"])
    assert re.search(r"needs \d+ bytes of shared memory, the limit is 65536", " ".join(fact.problems()))
    with pytest.raises(OutOfResources), compiling("gfx942", enforce_shared=True):
        case.run(torch.bfloat16, *SHAPES["aligned"])


def test_spills_fail():
    (fact,) = compile_case(toy(128, 256, 16, warps=4), "sm_80", *SHAPES["aligned"])
    assert fact.spills > 100 and any("spills" in problem for problem in fact.problems())


def test_a_product_without_matrix_unit_fails():
    (fact,) = compile_case(toy(32, 32, 16, warps=4, precision="ieee"), "sm_90", *SHAPES["aligned"], dtype=torch.float32)
    assert any("no matrix instruction" in problem for problem in fact.problems())


def test_a_tall_tile_on_the_small_matrix_unit_fails():
    (fact,) = compile_case(toy(16, 64, 32, warps=4), "sm_90", *SHAPES["aligned"])
    tall = replace(fact, constants={**fact.constants, "BLOCK_M": 64})
    assert any("has no wgmma.mma_async but mma.sync" in problem for problem in tall.problems())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_registers_are_those_of_the_binary(target, tmp_path):
    with compiling(target) as launches:
        toy(64, 64, 32, stages=2).run(torch.bfloat16, *SHAPES["aligned"])
    path = tmp_path / "kernel.cubin"
    path.write_bytes(launches[0].asm["cubin"])
    usage = subprocess.run(
        [str(_NVIDIA_TOOLS / "cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
    )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    fact = facts(launches[0], target)
    assert found is not None and (int(found[1]), int(found[2])) == (fact.registers, fact.spills)


def test_a_wrong_argument_fails_as_on_a_gpu():
    a = torch.empty(64, 64, dtype=torch.bfloat16)
    with compiling("sm_90"), pytest.raises(TypeError, match="BLOCK_K"):
        toy_fwd_kernel[(1, 1)](a, a, a, 64, 64, 64, BLOCK_M=64, BLOCK_N=64)


def test_a_second_driver_records_its_own_launches_and_the_first_is_put_back():
    before = driver._active
    for _ in range(2):
        with compiling("sm_90") as launches:
            toy(64, 64, 32, stages=2).run(torch.bfloat16, *SHAPES["aligned"])
        assert len(launches) == 1
    assert driver._active is before


def test_a_case_that_launches_nothing_fails():
    with pytest.raises(AssertionError, match="launches no kernel"):
        compile_case(CompileCase("nothing", False, lambda *_: None), "sm_90", 16, 16)


# ------------------------------------------------------------------------------------------------------- the gate


def check(module: str, case: CompileCase, target: str, shape: str) -> None:
    problems = [problem for fact in compile_case(case, target, *GATE_SHAPES[shape]) for problem in fact.problems()]
    assert not problems, "\n".join([f"{module}, {case.name}, {shape}:", *problems])


def test_every_module_with_kernels_has_cases():
    assert {"ffn", "block_sparse"} <= {module for module, _ in CASES}
    assert len(set(IDS)) == len(IDS)
    assert {entry[0] for entry in SLICE} <= set(IDS)


@pytest.mark.parametrize("name, target, shape", SLICE)
def test_slice(name, target, shape):
    module, case = CASES[IDS.index(name)]
    check(module, case, target, shape)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module, case", CASES, ids=IDS)
def test_every_case(module, case, target, shape):
    if target not in case.targets:
        pytest.skip(f"{case.name} is refused on {target}")
    check(module, case, target, shape)


def rows_at(op: str, target: str, height: int, shape: str) -> list[tuning.Row]:
    """Rows of the table that an operator may be launched with at this height of row tiles, by either kind of shape."""
    over_rows = op in ("w_down_bwd", "w_up_bwd")  # their tiles are of weights: one height, whatever that of rows
    if over_rows and height != 128:
        return []
    return [
        row for row in tuning.rows_for(op, target) if height in row.heights and row.aligned == (shape != "unaligned")
    ]


def rounds() -> list[tuple[str, int, str, int]]:
    """(target, height, shape, n): in round n every operator is forced to the n-th of its rows, so that each is compiled."""
    return [
        (target, height, shape, n)
        for target in TARGETS
        for height in (128, 64, 32, 16)
        for shape in GATE_SHAPES
        for n in range(max(len(rows_at(op, target, height, shape)) for op in tuning.OPS))
    ]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target, height, shape, n", rounds())
def test_every_row_of_the_tuning_table(monkeypatch, target, height, shape, n):
    case = CASES[IDS.index("ffn-swiglu")][1]
    chosen = {op: rows_at(op, target, height, shape)[n:] for op in tuning.OPS}
    monkeypatch.setattr(plan, "tile_rows", lambda *_: height)
    with ExitStack() as stack:
        for op, rows in chosen.items():
            if rows:
                stack.enter_context(tuning.forced(op, {"BLOCK_M": height, **rows[0].config}))
        launches = stack.enter_context(compiling(target))
        case.run(torch.bfloat16, *GATE_SHAPES[shape])
    compiled = {re.sub(r"_(fwd_)?kernel$", "", launch.kernel): launch for launch in launches}
    problems = []
    for op, rows in chosen.items():
        if rows:
            tile = {name: value for name, value in rows[0].config.items() if name.isupper()}
            assert {"BLOCK_M": height, **tile}.items() <= compiled[op].constants.items(), f"{op} does not ask the table"
            problems += facts(compiled[op], target).problems()
    assert not problems, "\n".join(problems)


# ------------------------------------------------------------------------------------------- the table and the model


def test_launches_have_the_tiles_that_the_roofline_counts():
    """Grids of the real wrappers on sm_90, against the model's tiles for the same rows per expert."""
    case = CASES[IDS.index("ffn-swiglu")][1]
    D, F = SHAPES["aligned"]
    with compiling("sm_90") as launches:
        case.run(torch.bfloat16, D, F)
    grids = {re.sub(r"_(fwd_)?kernel$", "", launch.kernel): launch.grid[0] for launch in launches}
    E = grids["plan_schedule"] - 1  # a program per expert, and one for what is left
    rows = 2048
    for kernel in roofline.predict(roofline.Shape(rows // 2, D, F, E, 2), roofline.MACHINES["h100"]):
        if not kernel.config:
            continue
        # the host's bound on row tiles holds for any routing: at most one more per expert than the model's
        columns = -(-(D if kernel.name in ("down", "input_bwd") else F) // kernel.config["BLOCK_N"])
        slack = 0 if kernel.name.startswith("w_") else E * columns
        assert kernel.tiles <= grids[kernel.name] <= kernel.tiles + slack, kernel.name


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_120", "sm_103", "gfx950"])
@pytest.mark.parametrize("op", tuning.OPS)
def test_every_size_has_a_row(op, target):
    for height in (16, 32, 64, 128):
        for D, F in ((2048, 1024), (64, 32), (97, 47), (2880, 2880), (1, 1), (8192, 16384)):
            config = tuning.pick(op, rows_per_expert=height, D=D, F=F, dtype=torch.bfloat16, target=target)
            assert config["BLOCK_M"] == (128 if op in ("w_down_bwd", "w_up_bwd") else height)
            assert {"BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages"} <= set(config)
            assert ("SLICES" in config) == (op == "hidden_bwd")


def test_every_row_of_the_table_gives_its_reason_and_is_reachable():
    for row in tuning.TABLE:
        assert row.reason and set(row.targets) <= set(TARGETS) and set(row.ops) <= set(tuning.OPS)
    for op in tuning.OPS:
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


def test_tuning_keeps_the_fastest_of_at_most_eight_and_never_measures_a_bucket_twice(tmp_path, monkeypatch):
    file, measured = tmp_path / "tuned.json", []
    where = {"D": 2048, "F": 1024, "dtype": torch.bfloat16, "target": "sm_90"}

    def measure(run) -> float:
        config = tuning.pick("down", rows_per_expert=500, **where)
        measured.append(config)
        return abs(config["num_stages"] - 4) + config["BLOCK_N"] / 1e4

    best = tuning.tune("down", lambda: None, measure, file, rows_per_expert=500, **where)
    assert 2 <= len(measured) <= tuning.MAX_CANDIDATES and best["num_stages"] == 4
    assert tuning.pick("down", rows_per_expert=500, **where) != best  # opt-in
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(file))
    assert tuning.pick("down", rows_per_expert=400, **where) == best  # the same bucket
    assert tuning.pick("down", rows_per_expert=600, **where) != best
    count = len(measured)
    assert tuning.tune("down", lambda: None, measure, file, rows_per_expert=511, **where) == best
    assert len(measured) == count
