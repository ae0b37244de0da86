"""The report of a run or of a comparison: report.json, plots/*.png and report.html, from the logged files alone."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moe.analysis import html, plots
from moe.analysis.contract_report import describe, judge_comparison
from moe.analysis.ledger import cost_of_knowing, of_arms
from moe.analysis.paired import Interval, evaluation_noise, paired_gain
from moe.analysis.promise import FILE as PROMISE
from moe.analysis.promise import outcome, quote, read_promise, tampering
from moe.analysis.rows import Json, RunRows, read_json, read_run
from moe.analysis.summaries import arm_summary, cautions, differences, finite, routing_health, timing_summary
from moe.errors import UserError
from moe.files import write_text

COMPARISON = {"contract": (str,), "seeds": (list,), "arms": (dict,)}
TIMING = {"sparse": (list,), "dense": (list,)}
AHEAD = {"ahead": "ahead of", "behind": "behind"}
STATUS = {"finished": "finished", "interrupted": "was interrupted", "stopped": "stopped itself"}


def _decimals(*values: float | None) -> int:
    """Decimals that show two digits of the smallest value: 3 to 6."""
    sizes = [abs(value) for value in values if value]
    return min(6, max(3, 1 + math.ceil(-math.log10(min(sizes))))) if sizes else 3


def verdict_sentence(contract: str, gain: Interval) -> str:
    """The comparison's result in one sentence; names a winner only if the interval excludes zero."""
    seeds, decimals = len(gain.values), _decimals(gain.mean, gain.low, gain.high)
    start = f"At {contract}, "
    if gain.low is None or gain.high is None:
        return (
            f"{start}no winner is named: one seed gives no interval "
            f"(its gain is {html.signed(gain.mean, decimals)} bits per byte)."
        )
    ends = f"[{html.signed(gain.low, decimals)}, {html.signed(gain.high, decimals)}]"
    if gain.verdict == "undecided":
        return (
            f"{start}no winner is named: the {100 * gain.confidence:g} % interval of the gain, {ends} bits per byte "
            f"over {seeds} "
            f"paired seeds, contains zero (mean {html.signed(gain.mean, decimals)})."
        )
    return (
        f"{start}the sparse model is {AHEAD[gain.verdict]} its dense twin by {abs(gain.mean):.{decimals}f} bits per "
        "byte: "
        f"the gain's {100 * gain.confidence:g} % interval over {seeds} paired seeds is {ends}."
    )


def _curve(run: RunRows, per_token: float) -> plots.Curve:
    """Validation curve of a run against tokens · per_token."""
    tokens = {row["step"]: row["tokens"] for row in run.metrics}
    during = [row for row in run.evals if not row["final"] and row["step"] in tokens]
    return plots.Curve(
        np.array([tokens[row["step"]] * per_token for row in during], dtype=float),
        np.array([row["bits_per_byte"] for row in during], dtype=float),
        tokens.get(run.final["step"], run.summary["tokens"]) * per_token,
        run.final_bits,
    )


def _seconds_per_token(run: RunRows, speed: float | None) -> float:
    """Seconds per token: of the interleaved timing if there is one, else of the run's own steps."""
    if speed:
        return 1 / speed
    return sum(row["step_seconds"] for row in run.metrics) / max(run.metrics[-1]["tokens"], 1) if run.metrics else 0.0


def _loss_plots(arms: dict[str, list[RunRows]], summaries: Sequence[Json], jobs: int, directory: Path) -> list[Json]:
    """Validation loss against tokens, FLOPs and seconds."""
    flops = {arm["name"]: arm["measured_flops_per_token"] for arm in summaries}
    speed = {arm["name"]: arm["tokens_per_second"] for arm in summaries}
    total = max(flops[name] * run.summary["tokens"] for name, runs in arms.items() for run in runs)
    exponent = 3 * int(math.log10(max(total, 1)) // 3)
    if all(speed.values()):
        clock = "Seconds are tokens divided by the median speed of the separate interleaved timing."
    elif jobs > 1:
        clock = f"Seconds are the runs' own; {jobs} runs shared the machine, so they do not compare the arms' speed."
    else:
        clock = "Seconds are the runs' own step times."
    power = f"$10^{{{exponent}}}$ " if exponent else ""
    axes = [
        ("tokens", "Training tokens (millions)", lambda name, run: 1e-6, ""),
        ("flops", f"Training compute ({power}FLOPs)", lambda name, run: flops[name] / 10**exponent, ""),
        ("seconds", "Training time (seconds)", lambda name, run: _seconds_per_token(run, speed[name]), " " + clock),
    ]
    made = []
    for label, xlabel, scale, note in axes:
        curves = {name: [_curve(run, scale(name, run)) for run in runs] for name, runs in arms.items()}
        cut = plots.plot_curves(curves, xlabel, directory / "plots" / f"loss_{label}.png")
        caption = "Lines: evaluations during training. Open marks: the final evaluation, on more rows." + note
        if cut:
            caption += " The first evaluations lie above the frame."
        what = {"flops": "compute", "seconds": "time"}.get(label, label)
        made.append(
            {
                "group": "loss",
                "file": f"plots/loss_{label}.png",
                "title": f"Validation loss against {what}",
                "caption": caption,
            }
        )
    return made


def _routing_plots(runs: Sequence[RunRows], directory: Path) -> list[Json]:
    """Load of every expert over time, and balance over time."""
    if not runs[0].routing:
        return []
    plots.plot_routing(runs, directory / "plots" / "routing_load.png")
    plots.plot_balance(runs, directory / "plots" / "routing_balance.png")
    return [
        {
            "group": "routing",
            "file": "plots/routing_load.png",
            "title": "Load of each expert over time",
            "caption": "White is the ideal share 1/E, orange more, purple less. Rows of the whole batch, before drops.",
        },
        {
            "group": "routing",
            "file": "plots/routing_balance.png",
            "title": "Balance over time",
            "caption": "MaxVio means something only above its floor, which a perfectly balanced router reaches by "
            "chance (dotted)." + (" Thin lines: single seeds." if len(runs) > 1 else ""),
        },
    ]


def _environment(run: RunRows, seeds: Sequence[int]) -> list[list[str]]:
    """What a reader needs to run it again."""
    meta = run.meta
    commit = str(meta.get("git_commit") or "unknown") + (" with uncommitted changes" if meta.get("git_dirty") else "")
    versions = ", ".join(f"{name} {version}" for name, version in dict(meta.get("versions") or {}).items())
    lines = [
        ["Seeds", ", ".join(map(str, seeds))],
        ["Evaluation", f"{run.final['bytes']:,.0f} bytes of held-out text, the same rows in every run"],
        ["Device, threads per run", f"{meta.get('device', 'unknown')}, {meta.get('threads', 'unknown')}"],
        ["Expert backend", str(meta.get("backend") or "none")],
        ["Git commit", commit],
        ["Versions", versions or "unknown"],
        ["Started", str(meta.get("started", "unknown"))],
    ]
    return lines


def _routing_notes(health: Sequence[Json]) -> list[str]:
    """Dead experts and drops in plain words."""
    if not health:
        return []
    dead = [line for line in health if line["dead_experts"][2] > 0]
    drops = [line for line in health if line["drop_rate"][2] > 0]
    dead_text = ", ".join(
        f"layer {line['layer']} (up to {line['dead_experts'][2]:.2g} of {line['experts']})" for line in dead
    )
    drop_text = ", ".join(f"layer {line['layer']} (up to {100 * line['drop_rate'][2]:.1f} %)" for line in drops)
    return [
        (f"Experts below 1 % of their ideal load at the end: {dead_text}." if dead else "No expert is dead at the end.")
        + " "
        + (f"Rows dropped by capacity: {drop_text}." if drops else "No rows were dropped.")
    ]


def _speed(timing: Json | None) -> list[str]:
    """Tokens per second of the two arms, from the interleaved timing only."""
    if timing is None:
        return ["Not measured: there is no timing.json. Speeds of runs that shared a machine are not compared."]
    return [
        f"Sparse trains {timing['ratio']:.2f} times as many tokens per second as dense: median of {timing['rounds']} "
        "rounds "
        f"in which the arms took turns on one machine with {timing['threads']} threads, quartiles {timing['low']:.2f} "
        "to "
        f"{timing['high']:.2f}. Median tokens per second: sparse {timing['sparse_tokens_per_second']:,.0f}, "
        f"dense {timing['dense_tokens_per_second']:,.0f}."
    ]


def _speed_in_short(timing: Json | None) -> str:
    if timing is None:
        return "Training speed was not measured."
    return (
        f"Sparse trains {timing['ratio']:.2f} times as many tokens per second as its twin "
        f"(quartiles {timing['low']:.2f} to {timing['high']:.2f}, separate interleaved timing)."
    )


def _twin_notes(comparison: Json, summaries: Sequence[Json]) -> list[str]:
    """How the twin and the learning rate were chosen."""
    measured = summaries[0]["measured_flops_per_token"] / summaries[1]["measured_flops_per_token"] - 1
    planned = summaries[0]["train_flops_per_token"] / summaries[1]["train_flops_per_token"] - 1
    notes = [
        "Training FLOPs per token (forward and backward) of sparse relative to dense: "
        f"planned {html.signed(100 * planned, 3)} %, with measured expert rows {html.signed(100 * measured, 3)} %."
    ]
    rate = comparison.get("learning_rate")
    if rate:
        notes.append(f"Both arms use the learning rate {rate['value']:g}, found by: {rate['found_by']}.")
        tried = [
            f"{float(lr):g}: {'diverged' if bits is None else format(bits, '.4f')}"
            for lr, bits in rate.get("tried", [])
        ]
        if tried:
            notes.append(f"Final bits per byte of the dense arm at each learning rate tried: {', '.join(tried)}.")
    return notes


def _gain_notes(gain: Interval, noise: Sequence[Json]) -> list[str]:
    """What the interval is over, and what the evaluation noise is not."""
    notes = []
    if gain.deviation is not None:
        notes.append(
            f"Gain is positive where the sparse model is better. The interval is Student's t over {len(gain.values)} "
            "paired "
            f"seeds (standard deviation {gain.deviation:.4f}, {len(gain.values) - 1} degrees of freedom)."
        )
    if noise:
        notes.append(
            f"Evaluation noise is the 95 % interval that pairing the {noise[0]['rows']} validation rows gives for one "
            "pair of "
            "runs. It says how precisely this pair was measured, nothing about other seeds, and takes no part in the "
            "verdict."
        )
    return notes


def _promise(directory: Path, arms: dict[str, list[RunRows]], gain: Interval, judged: Json | None) -> Json:
    """The promise that the comparison was made under, what became of it, and what speaks against it."""
    promise = read_promise(directory / PROMISE) if (directory / PROMISE).exists() else None
    warnings, result = tampering(promise, arms["sparse"], arms["dense"]), None
    if promise is not None:
        entries = judged["contracts"] if judged else []
        gains = [
            entry["gain"]["values"] for entry in entries if entry["contract"] == promise["contract"] and "gain" in entry
        ]
        if promise["contract"] == "flops":
            gains = [list(gain.values)]
        result = outcome(promise, gains[0]) if gains else None
    sentences = quote(promise, warnings, result)
    return {"promise": promise, "tampering": warnings, "outcome": result, "sentences": sentences}


def _comparison(directory: Path) -> Json:
    """The contents of report.json for a comparison directory, plots written."""
    comparison = read_json(directory / "compare.json", COMPARISON)
    names = comparison["arms"]
    if (
        set(names) != {"sparse", "dense"}
        or not len(names["sparse"]) == len(names["dense"]) == len(comparison["seeds"]) > 0
    ):
        raise UserError(
            f"{directory / 'compare.json'}: arms must list one sparse and one dense run for each of the seeds."
        )
    arms = {arm: [read_run(directory / name) for name in names[arm]] for arm in ("sparse", "dense")}
    for runs in arms.values():
        for run, seed in zip(runs, comparison["seeds"], strict=True):
            _require_finished(run)
            if run.config["seed"] != seed:
                raise UserError(
                    f"{run.path} has seed {run.config['seed']}, and {directory / 'compare.json'} says {seed}."
                )
    timing_file = directory / "timing.json"
    timing = read_json(timing_file, TIMING) if timing_file.exists() else None
    if timing and not len(timing["sparse"]) == len(timing["dense"]) > 0:
        raise UserError(f"{timing_file}: needs as many rounds of sparse as of dense, and at least one.")
    expected = (comparison.get("twin") or {}).get("rows_per_token", arms["sparse"][0].config["model"]["moe"]["top_k"])
    summaries = [arm_summary(arm, runs, expected, timing) for arm, runs in arms.items()]
    gain = paired_gain(summaries[1]["final_bits_per_byte"], summaries[0]["final_bits_per_byte"])
    rows = [(d.final_rows, s.final_rows) for s, d in zip(arms["sparse"], arms["dense"], strict=True)]
    noise = [asdict(evaluation_noise(d, s)) for d, s in rows if d is not None and s is not None]
    noise = noise if len(noise) == len(rows) else []
    bytes_seen = {run.final["bytes"] for runs in arms.values() for run in runs}
    if len(bytes_seen) > 1:
        raise UserError(f"{directory}: runs were evaluated on different amounts of text ({sorted(bytes_seen)} bytes).")
    health = routing_health(arms["sparse"])
    jobs, seeds = comparison.get("jobs", 1), comparison["seeds"]
    made = _loss_plots(arms, summaries, jobs, directory)
    curves = {arm: [_curve(run, 1e-6) for run in runs] for arm, runs in arms.items()}
    plots.plot_gain(curves, gain, seeds, directory / "plots" / "gain.png")
    made.insert(
        0,
        {
            "group": "loss",
            "file": "plots/gain.png",
            "title": "Gain of the sparse model",
            "caption": "Left: during training, on fewer validation rows. Right: the final evaluation by seed, with "
            "the mean and its interval over seeds, which decides.",
        },
    )
    timed = timing_summary(timing) if timing else None
    judged = judge_comparison(directory) if comparison.get("more_arms") else None
    promised = _promise(directory, arms, gain, judged)
    everything = {**names, **comparison.get("more_arms", {})}
    ledger = of_arms({arm: [directory / name for name in folders] for arm, folders in everything.items()})
    return {
        "kind": "comparison",
        "title": f"Sparse against dense: {comparison.get('recipe') or directory.name}",
        "subtitle": f"{len(seeds)} paired seed{'s' * (len(seeds) > 1)} per arm, validated on "
        f"{arms['sparse'][0].final['bytes']:,.0f} bytes that no run trained on. Contract: {comparison['contract']}.",
        "contract": comparison["contract"],
        "verdict": {
            "name": gain.verdict,
            "sentence": verdict_sentence(comparison["contract"], gain),
            "notes": [
                *promised["sentences"],
                _speed_in_short(timed),
                *(describe(judged).splitlines() if judged else ()),
                *([cost_of_knowing(ledger)] if ledger else ()),
            ],
        },
        "ledger": ledger,
        "promise": promised,
        "contracts": judged,
        "cautions": cautions(arms, summaries, comparison.get("learning_rate")),
        "jobs": jobs,
        "arms": summaries,
        "gain": {**asdict(gain), "verdict": gain.verdict, "notes": _gain_notes(gain, noise)},
        "evaluation_noise": noise,
        "timing": timed,
        "speed": _speed(timed),
        "routing": health,
        "routing_notes": _routing_notes(health),
        "differences": [
            {"field": name, "sparse": s, "dense": d}
            for name, s, d in differences(arms["sparse"][0].config, arms["dense"][0].config)
            if name != "name"
        ],
        "twin": comparison.get("twin"),
        "learning_rate": comparison.get("learning_rate"),
        "twin_notes": _twin_notes(comparison, summaries),
        "plots": made + _routing_plots(arms["sparse"], directory),
        "command": comparison.get("command", ""),
        "environment": _environment(arms["sparse"][0], seeds),
    }


def _require_finished(run: RunRows) -> None:
    if run.summary["status"] != "finished" or not run.final["final"]:
        raise UserError(
            f"{run.path} is {run.summary['status']} at step {run.summary['step']}, and only finished runs are "
            "compared: "
            "run the same compare command again to resume it."
        )


def _train_command(run: RunRows) -> str:
    """How the run was started, with the program's path shortened."""
    program, *arguments = [str(part) for part in run.meta.get("command") or [""]]
    name = "python -m moe.train" if program.endswith("__main__.py") else Path(program).name
    return f"{name} {shlex.join(arguments)}".strip()


def _single(directory: Path) -> Json:
    """The contents of report.json for one run's directory, plots written."""
    run = read_run(directory)
    name = "sparse" if run.config["model"].get("moe") else "dense"
    summary = arm_summary(name, [run], None, None)
    plots.plot_training(run, directory / "plots" / "training.png")
    training = {
        "group": "loss",
        "file": "plots/training.png",
        "title": "Training loss",
        "caption": "Mean over the targets of each step, auxiliary losses not included.",
    }
    health, status = routing_health([run]), run.summary["status"]
    kind = "" if run.final["final"] else " in the last evaluation during training"
    sentence = (
        f"The run {STATUS.get(status, status)} after {run.summary['step']:,} steps and {run.summary['tokens']:,} "
        "tokens: "
        f"{run.final_bits:.4f} bits per byte on {run.final['bytes']:,.0f} bytes of held-out text{kind}."
    )
    reason = str(run.summary.get("reason") or "")
    return {
        "kind": "run",
        "title": f"Run {run.config['name']}",
        "subtitle": f"Seed {run.config['seed']}. A single run: nothing is compared.",
        "verdict": {
            "name": "undecided",
            "sentence": sentence,
            "notes": [reason] if reason and status != "finished" else [],
        },
        "cautions": [],
        "arms": [summary],
        "routing": health,
        "routing_notes": _routing_notes(health),
        "plots": [training, *_loss_plots({name: [run]}, [summary], 1, directory), *_routing_plots([run], directory)],
        "command": _train_command(run),
        "environment": _environment(run, [run.config["seed"]]),
    }


def build_report(directory: Path) -> Path:
    """Write plots/, report.json and report.html of a run or comparison directory; returns the path of report.html.

    Raises UserError if files are missing, malformed, or of runs that are not finished.
    """
    if (directory / "compare.json").exists():
        report = _comparison(directory)
    elif (directory / "run.json").exists():
        report = _single(directory)
    else:
        raise UserError(
            f"{directory} holds neither compare.json nor run.json: give the output directory of `moe compare` or `moe "
            "train`."
        )
    report = finite({"schema_version": 1, **report})
    write_text(directory / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page = directory / "report.html"
    write_text(page, html.render(report, directory))
    return page
