"""The doctor's rules about the router and the experts: whether the choice means anything, and what spoils it."""

from statistics import fmean

from moe.analysis.causes_load import (
    balance_weight,
    last_value,
    listed,
    where,
)
from moe.analysis.finding import Finding, LayerTrouble, how_sure, lasting, name_layers, of_layers, troubled
from moe.analysis.history import History
from moe.analysis.rows import Json
from moe.analysis.thresholds import limit


def router_frozen(history: History) -> list[Finding]:
    """A router matrix that is meant to learn, and does not move."""
    found = troubled(history.routing, lambda row: row.get("router_change"), limit("router_change"), above=False)
    if not found:
        return []
    return [
        of_layers(
            "router_frozen",
            found,
            what=f"the router of {where(history, found)} does not move",
            why="its weights are the same after a step as before it: they get no gradient, or no optimizer step",
            change="check that the router's weights are in the optimizer and that its gate passes a gradient "
            "(top_k=1 with weights that sum to one has none)",
        )
    ]


def rows_aligned(history: History) -> list[Finding]:
    """The rows of the router point the same way, so every expert gets nearly the same logit."""
    late = {layer: history.late(rows) for layer, rows in history.routing.items()}
    found = troubled(late, lambda row: row.get("row_cosine"), limit("row_cosine"))
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    entropy = last_value(history.routing[worst.layer], "router_entropy") or 0.0
    return [
        of_layers(
            "rows_aligned",
            found,
            what=(
                f"the router rows of {where(history, found)} are aligned: mean cosine {worst.value:.2f} "
                f"(chance: ±{worst.row.get('row_cosine_floor', 0):.2f})"
            ),
            why=f"all experts get nearly the same logit, and a token's scores are {entropy:.0%} of uniform: the choice is noise",
            change="start the router's rows apart, lower the balance weight, or add row orthogonality (model.moe.router=simbal)",
        )
    ]


def utility_dead(history: History) -> list[Finding]:
    """Experts that get tokens and contribute nothing."""
    found: list[LayerTrouble] = []
    who: dict[int, list[int]] = {}
    for layer, rows in sorted(history.health.items()):
        rows = [row for row in rows if row.get("output_norms")]
        weak = _weak(history.routing.get(layer, []), rows[-1]) if rows else []
        points = [(row["step"], all(_ratio(row, e) < limit("utility") for e in weak)) for row in rows]
        since = lasting(points, 1) if weak else None
        if since is None:
            continue
        who[layer] = weak
        ratio = max(min(_ratio(rows[-1], e) for e in weak), 1e-6)
        found.append(LayerTrouble(layer, since, ratio, how_sure(points, limit("utility") / ratio), rows[-1]))
    if not found:
        return []
    names = "; ".join(f"layer {layer}: {listed(who[layer])}" for layer in list(who)[:4])
    return [
        of_layers(
            "utility_dead",
            found,
            what=f"expert(s) whose load looks fine contribute nothing ({names}): output below {limit('utility'):.0%} of the median",
            why="the load is balanced by force while their output weights have gone to zero; no load metric can show it",
            change="draw these experts' output weights again from their layer's others, and lower the balance weight",
        )
    ]


def _ratio(row: Json, expert: int) -> float:
    ordered = sorted(row["output_norms"])
    middle = ordered[len(ordered) // 2]
    return row["output_norms"][expert] / middle if middle > 0 else 1.0


def _weak(routing: list[Json], row: Json) -> list[int]:
    counts = routing[-1]["counts"] if routing else [1] * len(row["output_norms"])
    fair = 0.1 * sum(counts) / len(counts)
    return [e for e in range(len(counts)) if _ratio(row, e) < limit("utility") and counts[e] >= fair]


def redundancy(history: History) -> list[Finding]:
    """Experts that do the same."""
    late = {layer: history.late(rows) for layer, rows in history.health.items()}
    found = troubled(late, lambda row: row.get("output_cosine"), limit("output_cosine"), least=1)
    pairs = troubled(late, lambda row: row.get("output_cosine_max"), limit("pair_cosine"), least=1)
    if not found and not pairs:
        return []
    worst = max(found or pairs, key=lambda one: one.value)
    i, j = worst.row["output_cosine_pair"]
    alike = (
        f"all experts alike: mean cosine {worst.value:.2f}"
        if found
        else f"experts {i} and {j} alike: cosine {worst.value:.3f}"
    )
    return [
        of_layers(
            "redundancy",
            found or pairs,
            what=f"{where(history, found or pairs)}: {alike} of their outputs for the same tokens",
            why="experts that start equal, are tied, or see the same tokens learn the same: more parameters, no more capacity",
            change="draw the experts' weights apart (also after upcycling), fewer or wider experts, a lower balance weight",
        )
    ]


def rounding(history: History) -> list[Finding]:
    """The router's choice is decided by rounding."""
    measured = {
        layer: [row for row in rows if row.get("rounding_flips") is not None] for layer, rows in history.health.items()
    }
    # few choices of a small probe set are at a tie: the mean over three evaluations
    smooth = {
        layer: [
            row | {"rounding_flips": fmean(near["rounding_flips"] for near in rows[max(0, i - 2) : i + 1])}
            for i, row in enumerate(rows)
        ]
        for layer, rows in measured.items()
    }
    found = troubled(smooth, lambda row: row["rounding_flips"], limit("rounding_flips"), least=2)
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    largest = last_value(history.routing.get(worst.layer, []), "logit_max") or 0.0
    return [
        of_layers(
            "precision",
            found,
            what=f"{worst.value:.1%} of the choices of layer {worst.layer} would differ in float64 ({where(history, found)})",
            why=f"the logits reach {largest:.3g}, and the router computes them too coarsely (bfloat16 keeps 8 bits)",
            change="compute router logits in float32; a z-loss (model.moe.router.z_weight=0.001) keeps them small",
        )
    ]


def logit_growth(history: History) -> list[Finding]:
    """Router logits that grow and grow."""
    found = []
    for layer, rows in sorted(history.routing.items()):
        rows = [row for row in history.late(rows) if row.get("logit_rms") is not None]
        if len(rows) < 4:
            continue
        half = rows[len(rows) // 2]["logit_rms"]
        points = [
            (r["step"], r["logit_max"] > limit("logit_max") and r["logit_rms"] > limit("logit_growth") * half)
            for r in rows
        ]
        since = lasting(points, 2)
        if since is not None:
            growth = rows[-1]["logit_rms"] / max(half, 1e-9)
            found.append(LayerTrouble(layer, since, growth, how_sure(points, growth / 2), rows[-1]))
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    return [
        of_layers(
            "logit_growth",
            found,
            what=f"router logits of {where(history, found)} grow: {worst.value:.1f} times in half the run, up to "
            f"{worst.row['logit_max']:.0f}",
            why="nothing holds them: scores saturate, and the router stops learning",
            change="model.moe.router.z_weight=0.001, or a lower learning rate",
        )
    ]


def churn(history: History) -> list[Finding]:
    """Tokens that keep changing experts late in the run."""
    late = {layer: history.late(rows, 0.6) for layer, rows in history.health.items()}

    def value(row: Json) -> float | None:
        chance = row.get("churn_by_chance")
        return row["churn"] / chance if chance and row.get("churn") is not None else None

    found = troubled(late, value, limit("churn"), least=2)
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    return [
        of_layers(
            "churn",
            found,
            what=f"{worst.row['churn']:.0%} of the choices of layer {worst.layer} change from one evaluation to the next "
            f"(random routing: {worst.row['churn_by_chance']:.0%})",
            why="the routing does not settle, so no expert can specialise",
            change="a lower learning rate, a larger batch, or a smaller bias_rate",
        )
    ]


def balance_dominates(history: History) -> list[Finding]:
    """The balance loss moves the router more than the language model does."""
    late = {layer: history.late(rows) for layer, rows in history.health.items()}
    found = troubled(late, lambda row: row.get("gradient_ratio"), limit("gradient_ratio"), least=2)
    if not found:
        return _over_constrained(history, late)
    worst = max(found, key=lambda one: one.value)
    return [
        of_layers(
            "balance_dominates",
            found,
            what=f"the balance loss's gradient at the router of layer {worst.layer} is {worst.value:.3g} times the language "
            f"model's ({where(history, found)})",
            why=f"its weight {balance_weight(history)} outweighs what the experts' outputs could teach the router",
            change=_lower_weight(history, worst.value),
        )
    ]


def _over_constrained(history: History, late: dict[int, list[Json]]) -> list[Finding]:
    found = troubled(late, lambda row: row.get("gradient_ratio"), limit("over_constrained_ratio"), least=2)
    at_floor = []
    for one in found:
        last = history.routing.get(one.layer, [])[-3:]
        if last and all(row["max_vio"] < limit("floor_factor") * row["max_vio_floor"] for row in last):
            at_floor.append(one)
    if not at_floor:
        return []
    worst = max(at_floor, key=lambda one: one.value)
    return [
        of_layers(
            "over_constrained",
            at_floor,
            sure="possible",
            what=f"{where(history, at_floor)}: the load is as even as chance allows, and the balance loss still pulls "
            f"{worst.value:.2g} times as hard as the language model",
            why="perfect balance leaves no room for experts that some tokens need more than others",
            change=_lower_weight(history, worst.value),
        )
    ]


def _lower_weight(history: History, ratio: float) -> str:
    weight = balance_weight(history)
    if not weight:
        return "lower the balancing loss's weight"
    k, layers = history.config["model"]["moe"]["top_k"], len(history.routing)
    return (
        f"model.moe.router.balance.weight={weight / ratio:.1g}; if {weight:g} was taken from a code base that does not "
        f"divide the load by K, its balance loss is K={k} times ours and the weight here is {weight:g}·{k}={weight * k:g}; "
        f"from one that sums over layers, {weight:g}·{layers}={weight * layers:g}"
    )


def convention(history: History) -> list[Finding]:
    """The logged balance loss is a multiple of what the loads say it is."""
    k, layers = history.config["model"]["moe"]["top_k"], len(history.routing)
    logged = {row["step"]: (row.get("losses") or {}).get("balance") for row in history.metrics}
    expected: dict[int, list[float]] = {}
    for rows in history.routing.values():
        for row in rows:
            if row.get("balance_value"):
                expected.setdefault(row["step"], []).append(row["balance_value"])
    names = {k: "the load is not divided by K", layers: "layers are summed", k * layers: "both"}
    ratios = [
        (step, value / (sum(values) / len(values)))
        for step, values in sorted(expected.items())
        if (value := logged.get(step)) and len(values) == layers
    ]
    for factor, name in names.items():
        points = [(step, abs(ratio / factor - 1) < limit("convention")) for step, ratio in ratios]
        since = lasting(points, 3) if factor > 1 else None
        if since is not None:
            weight = balance_weight(history) or 0.0
            return [
                Finding(
                    cause="convention",
                    layers=(),
                    since=since,
                    sure=how_sure(points, 2),
                    what=f"the balance loss reads {ratios[-1][1]:.2f} times what the loads give (1.0 is balance here)",
                    why=f"it is in another project's convention ({name}: {factor} times ours)",
                    change=f"divide the loss by {factor}, or its weight: {weight:g} there is {weight * factor:g} here",
                )
            ]
    return []


def uninformative(history: History) -> list[Finding]:
    """The probe found that another routing of the same experts, or their mean, does as well."""
    lost = [row for row in history.probes if row["low"] <= limit("probe_gain")]
    routed = [row for row in lost if row["kind"] in ("random", "hash")]
    return [*_uninformative(history, routed), *_mergeable([row for row in lost if row["kind"] == "merged"], history)]


def _uninformative(history: History, rows: list[Json]) -> list[Finding]:
    if not rows:
        return []
    whole = [row for row in rows if row.get("layer") is None]
    worst = min(whole or rows, key=lambda row: row["mean"])
    layers = sorted(history.routing) if whole else sorted({row["layer"] for row in rows})
    return [
        Finding(
            cause="uninformative",
            layers=tuple(layers),
            since=worst["step"],
            sure="certain" if worst["high"] <= limit("probe_gain") else "likely",
            what=f"with {worst['kind']} routing of the same experts in {name_layers(layers, len(history.routing))} "
            f"the loss changes by {_interval(worst)}",
            why="which expert a token meets does not matter there: the experts do the same, or the gate is all that counts",
            change="train a hash twin (model.moe.router=hash) to see whether a learned router pays at all; "
            "a lower balance weight, or more steps, before more experts",
        )
    ]


def _mergeable(rows: list[Json], history: History) -> list[Finding]:
    return [
        Finding(
            cause="redundancy",
            layers=tuple(sorted(history.routing)),
            since=row["step"],
            sure="likely",
            what=f"with every expert replaced by the mean of its layer's the loss changes by {_interval(row)}",
            why="the experts have not become different: one of them would do",
            change="fewer or wider experts, a lower balance weight",
        )
        for row in rows
    ]


def _interval(row: Json) -> str:
    return f"only {row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] nats per token"
