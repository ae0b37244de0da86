"""Micro-batches through the stages of a model: torch's schedules in training, a relay where there is no gradient.

Between stages travel the hidden states and the float32 sum of the weighted auxiliary losses so far, and their gradients back.
torch's stages pass on tensors of one shape only. Whatever else a micro-batch needs (ids, targets, documents, positions)
every rank loads by itself, and a stage gets it by closure, keyed by the micro-batch's index.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.parallel.ranks import Ranks, Value

if TYPE_CHECKING:
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

Call = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""A stage's work on one micro-batch: from nothing (the first stage) or (hidden, auxiliary) to (hidden, auxiliary), or to what
is differentiated (the last)."""


class _Stage(nn.Module):
    """What torch takes for the stage's module. The model is not in it, so that FSDP2 reduces as it does without stages."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Sequence[Call] = ()

    def forward(self, *boundary: Tensor, micro_batch: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.calls[int(micro_batch)](*boundary)


class Pipeline:
    """The stages of a run, in training: `name` of the schedule, this process's place in `ranks`."""

    def __init__(self, name: str, ranks: Ranks):
        self.name, self.ranks = name, ranks
        self.stage = _Stage()
        self.made: tuple | None = None

    def step(self, calls: Sequence[Call], hidden: Tensor) -> None:
        """Forward and backward of every micro-batch; `hidden` has the shape and type of one's hidden states, on any device.

        All ranks call it, each with as many calls. Gradients are summed, as losses are parts of the step's.
        """
        kind = (len(calls), hidden.shape, hidden.dtype)
        if self.made is None or self.made[0] != kind:
            self.made = (kind, self._schedule(len(calls), hidden))
        self.stage.calls = calls
        # on the CPU, where reading an index waits for nothing
        micro_batch = torch.arange(len(calls))
        self.made[1].step(micro_batch=micro_batch, target=micro_batch, return_outputs=False)
        self.stage.calls = ()

    def _schedule(self, micro_batches: int, hidden: Tensor) -> "ScheduleGPipe | Schedule1F1B":
        # here, because it loads triton, which a run in one stage does not need
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        ranks, layout = self.ranks, self.ranks.layout
        assert ranks.mesh is not None
        boundary = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device="meta", requires_grad=True),
            torch.empty((), dtype=torch.float32, device="meta", requires_grad=True),
        )
        stage = layout.stage(ranks.rank)
        made = PipelineStage(
            self.stage,
            stage,
            layout.pipeline,
            ranks.device,
            input_args=boundary if stage > 0 else (),
            output_args=boundary if stage < layout.pipeline - 1 else boundary[1:],
            group=ranks.mesh.pipeline,
        )
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[self.name]
        return schedule(made, micro_batches, loss_fn=lambda objective, _: objective, scale_grads=False)


def relay(ranks: Ranks, hidden: Tensor, call: Callable[[Tensor | None], Tensor | None]) -> None:
    """Take one micro-batch through all stages without gradient: each gets hidden states, and sends its own on.

    `hidden` has their shape and type, on any device; `call` makes this stage's from those of the one before (None: the first).
    """
    group, stage = ranks.mesh.pipeline if ranks.mesh is not None else None, ranks.layout.stage(ranks.rank)
    came: Tensor | None = None
    if stage > 0:
        came = torch.empty(hidden.shape, dtype=hidden.dtype, device=ranks.device)
        dist.recv(came, group=group, group_src=stage - 1)
    with torch.no_grad():
        made = call(came)
    if stage < ranks.layout.pipeline - 1:
        assert made is not None
        dist.send(made.contiguous(), group=group, group_dst=stage + 1)


def gather_stages(ranks: Ranks, value: Value) -> list[Value]:
    """The value of every stage, in their order, on every rank; for log steps, and what is agreed upon once."""
    if ranks.layout.pipeline == 1 or ranks.mesh is None:
        return [value]
    values: list[Value] = [value] * ranks.layout.pipeline
    dist.all_gather_object(values, value, group=ranks.mesh.pipeline)
    return values
