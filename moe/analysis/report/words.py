"""Sentences of the report: verdicts, and what figures mean, from values alone."""

import math
from collections.abc import Sequence

from moe.analysis.paired import Interval
from moe.analysis.rows import Json, RunRows

AHEAD = {"ahead": "ahead of", "behind": "behind"}
STATUS = {
    "finished": "finished",
    "interrupted": "was interrupted",
    "stopped": "stopped itself",
    "unfinished": "is going on or was killed,",
}


def signed(value: float, decimals: int = 3) -> str:
    """A number with a typographic sign."""
    return f"{value if abs(value) > 1e-12 else 0.0:+.{decimals}f}".replace("-", "−")


def _decimals(*values: float | None) -> int:
    """Decimals that show two digits of the smallest value: 3 to 6."""
    sizes = [abs(value) for value in values if value and abs(value) > 1e-9]
    return min(6, max(3, 1 + math.ceil(-math.log10(min(sizes))))) if sizes else 3


def verdict_sentence(contract: str, gain: Interval) -> str:
    """The comparison's result in one sentence; names a winner only if the interval excludes zero."""
    seeds, decimals = len(gain.values), _decimals(gain.mean, gain.low, gain.high)
    start = f"At {contract}, "
    if gain.low is None or gain.high is None:
        return (
            f"{start}no winner is named: one seed gives no interval "
            f"(its gain is {signed(gain.mean, decimals)} bits per byte)."
        )
    ends = f"[{signed(gain.low, decimals)}, {signed(gain.high, decimals)}]"
    if gain.verdict == "undecided":
        return (
            f"{start}no winner is named: the {100 * gain.confidence:g} % interval of the gain, {ends} bits per byte "
            f"over {seeds} paired seeds, contains zero (mean {signed(gain.mean, decimals)})."
        )
    return (
        f"{start}the sparse model is {AHEAD[gain.verdict]} its dense twin by {abs(gain.mean):.{decimals}f} bits per byte: "
        f"the gain's {100 * gain.confidence:g} % interval over {seeds} paired seeds is {ends}."
    )


def ending_sentence(name: str, run: RunRows) -> str:
    """How far a run got and how good it is."""
    status = run.summary["status"]
    start = (
        f"{name} {STATUS.get(status, status)} after {run.summary['step']:,} steps and {run.summary['tokens']:,} tokens"
    )
    if run.evals:
        kind = "" if run.final["final"] else " in the last evaluation during training"
        bits = "not a finite loss" if math.isnan(run.final_bits) else f"{run.final_bits:.4f} bits per byte"
        return f"{start}: {bits} on {run.final['bytes']:,.0f} bytes of held-out text{kind}."
    losses = [row["loss"] for row in run.metrics if row["loss"] is not None]
    loss = f"; the loss of its last step is {losses[-1]:.4f} nats per token" if losses else ""
    return f"{start} and has not been evaluated{loss}."


def group_sentence(name: str, over: str, gain: Interval) -> str:
    """One group of runs against another, in a sentence that names a winner only if the interval excludes zero."""
    decimals, seeds = _decimals(gain.mean, gain.low, gain.high), len(gain.values)
    if gain.low is None or gain.high is None:
        return (
            f"{name} against {over}: a gain of {signed(gain.mean, decimals)} bits per byte with the one seed that both have, "
            "which gives no interval and names no winner."
        )
    ends = f"[{signed(gain.low, decimals)}, {signed(gain.high, decimals)}]"
    word = {"ahead": "better", "behind": "worse", "undecided": "undecided"}[gain.verdict]
    return (
        f"{name} against {over}: {word}, a gain of {signed(gain.mean, decimals)} {ends} bits per byte over {seeds} paired seeds, "
        f"each run at its own end."
    )


def routing_notes(health: Sequence[Json]) -> list[str]:
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


def speed_notes(timing: Json | None) -> list[str]:
    """Tokens per second of the two arms, from the interleaved timing only."""
    if timing is None:
        return ["Not measured: there is no timing.json. Speeds of runs that shared a machine are not compared."]
    return [
        f"Sparse trains {timing['ratio']:.2f} times as many tokens per second as dense: median of {timing['rounds']} rounds "
        f"in which the arms took turns on one machine with {timing['threads']} threads, quartiles {timing['low']:.2f} to "
        f"{timing['high']:.2f}. Median tokens per second: sparse {timing['sparse_tokens_per_second']:,.0f}, "
        f"dense {timing['dense_tokens_per_second']:,.0f}."
    ]


def speed_in_short(timing: Json | None) -> str:
    """The same for the top of the page."""
    if timing is None:
        return "Training speed was not measured."
    return (
        f"Sparse trains {timing['ratio']:.2f} times as many tokens per second as its twin "
        f"(quartiles {timing['low']:.2f} to {timing['high']:.2f}, separate interleaved timing)."
    )


def twin_notes(comparison: Json, summaries: Sequence[Json]) -> list[str]:
    """How the twin and the learning rate were chosen."""
    measured = summaries[0]["measured_flops_per_token"] / summaries[1]["measured_flops_per_token"] - 1
    planned = summaries[0]["train_flops_per_token"] / summaries[1]["train_flops_per_token"] - 1
    notes = [
        "Training FLOPs per token (forward and backward) of sparse relative to dense: "
        f"planned {signed(100 * planned, 3)} %, with measured expert rows {signed(100 * measured, 3)} %."
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


def gain_notes(gain: Interval, noise: Sequence[Json]) -> list[str]:
    """What the interval is over, and what the evaluation noise is not."""
    notes = []
    if gain.deviation is not None:
        notes.append(
            f"Gain is positive where the sparse model is better. The interval is Student's t over {len(gain.values)} paired "
            f"seeds (standard deviation {gain.deviation:.4f}, {len(gain.values) - 1} degrees of freedom)."
        )
    if noise:
        notes.append(
            f"Evaluation noise is the 95 % interval that pairing the {noise[0]['rows']} validation rows gives for one pair of "
            "runs. It says how precisely this pair was measured, nothing about other seeds, and takes no part in the verdict."
        )
    return notes


def environment(run: RunRows, seeds: Sequence[int]) -> list[list[str]]:
    """What a reader needs to run it again."""
    meta = run.meta
    commit = str(meta.get("git_commit") or "unknown") + (" with uncommitted changes" if meta.get("git_dirty") else "")
    versions = ", ".join(f"{name} {version}" for name, version in dict(meta.get("versions") or {}).items())
    evaluated = (
        f"{run.final['bytes']:,.0f} bytes of held-out text, the same rows in every run" if run.evals else "none yet"
    )
    return [
        ["Seeds", ", ".join(map(str, seeds))],
        ["Evaluation", evaluated],
        ["Device, threads per run", f"{meta.get('device', 'unknown')}, {meta.get('threads', 'unknown')}"],
        ["Expert backend", str(meta.get("backend") or "none")],
        ["Git commit", commit],
        ["Versions", versions or "unknown"],
        ["Started", str(meta.get("started", "unknown"))],
    ]
