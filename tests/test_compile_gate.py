"""The compile gate, without a GPU: every kernel, through its real wrapper, against the limits of four architectures.

Each operator module's `compile_cases()` run on CPU tensors under a stand-in driver that compiles and does not launch. A
launch must spill nothing, fit into shared memory, and use the matrix unit of its architecture where it multiplies. First,
toy kernels that must pass and toys that must fail show that the gate itself can tell; what it reads is compared with
another tool's reading of the same binary. Times and values are not looked at: they need a GPU and the interpreter.
"""

import os
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set, so triton compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from gate_matrix import CASES, JOBS, Job, compile_all, problems_of
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from moe_triton import roofline, tuning
from moe_triton.compile_only import SHAPES, CompileCase, assembled, compile_case, compiling, facts
from moe_triton.prediction import predict
from moe_triton.targets import TARGETS

# What the default suite compiles; the marker `full` has everything else.
SLICE = (
    Job("ffn-swiglu", "sm_90", "aligned", 128),
    Job("ffn-relu2_biased_input", "gfx942", "unaligned", 64),
    Job("block_sparse-block_128", "sm_100", "aligned", 128),
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
def test_registers_and_spills_are_those_that_the_assembler_reports(target):
    with compiling(target) as launches:
        toy(64, 64, 32, stages=2).run(torch.bfloat16, *SHAPES["aligned"])
        if target == "sm_80":
            toy(128, 256, 16, warps=4).run(torch.bfloat16, *SHAPES["aligned"])
    for launch in launches:
        fact = facts(launch, target)
        assert (fact.registers, fact.spills) == assembled(launch.asm["ptx"])


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


def test_every_module_with_kernels_has_cases():
    assert {"ffn-swiglu", "block_sparse-block_128"} <= CASES.keys()
    assert set(SLICE) <= set(JOBS)


def test_the_matrix_has_every_row_at_every_height_on_every_target_for_every_case():
    met = {row for job in JOBS for row in job.rows()}
    for name, case in CASES.items():
        for op in case.ops:
            for target in case.targets:
                for row in tuning.rows_for(op, target):
                    heights = [height for height in row.heights if case.height in (0, height)]
                    assert all((name, target, f"{op}: {row}", height) in met for height in heights), (name, op, row)
    assert {op for case in CASES.values() for op in case.ops} >= {op for row in tuning.TABLE for op in row.ops}


@pytest.mark.parametrize("job", SLICE, ids=str)
def test_slice(job):
    problems = problems_of(job)
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def matrix(request) -> dict[Job, list[str]]:
    """Problems of every job that this run asks for, compiled by one process per core: two to twenty minutes."""
    wanted = [item.callspec.params["job"] for item in request.session.items if "matrix" in item.fixturenames]
    return compile_all(wanted)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_every_case_with_every_row_of_the_tuning_table(matrix, job):
    assert not matrix[job], "\n".join(matrix[job])


# ------------------------------------------------------------------------------------------- the model


def test_launches_have_the_tiles_that_the_roofline_counts():
    """Grids of the real wrappers on sm_90, against the model's tiles for the same rows per expert."""
    case = CASES["ffn-swiglu"]
    D, F = SHAPES["aligned"]
    with compiling("sm_90") as launches:
        case.run(torch.bfloat16, D, F)
    grids = {re.sub(r"_(fwd_)?kernel$", "", launch.kernel): launch.grid[0] for launch in launches}
    E = grids["plan_schedule"] - 1  # a program per expert, and one for what is left
    rows = 2048
    for kernel in predict(roofline.Shape(rows // 2, D, F, E, 2), roofline.MACHINES["h100"]):
        if not kernel.config:
            continue
        # the host's bound on row tiles holds for any routing: at most one more per expert than the model's
        columns = -(-(D if kernel.name in ("down", "input_bwd") else F) // kernel.config["BLOCK_N"])
        slack = 0 if kernel.name.startswith("w_") else E * columns
        assert kernel.tiles <= grids[kernel.name] <= kernel.tiles + slack, kernel.name
