"""Whole models out: `save`, and `export_run` for a run's checkpoint, shard by shard."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe import checkpoint
from moe.config.load import load as load_run
from moe.config.schema import Model
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError
from moe.hf.families import FAMILIES, Family
from moe.hf.links import entries
from moe.hf.reading import DTYPES
from moe.hf.shards import Fetch, check_complete, shards_of, write_shards
from moe.hf.tokenizer import save_tokenizer
from moe.lora import base_name, is_adapter, merged
from moe.model import Transformer

SHARD_BYTES = 4 * 2**30


def family_of(model: Model, family: str = "auto") -> Family:
    """The family that can hold a model, or the first that can. Raises ConfigError saying why it, or each, cannot."""
    if family not in ("auto", *FAMILIES):
        raise ConfigError(f"family '{family}' is unknown: choose auto, {', '.join(FAMILIES)}")
    reasons = []
    for candidate in FAMILIES.values() if family == "auto" else (FAMILIES[family],):
        try:
            candidate.to_values(model)
            return candidate
        except ConfigError as error:
            reasons.append(f"{candidate.model_type}: {error}")
    which = "no family" if family == "auto" else f"family '{family}' cannot"
    verb = " can" if family == "auto" else ""
    raise ConfigError(f"{which}{verb} hold this model; it cannot express {'; '.join(reasons)}")


def save(
    model: Transformer,
    folder: str | Path,
    *,
    family: str = "auto",
    dtype: str = "float32",
    context_length: int = 4096,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a folder that AutoModelForCausalLM.from_pretrained reads; returns the folder.

    `dtype` is of the stored weights, `context_length` the longest text that the model is meant for. Raises ConfigError where
    no such family can hold the model, or the folder is not free.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def fetch(names: Iterable[str]) -> Mapping[str, Tensor]:
        return {name: state[name].cpu() for name in names}

    return _write(model.config, list(state), fetch, Path(folder), family, dtype, context_length, max_shard_bytes, None)


def export_run(
    run_folder: Path, folder: Path, *, family: str = "auto", dtype: str = "float32", max_shard_bytes: int = SHARD_BYTES
) -> tuple[str, int]:
    """Write a run's newest checkpoint, with its tokenizer; returns the family's name and the checkpoint's step.

    Reads one shard's tensors at a time, so its memory does not grow with the model. Adapters are added to their weights.
    """
    run = load_run(run_folder / "run.json")
    saved = checkpoint.newest(run_folder)
    if saved is None:
        raise CheckpointError(f"{run_folder} has no checkpoint: train it until it saves one.")

    stored, lora = checkpoint.stored_names(saved), run.model.lora

    def fetch(names: Iterable[str]) -> Mapping[str, Tensor]:
        if lora is None:
            return checkpoint.read_tensors(saved, names)
        wanted = set(names)
        return merged(checkpoint.read_tensors(saved, [name for name in stored if base_name(name) in wanted]), lora)

    chosen = family_of(run.model, family)
    tokenizer = prepare(run.data).tokenizer
    length = run.data.sequence_length
    _write(
        run.model,
        [name for name in stored if not is_adapter(name)],
        fetch,
        folder,
        chosen.model_type,
        dtype,
        length,
        max_shard_bytes,
        tokenizer,
    )
    return chosen.model_type, saved.step


def _write(
    model: Model,
    state: list[str],
    fetch: Fetch,
    folder: Path,
    family: str,
    dtype: str,
    context_length: int,
    max_shard_bytes: int,
    tokenizer: Any,
) -> Path:
    from transformers import AutoConfig, GenerationConfig

    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' must be one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another folder, or remove it")
    chosen = family_of(model, family)
    table = list(entries(model, chosen.names))
    check_complete(table, state)
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        end = save_tokenizer(tokenizer, temporary, context_length) if tokenizer is not None else None
        config = AutoConfig.for_model(
            chosen.model_type,
            **chosen.to_values(model),
            max_position_embeddings=context_length,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=None,
        )
        config.architectures, config.dtype = [chosen.architecture], DTYPES[dtype]
        config.save_pretrained(temporary)
        GenerationConfig(bos_token_id=None, eos_token_id=end, pad_token_id=end).save_pretrained(temporary)
        write_shards(temporary, shards_of(table, DTYPES[dtype], max_shard_bytes), fetch, DTYPES[dtype])
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
