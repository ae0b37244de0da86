"""The one initialisation table, and how each parameter gets its first value.

| parameter                              | distribution                                                  |
|----------------------------------------|---------------------------------------------------------------|
| norms (`*norm*.weight`)                | 1                                                             |
| biases (`*.bias`, experts' `b_*`),     | 0                                                             |
| attention sinks                        |                                                               |
| matrices that write to the residual    | N(0, std / sqrt(2·num_layers)) with depth scaling (GPT-2), so |
| stream (`out`, `down`, `w_down_EFD`,   | that its variance does not grow with depth                    |
| `w_down_FD`)                           |                                                               |
| adapters (moe/lora.py): A              | N(0, 1 / sqrt(3·in)), the variance of peft's uniform draw     |
| adapters: B                            | 0                                                             |
| every other matrix, embedding, router  | N(0, std)                                                     |

Latent experts carry the depth scaling in w_down_EFD; the matrix out of their latent width has none, so that the product is
scaled once.

A value is a function of (seed, canonical name, global expert index): the same in every layout, and in a model and its twin
wherever names and shapes agree. Of parameters that end in `_FD`, experts of different widths, each expert's rows are drawn.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.random import stable_seed

BIASES = ("b_gate_EF", "b_up_EF", "b_down_ED")
"""Of experts, in the order of their products."""
RESIDUAL_WRITERS = ("attention.out.weight", ".down.weight", "w_down_EFD", "w_down_FD")


def is_bias(name: str) -> bool:
    """Whether a parameter of this name holds the biases of experts: vectors, though stacked they are a matrix."""
    return name.rsplit(".", 1)[-1] in BIASES


@contextmanager
def off_meta() -> Iterator[None]:
    """Build what is inside on the CPU where the default device is meta: small modules whose buffers hold values."""
    if torch.get_default_device().type == "meta":
        with torch.device("cpu"):
            yield
    else:
        yield


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give a module that was built on the meta device memory on `device`; `initialise` then fills its parameters.

    Sharded parameters get memory for this rank's part; buffers, which hold values, are kept.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=device)
    for name, value in buffers.items():
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        owner._buffers[leaf] = value.to(device)


@torch.no_grad()
def initialise(
    module: nn.Module, *, seed: int, std: float, residual_scale: float = 1.0, prefix: str = "", skip: str = ""
) -> None:
    """Fill every parameter of `module`, whose canonical name is `prefix` + its own name, by the table.

    Parameters on the meta device, and those whose name holds `skip` if it is not empty, are left alone.
    """
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            if not parameter.is_meta and not (skip and skip in name):
                _fill(parameter, prefix + name, getattr(owner, "widths", ()), seed, std, residual_scale)


def _fill(parameter: Tensor, name: str, widths: Sequence[int], seed: int, std: float, residual_scale: float) -> None:
    """widths: rows of each expert, in a parameter whose letters are FD. Of a sharded parameter this rank's part is filled."""
    leaf = name.rsplit(".", 1)[-1]
    here, shape, window = _window(parameter)
    if leaf in ("bias", "sink_N", "b_JO", "b_EJO") or is_bias(leaf):
        here.zero_()
    elif "norm" in name.split(".")[-2]:
        here.fill_(1.0)
    else:
        deviation = std * residual_scale if name.endswith(RESIDUAL_WRITERS) else std
        if ".lora." in name:
            deviation = 1 / math.sqrt(3 * shape[-2])
        letters = leaf.rsplit("_", 1)[-1] if "_" in leaf else ""
        if "E" in letters:
            for values, expert in zip(here, range(shape[0])[window[0]], strict=True):
                values.copy_(_normal(shape[1:], deviation, stable_seed(seed, name, expert))[window[1:]])
        elif letters == "FD":
            experts = (
                _normal((width, shape[1]), deviation, stable_seed(seed, name, expert))
                for expert, width in enumerate(widths)
            )
            here.copy_(torch.cat(list(experts))[window])
        else:
            here.copy_(_normal(shape, deviation, stable_seed(seed, name))[window])


def _window(parameter: Tensor) -> tuple[Tensor, torch.Size, tuple[slice, ...]]:
    """This rank's part of a parameter, the whole one's shape, and where the part lies in it."""
    cut: Any = parameter
    if not hasattr(cut, "to_local"):
        return parameter, parameter.shape, (slice(None),) * parameter.ndim
    # a slow import that only a cut model needs (moe/parallel/parts.py)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, cut.device_mesh, cut.placements)
    window = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return cut.to_local(), parameter.shape, window


def _normal(shape: Sequence[int], std: float, seed: int) -> Tensor:
    """Drawn on the CPU, so that a device never changes the start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu") * std
