"""The folders of checkpoints: finding one, checking every byte of it, publishing, and removing the old."""

import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.content import check_content
from moe.errors import CheckpointError
from moe.files import flush, write_json
from moe.metrics import SCHEMA_VERSION


@dataclass(frozen=True)
class Saved:
    """A published checkpoint."""

    path: Path
    step: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Damaged:
    """A published checkpoint that is not what was written."""

    path: Path
    step: int
    reason: str


def checkpoint_root(out: Path) -> Path:
    """Where a run's checkpoints are."""
    return out / "checkpoints"


def published(out: Path) -> list[Saved]:
    """The run's checkpoints, oldest first, by their names and sizes only. Raises CheckpointError for a damaged one."""
    return [_read(path) for path in _folders(out)]


def newest(out: Path) -> Saved | None:
    """The run's newest checkpoint, every byte of it checked; None if there is none.

    Raises CheckpointError if it is damaged.
    """
    folders = _folders(out)
    try:
        return _checked(folders[-1]) if folders else None
    except CheckpointError as error:
        raise CheckpointError(f"{error}: remove that checkpoint's folder to use the one before") from error


def find(out: Path) -> tuple[Saved | None, list[Damaged]]:
    """The run's newest whole checkpoint (None if there are no checkpoints), and the damaged ones after it, newest first.

    Raises CheckpointError if there are checkpoints and none is whole.
    """
    damaged: list[Damaged] = []
    for path in reversed(_folders(out)):
        try:
            return _checked(path), damaged
        except CheckpointError as error:
            damaged.append(Damaged(path, _step(path), str(error)))
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints of {out} is whole ({'; '.join(d.reason for d in damaged)}): "
            f"remove {checkpoint_root(out)} to resume from the start"
        )
    return None, []


def set_aside(damaged: Damaged) -> Path:
    """Rename a damaged checkpoint so that it is not taken for one again; returns where it is."""
    aside = damaged.path.with_name(f"damaged-{damaged.path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(damaged.path, aside)
    return aside


def steps(out: Path) -> list[int]:
    """The steps of the published checkpoints, in order."""
    return [_step(path) for path in _folders(out)]


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in checkpoint_root(out).glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _checked(path: Path) -> Saved:
    """The checkpoint in a folder: every byte as it was written, every tensor whole."""
    saved = _read(path)
    for name, (_, written) in saved.meta["files"].items():
        if checksum(path / name) != written:
            raise _damaged(path / name, "has other content than was written")
    check_content(path)
    return saved


def _read(path: Path) -> Saved:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, (size, _) in meta["files"].items()}
        saved = Saved(path, int(meta["step"]), meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path / "meta.json", f"is missing or cannot be read ({type(error).__name__})") from error
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else "none"
        if actual != size:
            raise _damaged(path / name, f"should have {size} bytes and has {actual}")
    return saved


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}")


def checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def begin(out: Path, step: int, size: int) -> None:
    """Make the folder that a checkpoint of about `size` bytes is written into before it is published.

    Raises CheckpointError where the disk has less room than that; what is written there next to it, the logs, then goes on.
    """
    path = temporary(out, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    free = shutil.disk_usage(path).free
    if free < size:
        path.rmdir()
        raise CheckpointError(f"no space left on the disk of {out}: {size:,} bytes are needed, {free:,} are free")


def discard(out: Path, step: int) -> None:
    """Remove what a failed write left."""
    shutil.rmtree(temporary(out, step), ignore_errors=True)


def temporary(out: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return checkpoint_root(out) / f".writing-step_{step:08d}"


def finish(out: Path, step: int, meta: dict[str, Any]) -> int:
    """Check what was written, describe it in meta.json, flush it to the disk, and publish it; returns its bytes."""
    path = temporary(out, step)
    check_content(path)
    files = {file.name: (file.stat().st_size, checksum(file)) for file in sorted(path.iterdir())}
    write_json(path / "meta.json", {"schema_version": SCHEMA_VERSION, "step": step, "files": files, **meta})
    for name in files:
        flush(path / name)
    flush(path)
    publish(path, checkpoint_root(out) / f"step_{step:08d}")
    return sum(size for size, _ in files.values())


def publish(written: Path, target: Path) -> None:
    """Give a whole folder its name, in the place of one that may have it."""
    old = target.with_name(f".writing-old-{target.name}")
    if target.exists():
        os.rename(target, old)
    os.rename(written, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(out: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one, and what unfinished writes left."""
    for leftover in checkpoint_root(out).glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = {_step(path): path for path in _folders(out)}
    keep = set(sorted(steps)[-keep_last:]) | {best_step}
    for step, path in steps.items():
        if step not in keep:
            # renamed first, so that a half-removed folder is never taken for a checkpoint
            doomed = path.with_name(f".writing-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
