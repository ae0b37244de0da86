"""Folders and files that appear whole or not at all.

Everything is written under a temporary name beside its place and renamed into it: a killed process leaves a temporary
folder that nobody reads, and of two processes that build the same thing, the second drops its own.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import DataError

STALE_SECONDS = 24 * 3600


def digest(value: Any) -> str:
    """Hash of a JSON-able value, 32 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block ends well, and is removed if it does not.

    If another process published `final` in the meantime, its folder stays. Raises DataError where the disk refuses.
    """
    temporary = final.parent / _temporary_name(final.name)
    try:
        temporary.mkdir(parents=True)
        remove_stale(final.parent)
        yield temporary
        _sync(temporary)
        _publish(temporary, final)
    except OSError as error:
        raise DataError(
            f"the data cache {final.parent} cannot be written ({error.strerror or error}): make room, or set "
            "data.cache_dir to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(parent: Path) -> None:
    """Remove temporary folders of processes that died: nothing in them was written for a day."""
    for folder in parent.glob(".*.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            # Its owner finished and removed it while we looked.
            continue
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _temporary_name(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def _publish(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():
            raise


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
