"""A ladder in words: the plan before it, the answer after it, and the page with its figure (ladder.md, ladder.png)."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe.analysis.plots import DASHES, GREY, LAYER_COLOURS, STYLE
from moe.files import write_text

Json = dict[str, Any]
FIGURE = "ladder.png"
WORDS = {"published": "published ladders (docs/forecast.md)", "this ladder": "this ladder's own upper rungs"}
ADVICE = {
    "what back-tests missed by": ": rungs nearer to the target (--widths) would narrow it most",
    "the scatter of this ladder's runs": ": more --seeds, or longer and larger rungs, would narrow it most",
    "the distance of the two forms": ": more sizes, nearer to the target (--widths), would narrow it most",
}
"""What to do about the largest part of an interval."""
HELD = {"line": "line", "less its optimism": "corrected", "as on the rung below": "naive"}
"""Columns of the table of the held-out rung, and their keys."""


def count(value: float) -> str:
    """A count with a metric prefix: 1540000 -> 1.54M."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table."""
    lines = [list(header), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def describe_plan(plan: Json) -> str:
    """What is going to be trained, how each run's length and rate follow from the target, and what it takes."""
    target, ratio = plan["target"], plan["tokens_per_parameter"]
    rule = "fixed tokens" if ratio is None else f"{ratio:.3g} tokens per active parameter"
    rates = (
        f"learning rate of each size: the best of {', '.join(f'{lr:g}' for lr in plan['lr_grid'])} for its dense run"
        if plan["lr_grid"]
        else f"learning rates by compute^{plan['rules']['rate_power']:g} from the recipe's"
    )
    lines = [
        f"target {target['name']}: {count(target['active_parameters'])} active parameters (without embedding, head, router), "
        f"{target['experts']} experts, {target['top_k']} used, {count(target['tokens'])} tokens "
        f"({target['tokens_per_parameter']:.3g} per active parameter), {count(target['flops'])}FLOP"
    ]
    lines += [
        f"  {row['label']}: {count(row['active_parameters'])} active, {row['num_layers']} layers; dense and "
        f"{', '.join(map(str, row['experts']))} experts; {row['steps']} steps of {row['batch_rows']} rows = "
        f"{count(row['tokens'])} tokens; learning rate {row['learning_rate']:g}; {count(sum(row['flops'].values()))}FLOP"
        for row in plan["rungs"]
    ]
    lines.append(
        f"{plan['runs']} runs ({plan['seeds']} seed(s)), {rule}, {rates}, batch by compute^{plan['rules']['batch_power']:g}; "
        f"{count(plan['flops'])}FLOP, {plan['share']:.2%} of the target run"
    )
    expected = plan["expected"]
    lines.append(
        f"expect the gain to about ±{expected['of_gain']:.0%} (published back-tests over this distance) and "
        f"±{expected['of_noise']:.1f} times the deviation of one run's loss over seeds"
    )
    if ratio is None or abs(ratio / target["tokens_per_parameter"] - 1) > 0.05:
        lines.append(
            "the rungs' tokens are not in the target's proportion: the answer is about the target size on theirs"
        )
    return "\n".join(lines)


def describe_answer(record: Json) -> str:
    """The answer in a few sentences: gain, worth, verdict, where the correction is from, cost."""
    answer, plan = record["answer"], record["plan"]
    net, worth, target = answer["net"], answer["multiplier"], plan["target"]
    tax, share = net["tax"], record["cost"]["share"]
    sources = {form["optimism"]["source"] for form in answer["forms"].values() if form is not None}
    parts = ", ".join(f"{share:.0%} {name}" for name, share in answer["interval_from"].items())
    largest = max(answer["interval_from"], key=lambda name: answer["interval_from"][name])
    decided = "" if net["decided"] else " (its interval contains the break-even: undecided counts as no)"
    return "\n".join(
        [
            f"At {count(target['active_parameters'])} active parameters, {target['experts']} experts ({target['top_k']} used) and "
            f"{count(record['tokens'])} tokens: gain over dense {signed(answer['gain'])} {ends(answer)} nats per token, "
            f"{answer['confidence']:.0%} interval; as much as {times(worth['value'])} [{times(worth['low'])}, "
            f"{times(worth['high'])}] of the dense run's compute.",
            f"Step-time tax {tax['mean']:.2f} [{tax['low']:.2f}, {tax['high']:.2f}] ({record['tax_from']}), worth "
            f"{tax['nats']:.4f} nats: at equal time {signed(net['gain'])} {ends(net)}.",
            f"{net['verdict'].upper()}: the low end is {'above' if net['verdict'] == 'go' else 'not above'} the break-even of "
            f"{net['break_even']:g}{decided}.",
            f"Subtracted: the optimism of {WORDS[sources.pop()]}. The interval's width is {parts}{ADVICE[largest]}.",
            f"The answer cost {share:.2%} of the target run's FLOPs ({record['cost']['from']}).",
        ]
    )


def signed(value: float) -> str:
    """Four decimals with a sign."""
    return f"{value:+.4f}"


def ends(row: Json) -> str:
    """An interval."""
    return f"[{row['low']:+.4f}, {row['high']:+.4f}]"


def times(value: float | None) -> str:
    """A multiple; unbounded for null."""
    return "unbounded" if value is None else f"{value:.3g}×"


def write_page(record: Json, folder: Path) -> Path:
    """Write ladder.md and ladder.png into a folder; returns the page."""
    _plot(record, folder / FIGURE)
    page = folder / "ladder.md"
    write_text(page, _page(record))
    return page


def _page(record: Json) -> str:
    plan, answer = record["plan"], record["answer"]
    rungs = {row["label"]: row for row in plan["rungs"]}
    experts = sorted({row["experts"] for row in record["runs"] if row["experts"] is not None})
    losses = table(
        ["size", "active parameters", "tokens", "dense", *(f"{E} experts" for E in experts)],
        [
            [label, count(row["active_parameters"]), count(row["tokens"]), _cell(record, label, None)]
            + [_cell(record, label, E) for E in experts]
            for label, row in rungs.items()
        ],
    )
    forms = table(
        ["form", "before correction", "corrected", "interval", "optimism per factor e", "from"],
        [
            (form, signed(found["before"]), signed(found["gain"]), ends(found), *_source(found["optimism"]))
            for form, found in answer["forms"].items()
            if found is not None
        ],
    )
    check = answer["check"]
    top_k = plan["target"]["top_k"]
    held = table(
        ["experts", "measured gain", *(name for form in HELD for name in (form, "wrong by"))],
        [
            [
                f"{row['experts'] * top_k:g}",
                signed(row["gain"]),
                *(text for form in HELD.values() for text in _miss(row, form)),
            ]
            for row in check["runs"]
        ],
    )
    return (
        "\n\n".join(
            [
                f"# Ladder below {plan['target']['name']}: will sparsity pay there?",
                f"Written on {record['written']} by\n\n```\n{record['command']}\n```",
                describe_answer(record).replace("\n", "\n\n"),
                f"![Gain against size, with the answer at the target]({FIGURE})",
                "## What was trained",
                "```\n" + describe_plan(plan) + "\n```",
                "Final validation loss, nats per token, and gain over dense in brackets (means over seeds, paired):",
                losses,
                _cost_line(record),
                "## The two forms",
                "A line in log size for the target's number of experts, and the routed law against the dense power law; nats "
                "per token.",
                forms,
                _beside(answer),
                "## Held out: the largest rung, from the smaller ones",
                f"{math.exp(check['reach']):.2f} times the size of the rung below it. The line has two points, so no scatter to "
                "go by.",
                held,
                _limits(record),
            ]
        )
        + "\n"
    )


def _beside(answer: Json) -> str:
    dense = answer["dense_law"]
    return (
        f"With the gain of the largest rung taken as it is: {_maybe(answer['naive'])}. Scatter of a new run around the lines, "
        f"half-width at the target: {answer['scatter']:.4f}. Dense law: loss ~ compute^-{dense['beta']:.4f}, error "
        f"{dense['rmse']:.4f}; it says {dense['loss']:.4f} at the target."
    )


def _limits(record: Json) -> str:
    reach = math.exp(record["answer"]["reach"])
    return (
        "## What it cannot know\n\n"
        f"* The target is {reach:.3g} times the largest rung; the interval grows with that distance by rule, not by evidence.\n"
        "* Published optimism is that of top-1 models of 15M to 370M parameters at one number of tokens, scaled to the gain here.\n"
        "* Sizes round to whole heads, blocks and multiples of 8, so small rungs are not quite the same shape.\n"
        "* The tax is one of small layers on this machine unless it was given; larger layers usually pay less."
    )


def _cost_line(record: Json) -> str:
    cost = record["cost"]
    line = f"{count(cost['flops'])}FLOP, {cost['share']:.2%} of the target run ({cost['from']}; timing not in it)"
    total = cost["total"]
    if total is None:
        return line + "."
    parts = [
        f"{total['seconds']['value'] / 60:.1f} minutes of training ({total['runs']} runs, {total['attempts']} attempts)"
    ]
    if total["kwh"] is not None:
        parts.append(f"{total['kwh']['value']:.3g} kWh ({total['kwh']['grade']})")
    return f"{line}; {', '.join(parts)}."


def _cell(record: Json, label: str, experts: int | None) -> str:
    def mean(E: int | None) -> float:
        return float(np.mean([r["loss"] for r in record["runs"] if r["size"] == label and r["experts"] == E]))

    loss = mean(experts)
    return f"{loss:.4f}" if experts is None else f"{loss:.4f} ({mean(None) - loss:+.4f})"


def _source(optimism: Json) -> tuple[str, str]:
    return f"{optimism['share']:.3f}", f"{optimism['source']}, {optimism['back_tests']} back-tests"


def _miss(row: Json, name: str) -> list[str]:
    value = row[name]
    return ["", ""] if value is None else [signed(value), signed(value - row["gain"])]


def _maybe(value: float | None) -> str:
    return "no rung has as many experts" if value is None or math.isnan(value) else signed(value)


def _plot(record: Json, path: Path) -> None:
    plan, answer = record["plan"], record["answer"]
    sizes = {row["label"]: row["active_parameters"] for row in plan["rungs"]}
    experts = sorted({row["experts"] for row in record["runs"] if row["experts"] is not None})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for place, E in enumerate(experts):
            x, y = [], []
            for label, size in sizes.items():
                losses = {
                    kind: np.mean([r["loss"] for r in record["runs"] if r["size"] == label and r["experts"] == kind])
                    for kind in (None, E)
                }
                x.append(size)
                y.append(losses[None] - losses[E])
            colour = LAYER_COLOURS[place % len(LAYER_COLOURS)]
            axes.plot(x, y, "o", color=colour, markersize=5)
            slope, level = np.polyfit(np.log(x), y, 1)
            far = np.array([min(x), plan["target"]["active_parameters"]])
            dash = DASHES[place % len(DASHES)]
            axes.plot(
                far, slope * np.log(far) + level, linestyle=dash, color=colour, label=f"{E} experts, and its line"
            )
        size = plan["target"]["active_parameters"]
        low, high = answer["gain"] - answer["low"], answer["high"] - answer["gain"]
        axes.errorbar(
            [size], [answer["gain"]], [[low], [high]], fmt="D", color="black", capsize=4,
            label=f"answer: {plan['target']['experts']} experts, {answer['confidence']:.0%} interval",
        )  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.set(
            xlabel="active parameters (without embedding, head, router)", ylabel="gain over dense (nats per token)"
        )
        axes.legend(loc="best", fontsize=8)
        figure.savefig(path, dpi=160, metadata={"Software": None})
