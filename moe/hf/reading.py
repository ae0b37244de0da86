"""Whole models in: a folder's configuration, and its tensors by our names, one at a time."""

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe.config.schema import Model
from moe.errors import CheckpointError, ConfigError
from moe.hf import quantised
from moe.hf.families import COMMON_KEYS, FAMILIES, Family, words
from moe.hf.links import Entry, Link, entries
from moe.hf.mxfp4 import Unpacked
from moe.hf.refuse import require
from moe.hf.shards import Files, check_complete, check_content, check_names
from moe.init import materialise
from moe.model import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NO_EFFECT = words(
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id attention_dropout output_router_logits "
    "router_aux_loss_coef router_jitter_noise max_position_embeddings max_window_layers pretraining_tp "
    "num_nextn_predict_layers transformers_version architectures dtype torch_dtype _name_or_path model_type auto_map "
    "output_attentions output_hidden_states return_dict chunk_size_feed_forward problem_type id2label label2id "
    "aux_loss_alpha seq_aux ep_size"
)
"""Configuration keys that do not change what the model computes from a text (the layers that predict further tokens,
num_nextn_predict_layers, are left unread, as transformers leaves them)."""
_SIZES = words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size head_dim "
    "shared_expert_intermediate_size num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim decoder_sparse_step"
)
"""Keys whose values are 1 or more, or null; transformers computes some models of zero experts or of no width."""


class Folder:
    """A model of one of the families: its configuration, and each of our tensors when asked. A context manager.

    Raises ConfigError for a configuration that we do not model, CheckpointError listing tensors that are missing, unknown or of
    another shape.
    """

    def __init__(self, folder: Path):
        self.family, self.model = read_config(folder)
        self._stack = ExitStack()
        held = (folder / quantised.FILE).is_file()
        self._files = self._stack.enter_context(quantised.Held(folder) if held else Unpacked(folder))
        try:
            self._table = list(self._entries())
            self._check()
        except BaseException:
            self._stack.close()
            raise
        self._parts: dict[str, list[tuple[Entry, Link]]] = defaultdict(list)
        for entry in self._table:
            for link in entry.links:
                self._parts[link.ours].append((entry, link))

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _entries(self) -> Iterable[Entry]:
        names = self._files.names()
        fused = any(name.endswith(".experts.gate_up_proj") for name in names)
        naming = self.family.names
        if fused and any(".mlp.experts.gate_up_proj" in name for name in names):
            naming = replace(naming, moe="mlp")  # the names of transformers' modules, where its files have older ones
        return entries(self.model, naming, fused=fused)

    def _check(self) -> None:
        if self.model.tied_head and "lm_head.weight" in self._files.names():
            _check_tied(self._files)
        check_names(self._files, self._table, lambda name: _ignored(name, self.model))
        check_content(self._files, self._table)

    def empty(self, dtype: str = "float32") -> Transformer:
        """Our model without memory for its parameters, on the device meta."""
        with torch.device("meta"):
            model = Transformer(self.model, dtype=DTYPES[dtype])
        check_complete(self._table, model.state_dict())
        return model

    @torch.no_grad()
    def read(self, name: str, ours: Tensor) -> None:
        """Copy what the files hold of our tensor `name` into it; what only training reads is not in them and stays."""
        for entry, link in self._parts.get(name, ()):
            link.our_view(ours).copy_(link.their_view(self._files.tensor(entry.name)))


def load(folder: str | Path, *, dtype: str = "float32") -> Transformer:
    """Read a model of one of the families. `dtype` is of activations; parameters are float32.

    Raises ConfigError for a configuration that we do not model, CheckpointError listing tensors that are missing, unknown
    or of another shape.
    """
    with Folder(Path(folder)) as source:
        model = source.empty(dtype)
        materialise(model, torch.device("cpu"))
        for name, tensor in model.state_dict().items():
            source.read(name, tensor)
    return model.eval()


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
        for key in sorted(_SIZES & values.keys()):
            require(values[key] is None or values[key] >= 1, f"{key}={values[key]} (1 or more)")
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
