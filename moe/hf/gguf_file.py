"""`moe gguf`: an export as one file for llama.cpp, written tensor by tensor with the package gguf (extra `gguf`).

The names and the order of numbers are llama.cpp's: experts of a layer in one tensor, rotary rows of the llama architecture as
neighbours, DeepSeek's kv_b cut into the part that makes keys, transposed, and the part that makes values. Routers, norms and
biases stay float32; matrices take the type asked for, or float16 where 32 does not divide their rows.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.attention import rotary_frequencies
from moe.config.schema import LatentAttention, Model
from moe.errors import CheckpointError, ConfigError
from moe.hf.gguf_names import ARCHITECTURES, refuse, settings
from moe.hf.links import entries
from moe.hf.mxfp4 import Unpacked
from moe.hf.reading import read_config
from moe.hf.shards import Files, check_names

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)$")
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Ends of matrices that decide where a token goes."""
NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Kinds of tokens."""


@dataclass(frozen=True)
class Piece:
    """One tensor of the file."""

    name: str
    make: Callable[[Files], Tensor]
    shape: tuple[int, ...]


def write_gguf(folder: Path, out: Path, dtype: str = "f16") -> dict[str, Any]:
    """Write an export as the file `out`; returns its architecture, bytes, and the tensors that kept another type.

    Raises ConfigError for what llama.cpp would compute otherwise, another type, a file that exists, or without the package.
    """
    if dtype not in TYPES:
        raise ConfigError(f"type '{dtype}' must be one of {', '.join(TYPES)}")
    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the package gguf: pip install 'moe-lab[gguf]'")
    if out.exists():
        raise ConfigError(f"{out} exists: choose another file, or remove it")
    family, model = read_config(folder)
    try:
        refuse(model, family.model_type)
    except ConfigError as error:
        raise ConfigError(f"llama.cpp would not compute this model: {error}") from error
    tokenizer = _tokenizer(folder, model.vocab_size)
    length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings") or 4096
    temporary = out.with_name(f".writing-{out.name}")
    try:
        with Unpacked(folder) as files:
            table = list(entries(model, family.names))
            check_names(files, table, lambda name: name.endswith("rotary_emb.inv_freq"))
            planned = list(pieces(model, family.model_type, [(entry.name, entry.shape) for entry in table]))
            kept = _write(temporary, files, planned, ARCHITECTURES[family.model_type], dtype, [
                *settings(model, family.model_type, int(length)), *tokenizer
            ])  # fmt: skip
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {"architecture": ARCHITECTURES[family.model_type], "bytes": out.stat().st_size, "kept": kept}


def pieces(model: Model, family: str, table: list[tuple[str, tuple[int, ...]]]) -> Iterator[Piece]:
    """The file's tensors, out of the names and shapes of the export's. Every one of those is used once."""
    import gguf  # pyright: ignore[reportMissingImports]

    architecture = gguf.MODEL_ARCH[ARCHITECTURES[family].upper().replace("-", "_")]
    names = gguf.get_tensor_name_map(architecture, model.num_layers)
    done: set[str] = set()
    for name, shape in table:
        expert = _EXPERT.match(name)
        if expert is not None:
            own = f"{expert[1]}.{expert[3]}"
            if own not in done:
                done.add(own)
                each = [f"{expert[1]}.{e}.{expert[3]}" for e in range(_experts(model))]
                yield Piece(_named(names, own), _stacked(each), (len(each), *shape))
        elif family == "gpt_oss" and ".experts." in name:
            yield from _gpt_oss_experts(name, shape, names)
        elif name.endswith("kv_b_proj.weight"):
            yield from _key_value(model, name, names)
        else:
            turn = _turned(model, family, name)
            yield Piece(_named(names, name.replace("e_score_correction_bias", "e_score_correction.bias")), turn, shape)
    if model.rotary.llama3 is not None:
        yield _rope_factors(model)


def _experts(model: Model) -> int:
    assert model.moe is not None
    return model.moe.num_experts


def _named(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is not None and name.endswith(".sinks"):
        found = f"{found}.weight"
    if found is None:
        raise ConfigError(f"this architecture of llama.cpp has no place for {name}")
    return found


def _gpt_oss_experts(name: str, shape: tuple[int, ...], names: Any) -> Iterator[Piece]:
    """Its matrices [E, in, out] are [E, out, in] there; columns of gate and up, which take turns, are two tensors."""
    own, matrix = name.removesuffix("_bias"), not name.endswith("_bias")
    end = "weight" if matrix else "bias"
    parts = (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2)))
    for part, columns in parts if own.endswith("gate_up_proj") else (("down_proj", slice(None)),):
        place = names.get_name(f"{own.rpartition('.')[0]}.{part}")
        size = shape[-1] // (columns.step or 1)

        def make(files: Files, columns: slice = columns) -> Tensor:
            chosen = files.tensor(name)[..., columns]
            return chosen.transpose(1, 2) if matrix else chosen

        yield Piece(f"{place}.{end}", make, (shape[0], size, shape[1]) if matrix else (shape[0], size))


def _stacked(each: list[str]) -> Callable[[Files], Tensor]:
    return lambda files: torch.stack([files.tensor(name) for name in each])


def _turned(model: Model, family: str, name: str) -> Callable[[Files], Tensor]:
    """The llama architecture rotates neighbours, transformers halves: rows of queries and keys change places."""
    attention = model.attention
    own = re.search(r"self_attn\.(q|k)_proj\.", name)
    if own is None or ARCHITECTURES[family] != "llama" or isinstance(attention, LatentAttention):
        return lambda files: files.tensor(name)
    heads = attention.num_heads if own[1] == "q" else attention.num_kv_heads

    def turn(files: Files) -> Tensor:
        tensor = files.tensor(name)
        return tensor.view(heads, 2, attention.head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return turn


def _key_value(model: Model, name: str, names: Any) -> Iterator[Piece]:
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    N, P, V, rank = attention.num_heads, attention.nope_dim, attention.value_dim, attention.kv_rank

    def heads(files: Files) -> Tensor:
        return files.tensor(name).view(N, P + V, rank)

    key, value = (_named(names, name.replace("kv_b_proj", part)) for part in ("k_b_proj", "v_b_proj"))
    yield Piece(key, lambda files: heads(files)[:, :P].transpose(1, 2), (N, rank, P))
    yield Piece(value, lambda files: heads(files)[:, P:], (N, V, rank))


def _rope_factors(model: Model) -> Piece:
    """What each frequency is divided by."""
    attention = model.attention
    assert not isinstance(attention, LatentAttention)
    stretched = rotary_frequencies(model.rotary, attention.head_dim).double()
    plain = model.rotary.base ** -(torch.arange(0, attention.head_dim, 2, dtype=torch.float64) / attention.head_dim)
    return Piece("rope_freqs.weight", lambda files: (plain / stretched).float(), (attention.head_dim // 2,))


def _write(
    path: Path, files: Files, planned: list[Piece], architecture: str, dtype: str, values: list[tuple[str, Any]]
) -> list[str]:
    """Write the file; returns the names of matrices whose rows 32 does not divide, which are float16."""
    import gguf  # pyright: ignore[reportMissingImports]
    from gguf.quants import quantize  # pyright: ignore[reportMissingImports]

    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values:
        own = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(own, value)
    asked, kept = gguf.GGMLQuantizationType[dtype.upper()], []
    types = []
    for piece in planned:
        kind = asked
        if len(piece.shape) == 1 or piece.name.endswith((".bias", *_FLOAT32)):
            kind = gguf.GGMLQuantizationType.F32
        elif piece.shape[-1] % gguf.GGML_QUANT_SIZES[asked][0]:
            kind = gguf.GGMLQuantizationType.F16
            kept.append(piece.name)
        types.append(kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = (*piece.shape[:-1], piece.shape[-1] // block * size)  # in bytes
        writer.add_tensor_info(piece.name, raw, np.dtype("uint8"), math.prod(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece, kind in zip(planned, types, strict=True):
        tensor = piece.make(files)
        assert tuple(tensor.shape) == piece.shape
        writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), kind))
    writer.close()
    return kept


def _tokenizer(folder: Path, vocab_size: int) -> list[tuple[str, Any]]:
    """The byte-level BPE of tokenizer.json in llama.cpp's words; without the file, ids alone."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [("tokenizer.ggml.model", "no_vocab")]
    values = json.loads(path.read_text(encoding="utf-8"))
    model, before = values["model"], values.get("pre_tokenizer") or {}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges", [])]
    if (
        model.get("type") != "BPE"
        or before.get("type") != "ByteLevel"
        or (merges and not before.get("use_regex", True))
    ):
        raise ConfigError(
            f"{path} is no byte-level BPE that splits words as GPT-2 does: remove it for a file of ids without tokenizer"
        )
    special = {token["id"]: token for token in values.get("added_tokens", [])}
    vocabulary = {index: text for text, index in model["vocab"].items()}
    tokens, kinds = [], []
    for index in range(vocab_size):
        token = special.get(index)
        tokens.append(token["content"] if token else vocabulary.get(index, f"[unused {index}]"))
        kinds.append(CONTROL if token and token.get("special") else NORMAL if token or index in vocabulary else UNUSED)
    if not tokens:
        raise CheckpointError(f"{path} has no tokens")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    end = config.get("eos_token_id")
    return [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", kinds),
        # llama.cpp wants merges; one whose result is no token is undone by it, and so changes nothing
        ("tokenizer.ggml.merges", merges or ["~ ~"]),
        ("tokenizer.ggml.add_bos_token", False),
        *([("tokenizer.ggml.eos_token_id", int(end))] if isinstance(end, int) else []),
    ]


def describe(result: dict[str, Any], out: Path, dtype: str) -> str:
    """One line, and one more about what has another type."""
    kept = result["kept"]
    note = f"\n{len(kept)} matrices whose rows 32 does not divide are float16: {', '.join(kept[:4])}" if kept else ""
    return f"{out}: {result['architecture']}, {dtype}, {result['bytes']:,} bytes{note}"
