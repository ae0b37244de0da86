"""docs/experiments/failures.md from what failures_report.py found; its sentences carry the numbers, so that none can go stale."""

from statistics import median
from textwrap import fill
from typing import Any

WORDS = {
    "healthy": "nothing",
    "frozen": "router frozen at half of the training",
    "redrawn": "router replaced by a random one at half, then frozen",
    "tied": "experts kept at their mean from half on",
    "cut": "capacity cut to a quarter of the balanced load at half",
    "wsd": "nothing, another schedule (WSD)",
}
Json = dict[str, Any]
HEADER = (
    "what goes wrong", "runs", "alarmed", "delay (shares of training)", "final gain: forecast", "what came", "same run, healthy",
    "the doctor's first alarm after it",
)  # fmt: skip
OTHER_HEADER = (
    "run", "final gain", "plain forecast", "rate-aware forecast", "gains apart: plain", "translated", "losses apart: plain",
    "translated",
)  # fmt: skip


def page_of(result: Json) -> str:
    """The page."""
    runs = result["runs"]
    healthy = [run for run in runs if run["kind"] == "healthy"]
    parts = ["# Runs that fail midway", *_set_up(result), _healthy(healthy)]
    rows = [(kind, [run for run in runs if run["kind"] == kind]) for kind in WORDS]
    parts += [_table(HEADER, [_row(kind, group, healthy) for kind, group in rows if group]), *_remarks(runs, healthy)]
    parts += _other_schedule(result)
    parts += _other_anchors(result)
    if result["missing"]:
        parts.append(_paragraph(f"Not there when this was written: {', '.join(result['missing'])}."))
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 140, break_long_words=False, break_on_hyphens=False)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _set_up(result: Json) -> list[str]:
    collected, gains = result["collected"], result["past_final_gains"]
    return [
        _paragraph(
            """Written by `bash scripts/experiments/failures` from its runs' files (`--report` writes it again); nothing
            here is edited by hand. All looks and figures are in [failures.json](failures.json)."""
        ),
        _paragraph(
            f"""Byte-level models of 2 layers on a text of random facts (40 letters; two letters fix the third in three of
            four cases), whose attention sees two tokens. 240 steps of 1,024 tokens, cosine, evaluated every 8 steps
            on the same 64 rows. {collected["sparse_runs"]} past runs ({", ".join(collected["sizes"])} active
            parameters, {", ".join(map(str, collected["experts"]))} experts, seeds 0 to 2, collected with `moe
            forecast collect`) calibrate the forecast; the new runs have a size between them and other seeds. Forecast
            from {result["anchor"]:.0%} of training, alarms at a nominal 5 % per run, gains in nats per token. Faults
            are injected by the script, not by the product."""
        ),
        _paragraph(
            f"""In a run so short the gain is not there at the start (past final gains from {gains["least"]:+.3f} to
            {gains["most"]:+.3f}), so that 8 % of training, the default, says nothing here, and gains are fitted as
            they are and not their logarithms (`scale` linear)."""
        ),
    ]


def _healthy(healthy: list[Json]) -> str:
    alarms, covered = (sum(run[name] for run in healthy) for name in ("alarmed", "covered"))
    error = median([abs(run["forecast"] - run["gain_now"]) for run in healthy]) if healthy else 0.0
    seeds = len({run["seed"] for run in healthy})
    return _paragraph(
        f"""**Healthy: {alarms} of {len(healthy)} runs alarmed**, {covered} of {len(healthy)} final gains inside their 90
        % interval, median error {error:.3f} nats. The runs of one seed share their dense twin: there are {seeds}
        seeds."""
    )


def _row(kind: str, group: list[Json], healthy: list[Json]) -> tuple[str, ...]:
    faulty = kind not in ("healthy", "wsd")
    delays = [f"{run['delay']:.1%}" for run in group if run["alarmed"]] if faulty else []
    twins = [h["gain_now"] for run in group for h in healthy if _same(run, h)]
    doctors = sorted({tuple(run["doctor"][0]) for run in group if run["doctor"]}) if faulty else []
    return (
        WORDS[kind],
        str(len(group)),
        f"{sum(run['alarmed'] for run in group)} of {len(group)}",
        ", ".join(delays) or "–",
        _list([run["forecast"] for run in group]),
        _list([run["gain_now"] for run in group]),
        _list(twins) if twins and kind != "healthy" else "–",
        ", ".join(f"{cause} (step {step})" for step, cause in doctors) or "–",
    )


def _same(run: Json, other: Json) -> bool:
    return (run["seed"], run["experts"]) == (other["seed"], other["experts"])


def _list(values: list[float]) -> str:
    few = len(values) <= 4
    return ", ".join(f"{value:+.3f}" for value in values) if few else f"{min(values):+.3f} to {max(values):+.3f}"


def _remarks(runs: list[Json], healthy: list[Json]) -> list[str]:
    """What the table means, where its runs allow it to be said."""
    if not runs:
        return []
    lowest = min((run["lowest_deviation"] for run in healthy), default=0.0)
    found = [
        f"""A delay of 0 means the look right after the step of the fault; looks are {runs[0]["interval"]:.1%} of training
        apart. Deviations of the healthy runs go down to {lowest:.1f}, the threshold is {runs[0]["threshold"]:.1f}."""
    ]
    silent = [run for run in runs if run["kind"] == "frozen" and not run["alarmed"]]
    lost = [h["gain_now"] - run["gain_now"] for run in silent for h in healthy if _same(run, h)]
    if lost:
        found.append(
            f"""What did not work: a router that is only frozen is not alarmed by the forecast, because it loses next to
            nothing ({", ".join(f"{x:+.3f}" for x in lost)} nats against the same run unfrozen; how the facts are
            dealt out to the experts is settled by then). The doctor names it from the router's weights; a test of the
            gain cannot. A router that is lost at the same moment, the row below it, is seen at once."""
        )
    return [_paragraph(text) for text in found]


def _other_anchors(result: Json) -> list[str]:
    counts = [
        f"{anchor} of training {n['false']} of {n['healthy']} healthy runs and {n['alarmed']} of {n['faulty']} faulty ones "
        f"(frozen routers not counted), {n['covered']} of {n['healthy']} final gains covered"
        for anchor, n in result["other_anchors"].items()
    ]
    return [_paragraph(f"With other anchors the alarm is raised, from {'; from '.join(counts)}.")]


def _other_schedule(result: Json) -> list[str]:
    """The same models under WSD, forecast from cosine runs, with and without the law of `moe/analysis/annealing.py`."""
    other = result["other_schedule"]
    if not other:
        return []
    ours = {run["run"]: run for run in result["runs"]}
    rows = []
    for one in other:
        run, moved = ours[one["run"]], one["moved"]
        names = ("plain", "rate-aware", "plain losses", "rate-aware losses")
        apart = [f"{moved[name]:.3f}" if moved else "–" for name in names]
        both = [f"{r['forecast']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]" for r in (one["plain"], run)]
        rows.append((one["run"], f"{run['gain_now']:+.3f}", *both, *apart))
    groups = [one["plain"] for one in other], [ours[one["run"]] for one in other]
    errors = [median([abs(run["forecast"] - run["gain_now"]) for run in group]) for group in groups]
    alarms = [sum(run["alarmed"] for run in group) for group in groups]
    known = [one["moved"] for one in other if one["moved"]]
    nearer = [sum(one[f"rate-aware{what}"] < one[f"plain{what}"] for one in known) for what in ("", " losses")]
    return [
        "## Another schedule",
        _paragraph(
            """The past runs have a cosine; these have WSD (the last quarter decays to 0). Forecast of the final gain,
            without and with translation of the past curves, and how far one seed's cosine gain lies from its WSD gain
            after the anchor (root mean square), as it is and translated; then the same for the losses themselves."""
        ),
        _table(OTHER_HEADER, rows),
        _paragraph(
            f"""Median error {errors[0]:.3f} nats plain, {errors[1]:.3f} rate-aware; false alarms {alarms[0]} and
            {alarms[1]} of {len(other)}. Translation brings the gain nearer to what came in {nearer[0]} of {len(known)} and
            the losses in {nearer[1]} of {len(known)}: what one short cosine tells of the annealing term is little. So few runs do
            not tell which of the two forecasts gains better."""
        ),
    ]
