"""Energy used by this process's devices since the last look: counters where the machine has them, else a model of it.

Each meter's `read` returns joules since its last `read` (or its making), and says in `grade` and `source` what they are worth.
Processor and memory: RAPL counters, or a model. GPU: zeus where it is installed (extra `energy`), else NVML's counter
through its own library, else the board's limit. Counters are the whole processor's and board's, whoever used them.
"""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from moe.config.schema import Run
from moe.cost.charges import Grade
from moe.cost.rates import IDLE_WATTS_PER_THREAD, WATTS_PER_GIB, board_watts, watts_source
from moe.parallel import Ranks
from moe.train.memory import memory_bytes

GIB = 2**30


class Meter(Protocol):
    """One part of the machine."""

    part: str
    """cpu, memory or gpu."""
    grade: Grade
    source: str

    def read(self) -> float:
        """Joules since the last call."""
        ...


class Counter:
    """A counter of joules that may start again from 0 after `wrap` of them; it must be read once per wrap."""

    def __init__(self, part: str, source: str, count: Callable[[], float], wrap: float = 0.0):
        self.part, self.source, self.count, self.wrap = part, source, count, wrap
        self.grade: Grade = "measured"
        self.last = count()

    def read(self) -> float:
        """Joules since the last call."""
        now = self.count()
        used = now - self.last
        self.last = now
        return used + self.wrap if used < 0 else used


class Integrator:
    """Watts summed over time by the trapezoid rule, for a sensor that only tells power."""

    def __init__(
        self,
        part: str,
        grade: Grade,
        source: str,
        watts: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.part, self.source, self.watts, self.clock = part, source, watts, clock
        self.grade: Grade = grade
        self.last = (clock(), watts())

    def read(self) -> float:
        """Joules since the last call."""
        before, self.last = self.last, (self.clock(), self.watts())
        return (self.last[0] - before[0]) * (self.last[1] + before[1]) / 2


class ProcessorModel:
    """Every thread of this process draws idle power all the time, and its busy power while it computes."""

    part = "cpu"
    grade: Grade = "estimated"

    def __init__(
        self,
        busy_watts: float,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
        busy: Callable[[], float] = time.process_time,
    ):
        idle = min(IDLE_WATTS_PER_THREAD, busy_watts)
        self.source = f"model: {threads} thread(s), {idle:g} W idle, {busy_watts:g} W busy"
        self.idle_watts, self.extra_watts, self.clock, self.busy = idle * threads, busy_watts - idle, clock, busy
        self.last = (clock(), busy())

    def read(self) -> float:
        """Joules since the last call: idle·threads·seconds + (busy - idle)·seconds of processor time."""
        before, self.last = self.last, (self.clock(), self.busy())
        return self.idle_watts * (self.last[0] - before[0]) + self.extra_watts * (self.last[1] - before[1])


# ------------------------------------------------------------------------------------------------------------- RAPL


def rapl(powercap: Path) -> list[Counter]:
    """A counter for every processor package and memory in a powercap tree; empty where there are none to be read.

    Of a zone `intel-rapl:0` only the sub-zone `dram` is taken besides: cores and uncore are in the package already. `psys`
    is the whole platform, packages included, and left out.
    """
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = _text(zone / "name")
        top = zone.name.count(":") == 1
        part = "cpu" if top and name.startswith("package") else "memory" if name == "dram" else ""
        energy, most = zone / "energy_uj", _text(zone / "max_energy_range_uj")
        if part and most.isdigit() and _text(energy).isdigit():
            counters.append(Counter(part, f"RAPL {zone.name} ({name})", _microjoules(energy), int(most) * 1e-6))
    return counters


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text(encoding="ascii")) * 1e-6


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # root only, since 2020 (CVE-2020-8694)
        return ""


# -------------------------------------------------------------------------------------------------------------- GPU


class Nvml:
    """The few calls of NVIDIA's management library that are needed; `library` is the loaded libnvidia-ml."""

    def __init__(self, library: Any, uuid: str):
        self.library = library
        self.device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise OSError(code, f"{name} failed with NVML error {code}")

    def joules(self) -> float:
        """Energy since the driver was loaded; Volta and later."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(millijoules))
        return millijoules.value * 1e-3

    def watts(self) -> float:
        """Power now."""
        milliwatts = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self.device, ctypes.byref(milliwatts))
        return milliwatts.value * 1e-3


def nvml_meter(library: Any, uuid: str) -> Meter | None:
    """The best that NVML gives for a device: its energy counter, its power, or None."""
    try:
        device = Nvml(library, uuid)
    except (OSError, AttributeError):
        return None
    try:
        return Counter("gpu", "NVML energy counter", device.joules)
    except (OSError, AttributeError):
        pass
    try:
        return Integrator("gpu", "estimated", "NVML power, sampled at each row", device.watts)
    except (OSError, AttributeError):
        return None


class Zeus:
    """A GPU through zeus (arXiv 2208.06102), which reads NVIDIA's and AMD's counters."""

    part, source = "gpu", "zeus"
    grade: Grade = "measured"

    def __init__(self, monitor: Any):
        self.monitor = monitor
        monitor.begin_window("moe", sync_execution=False)

    def read(self) -> float:
        """Joules since the last call."""
        used = self.monitor.end_window("moe", sync_execution=False)
        self.monitor.begin_window("moe", sync_execution=False)
        return float(sum(used.gpu_energy.values()))


def _zeus(index: int) -> Meter | None:
    try:
        from zeus.monitor import ZeusMonitor  # extra: energy  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        return Zeus(ZeusMonitor(gpu_indices=[index], cpu_indices=[]))
    except (RuntimeError, ValueError, OSError):  # it is there and cannot measure this machine: accounting stops no run
        return None


def _gpu(device: torch.device) -> Meter | None:
    name = torch.cuda.get_device_name(device)
    meter = _zeus(device.index or 0)
    if meter is None and torch.version.cuda:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            library = None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        meter = nvml_meter(library, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}") if library is not None else None
    watts = board_watts(name)
    if meter is None and watts is not None:
        meter = Integrator("gpu", "assumed", f"{watts:g} W {watts_source(name)}", lambda: watts)
    return meter


# -------------------------------------------------------------------------------------------------------- all of them


def meters(run: Run, ranks: Ranks) -> list[Meter]:
    """The meters of this rank. Where the processor has counters, one rank of each machine reads them for all.

    A GPU of which nothing is known has none, and then the run's energy is not known either.
    """
    found: list[Meter] = []
    counters = rapl(Path(run.cost.powercap)) if run.cost.powercap else []
    if not any(counter.part == "cpu" for counter in counters):
        found.append(ProcessorModel(run.cost.watts_per_thread, torch.get_num_threads()))
    if counters and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        found += counters
    if not any(counter.part == "memory" for counter in counters):
        cpu = torch.device("cpu")
        source = f"model: {WATTS_PER_GIB:.3f} W per GiB of this process"
        found.append(Integrator("memory", "estimated", source, lambda: memory_bytes(cpu) / GIB * WATTS_PER_GIB))
    if ranks.device.type == "cuda":
        gpu = _gpu(ranks.device)
        found += [gpu] if gpu is not None else []
    return found


def read_all(found: Sequence[Meter]) -> dict[str, float | None]:
    """Joules of each part since the last call; None where a counter could not be read, which stops no run."""
    joules: dict[str, float | None] = {}
    for meter in found:
        before = joules.get(meter.part, 0.0)
        try:
            used = meter.read()
        except (OSError, ValueError):
            used = None
        joules[meter.part] = None if used is None or before is None else before + used
    return joules
