"""Wording that every message of this package shares."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

Step = str | int


def dotted(path: Iterable[Step]) -> str:
    """A path as it is typed on the command line: data.sources.0.weight."""
    return ".".join(str(step) for step in path)


def typed(value: Any) -> str:
    """A value as it is typed after the equals sign of an override: JSON, or text that is no JSON as it is."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value)


def shown(value: Any) -> str:
    """A value as JSON, cut to what fits in a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean X? known: X, Y, Z`, the most alike first; no question if nothing is alike."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=max(len(names), 1), cutoff=0.6)
    ordered = close + [other for other in names if other not in close]
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(ordered) or 'none'}"


def joined(problems: list[str], most: int = 4) -> str:
    """Several problems as one paragraph; those past the first few are only counted."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")
