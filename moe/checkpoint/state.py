"""Reading a checkpoint: into a model and its optimizer, or some tensors by name."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe.checkpoint.content import read_index
from moe.checkpoint.folder import Saved
from moe.errors import CheckpointError
from moe.experts import Experts
from moe.parallel import Ranks
from moe.parallel.parts import part_here
from moe.parallel.placement import inverse, move_rows

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@contextmanager
def one_process() -> Iterator[None]:
    """Without torch's warning that there is no process group: one process without a group is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds, under names and in an order that do not depend on the layout.

    The tensors are the model's own, but for experts that are placed out of order, which are copied.
    """
    state = _own_state(model, optimizer)
    for name, experts in _placed(model):
        exchange = experts.exchange
        assert exchange is not None and exchange.order is not None
        slots = inverse(exchange.order)
        for part in state.values():
            for key, value in part.items():
                if f"{name}." in key and isinstance(value, DTensor):
                    rows = move_rows(value.to_local(), slots, exchange.group)
                    part[key] = DTensor.from_local(rows, value.device_mesh, value.placements, run_check=False)
    return state


def _own_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state}


def _placed(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Expert modules, by name, whose experts are placed out of order."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.exchange is not None and module.exchange.order is not None:
            yield name, module


@torch.no_grad()
def _place(model: nn.Module, optimizer: Optimizer) -> None:
    """Bring experts that have been read in their own order to where the placement wants them, in place."""
    for _, experts in _placed(model):
        exchange = experts.exchange
        assert exchange is not None and exchange.order is not None
        for parameter in experts.parameters():
            moments = (value for value in optimizer.state[parameter].values() if isinstance(value, DTensor))
            for tensor in (parameter.detach(), *moments):
                here = part_here(tensor)
                here.copy_(move_rows(here, exchange.order, exchange.group))


def state_bytes(state: dict[str, dict[str, Any]]) -> int:
    """Bytes of all tensors in their global shapes."""
    tensors = [value for part in state.values() for value in part.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load(saved: Saved, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Load a checkpoint into a model and its optimizer. Raises CheckpointError when names, shapes or types differ."""
    state = _own_state(model, optimizer)
    _check_names(saved, state, ranks)
    with one_process():
        dcp.load(state, checkpoint_id=saved.path, process_group=ranks.patient, no_dist=ranks.world_size == 1)
    # the checkpoint's own learning rate, decay and betas give way to the run's, which may have been changed on resume
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    _place(model, optimizer)


def stored_names(saved: Saved) -> list[str]:
    """The model's parameters and buffers that a checkpoint holds."""
    stored = read_index(saved.path).state_dict_metadata
    return [name.removeprefix("model.") for name in stored if name.startswith("model.")]


def read_tensors(saved: Saved, names: Iterable[str]) -> dict[str, Tensor]:
    """Some of the model's parameters and buffers by name, on the CPU; no other tensor is read."""
    stored = read_index(saved.path).state_dict_metadata
    wanted: dict[str, Any] = {f"model.{name}": stored[f"model.{name}"] for name in names}
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in wanted.items()}
    with one_process():
        dcp.load(state, checkpoint_id=saved.path, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _check_names(saved: Saved, state: dict[str, dict[str, Any]], ranks: Ranks) -> None:
    """Every tensor of the model and the optimizer is stored with its shape and type, and no other of the model's is."""
    names = {f"{part}.{name}" for part, values in state.items() for name in values}
    if ranks.layout.pipeline > 1:  # each rank has some of the blocks
        parts: list[set[str]] = [set()] * ranks.world_size
        dist.all_gather_object(parts, names, group=ranks.patient)
        names = set().union(*parts)
    stored = {
        key: (tuple(item.size), str(item.properties.dtype))
        for key, item in read_index(saved.path).state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    wanted = {
        f"{part}.{name}": (tuple(value.shape), str(value.dtype))
        for part, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    strangers = [key for key in stored if key.startswith("model.") and key not in names]
    wrong = sorted([key for key in wanted if stored.get(key) != wanted[key]] + strangers)
    if wrong:
        lines = "; ".join(
            f"{key}: stored {_words(stored.get(key))}, model {_words(wanted.get(key))}" for key in wrong[:3]
        )
        raise CheckpointError(
            f"checkpoint {saved.path} does not fit the model in {len(wrong)} tensors ({lines}): "
            "resume with the model it was saved with"
        )


def _words(kind: tuple[tuple[int, ...], str] | None) -> str:
    return f"{kind[0]} {kind[1].removeprefix('torch.')}" if kind is not None else "nothing"
