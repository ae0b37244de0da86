"""A model whose blocks are on several ranks: its micro-batches through moe/parallel/pipeline.py, and what its stages report.

A stage's output has its own expert layers only, and of each loss its own layers' part; the loss is the last stage's.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe.model import Output, Transformer
from moe.parallel import Ranks
from moe.parallel.pipeline import Pipeline, gather_stages, relay


def without_graph(output: Output) -> Output:
    """What is kept of a training pass."""
    loss = output.loss.detach() if output.loss is not None else None
    return replace(output, loss=loss, objective=None, hidden_BSD=None)


def train_stages(
    pipeline: Pipeline, model: Transformer, calls: Sequence[Callable[..., Output]], ids_BS: Tensor
) -> list[Output]:
    """Forward and backward of every micro-batch, each of the shape of ids_BS; the outputs of this stage, without graphs.

    A call takes `hidden_BSD` and `auxiliary`, as the model does.
    """
    outputs: dict[int, Output] = {}

    def run(index: int, hidden_BSD: Tensor | None = None, auxiliary: Tensor | None = None) -> Any:
        pipeline.ranks.progress.at("forward")
        output = calls[index](hidden_BSD=hidden_BSD, auxiliary=auxiliary)
        outputs[index] = without_graph(output)
        return output.objective if output.hidden_BSD is None else (output.hidden_BSD, output.objective)

    pipeline.step([partial(run, index) for index in range(len(calls))], hidden_like(model, ids_BS))
    if isinstance(model, FSDPModule):
        model.reshard()
    return [outputs[index] for index in range(len(calls))]


def through_stages(ranks: Ranks, model: Transformer, ids_BS: Tensor, call: Callable[..., Output]) -> Output:
    """The output of this stage for one micro-batch, without gradient; of a model in one piece, its output."""
    if ranks.layout.pipeline == 1:
        return call()
    outputs: list[Output] = []

    def run(hidden_BSD: Tensor | None) -> Tensor | None:
        outputs.append(call(hidden_BSD=hidden_BSD))
        return outputs[0].hidden_BSD

    relay(ranks, hidden_like(model, ids_BS), run)
    return outputs[0]


def hidden_like(model: Transformer, ids_BS: Tensor) -> Tensor:
    """A tensor without memory, of the shape and type of a micro-batch's hidden states."""
    return torch.empty(*ids_BS.shape, model.config.dim, dtype=model.dtype, device="meta")


def by_layer(ranks: Ranks, rows: dict[int, Any]) -> dict[int, Any]:
    """What every stage has for its layers, by the layers' index, on every rank; for log steps only."""
    gathered = [row for stage in gather_stages(ranks, rows) for row in stage.items()]
    return dict(sorted(gathered))
