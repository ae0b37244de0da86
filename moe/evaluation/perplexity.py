"""Loss of a trained model on validation text: perplexity and bits per byte, of everything and of each source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe import parallel
from moe.analysis.paired import ratio_interval
from moe.config.load import load
from moe.config.schema import PretrainedTokenizer, Run, Source
from moe.data import Corpus, prepare
from moe.errors import ConfigError
from moe.model import Transformer
from moe.opened import Opened, open_model
from moe.surgery.start import model_of
from moe.train.evaluate import EvaluationResult, evaluate


@dataclass(frozen=True)
class Measured:
    """Loss on some rows, with a 95 % interval over rows."""

    name: str
    rows: int
    tokens: int
    bytes: int
    loss: float
    """Nats per token."""
    bits_per_byte: float
    low: float
    """Of bits per byte."""
    high: float

    @property
    def perplexity(self) -> float:
        """exp of the loss: per token, so comparable for one tokenizer only."""
        return math.exp(min(self.loss, 700.0))


def evaluate_folder(
    folder: Path, *, rows: int = 256, recipe: str = "", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint, or an export on the data of `recipe` with its own tokenizer.

    Overrides change the data, and of a run on its own data also the model, as far as the weights fit it: other top_k, say.
    Returns JSON: the whole and every source that has rows, each with loss, perplexity, bits per byte and its interval.
    Raises ConfigError for an export without a recipe, and for overrides that would change nothing.
    """
    opened = open_model(folder)
    _refuse_unread(overrides, own=opened.run is not None and not recipe, export=opened.run is None)
    run = _settings(folder, recipe, overrides)
    corpus = prepare(run.data)
    if corpus.vocab_size > opened.model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size} entries and the model {opened.model.config.vocab_size}: give the data of "
            "the model's own tokenizer"
        )
    if opened.run is None:
        # transformers' format does not say whether a token sees the documents before its own in a row: the recipe does
        opened.model.config = replace(opened.model.config, document_mask=run.model.document_mask)
    found = measure(_overridden(opened, recipe, overrides), corpus, rows)
    return {
        "folder": str(folder),
        "step": opened.step,
        "data": corpus.fingerprint,
        "sources": [_json(one) for one in found[1:]],
        **_json(found[0]),
    }


def _refuse_unread(overrides: Sequence[str], *, own: bool, export: bool) -> None:
    """Raise ConfigError for an override that no evaluation reads."""
    for text in overrides:
        path = text.partition("=")[0]
        known = path.split(".")[0] == "data" or (own and path.split(".")[0] == "model")
        if not known and not (export and path == "model.document_mask"):
            model = " and model.*" if own else ", for the weights are of one model" if path.startswith("model") else ""
            raise ConfigError(f"{path} changes nothing of this evaluation, which reads data.*{model}: leave it out")


def _overridden(opened: Opened, recipe: str, overrides: Sequence[str]) -> Transformer:
    """The model with a run's overrides."""
    if opened.run is None or recipe:
        return opened.model
    run = load(opened.run, overrides)
    return opened.model if run.model == opened.run.model else model_of(run, opened.model.state_dict())


def _settings(folder: Path, recipe: str, overrides: Sequence[str]) -> Run:
    """The run whose data are read: the folder's own or the recipe's, with the tokenizer that the model has."""
    own = folder / "run.json"
    if own.is_file() and not recipe:
        return load(own, overrides)
    if not recipe:
        raise ConfigError(
            f"{folder} is a model without data: give a recipe whose validation text is to be read, --recipe x.py"
        )
    run = load(recipe, overrides)
    tokenizer = load(own).data.tokenizer if own.is_file() else PretrainedTokenizer(path=str(folder))
    return replace(run, data=replace(run.data, tokenizer=tokenizer))


def measure(model: Transformer, corpus: Corpus, rows: int, *, micro_rows: int = 8) -> list[Measured]:
    """The first `rows` validation rows, then each source's share of them."""
    ranks = parallel.start("cpu")
    result = evaluate(model, corpus, ranks, rows=rows, micro_rows=micro_rows)
    source_R = corpus.validation_sources(range(len(result.nats_row)))
    names = [name_of(source) for source in corpus.data.sources]
    parts = [(names[i], source_R == i) for i in range(len(names)) if (source_R == i).any()]
    return [summed("all", result, np.ones(len(source_R), bool)), *(summed(name, result, kept) for name, kept in parts)]


def summed(name: str, result: EvaluationResult, kept_R: np.ndarray) -> Measured:
    """The figures of the kept rows."""
    nats, size, tokens = (part[kept_R] for part in (result.nats_row, result.bytes_row, result.tokens_row))
    mean, low, high = ratio_interval(nats / math.log(2), size) if size.sum() else (math.nan,) * 3
    return Measured(
        name, len(nats), int(tokens.sum()), int(size.sum()), float(nats.sum() / tokens.sum()), mean, low, high
    )


def name_of(source: Source) -> str:
    """A source's short name."""
    if source.name == "files":
        return Path(source.paths[0]).stem + (f" and {len(source.paths) - 1} more" if len(source.paths) > 1 else "")
    return source.dataset if source.name == "hub" else source.name


def _json(one: Measured) -> dict[str, Any]:
    fields = {key: getattr(one, key) for key in one.__dataclass_fields__}
    return {**fields, "perplexity": one.perplexity}


def describe(result: dict[str, Any]) -> str:
    """A table in words."""
    step = "" if result["step"] is None else f", step {result['step']}"
    width = max(len(row["name"]) for row in (result, *result["sources"]))
    lines = [f"{result['folder']}{step}: validation text {result['data'][:8]}"]
    lines.append(f"{'source':<{width}}  {'rows':>6}  {'nats/token':>10}  {'perplexity':>10}  bits per byte (95 %)")
    for row in (result, *result["sources"]):
        interval = f"{row['bits_per_byte']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
        lines.append(
            f"{row['name']:<{width}}  {row['rows']:>6}  {row['loss']:>10.4f}  {row['perplexity']:>10.3f}  {interval}"
        )
    return "\n".join(lines)
