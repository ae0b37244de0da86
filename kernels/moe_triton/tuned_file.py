"""The file of measured launch settings: written whole or not at all, and void for other kernels or another compiler.

Plain Python: imports neither torch nor triton.
"""

import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE_VARIABLE = "MOE_TRITON_TUNED"
"""Environment variable that names the file; where it is unset, only the table of tuning.py counts."""

Choices = dict[str, dict[str, int]]
"""Bucket (tuning.bucket) -> launch settings."""


@cache
def made_with() -> str:
    """What measured settings belong to: triton's version and a hash of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    return f"triton {compiler}, kernels {digest.hexdigest()[:16]}"


def read(file: Path) -> Choices:
    """What the file holds for these kernels and this triton; a warning and nothing if it was measured with others."""
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if content.get("made_with") == made_with():
        return content["choices"]
    warnings.warn(
        f"{file} was measured with {content.get('made_with')} and this is {made_with()}: its settings are ignored; "
        "run python -m moe_triton.autotune again",
        stacklevel=2,
    )
    return {}


def write(file: Path, found: Choices) -> None:
    """Replace the file in one step, so that a reader or a crash never meets half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump({"made_with": made_with(), "choices": found}, stream, indent=1, sort_keys=True)
        Path(partial).replace(file)
    finally:
        Path(partial).unlink(missing_ok=True)
    choices.cache_clear()


@cache
def choices(path: str | None) -> Choices:
    """`read`, once per process and path; nothing for None."""
    return read(Path(path)) if path else {}
