"""The stages of scripts/gpu_check: what only a GPU can show of the kernels, as named items with a result each.

In a rehearsal every shape is small, tensors are on the CPU, launches are compiled only, and each time is a second.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_layers
import torch
import triton

from moe_triton import block_sparse, measure, roofline, tuning
from moe_triton.block_sparse import reference as block_sparse_reference
from moe_triton.compile_only import compiling
from moe_triton.ffn import expert_ffn
from moe_triton.roofline import Machine, Shape
from moe_triton.runtime import target
from moe_triton.targets import TARGETS

ffn_cases: Any = importlib.import_module("ffn_cases")
"""The interpreter's suite: its cases and its criterion, in tests/kernels_interpreted, which scripts/gpu_check puts on the path."""

Json = dict[str, Any]
Item = tuple[str, Callable[[], Json]]

GRID = {
    "OLMoE": Shape(32768, 2048, 1024, 64, 8),
    "Qwen3-30B, 8k": Shape(8192, 2048, 768, 128, 8),
    "Qwen3-30B, 32k": Shape(32768, 2048, 768, 128, 8),
    "Qwen3-235B": Shape(32768, 4096, 1536, 128, 8),
    "SonicMoE's default": Shape(32768, 4096, 1024, 128, 8),
    "Qwen3-Next": Shape(32768, 2048, 512, 512, 10),
    "Mixtral-like": Shape(16384, 4096, 14336, 8, 2),
    "gpt-oss": Shape(32768, 2880, 2880, 32, 4),
}
ROUTINGS: dict[str, Callable[[Shape], list[float]]] = {
    "uniform": roofline.uniform_counts,
    "zipf": roofline.zipf_counts,
    "one empty": lambda shape: [0.0] + [shape.R / (shape.E - 1)] * (shape.E - 1),
    "all to one": lambda shape: [float(shape.R)] + [0.0] * (shape.E - 1),
}
REHEARSED = Shape(256, 512, 256, 4, 2)
"""What every shape becomes in a rehearsal."""


@dataclass
class Check:
    """One run of this script: where it runs, what it has found."""

    rehearse: bool
    device: str
    record: Path
    seconds: float
    """For each stage."""
    retry: bool = False
    """Whether an item that has failed counts as one without a result."""
    lines: list[Json] = field(default_factory=list)

    def shape(self, shape: Shape) -> Shape:
        return REHEARSED if self.rehearse else shape

    def key(self) -> str:
        """What results belong to: results of another device or version are not results of this one."""
        device = "rehearsal" if self.rehearse else torch.cuda.get_device_name()
        return f"{device}, torch {torch.__version__}, triton {triton.__version__}"

    def latest(self) -> list[Json]:
        """The last line of every item on this device, in the order of the items' first lines."""
        mine = {(line["stage"], line["item"]): line for line in self.lines if line["on"] == self.key()}
        return list(mine.values())

    def done(self, stage: str, item: str) -> bool:
        lines = [line for line in self.latest() if (line["stage"], line["item"]) == (stage, item)]
        return bool(lines) and (lines[0]["ok"] or not self.retry)

    def add(self, stage: str, item: str, result: Json) -> None:
        line = {"stage": stage, "item": item, "on": self.key(), **result}
        self.lines.append(line)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def times(self, runs: dict[str, Callable[[], object]]) -> dict[str, measure.Spread]:
        """Interleaved times on the GPU; in a rehearsal each function runs once and takes a second by definition."""
        if not self.rehearse:
            return measure.interleaved(runs)
        for run in runs.values():
            run()
        return {name: measure.spread([1.0]) for name in runs}


# --------------------------------------------------------------------------------------------------------------- facts


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


# -------------------------------------------------------------------------------------------------------------- parity


def parity(check: Check) -> Iterator[Item]:
    """Values and every gradient against float64, by the criterion of the interpreter's suite, at small and at full tiles."""
    cases = parity_cases(check)

    def agrees(case: Any) -> Callable[[], Json]:
        def run() -> Json:
            torch.manual_seed(0)
            with torch.device(check.device):
                ffn_cases.check(case)
            return {}

        return run

    yield "compiling ahead", lambda: _compile_ahead(check, len(cases))
    for name, case in cases.items():
        yield name, agrees(case)
    yield "two runs are bitwise equal", lambda: _repeatable(check)
    yield "rows past 2^31 elements", lambda: _large_offsets(check)
    yield "block-sparse products", lambda: _block_sparse(check)
    yield "torch.compile(fullgraph=True)", lambda: _compiled(check)


def parity_cases(check: Check) -> dict[str, Any]:
    """Full tiles first, then the cases that the interpreter's suite names, then its pairwise covering set."""
    case = ffn_cases.Case
    full = {"T": 1024, "D": 512, "F": 256, "E": 8, "K": 2}
    if check.rehearse:
        return {"full tiles, bfloat16": case(**full, dtype=torch.bfloat16)}
    suite = importlib.import_module("test_ffn")
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return {
        **{f"full tiles, {name}": case(**full, dtype=dtype) for name, dtype in types.items()},
        "ragged, bfloat16": case(T=2048, D=1000, F=488, E=8, K=2, dtype=torch.bfloat16, routing="zipf"),
        "wide, bfloat16": case(T=4096, D=2048, F=1024, E=16, K=2, dtype=torch.bfloat16),
        "unaligned, bfloat16": case(T=2048, D=601, F=353, E=8, K=2, dtype=torch.bfloat16, biased=True),
        **suite.CASES,
        **{str(one): one for one in map(suite.case_of, suite.PAIRS)},
    }


def _compile_ahead(check: Check, num_cases: int) -> Json:
    """Fill triton's cache from several processes, since one would compile for longer than a stage may take."""
    name = target()
    if name not in TARGETS:
        return {"skipped": f"{name} is not a target of the compile-only driver"}
    workers = 1 if check.rehearse else min(os.cpu_count() or 1, num_cases)
    rehearse = ["--rehearse"] if check.rehearse else []
    command = [sys.executable, str(Path(__file__).with_name("gpu_check.py")), *rehearse, "--child", name]
    started = [subprocess.Popen([*command, f"{number}/{workers}"]) for number in range(workers)]
    codes: list[int | str] = []
    deadline = time.monotonic() + 0.6 * check.seconds
    for process in started:
        try:
            codes.append(process.wait(max(deadline - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:  # what is missing is compiled when it is needed
            process.kill()
            codes.append("time is over")
    return {"exit_codes": codes}


def compile_share(check: Check, name: str, share: str) -> None:
    """What one of those processes does: its share of the cases, on CPU tensors, compiled for `name` and not launched."""
    number, workers = map(int, share.split("/"))
    with compiling(name):
        for case in list(parity_cases(check).values())[number::workers]:
            rows = ffn_cases.rows_of(case)
            inputs = ffn_cases.inputs_of(case, rows)
            ffn_cases.results(ffn_cases.kernels, case, rows, inputs, ffn_cases.gradient_of(case))


def _gradients(
    inputs: Json, dy_TD: torch.Tensor, layer: Callable[..., torch.Tensor] = expert_ffn
) -> list[torch.Tensor]:
    leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    y_TD = layer(**inputs)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD)]


def _repeatable(check: Check) -> Json:
    shape = check.shape(Shape(8192, 1024, 512, 32, 4))
    inputs = measure.arguments(shape, roofline.zipf_counts(shape), check.device)
    dy_TD = torch.randn_like(inputs["x_TD"])
    first = _gradients(inputs, dy_TD)
    for _ in range(5):
        same = [torch.equal(a, b) for a, b in zip(first, _gradients(inputs, dy_TD), strict=True)]
        assert check.rehearse or all(same), f"y and gradients that repeat: {same}"
    return {}


def _large_offsets(check: Check) -> Json:
    """The last tokens of a layer whose rows have more than 2^31 elements, against float64 on those tokens alone."""
    shape = check.shape(Shape(1 << 17, 2304, 64, 8, 8))
    inputs = measure.arguments(shape, roofline.uniform_counts(shape), check.device)
    got = _gradients(inputs, torch.ones_like(inputs["x_TD"]).expand(shape.T, shape.D))
    last = slice(shape.T - 64, shape.T)
    rows = inputs["token_R"] >= shape.T - 64
    token, expert = inputs["token_R"][rows] - (shape.T - 64), inputs["expert_R"][rows]
    exact = {name: value.detach().double() for name, value in inputs.items() if name.startswith("w")}
    x = inputs["x_TD"][last].detach().double().requires_grad_()
    y = torch.zeros_like(x)
    for e in range(shape.E):
        which = (expert == e).nonzero().flatten()
        row = x.index_select(0, token[which])
        hidden = torch.nn.functional.silu(row @ exact["w_gate_EDF"][e]) * (row @ exact["w_up_EDF"][e])
        weight = exact["weight_R"][rows][which].unsqueeze(1)
        y = y.index_add(0, token[which], hidden @ exact["w_down_EFD"][e] * weight)
    y.sum().backward()
    errors = {}
    for name, value, wanted in (("y", got[0][last], y.detach()), ("dx", got[1][last], x.grad)):
        assert wanted is not None
        errors[name] = ((value - wanted).norm() / wanted.norm()).item()
        assert check.rehearse or errors[name] < 1e-2, f"relative error of {name} on the last tokens: {errors[name]:.2g}"
    return errors


def _block_sparse(check: Check) -> Json:
    worst = 0.0
    for block in (128,) if check.rehearse else (16, 32, 64, 128):
        with torch.device(check.device):
            topology = block_sparse.from_mask(torch.rand(6, 5) < 0.5, block, (6 * block - 3, 5 * block - 5))
            M, N = topology.shape
            a, b = torch.randn(M, 512).bfloat16(), torch.randn(512, N).bfloat16()
            values = block_sparse.sdd(a, b, topology, backend="triton")
            wanted = block_sparse_reference.sdd(a.double(), b.double(), topology)
            out = block_sparse.dsd(wanted.bfloat16(), topology, b.t().contiguous(), backend="triton")
            wanted_out = block_sparse_reference.dsd(wanted.bfloat16().double(), topology, b.t().double())
        for got, exact in ((values, wanted), (out, wanted_out)):
            worst = max(worst, ((got - exact).norm() / exact.norm()).item())
    assert check.rehearse or worst < 1e-2, f"relative error {worst:.2g}"
    return {"relative_error": worst}


def _compiled(check: Check) -> Json:
    shape = check.shape(Shape(2048, 512, 256, 8, 2))
    inputs = measure.arguments(shape, roofline.uniform_counts(shape), check.device)
    dy_TD = torch.randn_like(inputs["x_TD"])
    # the eager backend traces the same graph and needs no C++ compiler, which not every machine has
    layer = torch.compile(expert_ffn, fullgraph=True, backend="eager")
    eager, traced = _gradients(inputs, dy_TD), _gradients(inputs, dy_TD, layer)
    assert check.rehearse or all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    return {}


# --------------------------------------------------------------------------------------------------------------- races


def races(check: Check) -> Iterator[Item]:
    """compute-sanitizer over one forward and backward in a process of its own, where the tool is there."""

    def sanitize(tool: str) -> Callable[[], Json]:
        def run() -> Json:
            rehearse = ["--rehearse"] if check.rehearse else []
            command = [sys.executable, str(Path(__file__).with_name("gpu_check.py")), *rehearse, "--child", "races"]
            sanitizer = shutil.which("compute-sanitizer")
            if not check.rehearse:
                if sanitizer is None:
                    return {"skipped": "compute-sanitizer is not on the PATH"}
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            result = subprocess.run(command, capture_output=True, text=True, timeout=check.seconds, env=environment)
            assert result.returncode == 0, f"exit code {result.returncode}: {(result.stdout + result.stderr)[-1500:]}"
            return {}

        return run

    for tool in ("memcheck",) if check.rehearse else ("memcheck", "racecheck", "synccheck", "initcheck"):
        yield tool, sanitize(tool)


def awkward_step(check: Check) -> None:
    """What the sanitizer looks at: awkward sizes, every kernel once."""
    shape = check.shape(Shape(100, 136, 72, 5, 2))
    inputs = measure.arguments(shape, roofline.zipf_counts(shape), check.device)
    measure.step(inputs, torch.ones_like(inputs["x_TD"]))
    check.synchronize()


# --------------------------------------------------------------------------------------------------------------- graph


def graph(check: Check) -> Iterator[Item]:
    """A captured forward and backward, replayed with another routing: proof that nothing waits for the host."""

    def capture() -> Json:
        shape = check.shape(Shape(4096, 1024, 512, 16, 2))
        inputs = measure.arguments(shape, roofline.uniform_counts(shape), check.device)
        dy_TD = torch.randn_like(inputs["x_TD"])
        _gradients(inputs, dy_TD)
        if check.rehearse:
            return {}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                _gradients(inputs, dy_TD)
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            captured = _gradients(inputs, dy_TD)
        for counts in (roofline.zipf_counts(shape), ROUTINGS["all to one"](shape), ROUTINGS["one empty"](shape)):
            other = measure.arguments(shape, counts, check.device)
            for name in ("token_R", "expert_R", "token_offsets"):
                inputs[name].copy_(other[name])
            recorded.replay()
            eager = _gradients(inputs, dy_TD)
            assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True)), "replay and eager differ"
        return {"routings": 4}

    yield "forward and backward", capture


# --------------------------------------------------------------------------------------------------------------- bench


def bench(check: Check) -> Iterator[Item]:
    """The grid of shapes and routings: ours, torch's grouped_mm layer, and a dense FFN of equal active FLOPs, interleaved."""
    for routing, counts in ROUTINGS.items():
        for name, shape in GRID.items():
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
        predicted = roofline.predict(used, machine, counts(used))
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


def peers(check: Check) -> Iterator[Item]:
    """Other projects' layers, where they are installed, beside ours; and ours with everything but x recomputed."""
    for name in ("OLMoE", "Qwen3-30B, 8k", "gpt-oss"):
        arms = ("ours", "ours_recompute", "liger", "scattermoe")
        yield name, _compare(check, GRID[name], roofline.uniform_counts, arms)


# ------------------------------------------------------------------------------------------------- kernels and tuning


def kernels(check: Check) -> Iterator[Item]:
    """The time of every kernel beside what the roofline predicts with the rates of this machine."""

    def one(name: str, shape: Shape) -> Callable[[], Json]:
        def run() -> Json:
            used, machine = check.shape(shape), machine_of(check)
            counts = roofline.uniform_counts(used)
            out = os.environ.get("OUT")
            trace = Path(out, "trace.json") if out and name == "OLMoE" and not check.rehearse else None
            times = measure.kernel_seconds(used, counts, trace)
            predicted = {kernel.name: kernel for kernel in roofline.predict(used, machine, counts)}
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
    """Every operator under up to 8 configurations, one bucket after the other; the file is what MOE_TRITON_TUNED may name."""
    file = (check.record.parent if check.rehearse else Path(os.environ.get("OUT", check.record.parent))) / "tuned.json"

    def one(shape: Shape, op: str) -> Callable[[], Json]:
        def run() -> Json:
            used = check.shape(shape)
            inputs = measure.arguments(used, roofline.uniform_counts(used), check.device)
            step = gpu_layers.step_of((expert_ffn, inputs), torch.randn_like(inputs["x_TD"]), backward=True)

            def seconds(run: Callable[[], object]) -> float:
                try:
                    return check.times({"step": run})["step"].median
                except Exception as error:  # a configuration that does not fit is no candidate
                    if "OutOfResources" in type(error).__name__:
                        return float("inf")
                    raise

            where = {"rows_per_expert": used.R / used.E, "D": used.D, "F": used.F, "dtype": torch.bfloat16}
            options = None
            if check.rehearse:  # two, so that it ends
                height = tuning.tile_height(used.R / used.E, "sm_90")
                options = tuning.candidates(op, height, used.D, used.F, torch.bfloat16, "sm_90")[:2]
            return tuning.tune(op, step, seconds, file, target=target(), options=options, **where)

        return run

    for name in ("OLMoE", "Qwen3-30B, 8k"):
        for op in tuning.OPS[:2] if check.rehearse else tuning.OPS:
            yield f"{name}, {op}", one(GRID[name], op)


STAGES: dict[str, Callable[[Check], Iterator[Item]]] = {
    "facts": facts,
    "parity": parity,
    "races": races,
    "graph": graph,
    "bench": bench,
    "kernels": kernels,
    "peers": peers,
    "tune": tune,
}
"""In order of value."""
