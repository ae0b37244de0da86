"""What a profile does not predict: the compiler's facts about each launch, and times on the GPU that this process sees."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_triton.roofline import Shape

Json = dict[str, Any]
SMALL = 1024
"""Sizes from twice this on are compiled with the same remainder: masks and alignment, so the facts, stay the same."""


def compiled_facts(shape: Shape, target: str) -> list[Json] | str:
    """What the compiler makes of each launch for a target; a sentence where this process cannot compile."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from moe_triton import compile_only, measure  # needs triton, which not every platform has
    from moe_triton.targets import nearest

    if compile_only.INTERPRETING:
        return "TRITON_INTERPRET is set, so nothing is compiled"
    D, F = (size if size < 2 * SMALL else SMALL + size % SMALL for size in (shape.D, shape.F))
    rows = max(1, min(round(shape.R / shape.E), 128))
    with compile_only.compiling(nearest(target).name) as launches:
        inputs = measure.arguments(Shape(2 * rows, D, F, 2, 1), [rows, rows], "cpu")
        measure.step(inputs, inputs["x_TD"].detach())
    facts = {launch.kernel: compile_only.facts(launch, nearest(target).name) for launch in launches}
    return [
        {
            "kernel": measure.short_name(fact.kernel),
            "target": fact.target,
            "registers": fact.registers,
            "spills": fact.spills,
            "shared": fact.shared,
            "matrix": fact.matrix,
            "num_warps": fact.num_warps,
            "num_stages": fact.num_stages,
        }
        for fact in facts.values()
    ]


def measured_seconds(shape: Shape, counts: Sequence[float], trace: Path | None) -> dict[str, float] | None:
    """Median seconds of every kernel on this process's GPU; None without one, or without triton."""
    if find_spec("triton") is None:
        return None
    from moe_triton.measure import kernel_seconds  # needs triton, which not every platform has

    return kernel_seconds(shape, counts, trace)
