"""What the full compile gate compiles: every case of every operator, with each row of the tuning table that it can meet.

A job is one call of a public function under the compile-only driver, with each of its operators forced to one of its rows.
Jobs are independent, so they run in one process per core; triton's cache on disk spares a second run the compiler, until
a kernel's source or triton changes.
"""

import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from moe_triton import tuning
from moe_triton.compile_only import SHAPES, CompileCase, all_cases, compiling, facts
from moe_triton.tuning import Row

CASES: dict[str, CompileCase] = {
    f"{module}-{case.name}": case for module, cases in all_cases().items() for case in cases
}
GATE_SHAPES = {**SHAPES, "ragged": (1000, 488)}
"""Ragged: aligned, but no multiple of a tile."""
HEIGHTS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Job:
    """One call of one case."""

    case: str
    target: str
    shape: str
    height: int = 0
    """BLOCK_M of the row tiles; 0 for a case whose operators have no rows in the table."""
    n: int = 0
    """Every operator takes the n-th of its rows; one that has fewer takes what it would without being forced."""

    def __str__(self) -> str:
        return f"{self.case}-{self.target}-{self.shape}-{self.height}-{self.n}"

    def forced(self) -> dict[str, Row]:
        """The row that each operator is forced to."""
        rows = {op: rows_at(op, self.target, self.height, self.shape) for op in CASES[self.case].ops}
        return {op: found[self.n] for op, found in rows.items() if self.n < len(found)}

    def rows(self) -> Iterator[tuple[str, str, str, int]]:
        """(case, target, the row's reason, height) of every row that is forced."""
        for op, row in self.forced().items():
            yield self.case, self.target, f"{op}: {row}", self.height


def rows_at(op: str, target: str, height: int, shape: str) -> list[Row]:
    """Rows of the table that an operator may be launched with at this height of row tiles, by this kind of shape."""
    if op in ("w_down_bwd", "w_up_bwd") and height != 128:  # tiles of weights: one height, whatever that of rows
        return []
    aligned = shape != "unaligned"
    return [row for row in tuning.rows_for(op, target) if height in row.heights and row.aligned <= aligned]


def _jobs() -> Iterator[Job]:
    for name, case in CASES.items():
        shapes = GATE_SHAPES if name == "ffn-swiglu" else SHAPES
        heights = (case.height,) if case.height or not case.ops else HEIGHTS
        for target in case.targets:
            for height in heights:
                for shape in shapes:
                    counts = [len(rows_at(op, target, height, shape)) for op in case.ops]
                    for n in range(max(counts) if counts else 1):
                        yield Job(name, target, shape, height, n)


JOBS: tuple[Job, ...] = tuple(_jobs())


def problems_of(job: Job) -> list[str]:
    """What is wrong with any kernel of a job: spills, shared memory, instructions, or a wrapper that ignores the table."""
    case, chosen, launches = CASES[job.case], job.forced(), []
    with ExitStack() as stack:
        if job.height:
            stack.enter_context(tuning.forced("tile_height", {"BLOCK_M": job.height}))
        for op, row in chosen.items():
            stack.enter_context(tuning.forced(op, {"BLOCK_M": job.height, **row.config}))
        launches = stack.enter_context(compiling(job.target))
        case.run(torch.bfloat16, *GATE_SHAPES[job.shape])
    distinct = {(launch.kernel, id(launch.asm)): launch for launch in launches}.values()
    found = [problem for launch in distinct for problem in facts(launch, job.target).problems()]
    for op, row in chosen.items():
        tile = {"BLOCK_M": job.height, **{name: value for name, value in row.config.items() if name.isupper()}}
        of_op = [launch for launch in distinct if re.sub(r"(_fwd)?_kernel$", "", launch.kernel) == op]
        if not of_op or any(not tile.items() <= launch.constants.items() for launch in of_op):
            found.append(f"{op} on {job.target} does not ask the table: {row.reason}")
    if not any("tt.dot" in launch.asm["ttir"] for launch in launches) and case.gemm:
        found.append(f"{job} launches no matrix product")
    return found


def _guarded(job: Job) -> list[str]:
    try:
        return problems_of(job)
    except Exception as error:  # a kernel that does not compile is a result of its job, not the end of all
        return [f"{job}: {type(error).__name__}: {error}"]


def compile_all(jobs: Sequence[Job]) -> dict[Job, list[str]]:
    """Problems of every job, from one process per core."""
    workers = min(os.cpu_count() or 1, max(len(jobs), 1))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(_guarded, jobs, chunksize=2), strict=True))
