"""A corpus prepared once: sources read, deduplicated, split, tokenised and written as memory-mapped token files.

A prepared corpus is a folder `corpora/<key>` of the cache with, for source i and each split:

    i.train.tokens, i.validation.tokens    ids of all documents, each followed by the separator (uint16 or uint32)
    i.train.prompt, i.validation.prompt    one byte a token, 1 where it is prompt (only with prompt_field)
    token_bytes.npy, tokenizer.json        bytes of text per id; the tokenizer, if it is not bytes
    manifest.json                          counts, skips and content hashes

The key is a hash of what is read (content of files, commit of hub data sets), the tokenizer and the split, so an edited
file makes a new corpus. Row length and weights are no part of it.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from moe.config.schema import BpeTokenizer, Data, FilesSource, HubSource, PretrainedTokenizer, Source
from moe.data import hub
from moe.data.cache import digest, new_folder
from moe.data.documents import Document, Intake
from moe.data.files import digest_files, find_files, find_stdlib, read_files, read_text
from moe.data.sampling import mix
from moe.data.tokenizers import AnyTokenizer, Bytes, load_pretrained, train_bpe
from moe.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
GROUP_BYTES = 1 << 22
LARGEST_BYTE_ERROR = 0.01


def prepare_shards(data: Data) -> Path:
    """The folder of the prepared corpus, built if the cache has none; raises DataError and leaves nothing half-done."""
    cache_dir = Path(data.cache_dir).expanduser()
    pretrained = load_pretrained(data.tokenizer) if isinstance(data.tokenizer, PretrainedTokenizer) else None
    identities = [_identify(source, cache_dir) for source in data.sources]
    key = digest([FORMAT, identities, _tokenizer_key(data, pretrained), data.validation_fraction])
    final = cache_dir / "corpora" / key
    if not final.is_dir():
        with new_folder(final) as folder:
            _build(data, identities, pretrained, folder)
    return final


def split_of(split_key: str, validation_fraction: float) -> Literal["train", "validation"]:
    """The split of a document, from a hash of its key alone: the same whatever else is in the corpus."""
    position = int.from_bytes(hashlib.blake2b(split_key.encode(errors="surrogatepass"), digest_size=8).digest()) / 2**64
    return "validation" if position < validation_fraction else "train"


def label(source: Source) -> str:
    """A short name of a source, for messages."""
    if isinstance(source, FilesSource):
        return f"files {source.paths[0]}" + (f" and {len(source.paths) - 1} more" if len(source.paths) > 1 else "")
    return f"hub {source.dataset}" if isinstance(source, HubSource) else "stdlib"


def _identify(source: Source, cache_dir: Path) -> dict[str, Any]:
    """What the source is read from and how; equal identities give equal documents."""
    if isinstance(source, HubSource):
        found = hub.identify(source, cache_dir)
    else:
        found = {"files": digest_files(_files(source, Intake()))}
    settings = {name: value for name, value in asdict(source).items() if name not in ("weight", "paths")}
    return {"found": found, "settings": settings}


def _tokenizer_key(data: Data, pretrained: AnyTokenizer | None) -> Any:
    return pretrained.identity if pretrained is not None else asdict(data.tokenizer)


def _files(source: Source, intake: Intake) -> Sequence[Any]:
    return find_files(source.paths, intake) if isinstance(source, FilesSource) else find_stdlib()


def _documents(source: Source, identity: dict[str, Any], intake: Intake) -> Iterator[Document]:
    if isinstance(source, HubSource):
        yield from hub.read_hub(source, identity["found"], intake)
    elif isinstance(source, FilesSource):
        yield from read_files(find_files(source.paths, intake), source, intake)
    else:
        for file in find_stdlib():
            intake.files += 1
            yield from read_text(file, intake)


def _build(data: Data, identities: list[dict[str, Any]], pretrained: AnyTokenizer | None, folder: Path) -> None:
    cache_dir = Path(data.cache_dir).expanduser()
    seen: set[bytes] = set()
    stages: list[_Stage] = []
    for i, (source, identity) in enumerate(zip(data.sources, identities, strict=True)):
        stages.append(_stage(i, source, identity, data.validation_fraction, seen, folder))
        if "files" in identity["found"] and _identify(source, cache_dir) != identity:
            raise DataError(
                f"source {i} ({label(source)}) changed while it was read: run again once nothing writes to it"
            )
    tokenizer = pretrained or _own_tokenizer(data, stages, cache_dir)
    for stage in stages:
        for split in SPLITS:
            stage.report[split] |= _tokenise(stage, split, tokenizer, folder)
            stage.path(split).unlink()
    tokenizer.save(folder)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes_V)
    manifest = {
        "schema_version": FORMAT,
        "tokenizer": {
            "name": data.tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.separator,
            "identity": tokenizer.identity,
        },
        "validation_fraction": data.validation_fraction,
        "sources": [stage.report for stage in stages],
    }
    # Last, so that a folder with a manifest is complete even where a file system reorders renames.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def _on_bad(source: Source) -> Literal["error", "skip"]:
    """The library's odd files are counted, as nobody can mend them; a bad hub record means a wrong setting."""
    if isinstance(source, FilesSource):
        return source.on_bad_file
    return "error" if isinstance(source, HubSource) else "skip"


class _Stage:
    """A source's kept documents as UTF-8 in one temporary file per split, with the bytes of each prompt and text."""

    def __init__(self, index: int, source: Source, folder: Path):
        self.index = index
        self.source = source
        self.folder = folder
        self.has_prompts = isinstance(source, FilesSource) and bool(source.prompt_field)
        self.sizes = {split: array("q") for split in SPLITS}
        self.report: dict[str, Any] = {"name": source.name}

    def path(self, split: str) -> Path:
        return self.folder / f"{self.index}.{split}.text"

    def groups(self, split: str) -> Iterator[list[tuple[str, str]]]:
        """(prompt, text) pairs in order, about GROUP_BYTES at a time."""
        sizes = iter(self.sizes[split])
        with self.path(split).open("rb") as stream:
            group, group_bytes = [], 0
            for prompt_size, text_size in zip(sizes, sizes, strict=True):
                group.append((stream.read(prompt_size).decode(), stream.read(text_size).decode()))
                group_bytes += prompt_size + text_size
                if group_bytes >= GROUP_BYTES:
                    yield group
                    group, group_bytes = [], 0
            if group:
                yield group


def _stage(
    index: int, source: Source, identity: dict[str, Any], fraction: float, seen: set[bytes], folder: Path
) -> _Stage:
    """Read a source once: drop texts that were seen before, in any source, and write the others by split."""
    stage = _Stage(index, source, folder)
    intake = Intake(_on_bad(source))
    counts = {split: {"documents": 0, "bytes": 0, "prompt_bytes": 0} for split in SPLITS}
    duplicates = duplicate_bytes = 0
    with stage.path("train").open("wb") as train, stage.path("validation").open("wb") as validation:
        streams: dict[str, BinaryIO] = {"train": train, "validation": validation}
        for document in _documents(source, identity, intake):
            prompt, text = document.prompt.encode(), document.text.encode()
            fingerprint = hashlib.blake2b(b"%d " % len(prompt) + prompt + text, digest_size=16).digest()
            if fingerprint in seen:
                duplicates, duplicate_bytes = duplicates + 1, duplicate_bytes + len(text)
                continue
            seen.add(fingerprint)
            split = split_of(document.split_key, fraction)
            streams[split].write(prompt + text)
            stage.sizes[split].extend((len(prompt), len(text)))
            for name, amount in (("documents", 1), ("bytes", len(text)), ("prompt_bytes", len(prompt))):
                counts[split][name] += amount
    stage.report |= {
        "files": intake.files,
        "duplicates": duplicates,
        "duplicate_bytes": duplicate_bytes,
        "skipped": dict(intake.skipped),
        "skipped_examples": intake.examples,
        "budget_reached": intake.budget_reached,
        **counts,
    }
    if not stage.sizes["train"] and not stage.sizes["validation"]:
        budget = (
            f" (the first document is larger than max_bytes={source.max_bytes})"
            if isinstance(source, HubSource) and intake.budget_reached
            else ""
        )
        raise DataError(
            f"source {index} ({label(source)}) gives no documents{budget}: {duplicates} are duplicates of "
            f"earlier ones, skipped: {dict(intake.skipped) or 'none'}; correct the source or remove it"
        )
    return stage


def _own_tokenizer(data: Data, stages: Sequence[_Stage], cache_dir: Path) -> AnyTokenizer:
    if not isinstance(data.tokenizer, BpeTokenizer):
        return Bytes()
    return train_bpe(data.tokenizer, _sample(stages, data.tokenizer.training_bytes), cache_dir)


def _sample(stages: Sequence[_Stage], budget: int) -> list[str]:
    """Training texts (and prompts) in a fixed shuffled order, up to `budget` bytes; the last one is cut to fit."""
    spans = []
    for stage in stages:
        start = 0
        sizes = iter(stage.sizes["train"])
        for size in (prompt + text for prompt, text in zip(sizes, sizes, strict=True)):
            spans.append((stage.path("train"), start, size))
            start += size
    texts = []
    for i in sorted(range(len(spans)), key=lambda i: mix(FORMAT, i)):
        if budget <= 0:
            break
        path, start, size = spans[i]
        with path.open("rb") as stream:
            stream.seek(start)
            texts.append(stream.read(min(size, budget)).decode(errors="ignore"))
        budget -= size
    return texts


def _tokenise(stage: _Stage, split: str, tokenizer: AnyTokenizer, folder: Path) -> dict[str, Any]:
    """Write one split's tokens (and prompt marks); returns tokens, content hash and file names."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    names = {"tokens": f"{stage.index}.{split}.tokens", "prompt": f"{stage.index}.{split}.prompt"}
    content = hashlib.blake2b(digest_size=16)
    num_tokens = represented_bytes = 0
    with (folder / names["tokens"]).open("wb") as tokens_file, (folder / names["prompt"]).open("wb") as prompt_file:
        for group in stage.groups(split):
            ids = iter(tokenizer.encode([part for pair in group for part in pair]))
            for prompt_ids, text_ids in zip(ids, ids, strict=True):
                tokens = np.concatenate([prompt_ids, text_ids, [tokenizer.separator]]).astype(dtype)
                prompt = (np.arange(len(tokens)) < len(prompt_ids)).astype(np.uint8)
                tokens_file.write(tokens.tobytes())
                content.update(tokens.tobytes())
                if stage.has_prompts:
                    prompt_file.write(prompt.tobytes())
                    content.update(prompt.tobytes())
                num_tokens += len(tokens)
                represented_bytes += int(tokenizer.token_bytes_V[tokens].sum())
    if not stage.has_prompts:
        (folder / names.pop("prompt")).unlink()
    counts = stage.report[split]
    _check_bytes(stage, represented_bytes, counts["bytes"] + counts["prompt_bytes"])
    return {"tokens": num_tokens, "dtype": dtype.str, "content": content.hexdigest(), "names": names}


def _check_bytes(stage: _Stage, represented: int, actual: int) -> None:
    """A tokenizer that loses text (unknown words, lower case) would make bits per byte a lie."""
    if abs(represented - actual) > LARGEST_BYTE_ERROR * actual:
        raise DataError(
            f"the tokens of source {stage.index} ({label(stage.source)}) stand for {represented} bytes of its "
            f"{actual}: this tokenizer loses or adds text, so bits per byte would be wrong; choose a byte-level one, "
            "or train one (tokenizer bpe)"
        )
