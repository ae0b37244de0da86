"""The contents of report.json for a comparison: what `moe compare` trained, judged from its files alone."""

from dataclasses import asdict
from pathlib import Path

from moe.analysis import plots
from moe.analysis.contract_report import contract_lines, judge_comparison, other_lines, timed_seconds
from moe.analysis.ledger import cost_of_knowing
from moe.analysis.ledger_prices import describe_comparison, of_comparison
from moe.analysis.paired import Interval, evaluation_noise, paired_gain
from moe.analysis.promise import FILE as PROMISE
from moe.analysis.promise import outcome, quote, read_promise, tampering
from moe.analysis.report import words
from moe.analysis.report.parts import charts, config_table, doctors, ledger_table
from moe.analysis.report.pictures import curve_of, loss_pictures, routing_pictures
from moe.analysis.report.reading import Arm
from moe.analysis.rows import Json, RunRows, read_json, read_run
from moe.analysis.summaries import arm_summary, cautions, differences, routing_health, timing_summary
from moe.errors import UserError

COMPARISON = {"contract": (str,), "seeds": (list,), "arms": (dict,)}
TIMING = {"sparse": (list,), "dense": (list,)}


def comparison_report(directory: Path, out: Path, past: Path | None = None) -> Json:
    """The report of a comparison directory, its plots written to `out`.

    Raises UserError if files are missing, malformed, or of unfinished runs.
    """
    record = read_json(directory / "compare.json", COMPARISON)
    runs = _runs(directory, record)
    arms, timing = {name: runs[name] for name in ("sparse", "dense")}, _timing(directory / "timing.json")
    expected = (record.get("twin") or {}).get("rows_per_token", arms["sparse"][0].config["model"]["moe"]["top_k"])
    summaries = [arm_summary(arm, found, expected, timing) for arm, found in arms.items()]
    gain = paired_gain(summaries[1]["final_bits_per_byte"], summaries[0]["final_bits_per_byte"])
    noise = _noise(arms)
    judged = judge_comparison(directory) if record.get("more_arms") else None
    promised = _promise(directory, arms, gain, judged)
    ledger = ledger_table({arm: [run.path for run in found] for arm, found in runs.items()})
    more = [arm_summary(name, found, expected, None) for name, found in list(runs.items())[2:]]
    speeds = {arm: 1 / seconds for arm, seconds in timed_seconds(directory).items()}
    drawn = [
        Arm(one["name"], tuple(runs[one["name"]]), one["measured_flops_per_token"], speeds.get(one["name"]))
        for one in [*summaries, *more]
    ]
    jobs, seeds = record.get("jobs", 1), record["seeds"]
    _pictures(out, drawn, gain, seeds)
    health, timed = routing_health(arms["sparse"]), timing_summary(timing) if timing else None
    return {
        "kind": "comparison",
        "title": f"Sparse against dense: {record.get('recipe') or directory.name}",
        "subtitle": f"{len(seeds)} paired seed{'s' * (len(seeds) > 1)} per arm, validated on "
        f"{arms['sparse'][0].final['bytes']:,.0f} bytes that no run trained on. Contract: {record['contract']}.",
        "contract": record["contract"],
        "verdict": _verdict(record["contract"], gain, timed, judged, ledger),
        "ledger": ledger,
        "prices": describe_comparison(of_comparison(directory)).splitlines() if ledger else [],
        "promise": promised,
        "contracts": judged,
        "cautions": cautions(arms, summaries, record.get("learning_rate")),
        "jobs": jobs,
        "arms": summaries,
        "more_arms": more,
        "gain": {**asdict(gain), "verdict": gain.verdict, "notes": words.gain_notes(gain, noise)},
        "evaluation_noise": noise,
        "timing": timed,
        "speed": words.speed_notes(timed),
        "routing": health,
        "routing_notes": words.routing_notes(health),
        "doctor": doctors(drawn),
        "differences": _differences(arms["sparse"][0], arms["dense"][0]),
        "settings": config_table(drawn),
        "twin": record.get("twin"),
        "learning_rate": record.get("learning_rate"),
        "twin_notes": words.twin_notes(record, summaries),
        "command": record.get("command", ""),
        "environment": words.environment(arms["sparse"][0], seeds),
        "charts": charts(drawn, [(drawn[0], other) for other in drawn[1:]], jobs, past),
    }


def _verdict(contract: str, gain: Interval, timed: Json | None, judged: Json | None, ledger: Json | None) -> Json:
    """Who won, in a sentence, and what belongs beside it."""
    return {
        "name": gain.verdict,
        "sentence": words.verdict_sentence(contract, gain),
        "contracts": contract_lines(judged) if judged else [],
        "notes": [
            words.speed_in_short(timed),
            *(other_lines(judged) if judged else ()),
            *([cost_of_knowing(ledger)] if ledger else ()),
        ],
    }


def _differences(sparse: RunRows, dense: RunRows) -> list[Json]:
    """Settings in which the two arms differ, but their names."""
    return [
        {"field": name, "sparse": s, "dense": d}
        for name, s, d in differences(sparse.config, dense.config)
        if name != "name"
    ]


def _runs(directory: Path, record: Json) -> dict[str, list[RunRows]]:
    """The runs of every arm, in the order of the seeds: sparse and dense first."""
    names, seeds = record["arms"], record["seeds"]
    if set(names) != {"sparse", "dense"} or not len(names["sparse"]) == len(names["dense"]) == len(seeds) > 0:
        raise UserError(
            f"{directory / 'compare.json'}: arms must list one sparse and one dense run for each of the seeds."
        )
    every = {arm: names[arm] for arm in ("sparse", "dense")} | record.get("more_arms", {})
    arms = {arm: [read_run(directory / name) for name in folders] for arm, folders in every.items()}
    for runs in arms.values():
        for run, seed in zip(runs, seeds, strict=True):
            _require_finished(run)
            if run.config["seed"] != seed:
                raise UserError(
                    f"{run.path} has seed {run.config['seed']}, and {directory / 'compare.json'} says {seed}."
                )
    sizes = {run.final["bytes"] for runs in arms.values() for run in runs}
    if len(sizes) > 1:
        raise UserError(f"{directory}: runs were evaluated on different amounts of text ({sorted(sizes)} bytes).")
    return arms


def _require_finished(run: RunRows) -> None:
    if run.summary["status"] != "finished" or not run.final["final"]:
        raise UserError(
            f"{run.path} is {run.summary['status']} at step {run.summary['step']}, and only finished runs are "
            "compared: "
            "run the same compare command again to resume it, or look at its runs as they are: moe report RUN RUN ..."
        )


def _timing(path: Path) -> Json | None:
    """The interleaved timing of the two arms, if there is one."""
    timing = read_json(path, TIMING) if path.exists() else None
    if timing and not len(timing["sparse"]) == len(timing["dense"]) > 0:
        raise UserError(f"{path}: needs as many rounds of sparse as of dense, and at least one.")
    return timing


def _noise(arms: dict[str, list[RunRows]]) -> list[Json]:
    """Evaluation noise of every pair; empty unless all have it."""
    rows = [(d.final_rows, s.final_rows) for s, d in zip(arms["sparse"], arms["dense"], strict=True)]
    noise = [asdict(evaluation_noise(d, s)) for d, s in rows if d is not None and s is not None]
    return noise if len(noise) == len(rows) else []


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


def _pictures(directory: Path, arms: list[Arm], gain: Interval, seeds: list[int]) -> None:
    loss_pictures(arms[:2], directory)
    curves = {arm.name: [curve_of(run, 1e-6) for run in arm.runs] for arm in arms[:2]}
    plots.plot_gain(curves, gain, seeds, directory / "plots" / "gain.png")
    routing_pictures(arms[0].runs, directory)
