"""Compiling every launch of real wrapper code for a GPU that is not there, and reading what the compiler made of it.

A stand-in driver takes the place of triton's: wrappers run as they are, on CPU tensors; each launch is compiled for the
named target, its grid and launch options are recorded, and nothing is executed. So a wrong grid, signature, stride or
constexpr fails here. What this proves: it compiles, it fits into shared memory, it uses the matrix unit, nothing spills.
What it does not: values (the interpreter does that) and times.

The process must not have TRITON_INTERPRET set: triton reads it when kernels are decorated.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import moe_triton
from moe_triton.compile_case import CompileCase
from moe_triton.runtime import INTERPRETING
from moe_triton.targets import TARGETS, Target

SHAPES = {"aligned": (512, 256), "unaligned": (97, 47)}
"""D and F of the gate: multiples of 16, for which triton specialises, and not."""


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled instead."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared: int
    """Bytes of shared memory per block."""
    constants: dict[str, Any]
    """Compile-time values by parameter name."""
    asm: Any = field(repr=False)
    """Text or bytes of every stage of the compiler by name: ttir, ptx, cubin, amdgcn, ..."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the compiler made of one launch on one target."""

    target: str
    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    shared: int
    """Bytes of shared memory per block."""
    registers: int
    """Per thread."""
    spills: int
    """Bytes per thread that are stored to memory because registers ran out (gfx942: registers, not bytes)."""
    matrix: dict[str, int]
    """Matrix instructions by kind, those that occur."""
    bulk_copies: int
    """Instructions that copy a box of a tensor by descriptor (TMA)."""
    gemm: bool
    """Whether the kernel has a tl.dot at all."""

    @property
    def height(self) -> int:
        """BLOCK_M, the rows of a tile; 0 for a kernel without one."""
        return int(self.constants.get("BLOCK_M", 0))

    def problems(self) -> list[str]:
        """What forbids the launch, or makes it slow; empty if nothing does."""
        limit = TARGETS[self.target]
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.shared > limit.shared:
            found.append(f"needs {self.shared} bytes of shared memory, the limit is {limit.shared}")
        wanted = limit.matrix if self.height >= 64 else limit.small_matrix
        if self.gemm and not self.matrix:
            found.append("has a tl.dot but no matrix instruction")
        elif self.gemm and self.height >= 64 and wanted not in self.matrix:
            found.append(f"has no {wanted} but {', '.join(self.matrix)} with tiles of {self.height} rows")
        if self.constants.get("TMA") and not self.bulk_copies:
            found.append(f"has TMA but no {BULK_COPY}")
        return [f"{self.kernel} on {self.target}, {self.constants}: {problem}" for problem in found]


class StandInDriver:
    """Implements what triton asks of a driver, for a device that does not exist."""

    compile_only = True

    def __init__(self, target: Target, launches: list[Launch], enforce_shared: bool) -> None:
        self.target, self.launches = target, launches
        self.max_shared = target.shared if enforce_shared else 1 << 30
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_current_device(self) -> str:
        # triton keeps compiled kernels by device; the target's name keeps those of different targets apart
        return f"compile-only:{self.target.name}:{self.max_shared}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": self.max_shared, "multiprocessor_count": self.target.multiprocessors}

    def load_binary(self, name: str, kernel: Any, shared: int, device: Any) -> tuple[object, int, int, int, int]:
        return object(), 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        options = {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages, "shared": metadata.shared}

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
            # a compiled kernel keeps its first launcher for good, so the list must be looked up now
            current: Any = driver.active
            kernels = source.fn.device_caches[current.get_current_device()][0].values()
            asm = next(kernel.asm for kernel in kernels if kernel.metadata is metadata)
            grid = (grid_x, grid_y, grid_z)
            current.launches.append(Launch(metadata.name, grid, constants=constants, asm=asm, **options))

        return launch

    def get_benchmarker(self) -> Any:
        # what triton's autotuner times with: every configuration is compiled, and all take the same time
        return lambda fn, quantiles=None, **_: (fn(), [1.0] * len(quantiles) if quantiles else 1.0)[1]

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def compiling(target: str, *, enforce_shared: bool = False) -> Iterator[list[Launch]]:
    """Inside, launches are compiled for `target` and recorded in the list that this gives, and none is executed.

    enforce_shared raises triton's OutOfResources, as the real driver would, for a kernel over the shared-memory limit.
    """
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing is compiled: compile in a process without it")
    launches: list[Launch] = []
    before = driver._active
    driver.set_active(StandInDriver(TARGETS[target], launches, enforce_shared))  # pyright: ignore[reportArgumentType]
    try:
        yield launches
    finally:
        driver._active = before


MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
BULK_COPY = "cp.async.bulk.tensor"
_NVIDIA_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


def facts(launch: Launch, target: str) -> Facts:
    """Registers, spills, shared memory and matrix instructions of a compiled launch."""
    if "ptx" in launch.asm:
        text = launch.asm["ptx"]
        registers, spills = _resources(launch.asm["cubin"], text)
    else:
        text = launch.asm["amdgcn"]
        registers, spills = (_number(text, rf"\.{name}:\s+(\d+)") for name in ("vgpr_count", "vgpr_spill_count"))
    counts = {name: text.count(name) for name in MATRIX_INSTRUCTIONS}
    return Facts(
        target=target,
        kernel=launch.kernel,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        constants=launch.constants,
        shared=launch.shared,
        registers=registers,
        spills=spills,
        matrix={name: count for name, count in counts.items() if count},
        bulk_copies=text.count(BULK_COPY),
        gemm="tt.dot" in launch.asm["ttir"],
    )


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"the compiler's output has no {pattern}"
    return int(match[1])


@cache
def _resources(cubin: bytes, ptx: str) -> tuple[int, int]:
    """(registers per thread, bytes of spill stores). A binary without a stack has no spills; with one, the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(str(_NVIDIA_TOOLS / "cuobjdump"), "-res-usage", str(path)).stdout
    return _number(usage, r"REG:(\d+)"), assembled(ptx)[1] if _number(usage, r"STACK:(\d+)") else 0


def assembled(ptx: str) -> tuple[int, int]:
    """(registers per thread, bytes of spill stores) that the wheel's own assembler reports: exact, and slow."""
    arch = re.search(r"\.target (\w+)", ptx)
    assert arch is not None
    # the wheel has two assemblers: from sm_100 on, triton takes the newer one
    tool = _NVIDIA_TOOLS / ("ptxas-blackwell" if int(re.sub(r"\D", "", arch[1])) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        report = _run(str(tool), "-v", f"-arch={arch[1]}", str(source), "-o", str(Path(folder, "kernel.cubin"))).stderr
    return _number(report, r"Used (\d+) registers"), _number(report, r"(\d+) bytes spill stores")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr}")
    return result


def compile_case(case: CompileCase, target: str, D: int, F: int, dtype: torch.dtype = torch.bfloat16) -> list[Facts]:
    """Run a case through the stand-in driver: what was compiled, one entry for each different launch.

    Raises AssertionError if the case launches nothing, or no matrix product where it promises one.
    """
    with compiling(target) as launches:
        case.run(dtype, D, F)
    assert launches, f"{case.name} launches no kernel"
    distinct = {(launch.kernel, id(launch.asm)): launch for launch in launches}
    result = [facts(launch, target) for launch in distinct.values()]
    assert any(fact.gemm for fact in result) or not case.gemm, f"{case.name} launches no matrix product"
    return result


def all_cases() -> dict[str, list[CompileCase]]:
    """Module name -> its compile cases, of every operator module in this package."""
    found: dict[str, list[CompileCase]] = {}
    for info in pkgutil.iter_modules(moe_triton.__path__):
        module = importlib.import_module(f"moe_triton.{info.name}")
        if hasattr(module, "compile_cases"):
            found[info.name] = module.compile_cases()
    return found
