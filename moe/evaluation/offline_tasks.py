"""Three small multiple-choice tasks for lm-evaluation-harness that need no network: their items are made here.

    moe_brackets    close what a line of Python opened
    moe_agreement   the verb that agrees with its subject, with a noun of the other number between
    moe_sums        the sum of two digits

They tell a model that learnt something from one that did not; they are no benchmark.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OPEN = {"(": ")", "[": "]", "{": "}"}
_NOUNS = (
    ("key", "keys"),
    ("letter", "letters"),
    ("door", "doors"),
    ("map", "maps"),
    ("song", "songs"),
    ("cup", "cups"),
)


def items() -> dict[str, list[dict[str, Any]]]:
    """Every task's items: context, choices, and the index of the right one."""
    return {"moe_brackets": list(_brackets()), "moe_agreement": list(_agreement()), "moe_sums": list(_sums())}


def configs(folder: Path) -> list[dict[str, Any]]:
    """Write the items into `folder`, and return the tasks' configurations for the harness."""
    tasks = []
    for name, rows in items().items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tasks.append(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "{{context}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    return tasks


def _brackets() -> Iterator[dict[str, Any]]:
    for outer in _OPEN:
        for inner in _OPEN:
            for name in ("values", "rows", "self.items"):
                choices = [_OPEN[inner] + _OPEN[end] for end in _OPEN]
                context = f"    return {outer}{inner}{name}"
                yield {"context": context, "choices": choices, "answer": list(_OPEN).index(outer)}


def _agreement() -> Iterator[dict[str, Any]]:
    for i, (one, many) in enumerate(_NOUNS):
        between_one, between_many = _NOUNS[(i + 1) % len(_NOUNS)]
        for subject, between, answer in ((one, between_many, 0), (many, between_one, 1)):
            for link in ("near the", "beside the", "under the"):
                yield {"context": f"The {subject} {link} {between}", "choices": [" is", " are"], "answer": answer}


def _sums() -> Iterator[dict[str, Any]]:
    for a in range(2, 8):
        for b in range(2, 10 - a):
            wrong = [n for n in (a + b + 1, a + b - 1, abs(a - b)) if n != a + b]
            yield {"context": f"{a} + {b} =", "choices": [f" {n}" for n in (a + b, *wrong)], "answer": 0}
