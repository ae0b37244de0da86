"""The one initialisation table, and how each parameter gets its first value.

| parameter                              | distribution                                                  |
|----------------------------------------|---------------------------------------------------------------|
| norms (`*norm*.weight`)                | 1                                                             |
| biases (`*.bias`), attention sinks     | 0                                                             |
| matrices that write to the residual    | N(0, std / sqrt(2·num_layers)) with depth scaling (GPT-2), so |
| stream (`out`, `down`, `w_down_EFD`,   | that its variance does not grow with depth                    |
| `w_down_FD`)                           |                                                               |
| every other matrix, embedding, router  | N(0, std)                                                     |

Latent experts carry the depth scaling in w_down_EFD; the matrix out of their latent width has none, so that the product is
scaled once.

A value is a function of (seed, canonical name, global expert index): the same in every layout, and in a model and its twin
wherever names and shapes agree. Of parameters that end in `_FD`, experts of different widths, each expert's rows are drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe.random import stable_seed

RESIDUAL_WRITERS = ("attention.out.weight", ".down.weight", "w_down_EFD", "w_down_FD")


@contextmanager
def off_meta() -> Iterator[None]:
    """Build what is inside on the CPU where the default device is meta: small modules whose buffers hold values."""
    if torch.get_default_device().type == "meta":
        with torch.device("cpu"):
            yield
    else:
        yield


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give a module that was built on the meta device memory on `device`; `initialise` then fills its parameters."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    module.to(device)


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
    """widths: rows of each expert, in a parameter whose letters are FD."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("bias", "sink_N"):
        parameter.zero_()
    elif "norm" in name.split(".")[-2]:
        parameter.fill_(1.0)
    else:
        deviation = std * residual_scale if name.endswith(RESIDUAL_WRITERS) else std
        letters = leaf.rsplit("_", 1)[-1] if "_" in leaf else ""
        if "E" in letters or letters == "FD":
            experts = parameter if "E" in letters else parameter.split(list(widths))
            for expert, values in enumerate(experts):
                values.copy_(_normal(values.shape, deviation, stable_seed(seed, name, expert)))
        else:
            parameter.copy_(_normal(parameter.shape, deviation, stable_seed(seed, name)))


def _normal(shape: torch.Size, std: float, seed: int) -> Tensor:
    """Drawn on the CPU, so that a device never changes the start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu") * std
