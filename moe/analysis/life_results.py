"""What the Game of Life laboratory found, read from its results.json, and the study's claims held against it.

A claim about two shares counts as replicated if their 95 % Wilson intervals do not overlap, as contradicted if they lie the
other way round, and as undecided otherwise. Pruned networks are compared winner by winner: McNemar's exact test at each size, times
the number of sizes (Bonferroni).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.analysis.shares import Share, wilson
from moe.errors import UserError

ALL = 512
"""Neighbourhoods of one step."""
MAGNITUDE, RANDOM, AGAIN = "magnitude", "random mask", "new first values"


@dataclass(frozen=True)
class Claim:
    """A sentence of the study, or a question of ours, and what the results say to it."""

    text: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Results:
    """All parts, by kind."""

    life: dict[str, Any]
    growing: dict[tuple[int, int], dict[str, Any]]
    """By (steps, width)."""
    pruning: list[dict[str, Any]]
    """Those with winners."""
    without_winners: list[int]
    """Widths of those without: no network was exact, so that there was nothing to prune."""
    flips: list[dict[str, Any]]
    densities: list[dict[str, Any]]
    experts: list[dict[str, Any]]


def read_results(path: Path) -> Results:
    """Read results.json. Raises UserError if it is not one."""
    try:
        record = json.loads(path.read_text("utf-8"))
        parts: dict[str, list[dict[str, Any]]] = {}
        for part in record["parts"]:
            parts.setdefault(part["name"].split("-")[0], []).append(part)
        life = record["life"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no results of the laboratory ({error!r}): `moe life RECIPE` writes them"
        ) from error
    growing = {(p["settings"]["steps"], p["settings"]["width"]): p for p in parts.get("growing", [])}
    kinds = {kind: parts.get(kind, []) for kind in ("flips", "densities", "experts")}
    tried = parts.get("pruning", [])
    lost = [part["settings"]["width"] for part in tried if not winners(part)]
    return Results(life, growing, [part for part in tried if winners(part)], lost, **kinds)


def grown(part: dict[str, Any]) -> Share:
    """Networks of one width that are exact."""
    return wilson(sum(part["exact"]), len(part["exact"]))


def without_error(part: dict[str, Any]) -> Share:
    """Networks of one width that make no error on random boards, exact or not."""
    return wilson(sum(share == 1 for share in part["accuracy"]), len(part["accuracy"]))


def solved(row: dict[str, Any]) -> Share:
    """Networks of a row that get all 512 neighbourhoods right."""
    return wilson(row["right"].count(ALL), len(row["right"]))


def winners(part: dict[str, Any]) -> list[int]:
    """Networks that were exact before anything was pruned."""
    return [q for q, right in enumerate(part["rows"][0]["right"]) if right == ALL]


def pruned(part: dict[str, Any], arm: str) -> dict[int, Share]:
    """Of the winners, those still exact, by kept parameters."""
    first = winners(part)
    rows = [row for row in part["rows"] if row["arm"] in (arm, MAGNITUDE if row["round"] == 0 else arm)]
    return {row["kept"]: wilson(sum(row["right"][q] == ALL for q in first), len(first)) for row in rows}


def layers(part: dict[str, Any]) -> Share:
    """Expert layers that are exact."""
    rows = part["rows"]
    return wilson(sum(row["right"] == ALL for row in rows), len(rows))


def median_updates(part: dict[str, Any]) -> float | None:
    """Median over layers of the updates until all neighbourhoods were right; None if most never were."""
    found = sorted(row["first_solved"] or float("inf") for row in part["rows"])
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    return middle if middle < float("inf") else None


def verdict(higher: Share, lower: Share) -> str:
    """Whether the share that is claimed to be higher is."""
    return "replicated" if higher.above(lower) else "contradicted" if lower.above(higher) else "undecided"


# ------------------------------------------------------------------------------------------------------------ claims


def claims(results: Results) -> list[Claim]:
    """Every claim that the results have something to say about."""
    return [
        *_about_width(results),
        *(claim for part in results.flips for claim in _about_flips(part)),
        *(claim for part in results.densities for claim in _about_density(part)),
        *(claim for part in results.pruning for claim in _about_pruning(part)),
        *_about_experts(results),
    ]


def _about_width(results: Results) -> list[Claim]:
    found, half = [], 0.5
    for steps in sorted({steps for steps, _ in results.growing}):
        by_width = {m: grown(part) for (n, m), part in sorted(results.growing.items()) if n == steps}
        narrow, wide = by_width[min(by_width)], by_width[max(by_width)]
        if 1 in by_width:
            rare = "replicated" if narrow.high < half else "contradicted" if narrow.low > half else "undecided"
            text = f"Training rarely finds the rule in the network that just suffices, n = {steps}"
            found.append(Claim(text, f"L({steps}, 1): {narrow}", rare))
        if len(by_width) > 1:
            text = f"Many times the parameters make it more likely, n = {steps}"
            here = f"L({steps}, {min(by_width)}): {narrow}; L({steps}, {max(by_width)}): {wide}"
            found.append(Claim(text, here, verdict(wide, narrow)))
            if steps > 1:
                narrow, wide = (without_error(results.growing[steps, m]) for m in (min(by_width), max(by_width)))
                here = f"L({steps}, {min(by_width)}): {narrow}; L({steps}, {max(by_width)}): {wide}"
                found.append(
                    Claim(f"{text}, counting networks without an error on random boards", here, verdict(wide, narrow))
                )
    for (steps, width), part in sorted(results.growing.items()):
        if steps == 2 and without_error(part).above(grown(part)):
            text = f"L(2, {width}): no error on random boards does not mean that the rule was learnt (ours)"
            found.append(Claim(text, f"no error: {without_error(part)}; exact: {grown(part)}", "shown"))
    both = sorted({m for n, m in results.growing if n == 1} & {m for n, m in results.growing if n == 2})
    if both:
        pairs = {m: (grown(results.growing[1, m]), grown(results.growing[2, m])) for m in both}
        m = max(both, key=lambda m: pairs[m][0].value - pairs[m][1].value)
        one, two = pairs[m]
        text = "More steps need more width: at equal m, two steps are learnt less often than one"
        found.append(Claim(text, f"largest difference at m = {m}: {one} and {two}", verdict(one, two)))
    return found


def _about_flips(part: dict[str, Any]) -> list[Claim]:
    rows = {row["flipped"]: solved(row) for row in part["rows"]}
    if not {0, 1} <= rows.keys():
        return []
    text = "Flipping the sign of one parameter of the solution before training can prevent learning"
    return [Claim(text, f"none flipped: {rows[0]}; one flipped: {rows[1]}", verdict(rows[0], rows[1]))]


def _about_density(part: dict[str, Any]) -> list[Claim]:
    rows = {row["density"]: solved(row) for row in part["rows"]}
    if 0.38 not in rows or len(rows) < 3:
        return []
    centre, found = rows[0.38], []
    for side, text in ((min(rows), "sparser"), (max(rows), "denser")):
        claim = f"Boards of density 0.38 teach better than much {text} ones, m = {part['settings']['width']}"
        found.append(Claim(claim, f"0.38: {centre}; {side}: {rows[side]}", verdict(centre, rows[side])))
    best = max(rows, key=lambda d: rows[d].value)
    here = (
        "the most successes are at 0.38" if best == 0.38 else f"most successes at {best}: {rows[best]}; 0.38: {centre}"
    )
    sharp = [d for d in rows if d != 0.38 and not centre.above(rows[d])]
    text = "0.38 is a critical value: no other density tried is as good"
    found.append(Claim(text, here, "replicated" if not sharp else f"undecided at {', '.join(map(str, sorted(sharp)))}"))
    return found


def _about_pruning(part: dict[str, Any]) -> list[Claim]:
    width, total = part["settings"]["width"], part["parameters"]
    arms = {arm: pruned(part, arm) for arm in (MAGNITUDE, RANDOM, AGAIN)}
    kept = min(arms[MAGNITUDE])
    last, size = arms[MAGNITUDE][kept], f"{kept} of {total} parameters ({kept / total:.0%})"
    exists = "shown" if last.successes else "not shown"
    text = f"A large winner, L(1, {width}), can be pruned to a tenth at equal accuracy"
    found = [Claim(text, f"{size}: {last} of the winners stay exact", exists)]
    for arm, text in ((RANDOM, "at random"), (AGAIN, "the same, with new first values (a lottery ticket)")):
        chances = paired_chances(part, arm)
        apart = [k for k, (better, worse, p) in chances.items() if p * len(chances) < 0.05 and better > worse]
        behind = any(p * len(chances) < 0.05 and better < worse for better, worse, p in chances.values())
        here = f"at {size}: {last} against {arms[arm][kept]}"
        if apart:
            here += f"; paired test passed at {', '.join(f'{k / total:.0%}' for k in sorted(apart, reverse=True))}"
        says = "contradicted" if behind and not apart else "replicated" if apart and not behind else "undecided"
        found.append(Claim(f"Kept parameters of L(1, {width}) beat as many {text}", here, says))
    return found


def paired_chances(part: dict[str, Any], arm: str) -> dict[int, tuple[int, int, float]]:
    """By kept parameters: winners exact only with the largest kept, only in this arm, and McNemar's exact two-sided p."""
    first, found = winners(part), {}
    rows = {(row["kept"], row["arm"]): row["right"] for row in part["rows"] if row["round"]}
    for kept in dict.fromkeys(kept for kept, _ in rows):
        pairs = [(rows[kept, MAGNITUDE][q] == ALL, rows[kept, arm][q] == ALL) for q in first]
        better, worse = pairs.count((True, False)), pairs.count((False, True))
        n = better + worse
        tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
        found[kept] = (better, worse, min(1.0, 2 * tail))
    return found


def _about_experts(results: Results) -> list[Claim]:
    dense = [p for p in results.experts if p["settings"]["moe"]["num_experts"] == 1]
    sparse = [p for p in results.experts if p["settings"]["moe"]["num_experts"] > 1]
    if not dense or not sparse:
        return []
    small = min(dense, key=lambda p: p["settings"]["moe"]["expert_hidden"])
    found = []
    for part in sparse:
        a, b = layers(part), layers(small)
        word = "more often" if a.above(b) else "less often" if b.above(a) else "undecided"
        text = f"{part['settings']['label']}: solved more or less often than one expert alone? (ours)"
        found.append(Claim(text, f"{a} against {b}", word))
    return found
