"""Writes what a comparison is expected to show, before it begins: `moe promise`, then `moe compare --promise FILE`."""

import json
import time
from pathlib import Path
from typing import Any

from moe.analysis.promise import config_digest, digest, read_promise, seal_holds, sealed
from moe.analysis.rows import NUMBER, read_json
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.errors import ConfigError, UserError
from moe.files import write_json

Json = dict[str, Any]
LADDER = "ladder.json"
SAME_TOKENS = 0.05
"""Largest relative difference of a ladder's tokens from the recipe's that a promise takes for the same."""


def promise(
    recipe: str,
    overrides: list[str],
    out: Path,
    *,
    gain: float,
    low: float,
    high: float,
    contract: str,
    error_rate: float,
    because: str,
    **more: str,
) -> Json:
    """Write a sealed and dated promise about a recipe; gains are dense minus sparse, in bits per byte; `more` is sealed with it.

    Raises UserError if there is one already: a promise is made once.
    """
    if out.exists():
        raise UserError(f"{out} exists, and a promise is made once: choose another --out.")
    run = load(recipe, overrides)
    if run.model.moe is None:
        raise ConfigError(f"{recipe} has no expert layers (model.moe), so it can promise no gain over dense")
    fields = {
        "schema_version": 1,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime()),
        "recipe": recipe,
        "overrides": overrides,
        "config": config_of(run),
        "contract": contract,
        "unit": "bits per byte",
        "gain": gain,
        "low": low,
        "high": high,
        "error_rate": error_rate,
        "because": because,
        **more,
    }
    made = sealed(fields)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, made)
    return made


def promise_from_ladder(recipe: str, overrides: list[str], out: Path, folder: Path) -> Json:
    """Promise what the ladder in a folder predicts; the digest of its ladder.json is sealed with it.

    Raises UserError for a ladder of another model, data or training, or one that answers about another number of tokens.
    """
    path = folder / LADDER
    record = read_json(
        path, {"config": (str,), "contract": (str,), "bits_per_byte": NUMBER, "answer": (dict,), "tokens": NUMBER}
    )
    run, answer = load(recipe, overrides), record["answer"]
    if record["config"] != config_of(run):
        raise UserError(
            f"{path} is about another model, data or training ({record['recipe']} {' '.join(record['overrides'])}): give the "
            "same recipe and settings, or make its ladder with 'moe ladder'."
        )
    tokens = run.train.steps * run.train.batch_rows * run.data.sequence_length
    if abs(record["tokens"] / tokens - 1) > SAME_TOKENS:
        raise UserError(
            f"{path} answers about {record['tokens']:.4g} tokens, and {recipe} trains on {tokens:.4g}: make a ladder with the "
            "recipe's own tokens per parameter."
        )
    bits = record["bits_per_byte"]
    return promise(
        recipe,
        overrides,
        out,
        **{name: answer[name] * bits for name in ("gain", "low", "high")},
        contract=record["contract"],
        error_rate=round(1 - answer["confidence"], 6),
        because=f"the ladder of {record['written']} in {folder}: {record['summary']}",
        ladder=digest(record),
    )


def config_of(run: Run) -> str:
    """What a promise knows a run by."""
    return config_digest(json.loads(json.dumps(dump(run))))


def require_promise(path: Path, run: Run) -> Json:
    """Read a promise that a comparison is to be started under. Raises UserError if it was changed, or is about another run."""
    made = read_promise(path)
    if not seal_holds(made):
        raise UserError(f"{path} was changed after it was sealed: make a new promise with 'moe promise'.")
    if made["config"] != config_of(run):
        raise UserError(
            f"{path} is about another model, data or training ({made.get('recipe')} {' '.join(made.get('overrides', []))}): "
            "give the same recipe and settings."
        )
    return made
