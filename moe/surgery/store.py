"""Many variants of one model, each number stored once: shards named by their content, a list of shards for every variant.

A shard is one expert's slice of a tensor, or a whole tensor without experts: `blobs/<hash>`, its bytes. A variant is
`variants/<name>.json`: the run's settings, and for every tensor its type, shape and shards. Ten variants that fine-tuned a few
experts each cost the base once and their experts ten times; what comes back is bitwise what went in.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.load import dump, load
from moe.errors import CheckpointError, ConfigError
from moe.files import write_json, write_whole
from moe.lora import is_adapter
from moe.surgery.select import expert_dimension
from moe.surgery.start import begin_run, read_run

SCHEMA_VERSION = 1


def put(store: Path, name: str, folder: Path) -> dict[str, int]:
    """Add a run's newest checkpoint as variant `name`; returns its shards, and those and the bytes that were new.

    Raises ConfigError for a name that is taken or is no file name.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"variant {name!r} must be letters, digits, '.', '_' and '-'")
    manifest = store / "variants" / f"{name}.json"
    if manifest.exists():
        raise ConfigError(f"{store} has a variant {name!r} already: choose another name")
    source = read_run(folder, adapters="apart")
    listed, counts = {}, {"shards": 0, "new_shards": 0, "new_bytes": 0}
    for key, tensor in source.tensors.items():
        hashes = []
        for shard in _shards(key, tensor):
            content = shard.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest = hashlib.blake2b(content, digest_size=20).hexdigest()
            blob = store / "blobs" / digest[:2] / digest
            counts["shards"] += 1
            if not _intact(blob, digest):
                write_whole(blob, lambda stream, content=content: stream.write(content))
                counts["new_shards"] += 1
                counts["new_bytes"] += len(content)
            hashes.append(digest)
        listed[key] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "shards": hashes}
    document = {"schema_version": SCHEMA_VERSION, "step": source.step, "run": dump(source.run), "tensors": listed}
    write_json(manifest, document)
    counts["new_bytes"] += manifest.stat().st_size
    return counts


def _shards(name: str, tensor: Tensor) -> list[Tensor]:
    """One per expert where experts are the first dimension, else the tensor; adapters, of which no two runs share one, whole."""
    apart = ".experts." in name and expert_dimension(name) == 0 and not is_adapter(name)
    return list(tensor.unbind(0)) if apart else [tensor]


def read(store: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A variant's document and tensors. Raises CheckpointError for an unknown name, or a shard whose content has changed."""
    manifest = store / "variants" / f"{name}.json"
    if not manifest.is_file():
        raise CheckpointError(f"{store} has no variant {name!r}; it has {', '.join(names(store)) or 'none'}")
    document = json.loads(manifest.read_text(encoding="utf-8"))
    tensors = {}
    for key, entry in document["tensors"].items():
        content = b"".join(_blob(store, digest) for digest in entry["shards"])
        flat = torch.frombuffer(bytearray(content), dtype=getattr(torch, entry["dtype"])) if content else torch.empty(0)
        tensors[key] = flat.view(entry["shape"])
    return document, tensors


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest() == digest


def _blob(store: Path, digest: str) -> bytes:
    path = store / "blobs" / digest[:2] / digest
    if not _intact(path, digest):
        raise CheckpointError(
            f"{path} is missing or has other content than its name says: put a run that has it, under any new name, which mends it"
        )
    return path.read_bytes()


def get(store: Path, name: str, out: Path) -> Path:
    """Write a variant as a run folder that starts from it."""
    document, tensors = read(store, name)
    origin = {"made_by": "store", "source": f"{store}:{name}", "source_step": document["step"]}
    return begin_run(out, load(document["run"]), tensors, origin)


def names(store: Path) -> list[str]:
    """Every variant."""
    return sorted(path.stem for path in (store / "variants").glob("*.json"))


def size(store: Path, name: str = "") -> int:
    """Bytes of all files, or of those that one variant needs."""
    if name:
        manifest = store / "variants" / f"{name}.json"
        document = json.loads(manifest.read_text(encoding="utf-8"))
        needed = {digest for entry in document["tensors"].values() for digest in entry["shards"]}
        blobs = sum((store / "blobs" / digest[:2] / digest).stat().st_size for digest in needed)
        return manifest.stat().st_size + blobs
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
