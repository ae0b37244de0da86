"""The arguments that `moe train`, `moe resume` and `python -m moe.train` share."""

from collections.abc import Sequence
from pathlib import Path

from moe.errors import ConfigError

USAGE = "python -m moe.train RECIPE [a.b.c=value ...] [out=DIR]"


def parse(arguments: Sequence[str]) -> tuple[str, list[str], Path | None]:
    """Recipe, overrides and folder, from RECIPE [overrides...] [out=DIR]. Raises ConfigError with the usage."""
    options = [argument for argument in arguments if argument.startswith("-")]
    if not arguments or options:
        reason = f"there is no option {options[0]}" if options else "a recipe is required, e.g. recipes/smoke.py"
        raise ConfigError(f"{reason}: usage: {USAGE}")
    recipe, *rest = arguments
    overrides, out = split_out(rest)
    return recipe, overrides, out


def split_out(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides of the run, and the folder in `out=DIR`. Raises ConfigError if it is empty or given twice."""
    folders = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    if len(folders) > 1:
        raise ConfigError(f"out is given twice ({' and '.join(folders)}): keep one")
    if folders == [""]:
        raise ConfigError("out= names no folder: write out=DIR, or leave it out for runs/<name>-<time>")
    overrides = [argument for argument in arguments if not argument.startswith("out=")]
    return overrides, Path(folders[0]) if folders else None
