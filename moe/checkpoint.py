"""Checkpoints through torch's distributed checkpoint: written aside, flushed, then published by one rename.

A folder `step_00000100` is therefore always whole: whatever moment a process dies at, the newest published checkpoint is a
complete one. It holds the model, the optimizer, router state, and `meta.json` with the step, the configuration and size
and checksum of every file.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from moe.errors import CheckpointError
from moe.files import flush, write_json
from moe.metrics import SCHEMA_VERSION
from moe.parallel import Ranks

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Saved:
    """A published checkpoint."""

    path: Path
    step: int
    meta: dict[str, Any]


@contextmanager
def _one_process() -> Iterator[None]:
    """Without torch's warning that there is no process group: one process without a group is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def checkpoint_root(out: Path) -> Path:
    """Where a run's checkpoints are."""
    return out / "checkpoints"


def published(out: Path) -> list[Saved]:
    """The run's whole checkpoints, oldest first. Raises CheckpointError for one whose files have changed since."""
    return [_read(path) for path in _folders(out)]


def newest(out: Path) -> Saved | None:
    """The run's newest checkpoint, every byte of it checked; None if there is none.

    Raises CheckpointError if it is damaged.
    """
    folders = _folders(out)
    if not folders:
        return None
    saved = _read(folders[-1])
    for name, (_, checksum) in saved.meta["files"].items():
        if _checksum(saved.path / name) != checksum:
            raise _damaged(saved.path / name, "has other content than was written")
    return saved


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in checkpoint_root(out).glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


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
    return CheckpointError(f"{path} {what}: remove that checkpoint's folder to resume from the one before")


def _checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def save(out: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: dict[str, Any], ranks: Ranks) -> Path:
    """Write and publish a checkpoint after `step` steps; on return it is whole. Called by all ranks."""
    target = checkpoint_root(out) / f"step_{step:08d}"
    temporary = target.with_name(f".writing-{target.name}")
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait_for_first()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    with _one_process():
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=temporary,
            no_dist=ranks.world_size == 1,
        )
    ranks.wait_for_all()
    if ranks.first:
        files = {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(temporary.iterdir())}
        write_json(temporary / "meta.json", {"schema_version": SCHEMA_VERSION, "step": step, "files": files, **meta})
        for name in files:
            flush(temporary / name)
        flush(temporary)
        _publish(temporary, target)
    ranks.wait_for_first()
    return target


def _publish(temporary: Path, target: Path) -> None:
    old = target.with_name(f".writing-old-{target.name}")
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(out: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one, and what unfinished writes left."""
    root = checkpoint_root(out)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = {int(path.name.removeprefix("step_")): path for path in _folders(out)}
    keep = set(sorted(steps)[-keep_last:]) | {best_step}
    for step, path in steps.items():
        if step not in keep:
            # renamed first, so that a half-removed folder is never taken for a checkpoint
            doomed = path.with_name(f".writing-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def load(saved: Saved, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Load a checkpoint into a model and its optimizer. Raises CheckpointError when names or shapes differ."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": model_state, "optimizer": optimizer_state}
    _check_names(saved, state)
    with _one_process():
        dcp.load(state, checkpoint_id=saved.path, no_dist=ranks.world_size == 1)
    # the checkpoint's own learning rate, decay and betas give way to the run's, which may have been changed on resume
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def stored_names(saved: Saved) -> list[str]:
    """The model's parameters and buffers that a checkpoint holds."""
    stored = dcp.FileSystemReader(saved.path).read_metadata().state_dict_metadata
    return [name.removeprefix("model.") for name in stored if name.startswith("model.")]


def read_tensors(saved: Saved, names: Iterable[str]) -> dict[str, Tensor]:
    """Some of the model's parameters and buffers by name, on the CPU; no other tensor is read."""
    stored = dcp.FileSystemReader(saved.path).read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {f"model.{name}": stored[f"model.{name}"] for name in names}
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in wanted.items()}
    with _one_process():
        dcp.load(state, checkpoint_id=saved.path, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _check_names(saved: Saved, state: dict[str, dict[str, Any]]) -> None:
    stored = dcp.FileSystemReader(saved.path).read_metadata().state_dict_metadata
    stored_shapes = {
        key: tuple(getattr(value, "size", ())) for key, value in stored.items() if key.startswith("model.")
    }
    wanted_shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in state["model"].items()}
    wrong = [
        key for key in sorted({*stored_shapes, *wanted_shapes}) if stored_shapes.get(key) != wanted_shapes.get(key)
    ]
    if wrong:
        lines = "; ".join(
            f"{key}: stored {stored_shapes.get(key)}, model {wanted_shapes.get(key)}" for key in wrong[:3]
        )
        raise CheckpointError(
            f"checkpoint {saved.path} does not fit the model in {len(wrong)} tensors ({lines}): "
            "resume with the model it was saved with"
        )
