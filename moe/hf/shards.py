"""Files of safetensors: written one shard at a time, read one tensor at a time, every tensor accounted for."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import CheckpointError, ConfigError
from moe.files import write_json
from moe.hf.links import Entry

INDEX = "model.safetensors.index.json"
_WHOLE = ("F32", "BF16", "F16")
"""Stored types whose every number is one of float32, in the files' words."""
_TRAINING_ONLY = re.compile(r"\.router\.momentum_E$")
"""Router state that only training reads."""
Fetch = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Names of our tensors to those tensors, on the CPU; called for one shard at a time."""


def shards_of(entries: Iterable[Entry], dtype: torch.dtype, limit: int) -> list[list[Entry]]:
    """Entries in order, cut so that no shard is larger than `limit` bytes (a single larger tensor has one of its own)."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        own = (4 if entry.exact else dtype.itemsize) * torch.Size(entry.shape).numel()
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += own
    return shards


def write_shards(folder: Path, shards: list[list[Entry]], fetch: Fetch, dtype: torch.dtype) -> int:
    """Write every shard and, for more than one, the index. Returns the bytes of all tensors.

    At any time one shard is in memory, beside what `fetch` returns for it.
    """
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        ours = fetch({link.ours for entry in shard for link in entry.links})
        tensors = {entry.name: _theirs(entry, ours, dtype) for entry in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def _theirs(entry: Entry, ours: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=torch.float32 if entry.exact else dtype)
    for link in entry.links:
        link.their_view(tensor).copy_(link.our_view(ours[link.ours]))
    for constant in entry.constants:
        constant.their_view(tensor).fill_(constant.value)
    return tensor


class Files:
    """The tensors of a folder: names, and each one's content when asked. A context manager.

    One file is open at a time: what was read of a file stays in memory until it is closed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: tuple[str, ExitStack, Any] | None = None
        self._where: dict[str, str] = {}
        self._kind: dict[str, tuple[tuple[int, ...], str]] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no .safetensors file: convert the model to safetensors first.")
        for path in paths:
            self._list(path.name)
        self._check_index(folder / INDEX)

    def _file(self, file: str) -> Any:
        """The file's reader; the one before is closed."""
        if self._open is not None and self._open[0] == file:
            return self._open[2]
        self.close()
        stack, path = ExitStack(), self._folder / file
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file ({error}): fetch it again.") from error
        self._open = (file, stack, opened)
        return opened

    def _list(self, file: str) -> None:
        opened = self._file(file)
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            if name in self._where:
                raise CheckpointError(f"the tensor {name} is twice: in {self._where[name]} and {file}. Remove one.")
            cut = opened.get_slice(name)
            self._where[name], self._kind[name] = file, (tuple(cut.get_shape()), str(cut.get_dtype()))

    def _check_index(self, path: Path) -> None:
        if not path.exists():
            return
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = sorted(name for name in listed if self._where.get(name) != listed[name])
        if wrong:
            raise CheckpointError(
                f"{path} places {len(wrong)} tensors in files that do not hold them ({_some(wrong)}): fetch the files again."
            )

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._kind[name][0]

    def dtype(self, name: str) -> str:
        """A tensor's type in the file's words, without reading it."""
        return self._kind[name][1]

    def tensor(self, name: str) -> Tensor:
        """A tensor's content."""
        return self._file(self._where[name]).get_tensor(name)


def check_names(files: Files, entries: list[Entry], ignored: Callable[[str], bool]) -> None:
    """Raise CheckpointError with the list of tensors that are missing, unknown, or of another shape."""
    expected, found = {entry.name: entry.shape for entry in entries}, files.names()
    missing = sorted(set(expected) - found)
    unknown = sorted(name for name in found - set(expected) if not ignored(name))
    shaped = [
        f"{name} is {files.shape(name)}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in found and files.shape(name) != shape
    ]
    lists = [("missing", missing), ("unknown", unknown), ("of another shape", shaped)]
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in lists if names]
    if problems:
        raise CheckpointError(f"the files do not hold the model of their configuration; {'; '.join(problems)}.")


def check_content(files: Files, entries: Iterable[Entry]) -> None:
    """Raise CheckpointError for a tensor whose type float32 does not hold, or which is not the constant that it stands for."""
    for entry in entries:
        kind = files.dtype(entry.name)
        if kind not in _WHOLE:
            raise CheckpointError(
                f"{entry.name} is stored as {kind}, which float32 does not hold to the last "
                "bit: convert the model to float32, bfloat16 or float16"
            )
        for constant in entry.constants:
            if not bool((constant.their_view(files.tensor(entry.name)) == constant.value).all()):
                raise CheckpointError(
                    f"{entry.name} is not {constant.value:g} everywhere, and we model no such numbers."
                )


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_complete(entries: Iterable[Entry], state: Iterable[str]) -> None:
    """Raise ConfigError naming our tensors that no entry reads or writes."""
    linked = {link.ours for entry in entries for link in entry.links}
    lost = [name for name in state if name not in linked and not _TRAINING_ONLY.search(name)]
    if lost:
        raise ConfigError(f"the family has no place for {', '.join(lost[:5])}: nothing was written")
