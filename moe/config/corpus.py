"""Settings of what is read, in which tokens, and in rows of which length."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Discriminator

from moe.config.base import PositiveFloat, PositiveInt, config


@config
class ByteTokenizer:
    """UTF-8 bytes, and id 256 between documents: results are bits per byte with no further conversion."""

    name: Literal["bytes"] = "bytes"


@config
class BpeTokenizer:
    """A byte-level BPE trained on the run's own training text, then cached."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Ge(258)]
    """Entries to learn, the 256 bytes and the document separator included."""
    training_bytes: PositiveInt = 20_000_000
    """Text to learn from, taken from the front of the shuffled training documents."""


@config
class PretrainedTokenizer:
    """A tokenizer of the Hugging Face hub, or a local folder or tokenizer.json."""

    name: Literal["pretrained"] = "pretrained"
    path: Annotated[str, MinLen(1)]
    """Hub name, folder, or file."""


Tokenizer = Annotated[ByteTokenizer | BpeTokenizer | PretrainedTokenizer, Discriminator("name")]


@config
class StdlibSource:
    """The source code of the running Python's standard library, without its tests (about 12 MB)."""

    name: Literal["stdlib"] = "stdlib"
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


@config
class FilesSource:
    """Local text, jsonl or parquet files; a text file is one document."""

    name: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], MinLen(1)]
    """Files, folders or glob patterns."""
    text_field: str = "text"
    """Field that holds the text, in jsonl and parquet."""
    prompt_field: str = ""
    """Field whose text goes before the text and carries no loss; empty for none (jsonl and parquet)."""
    on_bad_file: Literal["error", "skip"] = "error"
    """What to do with an empty, binary or wrongly encoded file; skips are counted and reported."""
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


@config
class HubSource:
    """A dataset that `datasets.load_dataset` can load, by name or local path."""

    name: Literal["hub"] = "hub"
    dataset: Annotated[str, MinLen(1)]
    """First argument of load_dataset, e.g. "roneneldan/TinyStories" or "json"."""
    subset: str = ""
    """Configuration name of the dataset; empty for the default."""
    data_files: tuple[str, ...] = ()
    """Files, for the format builders (json, text, parquet)."""
    split: str = "train"
    """Split to read; validation documents are taken out of it by hash."""
    text_field: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read as a stream rather than downloading the whole dataset."""
    max_bytes: PositiveInt = 1_000_000_000
    """Text to take, in bytes; written to shards before training."""
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


Source = Annotated[StdlibSource | FilesSource | HubSource, Discriminator("name")]


@config
class Data:
    """What is read, in which tokens, and in rows of which length."""

    sources: Annotated[tuple[Source, ...], MinLen(1)] = (StdlibSource(),)
    """Corpora; rows of a batch are drawn from them in proportion to their weights."""
    tokenizer: Tokenizer = ByteTokenizer()
    """How text becomes token ids."""
    sequence_length: PositiveInt = 256
    """S, tokens in a row."""
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the documents, chosen by hash, that only evaluation sees."""
    cache_dir: Annotated[str, MinLen(1)] = "~/.cache/moe-lab"
    """Where prepared shards and trained tokenizers live, keyed by content."""
