"""Before a large run: smaller sparse models and their dense twins are trained, and say whether the large one will pay.

Everything is a file in one directory: `<size>-<arm>-seed<n>.json` (config), `.log`, the run directories, timing.json,
ladder.json, ladder.md, curves.csv. Doing the same again reuses finished runs and resumes the others.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moe.analysis.contracts import log_ratio
from moe.analysis.ladder_answer import Target, Tax, answer
from moe.analysis.ladder_files import ladder_of_runs, write_curves
from moe.analysis.ladder_page import describe_answer, describe_plan, write_page
from moe.analysis.ledger import project
from moe.analysis.rows import read_json
from moe.config.load import dump
from moe.config.schema import Run
from moe.cost import train_flops_per_token
from moe.errors import UserError
from moe.experiments.ladder_plan import (
    DENSE,
    Options,
    arms_of_rung,
    check_options,
    estimate_hours,
    plan_of,
    planned_run,
    target_of,
)
from moe.experiments.planned import TIMING, TRAIN, Planned, find_rate, time_steps, train
from moe.experiments.promise import LADDER, config_of
from moe.experiments.rungs import (
    Rung,
    active_size,
    dense_of,
    expert_counts,
    rungs,
)
from moe.files import write_json

Json = dict[str, Any]
CONTRACT = "active_parameters"


def climb(
    recipe: str,
    overrides: list[str],
    out: Path,
    options: Options,
    *,
    jobs: int = 1,
    dry_run: bool = False,
    console: Console,
    train_command: Sequence[str] = TRAIN,
    timing_command: Sequence[str] = TIMING,
) -> Path | None:
    """Plan, train and judge the ladder of a recipe; returns the path of ladder.json, or None after a dry run.

    Raises UserError for what the user can correct, before any work where it can be known; TrainingStopped if a run fails.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    target = target_of(recipe, overrides, jobs)
    experts = options.experts or expert_counts(target.model.moe)  # type: ignore[arg-type]
    check_options(target, options, experts, jobs)
    ladder = rungs(
        target, options.widths, experts, tokens=options.tokens, tokens_per_parameter=options.tokens_per_parameter
    )
    plan = plan_of(target, ladder, options)
    say(describe_plan(plan))
    if plan["share"] > options.max_share:
        raise UserError(
            f"this ladder would take {plan['share']:.1%} of the target run's FLOPs, --max-share is {options.max_share:.1%}: "
            "give smaller --widths, fewer --tokens-per-parameter or --seeds, or a larger --max-share."
        )
    if dry_run:
        return None
    out.mkdir(parents=True, exist_ok=True)
    own = target.model.moe.num_experts  # type: ignore[union-attr]
    top = ladder[-1]
    timed = None
    if options.timing_rounds:
        arms = {"sparse": str(own if own in top.sparse else max(experts)), "dense": DENSE}
        # names of their own: the runs' learning rates may not be known yet
        sparse, dense = (planned_run(out, top, arm, target.seed, label=f"timing-{kind}") for kind, arm in arms.items())
        for planned in (sparse, dense):
            _write_config(planned)
        time_steps(out, sparse, dense, options.timing_rounds, timing_command, say, threads=target.train.threads)
        timed = read_json(out / "timing.json", {"sparse": (list,), "dense": (list,)})
        say(estimate_hours(plan, (sparse, dense), timed))
    plans = _train(out, ladder, options, target.seed, jobs, train_command, say)
    record = _judge(recipe, overrides, target, out, ladder, plans, plan, options, timed)
    write_json(out / LADDER, record)
    write_page(record, out)
    say(describe_answer(record))
    say(f"ladder: {out / LADDER}, {out / 'ladder.md'}")
    return out / LADDER


def _write_config(planned: Planned) -> None:
    write_json(planned.config, {"schema_version": 1, "run": json.loads(json.dumps(dump(planned.run)))})


def _train(
    out: Path,
    ladder: list[Rung],
    options: Options,
    first: int,
    jobs: int,
    command: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, dict[str, list[Planned]]]:
    """Train every rung, smallest first; returns the finished runs by size and arm, one per seed."""
    plans: dict[str, dict[str, list[Planned]]] = {}
    for rung in ladder:
        lr, reused = 0.0, ""
        if options.lr_grid:
            tries = {lr: planned_run(out, rung, DENSE, first, lr, f"{rung.label}-lr-{lr:g}") for lr in options.lr_grid}
            lr = find_rate(tries, jobs=jobs, command=command, say=say)["value"]
            reused = tries[lr].directory.name
        plans[rung.label] = {
            arm: [
                planned_run(out, rung, arm, first + i, lr, reused if arm == DENSE and i == 0 else "")
                for i in range(options.seeds)
            ]
            for arm in arms_of_rung(rung)
        }
    everything = [planned for arms in plans.values() for runs in arms.values() for planned in runs]
    train(everything, jobs=jobs, command=command, say=say)
    return plans


def _tax(options: Options, timed: Json | None) -> tuple[Tax, str]:
    if options.tax:
        return Tax(options.tax, options.tax, options.tax), "given"
    assert timed is not None
    found = log_ratio(timed["dense"], timed["sparse"], options.confidence)
    ends = [found.mean if end is None else end for end in (found.low, found.high)]
    return Tax(math.exp(found.mean), math.exp(ends[0]), math.exp(ends[1])), "measured on the largest rung"


def _judge(
    recipe: str,
    overrides: list[str],
    target: Run,
    out: Path,
    ladder: list[Rung],
    plans: dict[str, dict[str, list[Planned]]],
    plan: Json,
    options: Options,
    timed: Json | None,
) -> Json:
    """What ladder.json holds."""
    moe = target.model.moe
    assert moe is not None
    folders = {
        rung.label: {arm: [p.directory for p in runs] for arm, runs in plans[rung.label].items()} for rung in ladder
    }
    sizes = {rung.label: float(rung.size) for rung in ladder}
    found, rows, bits = ladder_of_runs(folders, sizes, moe.top_k)
    # The answer is about the target's size on the tokens that the rungs' rule gives it.
    tokens = options.tokens or plan["tokens_per_parameter"] * active_size(target.model)
    asked = Target(
        active_size(target.model),
        moe.num_experts / moe.top_k,
        tokens * train_flops_per_token(dense_of(target).model, target.data.sequence_length),
    )
    tax, where = _tax(options, timed)
    result = answer(
        found,
        {float(rung.size): rung.compute for rung in ladder},
        asked,
        tax,
        break_even=options.break_even,
        confidence=options.confidence,
    )
    write_curves(out / "curves.csv", folders, sizes, moe.top_k, moe.every)
    return {
        "schema_version": 1,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime()),
        "recipe": recipe,
        "overrides": overrides,
        "command": _command_line(),
        "config": config_of(target),
        "contract": CONTRACT,
        "unit": "nats per token",
        "bits_per_byte": bits,
        "tokens": tokens,
        "plan": plan,
        "runs": rows,
        "tax_from": where,
        "summary": f"{len(rows)} runs of {len(ladder)} sizes, the largest {math.exp(-result['reach']):.2g} of the target's",
        "answer": result,
        "cost": _cost(out, plan),
    }


def _cost(out: Path, plan: Json) -> Json:
    """What the answer took, by the runs' ledgers, and as a share of the target run's FLOPs; by the plan where they are missing."""
    if not any(out.rglob("ledger.jsonl")):
        return {"flops": plan["flops"], "share": plan["share"], "from": "the plan", "total": None}
    total = project([out])["total"]
    flops = total["flops"]["value"]
    return {"flops": flops, "share": flops / plan["target"]["flops"], "from": "the ledgers", "total": total}


def _command_line() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["moe" if program in ("__main__.py", "cli.py") else program, *sys.argv[1:]])
