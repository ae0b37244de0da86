"""Batches out of a prepared corpus: every row is a pure function of (seed, step, row), whoever asks for it.

Documents of a source lie in one stream of tokens, each followed by a separator. A row is a window of sequence_length
inputs and the same number of targets, the next tokens. Loss is counted on every token of a document after its first,
and on the separator that ends it; not where the input is the separator (the next document's first token cannot be
predicted), not on prompt tokens, not on padding. The separator stands for 0 bytes of text.

An epoch of a source is its stream as a circle, cut into windows from an offset that moves every epoch, in an order that
changes every epoch: each token is the target of exactly one window. What the last window lacks is padding.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config.schema import Data, Source
from moe.data.cache import digest
from moe.data.sampling import make_schedule, mix, permute
from moe.data.shards import FORMAT, MANIFEST, label, prepare_shards
from moe.data.tokenizers import AnyTokenizer, open_tokenizer
from moe.errors import DataError

NO_LOSS = -100
VALIDATION_KEY = 0x5EED
OFFSET_KEY = 0x0FF5E7


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a step (or of the validation set), as torch tensors on one device."""

    ids_BS: Tensor
    """Input tokens, int64."""
    targets_BS: Tensor
    """Next tokens, int64; -100 where no loss is counted."""
    document_BS: Tensor
    """Index of the document within the row, int64, ascending from 0; padding has an index of its own."""
    valid_BS: Tensor
    """False for padding, bool."""
    row_B: Tensor
    """Global index of each row in the step, int64."""
    bytes_B: Tensor
    """UTF-8 bytes of the text that each row's counted targets stand for, float64."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__})

    def part(self, index: int, parts: int) -> "Batch":
        """The index-th of `parts` equal pieces of every row; the first has the rows' bytes, so that they sum to the whole."""
        S = self.ids_BS.shape[1] // parts
        columns = {name: getattr(self, name)[:, index * S : (index + 1) * S] for name in self.__slots__ if "BS" in name}
        return replace(self, **columns, bytes_B=self.bytes_B if index == 0 else torch.zeros_like(self.bytes_B))


class Corpus:
    """A prepared corpus, memory-mapped, cut into rows of data.sequence_length; equal folders and data give equal rows.

    Raises DataError where a source has no full training row, or the sources together no full validation row.
    """

    def __init__(self, folder: Path, data: Data):
        self.folder = folder
        self.data = data
        self.manifest: dict[str, Any] = json.loads(_checked(folder, MANIFEST).read_text(encoding="utf-8"))
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.fingerprint = _fingerprint(self.manifest, data)
        self._separator: int = self.manifest["tokenizer"]["separator"]
        self._token_bytes_V = np.load(_checked(folder, "token_bytes.npy"))
        self._schedule = make_schedule([source.weight for source in data.sources])
        sources = self.manifest["sources"]
        self._train = [_Stream(folder, source["train"]) for source in sources]
        self._validation = [_Stream(folder, source["validation"]) for source in sources]
        self._check_sizes()
        length = data.sequence_length
        self._train_windows = [-(-len(stream.tokens) // length) for stream in self._train]
        # A stream of n tokens has n - 1 inputs that are followed by something.
        windows = [-(-(len(stream.tokens) - 1) // length) if len(stream.tokens) else 0 for stream in self._validation]
        self._validation_ends = np.cumsum(windows)

    @property
    def num_train_rows(self) -> int:
        """Rows of one epoch of every source together."""
        return sum(self._train_windows)

    @property
    def num_validation_rows(self) -> int:
        """Rows of the whole validation set."""
        return int(self._validation_ends[-1])

    @cached_property
    def tokenizer(self) -> AnyTokenizer:
        """The corpus's tokenizer, with encode and decode."""
        return open_tokenizer(self.folder)

    def train_batch(self, step: int, rows: Sequence[int], *, batch_rows: int, seed: int) -> Batch:
        """The given rows, of [0, batch_rows), of a step's batch (steps count from 0).

        Sources take turns in proportion to their weights; within a source, windows come without replacement until its
        epoch is over.
        """
        assert step >= 0 and all(0 <= row < batch_rows for row in rows), (step, rows, batch_rows)
        return self._collate([self._train_row(step * batch_rows + row, seed) for row in rows], rows)

    def train_sources(self, step: int, rows: Sequence[int], *, batch_rows: int) -> Tensor:
        """The index in data.sources of each of the given rows of a step's batch [B], int64."""
        return torch.tensor([self._schedule.locate(step * batch_rows + row)[0] for row in rows])

    def validation_batch(self, rows: Sequence[int]) -> Batch:
        """The given rows of the validation set, whose order is fixed and shuffled over all sources.

        The first n rows are a fair sample of the validation text, the same for every run of equal data. Raises
        DataError for rows that do not exist.
        """
        if len(rows) and not (min(rows) >= 0 and max(rows) < self.num_validation_rows):
            raise DataError(
                f"the validation set has {self.num_validation_rows} rows of {self.data.sequence_length} tokens, and "
                f"row {max(rows)} was asked for: lower evaluation.rows and evaluation.final_rows, or raise "
                "data.validation_fraction"
            )
        return self._collate([self._validation_row(row) for row in rows], rows)

    def validation_sources(self, rows: Sequence[int]) -> np.ndarray:
        """The index in data.sources of each of the given validation rows, int64."""
        numbers = [permute(row, self.num_validation_rows, VALIDATION_KEY) for row in rows]
        return np.searchsorted(self._validation_ends, numbers, side="right")

    def describe(self) -> str:
        """One paragraph for the console: documents, bytes, tokens, duplicates and skips of every source."""
        tokenizer = self.manifest["tokenizer"]
        parts = map(_describe_source, self.data.sources, self.manifest["sources"])
        return (
            f"Data {self.fingerprint[:8]}: {'; '.join(parts)}. Tokenizer {tokenizer['name']} with {self.vocab_size} "
            f"entries; rows of {self.data.sequence_length} tokens: {self.num_train_rows:,} in an epoch, "
            f"{self.num_validation_rows:,} for validation. Cached in {self.folder}."
        )

    def _check_sizes(self) -> None:
        least = self.data.sequence_length + 1
        fraction = self.data.validation_fraction
        for i, (source, report) in enumerate(zip(self.data.sources, self.manifest["sources"], strict=True)):
            train = report["train"]
            if train["tokens"] < least:
                raise DataError(
                    f"source {i} ({label(source)}) has {train['tokens']} training tokens in {train['documents']} "
                    f"documents, and one row needs sequence_length + 1 = {least}: add text, lower "
                    f"data.sequence_length, or lower data.validation_fraction ({fraction})"
                )
        splits = [source["validation"] for source in self.manifest["sources"]]
        documents = sum(split["documents"] for split in splits)
        tokens = max(split["tokens"] for split in splits)
        if tokens < least:
            total = documents + sum(source["train"]["documents"] for source in self.manifest["sources"])
            raise DataError(
                f"validation has {documents} of the {total} documents (validation_fraction={fraction}, chosen by hash) "
                f"and no source has more than {tokens} tokens there, while one row needs sequence_length + 1 = "
                f"{least}: raise data.validation_fraction, or add documents (a text file is one document: split it, "
                "or write one JSON line per passage)"
            )

    def _train_row(self, number: int, seed: int) -> "_Window":
        source, draw = self._schedule.locate(number)
        epoch, index = divmod(draw, self._train_windows[source])
        key = mix(seed, source, epoch)
        window = permute(index, self._train_windows[source], key)
        length = self.data.sequence_length
        offset = mix(key, OFFSET_KEY) % length
        size = len(self._train[source].tokens)
        return self._train[source].window(offset + window * length, min(length, size - window * length))

    def _validation_row(self, row: int) -> "_Window":
        number = permute(row, self.num_validation_rows, VALIDATION_KEY)
        source = int(np.searchsorted(self._validation_ends, number, side="right"))
        start = (number - (int(self._validation_ends[source - 1]) if source else 0)) * self.data.sequence_length
        stream = self._validation[source]
        return stream.window(start, min(self.data.sequence_length, len(stream.tokens) - 1 - start))

    def _collate(self, windows: "Sequence[_Window]", rows: Sequence[int]) -> Batch:
        shape = (len(windows), self.data.sequence_length)
        ids_BS, targets_BS = np.full(shape, self._separator, np.int64), np.full(shape, NO_LOSS, np.int64)
        document_BS, valid_BS = np.zeros(shape, np.int64), np.zeros(shape, bool)
        bytes_B = np.zeros(len(windows))
        for b, (tokens, prompt) in enumerate(windows):
            inputs, targets = tokens[:-1], tokens[1:]
            n = len(inputs)
            counted = inputs != self._separator
            if prompt is not None:
                counted &= prompt[1:] == 0
            ids_BS[b, :n] = inputs
            targets_BS[b, :n] = np.where(counted, targets, NO_LOSS)
            ends = np.cumsum(inputs == self._separator)
            document_BS[b, 1:n] = ends[:-1]
            document_BS[b, n:] = ends[-1] + 1
            valid_BS[b, :n] = True
            bytes_B[b] = self._token_bytes_V[targets[counted]].sum()
        arrays = (ids_BS, targets_BS, document_BS, valid_BS, np.array(rows, dtype=np.int64), bytes_B)
        return Batch(*map(torch.from_numpy, arrays))


def prepare(data: Data) -> Corpus:
    """Prepare the corpus, or open the cached one if the same text, tokenizer and split were prepared before.

    Reads every local file once to know its content, so an edited file never meets an old cache. Safe in several
    processes, though all but the first would wait or repeat the work: let one rank go first. Raises DataError.
    """
    make_schedule([source.weight for source in data.sources])
    return Corpus(prepare_shards(data), data)


_Window = tuple[np.ndarray, np.ndarray | None]


class _Stream:
    """One split of one source: its tokens and, where it has prompts, their marks."""

    def __init__(self, folder: Path, split: dict[str, Any]):
        self.tokens = _map(folder, split["names"]["tokens"], split["dtype"], split["tokens"])
        has_prompts = "prompt" in split["names"]
        self.prompt = _map(folder, split["names"]["prompt"], "u1", split["tokens"]) if has_prompts else None

    def window(self, start: int, count: int) -> _Window:
        """`count` inputs from start and the token after them, on the circle of the stream: (tokens, prompt marks)."""
        positions = np.arange(start, start + count + 1) % len(self.tokens)
        tokens = self.tokens[positions].astype(np.int64)
        return tokens, None if self.prompt is None else self.prompt[positions]


def _map(folder: Path, name: str, dtype: str, size: int) -> np.ndarray:
    path = _checked(folder, name, size * np.dtype(dtype).itemsize)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)


def _checked(folder: Path, name: str, num_bytes: int = -1) -> Path:
    path = folder / name
    found = path.stat().st_size if path.is_file() else -1
    if found == -1 or num_bytes not in (-1, found):
        state = "is missing" if found == -1 else f"has {found} bytes instead of {num_bytes}"
        raise DataError(
            f"the prepared corpus {folder} is damaged, {name} {state}: delete the folder, it will be prepared again"
        )
    return path


def _fingerprint(manifest: dict[str, Any], data: Data) -> str:
    """Equal for equal rows: token content, tokenizer, weights and row length; no paths, so every machine agrees."""
    content = [[source[split]["content"] for split in ("train", "validation")] for source in manifest["sources"]]
    weights = [source.weight for source in data.sources]
    return digest([FORMAT, content, manifest["tokenizer"], weights, data.sequence_length])


def _describe_source(source: Source, report: dict[str, Any]) -> str:
    counts = [
        f"{split['documents']:,} {name} documents ({split['bytes']:,} bytes, {split['tokens']:,} tokens)"
        for name, split in (("training", report["train"]), ("validation", report["validation"]))
    ]
    dropped = [f"{report['duplicates']:,} duplicates dropped"] if report["duplicates"] else []
    for reason, count in sorted(report["skipped"].items()):
        examples = ", ".join(report["skipped_examples"][reason][:2])
        dropped.append(f"{count:,} skipped as {reason} ({examples}{', ...' if count > 2 else ''})")
    if report["budget_reached"]:
        dropped.append("ended at max_bytes")
    return f"{label(source)}: {' and '.join(counts)}" + (f", {', '.join(dropped)}" if dropped else "")
