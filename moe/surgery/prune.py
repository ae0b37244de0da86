"""`moe prune`: a run with fewer experts, made from a trained one; `moe resume` on it is the recovery training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from moe.config.load import load, router_name
from moe.config.schema import MoE, Run
from moe.data import prepare
from moe.errors import ConfigError, UserError
from moe.model import Transformer
from moe.surgery.scores import SCORES, LayerUse, Score, calibration_batches, measure_use
from moe.surgery.select import best, groups_by_output, groups_by_router, keep_experts, merge_experts
from moe.surgery.start import Source, begin_run, model_of, read_run

Method = Literal["drop", "merge", "cluster"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Plan:
    """How many experts stay, and how they are chosen."""

    keep: float = 0.5
    """Share of each layer's experts that stays, rounded up."""
    method: Method = "drop"
    """Drop by score; merge by likeness of router logits around the most used; merge clusters of mean outputs."""
    score: Score = "reap"
    rows: int = 64
    """Rows of training text to look at."""
    seed: int = 0
    """Of the text and of random scores."""

    def check(self, moe: MoE | None, folder: Path) -> MoE:
        """The expert layers that this can be done to. Raises UserError or ConfigError."""
        if moe is None:
            raise UserError(f"{folder} is a dense model, and this prunes experts: give the folder of a sparse run")
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep ({self.keep}) must be between 0 and 1: use e.g. 0.5 for half of the experts")
        for value, known in ((self.method, METHODS), (self.score, SCORES)):
            if value not in known:
                raise ConfigError(f"{value!r} is unknown: choose {', '.join(known)}")
        if len(set(moe.expert_widths)) > 1:
            raise ConfigError(
                "experts of different widths (moe.expert_widths) cannot be renumbered here: train with one width"
            )
        return moe

    def count(self, num_experts: int) -> int:
        """Experts that stay of `num_experts`."""
        return math.ceil(num_experts * self.keep - 1e-9)


def pruned_run(run: Run, count: int) -> Run:
    """The settings with `count` experts a layer; at most as many are chosen per token as there are."""
    assert run.model.moe is not None
    moe = replace(run.model.moe, num_experts=count, top_k=min(run.model.moe.top_k, count), expert_widths=())
    hidden = run.model.moe.expert_widths[0] if run.model.moe.expert_widths else moe.expert_hidden
    return replace(run, model=replace(run.model, moe=replace(moe, expert_hidden=hidden)))


def prune_tensors(
    tensors: Mapping[str, Tensor], uses: Mapping[int, LayerUse], plan: Plan, count: int
) -> tuple[dict[str, Tensor], dict[int, list[list[int]]]]:
    """The state with `count` experts a layer, and by block which old experts each new one is made of."""
    if plan.method == "drop":
        kept = {layer: best(use.score(plan.score, seed=plan.seed, layer=layer), count) for layer, use in uses.items()}
        return keep_experts(tensors, kept), {layer: [[e] for e in order] for layer, order in kept.items()}
    find = groups_by_router if plan.method == "merge" else groups_by_output
    groups = {layer: find(use, count) for layer, use in uses.items()}
    return merge_experts(tensors, groups, uses), groups


def look(source: Source, plan: Plan) -> dict[int, LayerUse]:
    """What the run's experts do with its training text."""
    model = source.model()
    for layer, experts in model.moe_layers():
        if not hasattr(experts.router, "weight_ED"):
            name = router_name(experts.router.config) if hasattr(experts.router, "config") else "of this run"
            raise ConfigError(
                f"the router {name} of layer {layer} has no row per expert, so none can be taken out: pruning needs a linear one"
            )
    corpus = prepare(source.run.data)
    batches = calibration_batches(corpus, plan.rows, seed=source.run.seed + plan.seed)
    return measure_use(model, batches, rows=plan.rows)


def prune(folder: Path, out: Path, plan: Plan, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Write `out`, a run that starts from the pruned newest checkpoint of `folder`; returns what goes into origin.json.

    Overrides change the new run's settings, train.steps for the recovery training say.
    """
    source = read_run(folder)
    moe = plan.check(source.run.model.moe, folder)
    count = plan.count(moe.num_experts)
    run = load(pruned_run(source.run, count), overrides)
    uses = look(source, plan)
    tensors, groups = prune_tensors(source.tensors, uses, plan, count)
    origin = {
        "made_by": "prune",
        "source": str(folder),
        "source_step": source.step,
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
        "experts": {str(layer): of_layer for layer, of_layer in groups.items()},
        "scores": {
            str(layer): use.score(plan.score, seed=plan.seed, layer=layer).tolist() for layer, use in uses.items()
        },
    }
    begin_run(out, run, tensors, origin)
    return origin


def pruned_model(source: Source, uses: Mapping[int, LayerUse], plan: Plan) -> Transformer:
    """The pruned model alone, for those who compare many."""
    moe = plan.check(source.run.model.moe, source.folder)
    count = plan.count(moe.num_experts)
    tensors, _ = prune_tensors(source.tensors, uses, plan, count)
    return model_of(load(pruned_run(source.run, count)), tensors)


def describe(origin: dict[str, Any], out: Path) -> str:
    """What was done, by layer."""
    plan = origin["plan"]
    by = f"by {plan['score']}" if plan["method"] == "drop" else ""
    lines = [f"{out}: experts of {origin['source']} at step {origin['source_step']}, {plan['method']} {by}".rstrip()]
    for layer, groups in origin["experts"].items():
        total = len(origin["scores"][layer])
        lines.append(f"layer {layer}: {len(groups)} of {total}: {' '.join('+'.join(map(str, g)) for g in groups)}")
    return "\n".join(lines)
