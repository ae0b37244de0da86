"""A trained model with its tokenizer, from a run's folder or from one in transformers' format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.config.schema import Run
from moe.data import prepare
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.surgery.start import read_run


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer."""

    model: Transformer
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    end: int | None
    """Id that ends a text."""
    run: Run | None = None
    """The settings of the run that it is from."""
    step: int | None = None
    """The steps it was trained for there."""


def open_model(folder: Path) -> Opened:
    """Open a run's newest checkpoint, or a model in transformers' format, on the CPU in float32."""
    if (folder / "run.json").is_file():
        return _open_run(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds neither run.json nor config.json: name a run's folder, or a model's")
    from transformers import AutoTokenizer

    from moe import hf

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Opened(
        hf.load(folder),
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        tokenizer.eos_token_id,
    )


def _open_run(folder: Path) -> Opened:
    source = read_run(folder)
    tokenizer = prepare(source.run.data).tokenizer
    return Opened(
        source.model(),
        lambda text: tokenizer.encode([text])[0].tolist(),
        tokenizer.decode,
        tokenizer.separator,
        source.run,
        source.step,
    )
