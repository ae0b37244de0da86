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
from moe.train.record import require_free

Method = Literal["drop", "merge", "cluster"]
Budget = Literal["uniform", "global"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Plan:
    """How many experts stay, and how they are chosen."""

    keep: float = 0.5
    """Share of the experts that stays, rounded up."""
    budget: Budget = "uniform"
    """The same number in every layer; or the best of all layers, by score over the layer's mean, and top_k in each at least."""
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
        for value, known in ((self.method, METHODS), (self.score, SCORES), (self.budget, get_args(Budget))):
            if value not in known:
                raise ConfigError(f"{value!r} is unknown: choose {', '.join(known)}")
        if len(set(moe.expert_widths)) > 1:
            raise ConfigError(
                "experts of different widths (moe.expert_widths) cannot be renumbered here: train with one width"
            )
        groups = limiting_groups(moe)
        if groups > 1 and (self.method, self.budget) != ("drop", "uniform"):
            raise ConfigError(
                f"the router takes experts of the best {getattr(moe.router, 'top_groups', 1)} of {groups} groups, so as many must "
                f"stay in each, which method {self.method} with budget {self.budget} cannot do: use method drop, budget uniform"
            )
        return moe

    def scores(self, uses: Mapping[int, LayerUse]) -> dict[int, Tensor]:
        """Each layer's scores."""
        return {layer: use.score(self.score, seed=self.seed, layer=layer) for layer, use in uses.items()}

    def counts(self, uses: Mapping[int, LayerUse], top_k: int, groups: int = 1) -> dict[int, int]:
        """Experts that stay in each layer; with groups the same number of each."""
        if self.budget == "uniform":
            sizes = {layer: len(use.rows_E) // groups for layer, use in uses.items()}
            return {layer: groups * math.ceil(size * self.keep - 1e-9) for layer, size in sizes.items()}
        scores = {layer: score_E / score_E.mean() for layer, score_E in self.scores(uses).items()}
        total = math.ceil(sum(map(len, scores.values())) * self.keep - 1e-9)
        counts = dict.fromkeys(scores, top_k)
        # each layer's best top_k stay in any case; the others of all layers compete
        rest = sorted(
            (
                (float(s), layer)
                for layer, score_E in scores.items()
                for s in score_E.sort(descending=True).values[top_k:]
            ),
            key=lambda item: (-item[0], item[1]),
        )
        for _, layer in rest[: max(0, total - sum(counts.values()))]:
            counts[layer] += 1
        return counts


def limiting_groups(moe: MoE) -> int:
    """Groups of consecutive experts of which a token gets only the best (DeepSeek); 1 where there is no such limit."""
    groups = getattr(moe.router, "num_groups", 1)
    return groups if getattr(moe.router, "top_groups", groups) < groups else 1


def pruned_run(run: Run, counts: Mapping[int, int]) -> Run:
    """The settings with so many experts in each layer; at most as many are chosen per token as the fewest."""
    assert run.model.moe is not None
    each = tuple(count for _, count in sorted(counts.items()))
    moe = replace(
        run.model.moe,
        num_experts=max(each),
        num_experts_per_layer=each if len(set(each)) > 1 else (),
        top_k=min(run.model.moe.top_k, *each),
        expert_widths=(),
    )
    hidden = run.model.moe.expert_widths[0] if run.model.moe.expert_widths else moe.expert_hidden
    return replace(run, model=replace(run.model, moe=replace(moe, expert_hidden=hidden)))


def prune_tensors(
    tensors: Mapping[str, Tensor],
    uses: Mapping[int, LayerUse],
    plan: Plan,
    counts: Mapping[int, int],
    groups_of_experts: int = 1,
) -> tuple[dict[str, Tensor], dict[int, list[list[int]]]]:
    """The state with so many experts in each layer, and by block which old experts each new one is made of."""
    if plan.method == "drop":
        kept = {layer: best(score_E, counts[layer], groups_of_experts) for layer, score_E in plan.scores(uses).items()}
        return keep_experts(tensors, kept), {layer: [[e] for e in order] for layer, order in kept.items()}
    find = groups_by_router if plan.method == "merge" else groups_by_output
    groups = {layer: find(use, counts[layer]) for layer, use in uses.items()}
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
    require_free(out)
    source = read_run(folder)
    moe = plan.check(source.run.model.moe, folder)
    uses = look(source, plan)
    counts = plan.counts(uses, moe.top_k, limiting_groups(moe))
    run = load(pruned_run(source.run, counts), overrides)
    assert run.model.moe is not None
    tensors, groups = prune_tensors(source.tensors, uses, plan, counts, limiting_groups(moe))
    origin = {
        "made_by": "prune",
        "source": str(folder),
        "source_step": source.step,
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
        "top_k": {"before": moe.top_k, "after": run.model.moe.top_k},
        "experts": {str(layer): of_layer for layer, of_layer in groups.items()},
        "scores": {str(layer): score_E.tolist() for layer, score_E in plan.scores(uses).items()},
    }
    begin_run(out, run, tensors, origin)
    return origin


def pruned_model(source: Source, uses: Mapping[int, LayerUse], plan: Plan) -> Transformer:
    """The pruned model alone, for those who compare many."""
    moe = plan.check(source.run.model.moe, source.folder)
    counts = plan.counts(uses, moe.top_k, limiting_groups(moe))
    tensors, _ = prune_tensors(source.tensors, uses, plan, counts, limiting_groups(moe))
    return model_of(load(pruned_run(source.run, counts)), tensors)


def describe(origin: dict[str, Any], out: Path) -> str:
    """What was done, by layer."""
    plan = origin["plan"]
    by = f"by {plan['score']}" if plan["method"] == "drop" else ""
    lines = [f"{out}: experts of {origin['source']} at step {origin['source_step']}, {plan['method']} {by}".rstrip()]
    for layer, groups in origin["experts"].items():
        total = len(origin["scores"][layer])
        lines.append(f"layer {layer}: {len(groups)} of {total}: {' '.join('+'.join(map(str, g)) for g in groups)}")
    top_k = origin["top_k"]
    if top_k["after"] != top_k["before"]:
        lines.append(f"experts per token: {top_k['after']}, {top_k['before']} before (top_k)")
    return "\n".join(lines)
