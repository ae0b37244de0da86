"""Stages of scripts/gpu_check about time: the machine's rates, layers beside other layers, each kernel, launch settings.

In a rehearsal each time is a second by definition.
"""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gpu_layers
import torch
import triton
from gpu_run import ROUTINGS, Check, Item, Json

from moe_triton import autotune, measure, roofline, tuning
from moe_triton.down import down
from moe_triton.plan import routing_plan
from moe_triton.prediction import predict
from moe_triton.roofline import GRID, Machine, Shape
from moe_triton.tiles import Weights


def facts(check: Check) -> Iterator[Item]:
    """The machine, and the two rates that its floors are made of."""

    def machine() -> Json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        if check.rehearse:
            return versions
        properties = torch.cuda.get_device_properties(0)
        return {
            **versions,
            "cuda": torch.version.cuda or torch.version.hip,
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }

    def rates() -> Json:
        n = 64 if check.rehearse else 8192
        a, b = (torch.randn(n, n, device=check.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty(n * n * 8, device=check.device, dtype=torch.float32)
        target = torch.empty_like(source)
        times = check.times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
        return {
            "flops": 2 * n**3 / times["product"].median,
            "bandwidth": 2 * source.numel() * 4 / times["copy"].median,
        }

    yield "machine", machine
    yield "rates", rates


def machine_of(check: Check) -> Machine:
    """The nearest chip of the roofline's table, with the two rates that were measured here."""
    name = next((name for name in roofline.MACHINES if name in check.key().lower()), "h100")
    rates = [line for line in check.latest() if line["item"] == "rates" and line["ok"]]
    if not rates or check.rehearse:
        return roofline.MACHINES[name]
    return replace(roofline.MACHINES[name], flops=rates[-1]["flops"], bandwidth=rates[-1]["bandwidth"])


def bench(check: Check) -> Iterator[Item]:
    """The grid of shapes and routings: ours, torch's grouped_mm layer, and a dense FFN of equal active FLOPs, interleaved."""
    for routing, counts in ROUTINGS.items():
        # a rehearsal has one shape for all layers: one of them shows what another routing does
        for name, shape in list(GRID.items())[: 1 if check.rehearse and routing != "uniform" else None]:
            yield f"{name}, {routing}", _compare(check, shape, counts, ("ours", "grouped_mm", "dense"))


def _compare(
    check: Check, shape: Shape, counts: Callable[[Shape], list[float]], arms: tuple[str, ...]
) -> Callable[[], Json]:
    def run() -> Json:
        used = check.shape(shape)
        inputs = measure.arguments(used, counts(used), check.device)
        dy_TD = torch.randn_like(inputs["x_TD"])
        result: Json = {"shape": [used.T, used.D, used.F, used.E, used.K], "arms": {}, "failed": {}}
        runs: dict[str, Callable[[], object]] = {}
        for name in arms:
            try:
                arm = gpu_layers.ARMS[name](used, inputs)
                backward = gpu_layers.step_of(arm, dy_TD, backward=True)
                result["arms"][name] = {"peak_bytes": _peak_bytes(check, backward)}
            except Exception as error:
                if name == "ours":
                    raise
                result["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            runs[f"{name} forward"] = gpu_layers.step_of(arm, dy_TD, backward=False)
            runs[f"{name} both"] = backward
        for name, times in check.times(runs).items():
            result["arms"][name.split()[0]][name.split()[1]] = list(times)
        machine = machine_of(check)
        predicted = predict(used, machine, counts(used))
        result["floor_seconds"] = sum(roofline.floor_seconds(used, machine))
        result["predicted_seconds"] = sum(kernel.seconds for kernel in predicted)
        result["useful_flops"] = roofline.useful_flops(used)
        return result

    return run


def _peak_bytes(check: Check, run: Callable[[], object]) -> int | None:
    """Memory that one step needs beyond its inputs."""
    if check.rehearse:
        run()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def product(check: Check) -> Iterator[Item]:
    """One grouped product alone, forward, at the sizes at which others have published theirs: `down` and torch's."""

    def one(rows: int) -> Callable[[], Json]:
        def run() -> Json:
            R, K, N, E = (256, 512, 256, 4) if check.rehearse else (rows, 6144, 4096, 256)
            options = {"device": check.device, "dtype": torch.bfloat16}
            hidden, weight = torch.randn(R, K, **options), torch.randn(E, K, N, **options) * K**-0.5
            row, ends = (torch.arange(size, device=check.device) for size in (R + 1, E + 1))
            plan = routing_plan(row[:R], row[:R] * E // R, row, num_experts=E)
            weights = Weights(None, weight.transpose(1, 2), weight)
            offs = (ends[1:] * R // E).to(torch.int32)
            torch_product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
            arms: dict[str, Callable[[], object]] = {
                "ours": lambda: down(hidden, weights, plan),
                "grouped_mm": lambda: torch_product(hidden, weight, offs=offs),
            }
            times = {name: list(found) for name, found in check.times(arms).items()}
            return {"products": times, "flops": 2.0 * R * K * N}

        return run

    for rows in (262144, 524288):
        yield f"{rows} × 6144 × 4096, 256 experts", one(rows)


def peers(check: Check) -> Iterator[Item]:
    """Other projects' layers, where they are installed, beside ours; and ours with everything but x recomputed."""
    for name in ("OLMoE", "Qwen3-30B, 8k", "gpt-oss"):
        arms = ("ours", "ours_recompute", "liger", "scattermoe", "megablocks")
        yield name, _compare(check, GRID[name], roofline.uniform_counts, arms)


def kernels(check: Check) -> Iterator[Item]:
    """The time of every kernel beside what the roofline predicts with the rates of this machine."""

    def one(name: str, shape: Shape) -> Callable[[], Json]:
        def run() -> Json:
            used, machine = check.shape(shape), machine_of(check)
            counts = roofline.uniform_counts(used)
            out = os.environ.get("OUT")
            trace = Path(out, "trace.json") if out and name == "OLMoE" and not check.rehearse else None
            times = measure.kernel_seconds(used, counts, trace)
            predicted = {kernel.name: kernel for kernel in predict(used, machine, counts)}
            return {
                "kernels": {
                    name: {
                        "measured": None if times is None else times.get(name),
                        "predicted": kernel.seconds,
                        "flops": kernel.flops,
                        "bytes": kernel.bytes,
                    }
                    for name, kernel in predicted.items()
                },
                "small": {name: value for name, value in (times or {}).items() if name not in predicted},
            }

        return run

    for name in ("OLMoE", "Qwen3-30B, 8k", "Qwen3-235B", "Qwen3-Next", "gpt-oss"):
        yield name, one(name, GRID[name])


def tune(check: Check) -> Iterator[Item]:
    """Every product under up to 8 configurations, by bucket; the file is what MOE_TRITON_TUNED may name."""
    file = (check.record.parent if check.rehearse else Path(os.environ.get("OUT", check.record.parent))) / "tuned.json"

    def one(shape: Shape, op: str) -> Callable[[], Json]:
        def run() -> Json:
            used = check.shape(shape)
            where = {"ops": [op], "device": check.device}
            if check.rehearse:  # with two settings, since each costs the compiler a second
                return autotune.autotune(used, file, timer=_compiled, most=2, **where)
            return autotune.autotune(used, file, **where)

        return run

    for name in ("OLMoE", "Qwen3-30B, 8k"):
        for op in tuning.OPS[:1] if check.rehearse else tuning.OPS:
            yield f"{name}, {op}", one(GRID[name], op)


def _compiled(run: Callable[[], object]) -> float:
    run()
    return 1.0
