"""Train a billion parameters for a few steps, and hold time and peak memory against the plan.

    python scripts/bench_billion.py [--steps 4] [--folder DIR] [--json FILE] [--write docs/benchmarks.md]

Runs `moe train recipes/billion.py` in a process of its own, whose summary has the peak of its resident memory. The plan
(`moe show`) counts tensors; a process of torch that has trained nothing is measured beside, and added to it. DIR must have room
for the checkpoint (12 GB), which is deleted.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import Ratio, keep, machine, options, parse, spread

from moe import cost
from moe.config.layout import resolve
from moe.config.load import load

NAME = "bench_billion"
ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
_BARE = """
import moe.train, torch
from moe.train.memory import peak_memory_bytes
x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()
print(peak_memory_bytes(torch.device("cpu")))
"""


def bare_bytes() -> int:
    """Peak resident memory of a process that has imported the trainer and multiplied once."""
    done = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(recipe: Path, settings: list[str], folder: Path | None) -> dict[str, Any]:
    """Train; seconds of each step, peak bytes, and the bytes that the plan predicts."""
    run = load(recipe, settings)
    plan = cost.memory_bytes(run, resolve(run, 1))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "run"
        command = [sys.executable, "-m", "moe", "train", str(recipe), *settings, f"out={out}", "logging.console=off"]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        peak = json.loads((out / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    seconds = [row["step_seconds"] for row in rows]
    losses = [row["loss"] for row in rows]
    return {
        "seconds": seconds,
        "losses": losses,
        "peak": peak,
        "plan": sum(plan.values()),
        "tokens": rows[-1]["tokens"],
    }


def page(found: dict[str, Any], bare: int, figures: dict[str, Ratio], facts: dict[str, str]) -> str:
    """The lines of docs/benchmarks.md."""
    step = figures["seconds per step"]
    return "\n".join(
        [
            " · ".join(f"{key} {value}" for key, value in facts.items()),
            "",
            "| | |",
            "| --- | --- |",
            f"| peak of resident memory, saving included | {found['peak'] / GIB:.2f} GiB |",
            f"| plan, and {bare / GIB:.2f} GiB of a process that trains nothing | {(found['plan'] + bare) / GIB:.2f} GiB |",
            f"| measured over predicted | {found['peak'] / (found['plan'] + bare):.3f} |",
            f"| seconds per step of {found['tokens'] // len(found['seconds']):,} tokens, without the first | {step} |",
            f"| loss, step by step | {', '.join(f'{loss:.3f}' for loss in found['losses'])} |",
        ]
    )


def main() -> None:
    """Train, print, and write what is asked for."""
    parser = options(__doc__)
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="of training, at least 3 (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the run is, while it is there")
    arguments = parse(parser, NAME)
    if arguments.steps < 3:
        parser.error("--steps must be at least 3: quartiles need two values, and the first step is not counted")
    bare = bare_bytes()
    settings = [f"train.steps={arguments.steps}", f"train.schedule.warmup_steps={min(10, arguments.steps - 1)}"]
    found = measure(ROOT / "recipes/billion.py", settings, arguments.folder)
    ratio = found["peak"] / (found["plan"] + bare)
    figures = {
        "seconds per step": spread(found["seconds"][1:]),
        "peak over plan": Ratio(0.99 * ratio, ratio, 1.01 * ratio),
    }
    facts = machine()
    text = page(found, bare, figures, facts)
    print(text)
    keep(arguments, NAME, text, {"facts": facts, "figures": figures, **found, "bare": bare})


if __name__ == "__main__":
    main()
