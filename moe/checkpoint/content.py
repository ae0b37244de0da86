"""Whether a checkpoint's index describes whole tensors: every element of each, and so every expert, exactly once.

Ranks that hold different experts write different chunks of one tensor of global shape. A rank that wrote its own experts
under the name of all, or two that wrote the same ones, leave an index whose chunks do not tile the tensor.
"""

import pickle
import re
from collections.abc import Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from moe.errors import CheckpointError

Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes of a chunk."""


def read_index(path: Path) -> Metadata:
    """A checkpoint's index. Raises CheckpointError where there is none that can be read."""
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} has no index that can be read ({type(error).__name__}: {error})") from error


def check_content(path: Path) -> None:
    """Raise CheckpointError for a tensor that is not there exactly once, by name and expert, or bytes outside a file."""
    index = read_index(path)
    for name, item in index.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            continue
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in item.chunks]
        wrong = tiling_error(name, tuple(item.size), boxes)
        if wrong:
            raise CheckpointError(f"{path} is not whole: {wrong}")
        for offsets, sizes in boxes:
            if prod(sizes):
                _check_bytes(path, name, index.storage_data.get(MetadataIndex(name, offsets)))


def _check_bytes(path: Path, name: str, stored: Any) -> None:
    if stored is None:
        raise CheckpointError(f"{path} is not whole: a part of {name} is in none of its files")
    file = path / stored.relative_path
    if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
        raise CheckpointError(f"{path} is not whole: a part of {name} is not in {file.name}")


def tiling_error(name: str, size: Sequence[int], boxes: Sequence[Box]) -> str:
    """What keeps chunks from covering a tensor of shape `size` exactly once; empty if nothing does."""
    boxes = [box for box in boxes if prod(box[1])]
    for offsets, sizes in boxes:
        if any(o + n > whole for o, n, whole in zip(offsets, sizes, size, strict=True)):
            return f"{name} {list(size)} has a chunk at {list(offsets)} of {list(sizes)}, outside of it"
    if len(size) > 1 and _is_expert_tensor(name):
        rows = [0] * size[0]
        for offsets, sizes in boxes:
            for expert in range(offsets[0], offsets[0] + sizes[0]):
                rows[expert] += prod(sizes[1:])
        whole = prod(size[1:])
        missing = [expert for expert, elements in enumerate(rows) if elements < whole]
        twice = [expert for expert, elements in enumerate(rows) if elements > whole]
        if missing or twice:
            found = [f"{what} experts {_list(experts)}" for what, experts in (("lacks", missing), ("has twice", twice))]
            kept = [text for text, experts in zip(found, (missing, twice), strict=True) if experts]
            return f"{name} {list(size)} {' and '.join(kept)}"
    for first, second in combinations(boxes, 2):
        if _overlap(first, second):
            return f"{name} {list(size)} has chunks at {list(first[0])} and {list(second[0])} that overlap"
    elements = sum(prod(sizes) for _, sizes in boxes)
    if elements != prod(size):
        return f"{name} {list(size)} lacks {prod(size) - elements} of {prod(size)} elements"
    return ""


def _is_expert_tensor(name: str) -> bool:
    """Whether the first dimension counts experts: `experts.w_up_EDF`, `experts.b_up_EF`, or its optimizer state."""
    return re.search(r"experts\.[wb]_\w+_E[A-Z]+(\.|$)", name) is not None


def _overlap(a: Box, b: Box) -> bool:
    return all(
        max(o, p) < min(o + m, p + n) for o, m, p, n in zip(a[0], a[1], b[0], b[1], strict=True)
    )  # fmt: skip


def _list(numbers: list[int]) -> str:
    """The first few numbers."""
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
