"""Stages of scripts/gpu_check about values: parity with float64, races, and a captured graph.

In a rehearsal launches are compiled only: outputs are unwritten memory, and nothing is compared.
"""

import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_operators import operators
from gpu_run import ROUTINGS, Check, Item, Json

from moe_triton import autotune, measure, roofline, tuning
from moe_triton.compile_only import compiling
from moe_triton.ffn import expert_ffn
from moe_triton.roofline import Shape
from moe_triton.runtime import target
from moe_triton.targets import TARGETS
from moe_triton.topk import score_topk

ffn_cases: Any = importlib.import_module("ffn_cases")
"""The interpreter's suite: its cases and its criterion, in tests/kernels_interpreted, which scripts/gpu_check puts on the path."""


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
    yield "persistent with TMA equals plain", lambda: _variants(check)
    yield "rows past 2^31 elements", lambda: _large_offsets(check)
    yield from operators(check)
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
    if check.rehearse:
        compile_share(check, name, "0/1")
        return {}
    workers = min(os.cpu_count() or 1, num_cases)
    started = [subprocess.Popen(check.child("compile", name, f"{number}/{workers}")) for number in range(workers)]
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


def _variants(check: Check) -> Json:
    """The operators that have both variants, with one set of tiles: they add the same products in the same order."""
    if target() not in ("sm_90", "sm_100"):
        return {"skipped": f"{target()} has no TMA"}
    shape = check.shape(Shape(4096, 2048, 1024, 16, 2))
    launches = autotune.runs(shape, check.device)
    for op in ("up", "down", "input_bwd")[: 1 if check.rehearse else None]:
        tile = tuning.candidates(op, 128, 4096, 4096, torch.bfloat16, target())[0]
        assert tile["TMA"], f"{op}: {tile}"
        found = []
        for tma in (0, 1):
            with tuning.forced(op, {**tile, "TMA": tma}):
                found.append(launches[op]())
        for plain, described in zip(*map(_flat, found), strict=True):
            same = check.rehearse or torch.equal(plain, described)
            assert same, f"{op}: {(plain != described).sum()} of {plain.numel()} elements differ"
    return {}


def _flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


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


def _compiled(check: Check) -> Json:
    shape = check.shape(Shape(2048, 512, 256, 8, 2))
    inputs = measure.arguments(shape, roofline.uniform_counts(shape), check.device)
    dy_TD = torch.randn_like(inputs["x_TD"])
    # the eager backend traces the same graph and needs no C++ compiler, which not every machine has
    layer = torch.compile(expert_ffn, fullgraph=True, backend="eager")
    eager, traced = _gradients(inputs, dy_TD), _gradients(inputs, dy_TD, layer)
    assert check.rehearse or all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    return {}


def races(check: Check) -> Iterator[Item]:
    """compute-sanitizer over one forward and backward in a process of its own, where the tool is there."""

    def sanitize(tool: str) -> Callable[[], Json]:
        def run() -> Json:
            command = check.child("races")
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
    wide = check.shape(Shape(600, 1032, 1024, 4, 2))  # for the variants with descriptors, where there are any
    inputs = measure.arguments(wide, roofline.zipf_counts(wide), check.device)
    measure.step(inputs, torch.ones_like(inputs["x_TD"]))
    logits_TE = torch.zeros(100, 7, device=check.device, requires_grad=True)
    score_topk(logits_TE, 2, normalize=True).weight_TK.sum().backward()
    check.synchronize()


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
