"""Writes what a comparison is expected to show, before it begins: `moe promise`, then `moe compare --promise FILE`."""

import json
import time
from pathlib import Path
from typing import Any

from moe.analysis.promise import config_digest, read_promise, seal_holds, sealed
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.errors import ConfigError, UserError
from moe.files import write_json

Json = dict[str, Any]


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
) -> Json:
    """Write a sealed and dated promise about a recipe; gains are dense minus sparse, in bits per byte.

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
    }
    made = sealed(fields)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, made)
    return made


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
