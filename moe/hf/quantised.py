"""Weight-only int8 and int4 of an export: matrices stored as integers with one scale a row or a group, by torchao.

    int8    symmetric, one scale a row of the products' inner dimension, in files that hold one byte a weight
    int4    symmetric, one scale for 32 weights of a row, two weights a byte

A folder holds config.json, the tokenizer and `quantised.safetensors`: `<name>.int`, `<name>.scale` (bfloat16), and what
stays as it was: vectors, routers and matrices whose rows do not divide into groups. `load_transformers` gives transformers'
own model with these integers as its parameters, widened where they are used; `tensors` the widened weights, for `moe eval`.
Needs the extra `quantise` (torchao).
"""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.errors import CheckpointError, ConfigError
from moe.files import write_json
from moe.hf.mxfp4 import Unpacked
from moe.hf.shards import Files

FILE = "quantised.safetensors"
GROUP = 32
"""Weights that share a scale in int4."""
_KEPT = ("gate.weight", "router.weight", "shared_expert_gate.weight", "e_score_correction_bias")
"""Ends of names that decide where a token goes: a rounded router chooses other experts."""


def quantise(folder: Path, out: Path, bits: int) -> dict[str, int]:
    """Write `out` from an export; returns its bytes and the export's, tensors alone.

    Raises ConfigError for other bits than 8 and 4, a folder that is not free, or without torchao.
    """
    if bits not in (8, 4):
        raise ConfigError(f"bits ({bits}) must be 8 or 4")
    if find_spec("torchao") is None:
        raise ConfigError("quantisation needs the package torchao: pip install 'moe-lab[quantise]'")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another folder, or remove it")
    stored: dict[str, Tensor] = {}
    before = 0
    with Unpacked(folder) as files:
        for name in sorted(files.names()):
            tensor = files.tensor(name)
            before += tensor.nbytes
            if not _quantised(name, tensor, bits):
                stored[name] = tensor
                continue
            values, scale = rounded(tensor, bits)
            stored[f"{name}.int"] = values if bits == 8 else packed(values)
            stored[f"{name}.scale"] = scale.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix == ".json" and "safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    values = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if values.pop("quantization_config", None) is not None:  # experts in MXFP4 are not in it any more
        write_json(out / "config.json", values)
    save_file(stored, out / FILE, metadata={"format": "pt", "bits": str(bits)})
    return {"bytes": sum(tensor.nbytes for tensor in stored.values()), "bytes_before": before}


def _quantised(name: str, tensor: Tensor, bits: int) -> bool:
    return tensor.ndim >= 2 and not name.endswith(_KEPT) and (bits == 8 or tensor.shape[-1] % GROUP == 0)


def _span(bits: int, width: int) -> tuple[int, int, int]:
    """(lowest, highest, weights a scale)."""
    return (-127, 127, width) if bits == 8 else (-7, 7, GROUP)


def rounded(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers (int8) of a tensor's shape, and a scale for every group along its last dimension."""
    from torchao.quantization.quant_primitives import (  # pyright: ignore[reportMissingImports]
        MappingType,
        choose_qparams_affine,
        quantize_affine,
    )

    low, high, group = _span(bits, tensor.shape[-1])
    block: Any = (*[1] * (tensor.ndim - 1), group)  # torchao says Tuple[int] and means any length
    scale, zero = choose_qparams_affine(
        tensor.float(), MappingType.SYMMETRIC, block, torch.int8, low, high, scale_dtype=torch.float32
    )
    # the scale is stored in bfloat16, so the weights are rounded by what will widen them
    scale = scale.to(torch.bfloat16).float()
    values = quantize_affine(tensor.float(), block, scale, zero, torch.int8, low, high)
    shape = (*tensor.shape[:-1], tensor.shape[-1] // group)
    return values, scale.view(shape)


def widened(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that integers [..., n] and scales [..., n / group] stand for."""
    from torchao.quantization.quant_primitives import dequantize_affine  # pyright: ignore[reportMissingImports]

    group = values.shape[-1] // scale.shape[-1]
    block = (*[1] * (values.ndim - 1), group)
    return dequantize_affine(values, block, scale.float(), None, torch.int8, -128, 127, output_dtype=dtype)


def packed(values: Tensor) -> Tensor:
    """Two integers of [-7, 7] a byte: the even column low, the odd one high."""
    raised = (values + 8).to(torch.uint8)
    return raised[..., 0::2] | (raised[..., 1::2] << 4)


def unpacked(pairs: Tensor) -> Tensor:
    """The inverse of `packed`."""
    both = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    return both.to(torch.int8) - 8


def integers(folder: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, integers or plain tensor, scale or None) of every tensor. Raises CheckpointError without the file."""
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}: 'moe quantise' writes one")
    with safe_open(path, framework="pt") as file:
        bits, names = int(file.metadata()["bits"]), sorted(file.keys())
        for name in names:
            if name.endswith(".int"):
                own = name.removesuffix(".int")
                values = file.get_tensor(name)
                yield own, values if bits == 8 else unpacked(values), file.get_tensor(f"{own}.scale")
            elif not name.endswith(".scale"):
                yield name, file.get_tensor(name), None


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the export, widened to float32 where it was quantised."""
    return {name: values if scale is None else widened(values, scale) for name, values, scale in integers(folder)}


class Held(Files):
    """A quantised folder's tensors, widened, where the files of an export are asked for."""

    def __init__(self, folder: Path):
        self._folder, self._open = folder, None
        self._bits = int(self._file(FILE).metadata()["bits"])
        self._kind = {}
        for stored in self._file(FILE).keys():  # noqa: SIM118  (not a mapping)
            if not stored.endswith(".scale"):
                cut = self._file(FILE).get_slice(stored)
                shape, integers = tuple(cut.get_shape()), stored.endswith(".int")
                wide = (*shape[:-1], 2 * shape[-1]) if integers and self._bits == 4 else shape
                kind = "F32" if integers else str(cut.get_dtype())
                self._kind[stored.removesuffix(".int")] = (wide, kind)

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._kind)

    def tensor(self, name: str) -> Tensor:
        """A tensor's content."""
        file = self._file(FILE)
        if f"{name}.int" not in file.keys():  # noqa: SIM118
            return file.get_tensor(name)
        values = file.get_tensor(f"{name}.int")
        return widened(values if self._bits == 8 else unpacked(values), file.get_tensor(f"{name}.scale"))


class Widen(nn.Module):
    """A parametrization: integers are what is held, weights what is used."""

    def __init__(self, scale: Tensor, bits: int, dtype: torch.dtype):
        super().__init__()
        self.scale = nn.Buffer(scale)
        self.bits, self.dtype = bits, dtype

    def forward(self, stored: Tensor) -> Tensor:
        """Weights of the parameter's shape."""
        return widened(stored if self.bits == 8 else unpacked(stored), self.scale, self.dtype)


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a quantised folder, which generates; its matrices are held as integers.

    A matrix is widened whole where it is used, so this saves memory and files, not time.
    """
    import transformers

    with safe_open(folder / FILE, framework="pt") as file:
        bits = int(file.metadata()["bits"])
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, (config.architectures or [""])[0]).from_pretrained(
        None, config=config, state_dict=tensors(folder), dtype=dtype
    )
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not _quantised(f"{path}.{name}", parameter, bits):
                continue
            values, scale = rounded(parameter.detach(), bits)
            setattr(module, name, nn.Parameter(values if bits == 8 else packed(values), requires_grad=False))
            widen = Widen(scale.to(torch.bfloat16), bits, dtype)
            parametrize.register_parametrization(module, name, widen, unsafe=True)
    return model.eval()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def ratio(counts: dict[str, int]) -> float:
    """How many times smaller."""
    return counts["bytes_before"] / counts["bytes"] if counts["bytes"] else math.inf


def describe(counts: dict[str, int], out: Path, bits: int) -> str:
    """One line."""
    return (
        f"{out}: int{bits}, {counts['bytes']:,} bytes of {counts['bytes_before']:,}, {ratio(counts):.2f} times smaller"
    )
