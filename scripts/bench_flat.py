"""Whether time per step and memory stay flat over a long run: a tiny model through the whole trainer, with everything on.

    python scripts/bench_flat.py [--steps 2000] [--json FILE] [--write docs/benchmarks.md]

The run is recipes/smoke.py with 4 rows a step in this process, one thread, with an evaluation and health measurements every
100 steps, a checkpoint every 200, and routing every 10. A thread beside it notes four times a second the process's processor
time, its resident memory and the step that metrics.jsonl has reached; the figures are per hundred steps, all of the trainer's
work included. A slope is that of a straight line through the hundreds but the first two, with a 95 % interval of Student's t.
"""

import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from bench_common import Ratio, keep, machine, options, parse
from scipy.stats import t as student

from moe.config.load import load
from moe.train import train
from moe.train.memory import memory_bytes

NAME = "bench_flat"
ROOT = Path(__file__).resolve().parents[1]
HUNDRED, SKIPPED = 100, 2
MIB = 2**20


class Watch(threading.Thread):
    """Notes (finished steps, processor seconds, resident bytes) while a run writes its metrics."""

    def __init__(self, metrics: Path):
        super().__init__(daemon=True)
        self.metrics, self.done = metrics, threading.Event()
        self.seen: list[tuple[int, float, int]] = []

    def run(self) -> None:
        """Until told that it is done."""
        lines = read = 0
        while True:
            last = self.done.wait(0.25)
            if self.metrics.exists():
                with self.metrics.open("rb") as stream:
                    stream.seek(read)
                    new = stream.read()
                lines, read = lines + new.count(b"\n"), read + len(new)
            self.seen.append((lines, time.process_time(), memory_bytes(torch.device("cpu"))))
            if last:
                return


def hundreds(seen: list[tuple[int, float, int]], steps: int) -> tuple[list[float], list[float]]:
    """Processor milliseconds per step, and resident MiB at the end, of each hundred steps."""
    at, seconds, held = (np.array(column, dtype=float) for column in zip(*seen, strict=True))
    marks = np.arange(0, steps + 1, HUNDRED)
    # the last moment at which a step count was seen is when that many steps were done
    newest = [int(np.searchsorted(at, mark, side="right")) - 1 for mark in marks]
    clock = np.interp(marks, at, seconds)
    per_step = 1e3 * np.diff(clock) / HUNDRED
    return per_step.tolist(), [float(held[index]) / MIB for index in newest[1:]]


def slope(values: list[float]) -> Ratio:
    """Change over 1,000 steps of a line through hundreds: 95 % interval around it."""
    x = np.arange(len(values)) * HUNDRED / 1000
    y = np.array(values)
    centred = x - x.mean()
    value = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - value * centred
    error = float(np.sqrt(rest @ rest / (len(values) - 2) / (centred @ centred)))
    reach = float(student.ppf(0.975, len(values) - 2)) * error
    return Ratio(value - reach, value, value + reach)


def measure(steps: int) -> dict[str, list[float]]:
    """Train, and return both series."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = ["train.batch_rows=4", "train.micro_rows=4", "train.threads=1", f"train.steps={steps}"]
        settings += ["evaluation.every_steps=100", "checkpoint.every_steps=200", "logging.routing_every=10"]
        run = load(ROOT / "recipes/smoke.py", [*settings, "logging.console=plain"])
        watch = Watch(out / "metrics.jsonl")
        watch.start()
        try:
            train(run, out)
        finally:
            watch.done.set()
            watch.join()
    per_step, held = hundreds(watch.seen, steps)
    return {"milliseconds per step": per_step, "MiB": held}


def page(series: dict[str, list[float]], figures: dict[str, Ratio], facts: dict[str, str]) -> str:
    """The table of docs/benchmarks.md."""
    per_step, held = series["milliseconds per step"], series["MiB"]
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += ["| steps | " + " | ".join(str(HUNDRED * (i + 1)) for i in range(len(held))) + " |"]
    lines += ["| --- |" + " --- |" * len(held)]
    lines += [
        "| processor ms per step, in the hundred before | " + " | ".join(f"{value:.1f}" for value in per_step) + " |"
    ]
    lines += ["| resident MiB | " + " | ".join(f"{value:,.0f}" for value in held) + " |", ""]
    time_, memory = figures["processor time, % per 1,000 steps"], figures["memory, MiB per 1,000 steps"]
    lines += [
        f"Over 1,000 steps processor time changes by {time_.middle:+.1f} % [{time_.low:+.1f}, {time_.high:+.1f}] and memory by "
        f"{memory.middle:+.1f} MiB [{memory.low:+.1f}, {memory.high:+.1f}] (95 % intervals, without the first {SKIPPED} hundreds)."
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, print, and write what is asked for."""
    parser = options(__doc__)
    parser.add_argument(
        "--steps", type=int, default=2000, metavar="N", help="of training, in hundreds (default: %(default)s)"
    )
    arguments = parse(parser, NAME)
    if arguments.steps % HUNDRED or arguments.steps < (SKIPPED + 3) * HUNDRED:
        parser.error(f"--steps must be hundreds, at least {SKIPPED + 3} of them: a slope needs three")
    series = measure(arguments.steps)
    late = {name: values[SKIPPED:] for name, values in series.items()}
    mean = statistics.fmean(late["milliseconds per step"])
    figures = {
        "processor time, % per 1,000 steps": slope([100 * value / mean for value in late["milliseconds per step"]]),
        "memory, MiB per 1,000 steps": slope(late["MiB"]),
    }
    facts = machine()
    text = page(series, figures, facts)
    print(text)
    keep(arguments, NAME, text, {"facts": facts, "figures": figures, "series": series})


if __name__ == "__main__":
    main()
