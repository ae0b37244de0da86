"""One document, and the account of everything that was left out on the way to it.

A document is a text with a name (for messages) and a split key: the string whose hash decides whether training or
validation sees it. `Intake` counts what a source gave and what was skipped, so that no loss is silent.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe.errors import DataError

EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn from, after an optional prompt that carries no loss."""

    name: str
    split_key: str
    text: str
    prompt: str = ""


class Intake:
    """What one source gave: files read, what was skipped and why, and whether a budget ended it."""

    def __init__(self, on_bad: Literal["error", "skip"] = "error"):
        self.on_bad = on_bad
        self.files = 0
        self.budget_reached = False
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def skip(self, reason: str, name: str) -> None:
        """Count something that is left out in any case."""
        self.skipped[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES_PER_REASON:
            names.append(name)

    def reject(self, reason: str, name: str, message: str) -> None:
        """Raise DataError(message) for bad input, or count it where the source asked for that."""
        if self.on_bad == "error":
            raise DataError(message)
        self.skip(reason, name)


def document_from_record(
    record: Mapping[str, Any], *, name: str, text_field: str, prompt_field: str, intake: Intake
) -> Document | None:
    """The document in one record of a jsonl, parquet or hub source; None (counted) if it holds no usable text.

    Null and blank texts are skipped and counted; a missing field, a value that is not text, or text that has no UTF-8
    form is rejected.
    """
    fields = (text_field, prompt_field) if prompt_field else (text_field,)
    values = []
    for field in fields:
        reason, message = _problem(record, field)
        if reason:
            intake.reject(reason, name, f"{name} {message}")
            return None
        values.append(record[field] or "")
    if not values[0].strip():
        intake.skip("empty record", name)
        return None
    return Document(name, values[0], *values)


def _problem(record: Mapping[str, Any], field: str) -> tuple[str, str]:
    """(reason, message) why a field cannot be used, or ("", ""); null counts as empty text."""
    if field not in record:
        known = ", ".join(record) or "none"
        return "missing field", f"has no field {field!r} (it has: {known}): name one of them in the source"
    value = record[field]
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        return "not text", f"has {kind} in the field {field!r}, which must be text: name a text field in the source"
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        return "not UTF-8", f"has half of a surrogate pair in the field {field!r}, which has no UTF-8 form: mend it"
    return "", ""
