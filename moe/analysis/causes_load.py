"""The doctor's rules about the load: who gets tokens, how many, and which are lost."""

from collections.abc import Sequence

from moe.analysis.finding import Finding, LayerTrouble, lasting, name_layers, of_layers, troubled
from moe.analysis.history import History
from moe.analysis.rows import Json
from moe.analysis.thresholds import limit


def collapse(history: History) -> list[Finding]:
    """Most tokens go to a few of the experts."""
    settled = {layer: history.settled(rows) for layer, rows in history.routing.items()}
    least = max((history.lasting(rows) for rows in settled.values()), default=4)
    share = limit("effective_share")
    found = troubled(
        settled,
        lambda row: row["effective_experts"] / len(row["counts"]),
        share,
        above=False,
        least=least,
        since=history.routing,
    )
    found = [one for one in found if not _cut_off(history.settled(history.routing[one.layer]))[0]]
    if not found:
        return []
    E = experts(history)
    worst = min(found, key=lambda one: one.value)
    weight = balance_weight(history)
    return [
        of_layers(
            "collapse",
            found,
            what=(
                f"{where(history, found)} collapsed onto {worst.value * E:.1f} of {E} experts"
                + (f" (layer {worst.layer} is the worst)" if len(found) > 1 else "")
            ),
            why=_why_unbalanced(history, worst.layer),
            change=(
                f"give the load a stronger pull: model.moe.router.balance.weight={max(0.01, 10 * weight):g}"
                if weight is not None
                else "model.moe.router=topk, or loss_free"
            )
            + ", or balance without a loss (model.moe.router=loss_free)",
        )
    ]


def _why_unbalanced(history: History, layer: int) -> str:
    weight = balance_weight(history)
    ratio = last_value(history.health.get(layer, []), "gradient_ratio")
    if weight == 0:
        return "the balance loss has weight 0, so nothing pulls the load back"
    if weight is None:
        return "this router has no balance loss"
    if ratio is not None:
        return f"the balance loss has weight {weight:g}, and its gradient at the router is {ratio:.2g} of the language model's"
    return f"the balance loss has weight {weight:g}"


def dead(history: History) -> list[Finding]:
    """Experts that get no tokens, while the load on the others is as it was."""
    found: list[LayerTrouble] = []
    who: dict[int, list[int]] = {}
    at_once = False
    for layer, rows in sorted(history.routing.items()):
        gone, since = _cut_off(history.settled(rows))
        idle = gone or _idle(history.settled(rows), 2 * history.lasting(rows))
        if not idle:
            continue
        at_once |= bool(gone)
        points = [(row["step"], _is_dead(row, idle)) for row in rows]
        start = since if gone else lasting(points, 3)
        if start is None:
            continue
        who[layer] = idle
        count = sum(bad for _, bad in points)
        found.append(LayerTrouble(layer, start, float(len(idle)), "certain" if count >= 6 else "likely", rows[-1]))
    if not found:
        return []
    names = "; ".join(f"layer {layer}: {listed(who[layer])}" for layer in list(who)[:4])
    return [
        of_layers(
            "dead",
            found,
            what=(
                f"{sum(map(len, who.values()))} expert(s) get less than 1 % of a balanced load ({names})"
                + (", from one logged step to the next" if at_once else "")
            ),
            why=(
                "they had a fair load until then, so something took them out of the choice: a mask, a bias, or a changed router"
                if at_once
                else "the router never or no longer scores them high enough to teach them anything"
            ),
            change=(
                "look at what changed in that step; resume from the checkpoint before it"
                if at_once
                else "a stronger balance loss, or model.moe.router=loss_free, whose bias brings them back"
            ),
        )
    ]


def _is_dead(row: Json, who: Sequence[int]) -> bool:
    mean = sum(row["counts"]) / len(row["counts"])
    return mean >= limit("dead_rows") and all(row["counts"][e] < limit("dead_share") * mean for e in who)


def _idle(rows: Sequence[Json], least: int) -> list[int]:
    """Experts without load in each of the last `least` rows."""
    last = rows[-least:]
    if len(last) < least:
        return []
    return [e for e in range(len(last[0]["counts"])) if all(_is_dead(row, [e]) for row in last)]


def _cut_off(rows: Sequence[Json]) -> tuple[list[int], int]:
    """Experts without load now that had a fair share in the line before they lost it, two or more in one step; and the step."""
    idle = _idle(rows, 4)
    lost: dict[int, list[int]] = {}
    for e in idle:
        first = len(rows) - 1
        while first > 0 and _is_dead(rows[first - 1], [e]):
            first -= 1
        if first == 0:
            continue
        before = rows[first - 1]["counts"]
        if before[e] * len(before) >= 0.25 * sum(before):
            lost.setdefault(rows[first]["step"], []).append(e)
    step = max(lost, key=lambda at: len(lost[at]), default=0)
    gone = lost.get(step, [])
    return (gone, step) if len(gone) >= max(2, len(idle) // 2) else ([], 0)


def starvation(history: History) -> list[Finding]:
    """Too few tokens per expert and step for gradients that are more than noise."""
    found = troubled(history.routing, lambda row: row.get("tokens_per_expert"), limit("tokens_per_expert"), above=False)
    if not found:
        return []
    least = min(found, key=lambda one: one.value)
    rows = history.config["train"]["batch_rows"]
    factor = -(-limit("tokens_per_expert") * 2 // max(least.value, 1e-9))
    return [
        of_layers(
            "starvation",
            found,
            what=f"an expert sees {least.value:.1f} tokens per step on average ({where(history, found)})",
            why=(
                f"the batch is too small for {experts(history)} experts: below about {limit('tokens_per_expert'):.0f} tokens "
                "an expert's gradient, and its load, are mostly noise"
            ),
            change=f"train.batch_rows={int(rows * factor)} (now {rows}), or fewer experts",
        )
    ]


def drops(history: History) -> list[Finding]:
    """Capacity drops a large share of the rows."""
    settled = {layer: history.settled(rows) for layer, rows in history.routing.items()}
    least = max((history.lasting(rows) for rows in settled.values()), default=4)
    found = troubled(settled, lambda row: row["drop_rate"], limit("drop_rate"), least=least, since=history.routing)
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    factor = router_of(history).get("capacity_factor")
    return [
        of_layers(
            "drops",
            found,
            what=f"{worst.value:.0%} of the rows are dropped in layer {worst.layer} ({where(history, found)})",
            why=f"capacity_factor={factor} leaves an expert room for that multiple of a balanced load in each batch row",
            change="model.moe.router.capacity_factor=0 (dropless), or 2",
        )
    ]


def padding_counted(history: History) -> list[Finding]:
    """The routers count more tokens than the step has."""
    tokens = {row["step"]: row["tokens"] for row in history.metrics}
    valid = {step: tokens[step] - tokens.get(step - 1, 0) for step in tokens if step == 1 or step - 1 in tokens}

    def excess(row: Json) -> float | None:
        known = valid.get(row["step"], 0)
        return row["tokens"] / known - 1 if known and "tokens" in row else None

    found = troubled(history.routing, excess, limit("extra_tokens"))
    if not found:
        return []
    worst = max(found, key=lambda one: one.value)
    return [
        of_layers(
            "padding_counted",
            found,
            sure="certain",
            what=f"the routers count {worst.value:.0%} more tokens than the step has ({where(history, found)})",
            why="padding is routed and counted as load, so balance is sought for tokens that carry no text",
            change="pass the batch's padding as Tokens.valid_T, and route nothing where it is False",
        )
    ]


# ------------------------------------------------------------------------------------------------------ shared words


def where(history: History, found: Sequence[LayerTrouble]) -> str:
    """Their layers in words."""
    return name_layers(tuple(one.layer for one in found), len(history.routing))


def experts(history: History) -> int:
    """E."""
    return history.config["model"]["moe"]["num_experts"]


def router_of(history: History) -> Json:
    """The router's settings."""
    return history.config["model"]["moe"]["router"]


def balance_weight(history: History) -> float | None:
    """The balance loss's weight, None for a router without one."""
    balance = router_of(history).get("balance")
    return balance["weight"] if isinstance(balance, dict) else None


def last_value(rows: Sequence[Json], name: str) -> float | None:
    """A field's last value that is not null."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def listed(numbers: Sequence[int]) -> str:
    """'1, 2, 3 and 9 more'."""
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
