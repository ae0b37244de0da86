"""The contents of report.json for one run, or for any runs side by side; they may be unfinished."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from moe.analysis import plots
from moe.analysis.paired import Interval, t_interval
from moe.analysis.report import words
from moe.analysis.report.parts import charts, config_table, doctors, ledger_table, prices
from moe.analysis.report.pictures import loss_pictures, routing_pictures
from moe.analysis.report.reading import Arm, grouped, read_so_far
from moe.analysis.rows import Json, RunRows
from moe.analysis.summaries import arm_summary, routing_health


def run_report(folder: Path, out: Path) -> Json:
    """The report of a single run."""
    run = read_so_far(folder)
    name = "sparse" if run.config["model"].get("moe") else "dense"
    summary = arm_summary(name, [run], None, None)
    arm = Arm(name, (run,), summary["measured_flops_per_token"])
    if run.metrics:
        plots.plot_training(run, out / "plots" / "training.png")
    _pictures([arm], out)
    health, status, reason = routing_health([run]), run.summary["status"], str(run.summary.get("reason") or "")
    return {
        "kind": "run",
        "title": f"Run {run.config['name']}",
        "subtitle": f"Seed {run.config['seed']}. A single run: nothing is compared.",
        "verdict": {
            "name": "undecided",
            "sentence": words.ending_sentence("The run", run),
            "contracts": [],
            "notes": [reason] if reason and status != "finished" else [],
        },
        "cautions": [],
        "ledger": ledger_table({name: [run.path]}),
        "prices": prices([arm], []),
        "arms": [summary],
        "routing": health,
        "routing_notes": words.routing_notes(health),
        "doctor": doctors([arm]),
        "settings": [],
        "command": _train_command(run),
        "environment": words.environment(run, [run.config["seed"]]),
        "charts": charts([arm], []),
    }


def runs_report(folders: Sequence[Path], out: Path, past: Path | None = None) -> Json:
    """The report of several runs: those that differ in the seed only are one arm, and the others are held against the first."""
    runs = [read_so_far(folder) for folder in folders]
    arms, summaries = [], []
    for name, members in grouped(runs).items():
        summaries.append(arm_summary(name, members, None, None))
        arms.append(Arm(name, tuple(members), summaries[-1]["measured_flops_per_token"]))
    _pictures(arms, out)
    first, others = arms[0], arms[1:]
    gains = {arm.name: gain for arm in others if (gain := _gain(arm, first)) is not None}
    sentences = [words.group_sentence(name, first.name, gain) for name, gain in gains.items()]
    sentences += [
        f"{arm.name} against {first.name}: they share no seed that both have evaluated."
        for arm in others
        if arm.name not in gains
    ]
    health = {arm.name: routing_health(arm.runs) for arm in arms if arm.sparse}
    return {
        "kind": "runs",
        "title": f"Runs: {', '.join(arm.name for arm in arms[:4])}{' and others' if len(arms) > 4 else ''}",
        "subtitle": f"{len(runs)} runs, {len(arms)} kinds. Nothing here was planned as a comparison: read what differs below.",
        "verdict": {
            "name": "undecided",
            "sentence": sentences[0] if sentences else "All runs differ in the seed only: nothing is compared.",
            "contracts": [],
            "notes": [
                *sentences[1:],
                *(words.ending_sentence(run.path.name, run) for run in runs if run.summary["status"] != "finished"),
            ],
        },
        "cautions": _cautions(runs),
        "ledger": ledger_table({arm.name: [run.path for run in arm.runs] for arm in arms}),
        "prices": prices(arms, [(a, b) for a in arms for b in arms]),
        "arms": summaries,
        "routing_by_arm": health,
        "routing": [],
        "routing_notes": [],
        "doctor": doctors(arms),
        "settings": config_table(arms),
        "command": "moe report " + shlex.join(str(folder) for folder in folders),
        "environment": words.environment(first.runs[0], [run.config["seed"] for run in first.runs]),
        "charts": charts(arms, [(arm, first) for arm in others], past=past),
    }


def _gain(of: Arm, over: Arm) -> Interval | None:
    """Paired gain at the ends of the runs, over the seeds that both arms have; None without one."""
    ends = {run.config["seed"]: run.final_bits for run in over.runs}
    pairs = [(ends.get(run.config["seed"], math.nan), run.final_bits) for run in of.runs]
    finite = [a - b for a, b in pairs if math.isfinite(a - b)]
    return t_interval(finite) if finite else None


def _cautions(runs: Sequence[RunRows]) -> list[str]:
    """What makes the runs hard to compare, a sentence each."""
    found = []
    sizes = sorted({run.final["bytes"] for run in runs if run.evals})
    if len(sizes) > 1:
        found.append(
            f"The runs were evaluated on different amounts of text: {', '.join(f'{size:,.0f}' for size in sizes)} bytes."
        )
    tokens = sorted({run.summary["tokens"] for run in runs})
    if len(tokens) > 1:
        found.append(
            f"The runs trained on different numbers of tokens, {tokens[0]:,} to {tokens[-1]:,}: compare curves, not ends."
        )
    for name in ("device", "threads", "versions"):
        if any(run.meta.get(name) != runs[0].meta.get(name) for run in runs):
            found.append(f"The runs had different {name}.")
    return found


def _pictures(arms: Sequence[Arm], out: Path) -> None:
    if any(run.evals for arm in arms for run in arm.runs):
        loss_pictures([arm for arm in arms if all(run.evals for run in arm.runs)], out)
    sparse = next((arm for arm in arms if arm.sparse), None)
    if sparse is not None:
        routing_pictures(sparse.runs, out)


def _train_command(run: RunRows) -> str:
    """How the run was started, with the program's path shortened."""
    program, *arguments = [str(part) for part in run.meta.get("command") or [""]]
    name = "python -m moe.train" if program.endswith("__main__.py") else Path(program).name
    return f"{name} {shlex.join(arguments)}".strip()
