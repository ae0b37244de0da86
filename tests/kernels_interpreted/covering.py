"""A small set of combinations in which every pair of values of any two parameters occurs (greedy, deterministic)."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[str, Any, str, Any]


def pairs_of(combination: Mapping[str, Any]) -> set[Pair]:
    """Every pair of values that a combination contains."""
    return {(a, combination[a], b, combination[b]) for a, b in combinations(combination, 2)}


def covering(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations of one value per parameter that together contain every pair."""
    missing = {
        (a, x, b, y): None for a, b in combinations(values, 2) for x, y in product(values[a], values[b])
    }  # a dict, because a set of strings has no fixed order
    found = []
    while missing:
        combination = _grow(values, missing)
        for pair in pairs_of(combination):
            missing.pop(pair, None)
        found.append(combination)
    return found


def _grow(values: Mapping[str, Sequence[Any]], missing: Mapping[Pair, None]) -> dict[str, Any]:
    """Start from the first missing pair, then give each parameter the value that adds most missing pairs."""
    a, x, b, y = next(iter(missing))
    chosen = {a: x, b: y}
    for name in values:
        if name not in chosen:
            gains = [_gain({**chosen, name: value}, values, missing) for value in values[name]]
            chosen[name] = values[name][gains.index(max(gains))]
    return {name: chosen[name] for name in values}


def _gain(partial: Mapping[str, Any], values: Mapping[str, Sequence[Any]], missing: Mapping[Pair, None]) -> int:
    ordered = {name: partial[name] for name in values if name in partial}
    return sum(pair in missing for pair in pairs_of(ordered))
