"""Opt-in measuring of launch settings: up to 8 configurations of each product on a GPU, the fastest kept per bucket in a file.

    python -m moe_triton.autotune 32768,2048,1024,64,8 --file tuned.json
    MOE_TRITON_TUNED=tuned.json torchrun ...

Nothing is measured while a model trains, and without the variable nothing reads the file. A bucket is an architecture, an
operator, its type, and powers of two of R/E, D and F, so one run serves all numbers of tokens near it. The file names the
triton and the sources that it was measured with, and is ignored under others.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from moe_triton import measure, roofline, tuning
from moe_triton.compile_only import compiling
from moe_triton.down import down
from moe_triton.hidden_backward import hidden_bwd
from moe_triton.input_backward import input_bwd
from moe_triton.plan import routing_plan
from moe_triton.reference import ALPHA, LIMIT
from moe_triton.roofline import Shape
from moe_triton.runtime import target
from moe_triton.tiles import Weights
from moe_triton.tuned_file import FILE_VARIABLE, read, write
from moe_triton.up import up
from moe_triton.weight_backward import w_down_bwd, w_up_bwd

MAX_CANDIDATES = 8

Run = Callable[[], object]
Timer = Callable[[Run], float]
"""Seconds of a run; infinite if it cannot be launched."""


def tune(
    op: str,
    run: Run,
    seconds_of: Timer,
    file: Path,
    *,
    rows_per_expert: float,
    D: int,
    F: int,
    dtype: Any,
    target: str,
    options: Sequence[dict[str, int]] | None = None,
) -> dict[str, int]:
    """Time an operator under at most 8 configurations and keep the fastest in `file` for its bucket.

    run() launches the operator. options: what to try, by default the table's rows that fit and their neighbours in stages.
    A bucket that is in the file is not measured again. Raises RuntimeError if no configuration can be launched.
    """
    key = tuning.bucket(op, rows_per_expert, D, F, dtype, target)
    known = dict(read(file))
    if key in known:
        return known[key]
    options = options_of(op, rows_per_expert, D, F, dtype, target) if options is None else options
    distinct = list({json.dumps(option, sort_keys=True): option for option in options}.values())[:MAX_CANDIDATES]
    seconds = []
    for option in distinct:
        with tuning.forced(op, option):
            seconds.append(seconds_of(run))
    if min(seconds) == float("inf"):
        raise RuntimeError(f"none of {len(distinct)} configurations of {op} can be launched on {target}: {distinct}")
    known[key] = distinct[seconds.index(min(seconds))]
    write(file, known)
    return known[key]


def options_of(op: str, rows_per_expert: float, D: int, F: int, dtype: Any, target: str) -> list[dict[str, int]]:
    """The table's rows that fit, then each with one stage more (which hides more) and one less (room for a second block)."""
    rows = tuning.candidates(op, tuning.tile_height(rows_per_expert, target), D, F, dtype, target)
    near = [{**row, "num_stages": row["num_stages"] + step} for row in rows for step in (1, -1)]
    return [*rows, *(row for row in near if row["num_stages"] >= 2)]


def runs(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Run]:
    """Operator -> a function that launches it alone, on random tensors and a uniform routing of this shape."""
    inputs = measure.arguments(shape, roofline.uniform_counts(shape), device, dtype)
    tensors = {name: value.detach() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    x_TD, weight_R = tensors["x_TD"], tensors["weight_R"]
    weights = Weights(tensors["w_gate_EDF"], tensors["w_up_EDF"], tensors["w_down_EFD"])
    rows = (tensors["token_R"], tensors["expert_R"], tensors["token_offsets"])
    plan = routing_plan(*rows, num_experts=shape.E)
    rule: dict[str, Any] = {"activation": "swiglu", "alpha": ALPHA, "limit": LIMIT, "weigh_input": False}
    gate, up_, hidden = up(x_TD, weights, weight_R, plan, keep=True, **rule)
    dgate, dup, weighted, _ = hidden_bwd(x_TD, gate, up_, weights, weight_R, plan, **rule)
    into = {name: torch.empty_like(value) for name, value in weights._asdict().items() if value is not None}
    return {
        "up": lambda: up(x_TD, weights, weight_R, plan, keep=True, **rule),
        "down": lambda: down(hidden, weights, plan),
        "hidden_bwd": lambda: hidden_bwd(x_TD, gate, up_, weights, weight_R, plan, **rule),
        "input_bwd": lambda: input_bwd(dgate, dup, x_TD, weights, weight_R, plan, weigh_input=False),
        "w_down_bwd": lambda: w_down_bwd(weighted, x_TD, weight_R, plan, into, weigh_input=False),
        "w_up_bwd": lambda: w_up_bwd(x_TD, dgate, dup, weight_R, plan, into, weigh_input=False),
    }


def seconds_of(run: Run) -> float:
    """Median of 20 on the current GPU; infinite for a configuration that does not fit on it."""
    try:
        return measure.interleaved({"run": run})["run"].median
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            return float("inf")
        raise


def autotune(
    shape: Shape,
    file: Path,
    *,
    ops: Sequence[str] = tuning.OPS,
    device: str = "cuda",
    timer: Timer = seconds_of,
    most: int = MAX_CANDIDATES,
) -> dict[str, dict[str, int]]:
    """Tune some of the six products for a layer's shape in bfloat16: operator -> what was chosen of at most `most`.

    timer: replaced where there is no GPU.
    """
    launches = runs(shape, device)
    where: dict[str, Any] = {"rows_per_expert": shape.R / shape.E, "D": shape.D, "F": shape.F, "dtype": torch.bfloat16}
    where["target"] = target()
    return {op: tune(op, launches[op], timer, file, options=options_of(op, **where)[:most], **where) for op in ops}


def _compiled_only(run: Run) -> float:
    """A timer for the compile-only driver: everything takes a second, so the table's first row wins."""
    run()
    return 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; --rehearse compiles every configuration for sm_90 and times none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="T,D,F,E,K: tokens, width, experts' width, experts, experts per token")
    parser.add_argument("--file", type=Path, default=Path("tuned.json"), help="written to; by default %(default)s")
    parser.add_argument("--ops", nargs="+", choices=tuning.OPS, default=tuning.OPS)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: compile, and time nothing")
    options = parser.parse_args(arguments)
    try:
        T, D, F, E, K = map(int, options.shape.split(","))
    except ValueError:
        parser.error(f"the shape {options.shape!r} must be five whole numbers T,D,F,E,K: e.g. 32768,2048,1024,64,8")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("this process sees no GPU: run it where torch.cuda.is_available(), or with --rehearse")
    with compiling("sm_90") if options.rehearse else nullcontext():
        chosen = autotune(
            Shape(T, D, F, E, K),
            options.file,
            ops=options.ops,
            device="cpu" if options.rehearse else "cuda",
            timer=_compiled_only if options.rehearse else seconds_of,
        )
    for op, config in chosen.items():
        print(f"{op}: {config}")
    print(f"{options.file}: used where {FILE_VARIABLE} names it")


if __name__ == "__main__":
    sys.exit(main())
