"""The arms of a comparison as configs: the recipe, its dense twins, twins whose router learns nothing; and their learning rates."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

from moe.analysis.contract_report import ROUTERLESS
from moe.config.load import resolve_router
from moe.config.schema import MoE, Run, ffn_hidden
from moe.cost import dense_total_twin, dense_twin, relative_difference, train_flops_per_token

Json = dict[str, Any]
P = TypeVar("P")


def with_rate(run: Run, lr: float) -> Run:
    return replace(run, train=replace(run.train, optimizer=replace(run.train.optimizer, lr=lr)))


def _routed_rows(moe: MoE) -> float:
    """Expected rows per token that the logs will count: those computed only for a gradient estimator are not."""
    router = moe.router
    if "estimator" in {field.name for field in fields(router)}:  # type: ignore[arg-type]
        router = replace(router, estimator="chosen")  # type: ignore[type-var]
    return router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)


def twin_record(sparse: Run, dense: Run) -> Json:
    moe = sparse.model.moe
    assert moe is not None
    length = sparse.data.sequence_length
    return {
        "ffn_hidden": [ffn_hidden(dense.model, layer) for layer in range(dense.model.num_layers)],
        "flops_sparse": train_flops_per_token(sparse.model, length),
        "flops_dense": train_flops_per_token(dense.model, length),
        "relative_difference": relative_difference(sparse, dense),
        "rows_per_token": _routed_rows(moe),
    }


def arms_of(sparse: Run, contracts: bool, decompose: bool) -> dict[str, Run]:
    """What is trained: the recipe, its dense twin, and with `contracts` or `decompose` the twins that those need."""
    arms = {"sparse": sparse, "dense": dense_twin(sparse)}
    if contracts:
        arms["total"] = dense_total_twin(sparse)
    moe = sparse.model.moe
    assert moe is not None
    for name in ROUTERLESS if decompose else ():
        router = resolve_router(name).Config()
        router.check(num_experts=moe.num_experts, top_k=moe.top_k)
        arms[name] = replace(sparse, model=replace(sparse.model, moe=replace(moe, router=router)))
    return arms


def tuned(
    arms: dict[str, Run],
    rates: list[float],
    each: bool,
    plan: Callable[[Run, str, str], P],
    find: Callable[[dict[float, P]], Json],
    name: Callable[[P], str],
) -> tuple[dict[str, Run], Json, dict[str, str]]:
    """The arms at their learning rates, what is said of those, and the run that each tuned arm already has with the first seed."""
    at_rate, labels, rate = dict(arms), {}, {"value": arms["sparse"].train.optimizer.lr, "found_by": "the recipe"}
    for arm in (arms if each else ("dense",)) if rates else ():
        prefix = "" if arm == "dense" else f"{arm}-"
        plans = {lr: plan(with_rate(arms[arm], lr), arm, f"{prefix}lr-{lr:g}") for lr in rates}
        found = find(plans)
        at_rate[arm], labels[arm] = with_rate(arms[arm], found["value"]), name(plans[found["value"]])
        rate = found if arm == "dense" else rate
    if rates and each:
        rate["per_arm"] = {arm: run.train.optimizer.lr for arm, run in at_rate.items()}
        rate["found_by"] = "lowest final loss of each arm with the first seed"
    elif rates:
        at_rate = {arm: with_rate(run, rate["value"]) for arm, run in arms.items()}
        rate["found_by"] = "lowest final loss of the dense arm with the first seed"
    return at_rate, rate, labels
