"""Running the expert FFN on random tensors with a given routing, and timing it on a GPU: layers interleaved, kernels one by one.

Nothing here has a result without a GPU; `arguments` and `step` also serve the compile-only driver, on CPU tensors.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from moe_triton.ffn import expert_ffn
from moe_triton.roofline import Shape, whole_rows


class Spread(NamedTuple):
    """Of repeated timings, in seconds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int


def arguments(
    shape: Shape, counts: Sequence[float], device: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Arguments of expert_ffn, differentiable, of unit scale: R rows, in proportion to `counts`, in random order over tokens."""
    T, D, F, E, R = shape.T, shape.D, shape.F, shape.E, shape.R
    expert_R = torch.repeat_interleave(torch.arange(E), torch.tensor(whole_rows(counts, shape)))
    expert_R = expert_R[torch.randperm(R, generator=torch.Generator().manual_seed(0))]
    token_R = torch.arange(R) * T // max(R, 1)

    def tensor(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device, dtype=dtype) * scale).requires_grad_()

    return {
        "x_TD": tensor(T, D),
        "w_gate_EDF": tensor(E, D, F, scale=D**-0.5),
        "w_up_EDF": tensor(E, D, F, scale=D**-0.5),
        "w_down_EFD": tensor(E, F, D, scale=F**-0.5),
        "token_R": token_R.to(device),
        "expert_R": expert_R.to(device),
        "weight_R": torch.rand(R, device=device).requires_grad_(),
        "token_offsets": torch.searchsorted(token_R, torch.arange(T + 1)).to(device),
        "num_experts": E,
    }


def step(inputs: dict[str, Any], dy_TD: Tensor, layer: Callable[..., Tensor] = expert_ffn) -> None:
    """One forward and backward; the gradients are dropped, so that the next step does not add to them."""
    layer(**inputs).backward(dy_TD)
    for value in inputs.values():
        if isinstance(value, Tensor):
            value.grad = None


def short_name(kernel: str) -> str:
    """up_fwd_kernel -> up, hidden_bwd_kernel -> hidden_bwd: names as the tuning table and the roofline have them."""
    return re.sub(r"(_fwd)?_kernel.*$", "", kernel)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int = 20, warm_up: int = 3) -> dict[str, Spread]:
    """Times of several functions on the current GPU, in turn, so that a drift of the clocks meets them all alike."""
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()  # host sync: a time is wanted
            seconds[name].append(start.elapsed_time(end) * 1e-3)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Spread(median(values), low, high, len(values))


def kernel_seconds(
    shape: Shape, counts: Sequence[float], trace: Path | None = None, steps: int = 10
) -> dict[str, float] | None:
    """Median seconds of every kernel of a forward and backward in bfloat16, by name; None where there is no GPU.

    trace: gets torch's Chrome trace, with a named range for every step.
    """
    if not torch.cuda.is_available():
        return None
    inputs = arguments(shape, counts, "cuda")
    dy_TD = torch.randn_like(inputs["x_TD"])
    for _ in range(3):
        step(inputs, dy_TD)
    torch.cuda.synchronize()  # host sync: the warm-up must not run into the measurement
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for number in range(steps):
            with record_function(f"expert layer, step {number}"):
                step(inputs, dy_TD)
        torch.cuda.synchronize()  # host sync: as above
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(trace))
    events = [
        (event.name, event.time_range.elapsed_us() * 1e-6)
        for event in sorted(recorded.events() or [], key=lambda event: event.time_range.start)
        if event.device_type == DeviceType.CUDA
    ]
    return by_kernel(events)


def by_kernel(events: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Median seconds by short name, of (kernel, seconds) in the order of their start; combine's backward gets its name.

    combine runs forward and backward in turn, so its second, fourth, ... event is the backward's.
    """
    seconds: dict[str, list[float]] = {}
    combines = 0
    for kernel, duration in events:
        if "_kernel" not in kernel:
            continue
        name = short_name(kernel)
        if name == "combine":
            name = ("combine", "combine_bwd")[combines % 2]
            combines += 1
        seconds.setdefault(name, []).append(duration)
    return {name: median(values) for name, values in seconds.items()}
