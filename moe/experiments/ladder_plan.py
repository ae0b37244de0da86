"""What a ladder is going to train and what that takes, before anything is started: options, rules, counts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.analysis.ladder_answer import expected_width
from moe.config.load import load
from moe.config.schema import Run
from moe.cost import train_flops_per_token
from moe.cost.totals import totals
from moe.errors import ConfigError
from moe.experiments.arms import with_rate
from moe.experiments.planned import Planned
from moe.experiments.processes import cpu_count
from moe.experiments.rungs import BATCH_POWER, RATE_POWER, WIDTHS, Rung, active_size, tokens_of

Json = dict[str, Any]
DENSE = "dense"


@dataclass(frozen=True)
class Options:
    """What a ladder is made of, and what it is held against."""

    widths: tuple[float, ...] = WIDTHS
    """Shares of the target's width, three or more."""
    experts: tuple[int, ...] = ()
    """Numbers of experts, three or more; empty: the recipe's own, a half and a quarter of it."""
    seeds: int = 1
    """Runs of each arm, from the recipe's seed on; paired, because a seed is an order of batches."""
    tokens: float = 0.0
    """Tokens of every run; 0 for a number per active parameter."""
    tokens_per_parameter: float = 0.0
    """Tokens for each active parameter; 0 for the target's own ratio."""
    lr_grid: tuple[float, ...] = ()
    """Learning rates that each size's dense run tries with the first seed; none: they follow from the recipe's own."""
    max_share: float = 0.1
    """Largest share of the target run's FLOPs that the ladder may take."""
    break_even: float = 0.0
    """Gain at equal time, nats per token, from which the sparse model is worth its trouble."""
    tax: float = 0.0
    """Step time over the dense twin's, where it is known from elsewhere; 0 measures it on the largest rung."""
    timing_rounds: int = 10
    """Timed turns for that."""
    confidence: float = 0.9
    """Of the interval."""


def target_of(recipe: str, overrides: list[str], jobs: int) -> Run:
    """The recipe, with a number of threads that suits `jobs` runs side by side where it leaves that open. Raises ConfigError."""
    run = load(recipe, overrides)
    if run.model.moe is None:
        raise ConfigError(
            f"{recipe} has no expert layers (model.moe), so there is no gain to predict: name a sparse recipe"
        )
    return replace(run, train=replace(run.train, threads=run.train.threads or max(1, cpu_count() // jobs)))


def check_options(target: Run, options: Options, experts: Sequence[int], jobs: int) -> None:
    """Raise ConfigError for what no ladder can be made of."""
    top_k = target.model.moe.top_k  # type: ignore[union-attr]
    if len(options.widths) < 3 or len(set(experts)) < 3:
        raise ConfigError(
            f"a ladder needs 3 sizes and 3 numbers of experts, found {len(options.widths)} and {len(set(experts))}: "
            "e.g. --widths 1/4,1/3,1/2 --experts 4,8,16"
        )
    if not all(0 < width < 1 for width in options.widths):
        raise ConfigError(
            f"--widths must be shares of the target's width below 1, found {list(options.widths)}: e.g. 1/4"
        )
    if min(experts) <= top_k:
        raise ConfigError(f"--experts ({min(experts)}) must be more than top_k ({top_k}): as many are a dense model")
    if options.tokens and options.tokens_per_parameter:
        raise ConfigError("give --tokens or --tokens-per-parameter, not both: each fixes how long a rung trains")
    if options.tax and not 0.1 <= options.tax <= 100:
        raise ConfigError(f"--tax ({options.tax:g}) must be a ratio of step times: e.g. 1.3")
    if not options.tax and not options.timing_rounds:
        raise ConfigError("--timing-rounds 0 measures no step-time tax: give it as --tax, e.g. --tax 1.3")
    if jobs < 1 or options.seeds < 1:
        raise ConfigError(f"--jobs ({jobs}) and --seeds ({options.seeds}) must be at least 1")


def arms_of_rung(rung: Rung) -> dict[str, Run]:
    """The runs of a size by arm: `dense`, and numbers of experts."""
    return {DENSE: rung.dense, **{str(count): run for count, run in rung.sparse.items()}}


def planned_run(out: Path, rung: Rung, arm: str, seed: int, lr: float = 0.0, label: str = "") -> Planned:
    """One run of a rung, at another learning rate or under another name where given."""
    run = arms_of_rung(rung)[arm]
    run = with_rate(run, lr) if lr else run
    name = f"{rung.label}-{arm if arm == DENSE else f'e{arm}'}-seed{seed}"
    return Planned(out / (label or name), replace(run, seed=seed, name=f"{run.name}-{name}"))


def plan_of(target: Run, ladder: list[Rung], options: Options) -> Json:
    """What is going to be trained and what it takes, counted."""
    moe = target.model.moe
    assert moe is not None
    rows = [
        {
            "label": rung.label,
            "dim": rung.dense.model.dim,
            "num_layers": rung.dense.model.num_layers,
            "active_parameters": rung.size,
            "experts": list(rung.sparse),
            "tokens": rung.tokens,
            "steps": rung.dense.train.steps,
            "batch_rows": rung.dense.train.batch_rows,
            "learning_rate": rung.dense.train.optimizer.lr,
            "compute": rung.compute,
            "flops": {arm: totals(run).flops for arm, run in arms_of_rung(rung).items()},
        }
        for rung in ladder
    ]
    tuning = sum(max(0, len(options.lr_grid) - 1) * row["flops"][DENSE] for row in rows)
    flops = options.seeds * sum(sum(row["flops"].values()) for row in rows) + tuning
    whole = totals(target).flops
    sizes, size = [rung.size for rung in ladder], active_size(target.model)
    of_gain, of_noise = expected_width(sizes, size, options.seeds, options.confidence)
    return {
        "target": {
            "name": target.name,
            "active_parameters": size,
            "tokens": tokens_of(target),
            "tokens_per_parameter": tokens_of(target) / size,
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "flops": whole,
        },
        "rungs": rows,
        "tokens_per_parameter": None if options.tokens else ladder[-1].tokens / ladder[-1].size,
        "seeds": options.seeds,
        "runs": sum(len(row["flops"]) for row in rows) * options.seeds + max(0, len(options.lr_grid) - 1) * len(rows),
        "flops": flops,
        "share": flops / whole,
        "reach": math.log(size / ladder[-1].size),
        "expected": {"of_gain": of_gain, "of_noise": of_noise},
        "lr_grid": list(options.lr_grid),
        "rules": {"rate_power": RATE_POWER, "batch_power": BATCH_POWER, "source": "arXiv 2401.02954, equation 1"},
        "hours": None,
    }


def estimate_hours(plan: Json, pair: Sequence[Planned], timed: Json) -> str:
    """The plan's hours from the speed of the largest rung, entered into the plan and said."""
    rate = {}
    for kind, planned in zip(("sparse", "dense"), pair, strict=True):
        flops = train_flops_per_token(planned.run.model, planned.run.data.sequence_length)
        rate[kind] = flops * statistics.median(timed[kind])
    seconds = 0.0
    for row in plan["rungs"]:
        for arm, flops in row["flops"].items():
            seconds += flops * plan["seeds"] / rate["dense" if arm == DENSE else "sparse"]
    plan["hours"] = seconds / 3600
    return f"about {seconds / 3600:.2g} hours on this machine, at the speed of the largest rung (small ones are slower per FLOP)"
