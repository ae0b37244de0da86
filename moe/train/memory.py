"""Memory of the device: what is held, what there is, and the refusal of a run that cannot fit."""

import os
import resource
import sys
from pathlib import Path

import torch

from moe import cost
from moe.config.schema import Run
from moe.errors import ConfigError
from moe.parallel import Ranks

GIB = 2**30


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the device's allocator, or the process's resident set on a CPU."""
    return _peak_resident_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def _peak_resident_bytes() -> int:
    """Of this program alone, where the system says (Linux): getrusage begins with the peak of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: torch.device) -> int:
    """Memory held now: the device's allocator, or the process's resident set (Linux; elsewhere its peak)."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_bytes(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def installed_bytes(device: torch.device) -> int | None:
    """Memory of the device, or of this machine and its container's limit; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # control group, version 2: a number, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return installed
    return min(installed, limit)


def require_memory(run: Run, ranks: Ranks) -> None:
    """Raise ConfigError if parameters, gradients and optimizer state alone exceed what this rank's device has.

    On a CPU, the copy that checkpoints are written from counts too. A lower bound: activations come on top, so a run that
    passes may still run out.
    """
    installed = installed_bytes(ranks.device)
    if installed is None:
        return
    plan = cost.memory_bytes(run, ranks.layout)
    on_host = ranks.device.type == "cpu"
    copy = plan["parameters"] + plan["optimizer"] if on_host and run.checkpoint.asynchronous else 0
    held = plan["parameters"] + plan["gradients"] + plan["optimizer"] + copy
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_host else 1
    if held * sharing > installed:
        together = f" on each of {sharing} ranks" if sharing > 1 else ""
        raise ConfigError(
            f"the parameters ({cost.parameters(run.model).total:,}), their gradients and the optimizer's state need "
            f"{held / GIB:,.1f} GiB{together}, this {ranks.device.type} has {installed / GIB:,.1f} GiB: choose a "
            "smaller model.dim, model.num_layers or model.moe.num_experts, or spread them with parallel.shard, "
            "parallel.expert or parallel.pipeline; moe show prints the plan"
            + (f"; checkpoint.asynchronous=false needs {copy / GIB:,.1f} GiB less" if copy else "")
        )
