"""One run of scripts/gpu_check: the device it runs on, the record of what it has found, and the clock of its stages.

A stage is a list of named items. Each item's result is a line of the record as soon as it is there, so that a run that is cut
off loses one item. In a rehearsal every shape is small, tensors are on the CPU, and each time is a second.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from moe_triton import measure, roofline
from moe_triton.roofline import Shape

Json = dict[str, Any]
Item = tuple[str, Callable[[], Json]]
Stage = Callable[["Check"], Iterator[Item]]

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

    def child(self, *task: str) -> list[str]:
        """The command that does a task of this script in a process of its own."""
        rehearse = ["--rehearse"] if self.rehearse else []
        return [sys.executable, str(Path(__file__).with_name("gpu_check.py")), *rehearse, "--child", *task]

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


def read_record(record: Path) -> list[Json]:
    """The lines of an earlier run; one that was cut off in the middle of its last line loses that line."""
    lines = record.read_text().splitlines() if record.exists() else []
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{record}, line {number}: not JSON: delete the line") from None
            record.write_text("".join(f"{whole}\n" for whole in lines[:-1]))
    return results


def outcome(result: Json) -> str:
    """An item's result in a word or a sentence."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    return "ok" if result["ok"] else f"FAILED: {result['error']}"
