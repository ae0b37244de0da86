"""The distillation of scripts/experiments/reuse: dense students of a sparse teacher, and the share of its gain that they keep.

For each seed: recipes/upcycle.py:run (8 experts, 2 a token) for N steps is the teacher; recipes/upcycle.py:dense for as many
steps on the text alone is the plain run; and the same dense model on the teacher's probabilities, once for each way of WAYS.
"""

import json
from pathlib import Path
from typing import Any

from moe.analysis.paired import t_interval
from moe.config.load import load
from moe.experiments.planned import Planned, state_of
from moe.surgery.distil import RECEIPT, distil, measure
from moe.train import resume, train

RECIPE = Path(__file__).parents[2] / "recipes/upcycle.py"
WAYS = ((1.0, 0.5), (2.0, 0.5), (1.0, 1.0))
"""Temperature and share of the teacher's term."""


def students(out: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """Bits per byte of one seed's teacher, plain run and students, as `moe distil` measures them; trains what is missing."""
    teacher = out / f"teacher-seed{seed}"
    _trained(teacher, "run", settings)
    plain = out / f"plain-seed{seed}"
    _trained(plain, "dense", settings)
    result: dict[str, Any] = {}
    for temperature, share in WAYS:
        folder = out / f"student-t{temperature:g}-s{share:g}-seed{seed}"
        if not (folder / RECEIPT).is_file():
            if (folder / "run.json").is_file():
                run = load(folder / "run.json")
                if state_of(Planned(folder, run)) != "finished":
                    resume(folder)
                measure(folder, plain)
            else:
                source = f"{RECIPE}:dense"
                distil(teacher, source, folder, settings, temperature=temperature, share=share, plain=plain)
        receipt = json.loads((folder / RECEIPT).read_text())
        result[f"{temperature:g}, {share:g}"] = receipt["bits_per_byte"]
        result |= {"teacher": receipt["teacher_bits_per_byte"], "plain": receipt["plain_bits_per_byte"]}
    return result


def _trained(folder: Path, entry: str, settings: list[str]) -> None:
    planned = Planned(folder, load(f"{RECIPE}:{entry}", settings))
    state = state_of(planned)
    if state == "fresh":
        train(planned.run, folder)
    elif state == "resume":
        resume(folder)


def retained(results: dict[int, dict[str, float]], way: str) -> tuple[float, float | None, float | None]:
    """Share of the teacher's gain that students keep, sum over sum, and its 95 % interval over seeds.

    The interval is that of the mean of (plain - student) - share x (plain - teacher), divided by the mean gain (the ratio's
    first order), so that a seed whose teacher hardly gained cannot blow it up.
    """
    gains = [found["plain"] - found["teacher"] for found in results.values()]
    moved = [found["plain"] - found[way] for found in results.values()]
    share, mean = sum(moved) / sum(gains), sum(gains) / len(gains)
    spread = t_interval([m - share * g for m, g in zip(moved, gains, strict=True)])
    if spread.low is None or spread.high is None:
        return share, None, None
    return share, share + spread.low / mean, share + spread.high / mean


def section(results: dict[int, dict[str, float]], steps: int) -> list[str]:
    """The page's part."""

    def mean(arm: str) -> float:
        return sum(found[arm] for found in results.values()) / len(results)

    def better(arm: str) -> str:
        found = t_interval([found["plain"] - found[arm] for found in results.values()])
        interval = "" if found.low is None or found.high is None else f" ({found.low:+.4f} to {found.high:+.4f})"
        return f"{found.mean:+.4f}{interval}"

    lines = [
        f"## Distillation, {len(results)} seeds, {steps} steps each",
        "",
        "| run | temperature | share of its term | bits per byte, mean | better than plain by (95 %) | share of the gain (95 %) |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| teacher, 8 experts, 2 a token | | | {mean('teacher'):.4f} | {better('teacher')} | |",
        f"| plain | | | {mean('plain'):.4f} | | |",
    ]
    for temperature, share in WAYS:
        way = f"{temperature:g}, {share:g}"
        part, low, high = retained(results, way)
        interval = "" if low is None or high is None else f" ({low:.0%} to {high:.0%})"
        lines.append(
            f"| student | {temperature:g} | {share:g} | {mean(way):.4f} | {better(way)} | {part:.0%}{interval} |"
        )
    return [*lines, ""]
