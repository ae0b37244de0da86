"""The ranks of a run and what they say to each other. Without torchrun there is one rank and every call is local.

Each rank computes its part of the batch, and gradients are summed. Every loss is divided by counts over the whole step before it
is differentiated, so a sum is all there is to do, whatever the layout.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config.layout import Layout
from moe.errors import UserError
from moe.parallel.mesh import Mesh, build
from moe.parallel.watch import Progress, Watch

Value = TypeVar("Value")
BUCKET_ELEMENTS = 16 * 2**20
WATCH_SECONDS = 10.0
"""How much longer torch waits than the watch, which knows more and is to speak first."""
SET_UP_TIMEOUT = timedelta(days=7)
"""Longest wait for rank 0 to download, tokenise and write, which may take long."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """Group for messages between steps, with SET_UP_TIMEOUT; None for one rank."""
    layout: Layout = field(default_factory=Layout)
    """Which rank holds what; until `arranged`, every rank the whole model."""
    mesh: Mesh | None = None
    """The process groups of the layout; None for one rank."""
    progress: Progress = field(default_factory=Progress)
    """What this rank is doing, for whoever waits for it."""

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks on the console."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `layout.data_ranks` shares of the rows this rank sees."""
        return self.layout.data_rank(self.rank)

    @property
    def context_rank(self) -> int:
        """Which of the `layout.context` parts of each row this rank sees."""
        return self.layout.context_rank(self.rank)

    def arranged(self, layout: Layout) -> "Ranks":
        """These ranks in a layout for as many of them; every rank calls it."""
        assert layout.world_size == self.world_size
        return replace(self, layout=layout, mesh=build(layout, self.device) if self.world_size > 1 else None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that see other tokens, without gradient; the argument is left alone."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the ranks that see other tokens, without gradient; the argument is left alone."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """Sum over every rank of the run, without gradient; the argument is left alone."""
        tensor = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_row(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that see other parts of the same rows, without gradient; the argument is left alone."""
        tensor = tensor.detach().clone()
        if self.mesh is not None and self.layout.context > 1:
            dist.all_reduce(tensor, group=self.mesh.context)
        return tensor

    def sum_over_stages(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold other blocks and see the same tokens, without gradient; the argument is left alone."""
        tensor = tensor.detach().clone()
        if self.mesh is not None and self.layout.pipeline > 1:
            dist.all_reduce(tensor, group=self.mesh.pipeline)
        return tensor

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        tensor = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=self.mesh.tokens if self.mesh else None)
        return tensor

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def wait_for_first(self) -> None:
        """Go on when rank 0 has come here too."""
        self.broadcast(None)

    def wait_for_all(self) -> None:
        """Go on when every rank has come here."""
        if self.world_size > 1:
            dist.barrier(group=self.patient)

    def first_then_others(self, action: Callable[[], Value]) -> Value:
        """Run on rank 0, then on the others; a UserError of rank 0 ends them all, and none waits for ever."""
        outcome: list[Value] = []
        error: UserError | None = None
        if self.first:
            try:
                outcome.append(action())
            except UserError as caught:
                error = caught
        error = self.broadcast(error)
        if error is not None:
            raise error
        return outcome[0] if self.first else action()


def sum_in_buckets(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace every tensor by its sum over a group's ranks (None: all), in buckets of about 64 MiB of float32."""
    left = list(tensors)
    while left:
        bucket = [left.pop(0)]
        while left and sum(t.numel() for t in bucket) + left[0].numel() <= BUCKET_ELEMENTS:
            bucket.append(left.pop(0))
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def start(device: str, timeout_seconds: float = 600.0) -> Ranks:
    """Join the run: one process, or those that torchrun started (RANK and WORLD_SIZE in the environment).

    `device` is "auto", "cpu" or "cuda"; `timeout_seconds` bounds the wait for other ranks within a step. Raises UserError if
    that device is not there.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and kind.type == "mps":
        kind = None  # no float64 there, which counts and statistics are summed in
    if device == "cuda" and (kind is None or kind.type != "cuda"):
        raise UserError(f"train.device='cuda', but torch {torch.__version__} sees no CUDA device: use 'auto' or 'cpu'")
    use_accelerator = device != "cpu" and kind is not None
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind.type, local_rank) if use_accelerator and kind is not None else torch.device("cpu")
    if use_accelerator:
        torch.accelerator.set_device_index(local_rank)
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(0, 1, place)
    if not dist.is_initialized():
        store, rank, world_size = next(iter(dist.rendezvous("env://")))
        # after an elastic restart the store still holds the dead attempt's addresses: each attempt gets its own keys
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = dist.get_default_backend_for_device(place)
        timeout = timedelta(seconds=timeout_seconds + WATCH_SECONDS)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=SET_UP_TIMEOUT)
    assert isinstance(patient, dist.ProcessGroup)
    world_size = dist.get_world_size()
    return Ranks(dist.get_rank(), world_size, place, patient, Layout(replicate=world_size))


def watched(ranks: Ranks, timeout_seconds: float) -> Watch:
    """A watch over this rank's progress, which ends the process after so long without any; a context around training."""
    store: Any = dist.distributed_c10d._get_default_store()
    alike = ranks.layout.pipeline == 1  # the stages of a pipeline pass other blocks in another order
    return Watch(ranks.progress, ranks.rank, ranks.world_size, timeout_seconds, store, alike=alike)


def joined() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def stop() -> None:
    """Leave the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
