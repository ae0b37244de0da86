"""Many variants of one model, each number stored once: shards named by their content, a list of shards for every variant.

A shard is one expert's slice of a tensor, or a whole tensor without experts: `blobs/<hash>`, its bytes. A variant is
`variants/<name>.json`: the run's settings, and for every tensor its type, shape and shards. Ten variants that fine-tuned a few
experts each cost the base once and their experts ten times; what comes back is bitwise what went in.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.load import dump, load
from moe.errors import CheckpointError, ConfigError
from moe.files import lock, write_json, write_whole
from moe.lora import is_adapter
from moe.surgery.select import expert_dimension
from moe.surgery.start import Source, begin_run, read_run

SCHEMA_VERSION = 1


def put(store: Path, name: str, folder: Path) -> dict[str, int]:
    """Add a run's newest checkpoint as variant `name`; returns its shards, and those and the bytes that were new.

    Raises ConfigError for a name that is taken or is no file name.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"variant {name!r} must be letters, digits, '.', '_' and '-'")
    manifest = store / "variants" / f"{name}.json"
    _require_new(store, name)
    source = read_run(folder, adapters="apart")
    with lock(store / ".lock", wait=True):
        _require_new(store, name)  # another process may have put it meanwhile
        return _put(store, manifest, source)


def _require_new(store: Path, name: str) -> None:
    if name in names(store):
        raise ConfigError(f"{store} has a variant {name!r} already: choose another name")


def _put(store: Path, manifest: Path, source: Source) -> dict[str, int]:
    """Write the shards that are not there, and then the manifest that needs them."""
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


def remove(store: Path, name: str) -> int:
    """Forget a variant, damaged or not, and delete the shards that no other needs; returns the bytes that came free.

    Raises CheckpointError for an unknown name, and where another variant is damaged, so that nobody knows what it needs.
    """
    _require_there(store, name)
    with lock(store / ".lock", wait=True):
        _require_there(store, name)
        before = size(store)
        others = {other for other in names(store) if other != name}
        needed = {digest for other in others for digest in _digests(_manifest(store, other))}
        (store / "variants" / f"{name}.json").unlink()
        for blob in (store / "blobs").glob("*/*"):
            if blob.name not in needed:
                blob.unlink()
        return before - size(store)


def read(store: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A variant's document and tensors. Raises CheckpointError for an unknown name, or a shard whose content has changed."""
    document = _manifest(store, name)
    tensors = {}
    for key, entry in document["tensors"].items():
        content = b"".join(_blob(store, digest, f"{name}: {key}") for digest in entry["shards"])
        flat = torch.frombuffer(bytearray(content), dtype=getattr(torch, entry["dtype"])) if content else torch.empty(0)
        tensors[key] = flat.view(entry["shape"])
    return document, tensors


def _require_there(store: Path, name: str) -> None:
    if name not in names(store):
        raise CheckpointError(f"{store} has no variant {name!r}; it has {', '.join(names(store)) or 'none'}")


def _manifest(store: Path, name: str) -> dict[str, Any]:
    """A variant's document. Raises CheckpointError for an unknown name, another version, or a file that is damaged."""
    _require_there(store, name)
    path = store / "variants" / f"{name}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["schema_version"]
        _digests(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): 'moe store remove {store} {name}', and put the run again under that name"
        ) from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, and this program reads {SCHEMA_VERSION}: use the one that wrote it"
        )
    return document


def _digests(document: dict[str, Any]) -> set[str]:
    """The names of the shards that a variant needs."""
    return {digest for entry in document["tensors"].values() for digest in entry["shards"]}


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest() == digest


def _blob(store: Path, digest: str, what: str) -> bytes:
    path = store / "blobs" / digest[:2] / digest
    if not _intact(path, digest):
        raise CheckpointError(
            f"{path} (of {what}) is missing or has other content than its name says: put a run that has it, under any new name, "
            "which mends it"
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
        blobs = (store / "blobs" / digest[:2] / digest for digest in _digests(_manifest(store, name)))
        return manifest.stat().st_size + sum(blob.stat().st_size for blob in blobs)
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def listing(store: Path) -> list[dict[str, Any]]:
    """Every variant with its step, the bytes that it needs, and those that no other variant needs."""
    if not (store / "variants").is_dir():
        raise CheckpointError(f"{store} is no store: 'moe store put' makes one")
    documents = {name: _manifest(store, name) for name in names(store)}
    uses = Counter(digest for document in documents.values() for digest in _digests(document))
    return [
        {
            "name": name,
            "step": document["step"],
            "bytes": size(store, name),
            "own_bytes": sum(
                (store / "blobs" / digest[:2] / digest).stat().st_size
                for digest in _digests(document)
                if uses[digest] == 1
            ),
        }
        for name, document in documents.items()
    ]
