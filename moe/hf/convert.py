"""Whole models in and out: `load`, `save`, and `export_run` for a run's checkpoint, shard by shard."""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import checkpoint
from moe.config.load import load as load_run
from moe.config.schema import Model
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError
from moe.hf import quantised
from moe.hf.families import COMMON_KEYS, FAMILIES, Family, words
from moe.hf.links import Entry, entries
from moe.hf.mxfp4 import Unpacked
from moe.hf.shards import Fetch, Files, check_names, iterate_unlinked, read_into, shards_of, write_shards
from moe.hf.tokenizer import save_tokenizer
from moe.init import materialise
from moe.lora import base_name, is_adapter, merged
from moe.model import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 4 * 2**30
_TRAINING_ONLY = re.compile(r"\.router\.momentum_E$")
"""Router state that only training reads."""
_NO_EFFECT = words(
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id attention_dropout output_router_logits "
    "router_aux_loss_coef router_jitter_noise max_position_embeddings max_window_layers pretraining_tp "
    "num_nextn_predict_layers transformers_version architectures dtype torch_dtype _name_or_path model_type auto_map"
)
"""Configuration keys that do not change what the model computes from a text (the layers that predict further tokens,
num_nextn_predict_layers, are left unread, as transformers leaves them)."""


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
    _check_complete(table, state)
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


def _check_complete(table: list[Entry], state: Iterable[str]) -> None:
    lost = [name for name in iterate_unlinked(table, state) if not _TRAINING_ONLY.search(name)]
    if lost:
        raise ConfigError(f"the family has no place for {', '.join(lost[:5])}: nothing was written")


def load(folder: str | Path, *, dtype: str = "float32") -> Transformer:
    """Read a model of one of the families. `dtype` is of activations; parameters are float32.

    Raises ConfigError for a configuration that we do not model, CheckpointError listing tensors that are missing, unknown
    or of another shape.
    """
    folder = Path(folder)
    family, model = read_config(folder)
    with quantised.Held(folder) if (folder / quantised.FILE).is_file() else Unpacked(folder) as files:
        names = files.names()
        fused = any(name.endswith(".experts.gate_up_proj") for name in names)
        naming = family.names
        if fused and any(".mlp.experts.gate_up_proj" in name for name in names):
            naming = replace(naming, moe="mlp")  # the names of transformers' modules, where its files have older ones
        table = list(entries(model, naming, fused=fused))
        if model.tied_head and "lm_head.weight" in names:
            _check_tied(files)
        check_names(files, table, lambda name: _ignored(name, model))
        with torch.device("meta"):
            loaded = Transformer(model, dtype=DTYPES[dtype])
        materialise(loaded, torch.device("cpu"))
        state = loaded.state_dict()
        _check_complete(table, state)
        with torch.no_grad():
            read_into(files, table, state)
    return loaded.eval()


def read_config(folder: Path) -> tuple[Family, Model]:
    """The family and model of a folder's config.json."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: name the folder of a model in transformers' format.")
    config = AutoConfig.from_pretrained(folder)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(f"model_type '{config.model_type}' is not one we read: {', '.join(FAMILIES)}")
    values, defaults = config.to_dict(), type(config)().to_dict()
    known = COMMON_KEYS | family.keys | _NO_EFFECT
    strange = sorted(key for key, value in values.items() if key not in known and value != defaults.get(key))
    if strange:
        listed = ", ".join(f"{key}={values[key]!r}" for key in strange)
        raise ConfigError(f"{folder / 'config.json'} has settings that we do not model: {listed}")
    if not values.get("rope_interleave", True):
        family = replace(family, names=replace(family.names, rotary_pairs=False))
    try:
        return family, family.to_model(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'} has what we do not model: {error}") from error


def _ignored(name: str, model: Model) -> bool:
    """Tensors without effect: rotary tables, a tied head's copy, and layers that predict further tokens (DeepSeek-V3)."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    further = layer is not None and int(layer[1]) >= model.num_layers
    return further or name.endswith("rotary_emb.inv_freq") or (model.tied_head and name == "lm_head.weight")


def _check_tied(files: Files) -> None:
    if not torch.equal(files.tensor("lm_head.weight"), files.tensor("model.embed_tokens.weight")):
        raise CheckpointError("tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight.")
