"""Text to token ids and back: UTF-8 bytes, a BPE trained here, or a pretrained tokenizer.

Every tokenizer has one separator id, put after each document. `token_bytes_V` says how many bytes of text each id
stands for (0 for the separator and special tokens), which makes losses comparable across tokenizers.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.config.schema import BpeTokenizer, PretrainedTokenizer
from moe.errors import DataError
from moe.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SEPARATOR = "<|document|>"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
PIECE_CHARACTERS = 1 << 20


class Bytes:
    """UTF-8 bytes; id 256 separates documents."""

    vocab_size = 257
    separator = 256
    token_bytes_V = np.array([1] * 256 + [0], dtype=np.uint32)
    identity = "bytes"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators are left out, and bytes that are not UTF-8 are replaced."""
        return bytes(i for i in map(int, ids) if i != self.separator).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing to save."""


class Learned:
    """A `tokenizers` tokenizer, with truncation and padding off, for which special tokens in a text are plain text.

    The separator is `separator`, an existing token, or, if that is "", an id of its own after the vocabulary.
    """

    def __init__(self, backend: "Backend", separator: str):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.separator_token = separator
        vocabulary = backend.get_vocab()
        size = max(vocabulary.values()) + 1
        self.separator: int = vocabulary[separator] if separator else size
        self.vocab_size = size if separator else size + 1
        self.token_bytes_V = _token_bytes(backend, self.vocab_size)
        self.token_bytes_V[self.separator] = 0
        self.identity = hashlib.blake2b((backend.to_str() + separator).encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text; texts over a million characters are cut at line ends, which bounds memory."""
        pieces = [_pieces(text) for text in texts]
        encodings = iter(
            self.backend.encode_batch([piece for some in pieces for piece in some], add_special_tokens=False)
        )
        ids = [[np.array(next(encodings).ids, dtype=np.int64) for _ in some] for some in pieces]
        return [np.concatenate(some) if some else np.zeros(0, np.int64) for some in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators are left out."""
        return self.backend.decode([i for i in map(int, ids) if i != self.separator], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and separator.txt, for `open_tokenizer`."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (folder / "separator.txt").write_text(self.separator_token, encoding="utf-8")


AnyTokenizer = Bytes | Learned


def open_tokenizer(folder: Path) -> AnyTokenizer:
    """The tokenizer that was saved in a prepared corpus."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return Bytes()
    return Learned(_read_backend(path), (folder / "separator.txt").read_text(encoding="utf-8"))


def train_bpe(config: BpeTokenizer, texts: Sequence[str], cache_dir: Path) -> Learned:
    """A byte-level BPE (Sennrich et al. 2016; GPT-2's pre-tokenisation) of the texts, cached by their content."""
    digest = hashlib.blake2b(f"bpe {config.vocab_size}".encode(), digest_size=16)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
    path = cache_dir / "tokenizers" / f"{digest.hexdigest()}.json"
    if not path.is_file():
        write_text(path, _train_backend(config, texts).to_str())
    return Learned(_read_backend(path), SEPARATOR)


def load_pretrained(config: PretrainedTokenizer) -> Learned:
    """The tokenizer of a tokenizer.json, a folder that holds one, or a hub name; raises DataError if there is none.

    Documents end with its end-of-text token: the one in tokenizer_config.json, else a usual one, else an id of its own.
    """
    path, settings_path = _pretrained_files(config.path)
    backend = _read_backend(path)
    vocabulary = backend.get_vocab()
    settings: dict[str, Any] = {}
    if settings_path is not None and settings_path.is_file():
        try:
            settings = json.loads(settings_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{settings_path} is not JSON ({error}): fetch the tokenizer again") from error
    end = settings.get("eos_token")
    named = end.get("content") if isinstance(end, dict) else end
    found = [token for token in (named, *END_TOKENS) if token in vocabulary]
    return Learned(backend, found[0] if found else "")


def _train_backend(config: BpeTokenizer, texts: Sequence[str]) -> "Backend":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _read_backend(path: Path) -> "Backend":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises a bare Exception.
        raise DataError(
            f"{path} is not a tokenizer.json of the tokenizers library ({error}): fetch or train it again"
        ) from error


def _pretrained_files(path: str) -> tuple[Path, Path | None]:
    local = Path(os.path.expanduser(path))
    if local.is_file():
        return local, local.parent / "tokenizer_config.json"
    if local.is_dir():
        if not (local / "tokenizer.json").is_file():
            raise DataError(
                f"the folder {path!r} has no tokenizer.json, and other formats are not read: name a folder that "
                "has one, or the file itself"
            )
        return local / "tokenizer.json", local / "tokenizer_config.json"
    if path.startswith((".", "/", "~")) or path.endswith(".json"):
        raise DataError(
            f"tokenizer path {path!r} does not exist (seen from {os.getcwd()}): correct data.tokenizer.path"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        tokenizer = Path(hf_hub_download(path, "tokenizer.json"))
    except Exception as error:
        # Unknown names, private repositories and missing networks come as unrelated classes.
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"tokenizer {path!r} is no local path, and no tokenizer.json of that name can be had from the hub "
            f"({reason}): check the name, or give the path of a tokenizer.json"
        ) from error
    try:
        return tokenizer, Path(hf_hub_download(path, "tokenizer_config.json"))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return tokenizer, None
        raise DataError(
            f"tokenizer {path!r}: its tokenizer_config.json, which names the end-of-text token, cannot be had from the "
            "hub: try again, or give the path of a tokenizer.json"
        ) from error


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces


def _token_bytes(backend: "Backend", vocab_size: int) -> np.ndarray:
    """Bytes of text that each id stands for, from the way its decoder writes tokens; special tokens stand for none.

    Byte-level (GPT-2) writes one character per byte. SentencePiece writes a space as U+2581 and a lone byte as <0x0A>.
    """
    from tokenizers import pre_tokenizers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    added = backend.get_added_tokens_decoder()
    token_bytes_V = np.zeros(vocab_size, dtype=np.uint32)
    for token, i in backend.get_vocab().items():
        if i in added:
            token_bytes_V[i] = 0 if added[i].special else len(token.encode())
        elif byte_level and alphabet.issuperset(token):
            token_bytes_V[i] = len(token)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            token_bytes_V[i] = 1
        else:
            token_bytes_V[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    return token_bytes_V
