"""One optimizer step: micro-batches forward and backward, sums over ranks, clipping, update, router update.

Every quantity is a sum of additive parts over micro-batches and ranks, divided by counts over the whole step that are
known before the first forward pass, so losses, gradients and statistics do not depend on the layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.config.rates import learning_rate
from moe.config.schema import Run
from moe.cost import moe_layers
from moe.cost.shares import needs_first_pass
from moe.data import Batch, Corpus
from moe.model import IGNORE, LayerRouting, Output, Transformer
from moe.optim import build_optimizer, clip, gradient_norm
from moe.parallel import Ranks
from moe.parallel.pipeline import Pipeline, gather_stages
from moe.routing import Selection, Tokens
from moe.train.distil import Teacher
from moe.train.finite import Finite
from moe.train.replay import Recorder, Replayer
from moe.train.sharding import build_model, sum_gradients
from moe.train.stages import by_layer, through_stages, train_stages, without_graph


@dataclass
class State:
    """What a training step needs and changes."""

    run: Run
    ranks: Ranks
    corpus: Corpus
    model: Transformer
    forward: Callable[..., Output]
    """The model, compiled if asked for."""
    optimizer: torch.optim.Optimizer
    finite: Finite = field(default_factory=Finite)
    recorder: Recorder | None = None
    replayer: Replayer | None = None
    pipeline: Pipeline | None = field(init=False, default=None)
    """Set where the model's blocks are on several ranks."""
    teacher: Teacher | None = None
    """Whose probabilities the run learns from, beside the text."""
    loss_names: tuple[str, ...] | None = field(init=False, default=None)
    """Auxiliary losses of all stages, agreed upon in the first step."""

    def __post_init__(self) -> None:
        if self.ranks.layout.pipeline > 1:
            self.pipeline = Pipeline(self.run.parallel.pipeline_schedule, self.ranks)


@dataclass(frozen=True)
class StepResult:
    """What one step did, summed over the whole batch."""

    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int
    """Valid tokens of the step."""
    skipped: bool
    culprits: tuple[int, ...]
    """Ranks on which the loss or a gradient was not finite, if the step was skipped and it can be told."""
    stop: bool
    """Whether any rank was asked to stop."""
    statistics: list[tuple[int, dict[str, Tensor]]]
    """(block index, statistics) per expert layer; those ending in _max only if they were asked for, and only then those of
    other stages of a pipeline."""


def build_state(run: Run, ranks: Ranks, corpus: Corpus) -> State:
    """Model, optimizer and replay of a run, on this rank's device."""
    train = run.train
    model = build_model(run, ranks)
    forward = torch.compile(model, fullgraph=True) if train.compile else model
    teacher = Teacher(train.distil, run, ranks.device) if train.distil is not None else None
    return State(run, ranks, corpus, model, forward, build_optimizer(model, train.optimizer), teacher=teacher)


def micro_ranges(run: Run, ranks: Ranks) -> list[range]:
    """The rows of each micro-batch of this rank; ranks hold consecutive shares of the batch."""
    share = run.train.batch_rows // ranks.layout.data_ranks
    first = ranks.data_rank * share
    return [range(row, row + run.train.micro_rows) for row in range(first, first + share, run.train.micro_rows)]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def train_step(state: State, step: int, *, stop: Callable[[], bool] = never, maxima: bool = False) -> StepResult:
    """Do optimizer step `step` (from 0).

    `stop` tells, when the backward pass is done, whether this rank was asked to stop; `maxima` asks for all statistics.
    """
    run, ranks, model = state.run, state.ranks, state.model
    train = run.train
    ranks.progress.at("data", step=step + 1)
    model.train()
    # a compiled model reports always: leaving it out in some steps would compile it twice
    measured = maxima or train.compile
    batches, inputs, targets, valid_tokens = step_inputs(state, step, measured=measured)
    lr = learning_rate(train.schedule, train.optimizer.lr, step, train.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    outputs = _outputs(state, batches, inputs, targets, step)
    not_finite = state.finite.take(model, outputs) if ranks.world_size > 1 else torch.zeros(())
    ranks.progress.at("sum of gradients")
    sum_gradients(model, ranks)
    ranks.progress.at("sum of losses")
    loss, losses, stops, culprits, statistics = _reduce(outputs, stop(), not_finite, state, maxima)
    ranks.progress.at("update")
    norm = gradient_norm(model, ranks)
    grad_norm = float(norm)  # host sync: a step that is not finite must not reach the optimizer
    skipped = not (math.isfinite(grad_norm) and math.isfinite(loss))
    if not skipped:
        clip(model, norm, train.clip_norm)
        state.optimizer.step()
        if run.model.lora is None:  # a frozen base keeps its routers' state, too
            for (_, layer), (_, sums) in zip(model.moe_layers(), statistics, strict=True):
                layer.update(sums)
    if maxima:
        statistics = list(by_layer(ranks, dict(statistics)).items())
    culprits = culprits if skipped else ()
    # host sync: a count that the log wants
    return StepResult(loss, losses, lr, grad_norm, int(valid_tokens), skipped, culprits, stops, statistics)


def step_inputs(state: State, step: int, *, measured: bool = True) -> tuple[list[Batch], list[Tokens], Tensor, Tensor]:
    """This rank's micro-batches of step `step` (from 0), their tokens, and the whole step's targets and valid tokens."""
    run, ranks = state.run, state.ranks
    batches = [
        state.corpus.train_batch(step, rows, batch_rows=run.train.batch_rows, seed=run.seed)
        for rows in micro_ranges(run, ranks)
    ]
    targets, valid_tokens, valid_rows = _step_counts(batches, ranks)
    batches = [batch.part(ranks.context_rank, ranks.layout.context) for batch in batches]
    inputs = [_inputs(batch, step, valid_tokens, valid_rows, ranks) for batch in batches]
    inputs = [replace(tokens, measured=measured) for tokens in inputs]
    return batches, _with_global_counts(state, batches, inputs), targets, valid_tokens


def _step_counts(batches: list[Batch], ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, valid tokens and rows with a valid token of the whole step, float64 scalars, given whole rows."""
    counts = (
        [0, 0, 0]
        if ranks.context_rank
        else [
            sum(int((batch.targets_BS != IGNORE).sum()) for batch in batches),
            sum(int(batch.valid_BS.sum()) for batch in batches),
            sum(int(batch.valid_BS.any(1).sum()) for batch in batches),
        ]
    )
    total = ranks.sum(torch.tensor(counts, dtype=torch.float64, device=ranks.device))
    return total[0], total[1], total[2]


def _inputs(batch: Batch, step: int, valid_tokens: Tensor, valid_rows: Tensor, ranks: Ranks) -> Tokens:
    (B, S), device = batch.ids_BS.shape, ranks.device
    first = ranks.context_rank * S
    return Tokens(
        ids_T=batch.ids_BS.flatten().to(device),
        row_T=batch.row_B.repeat_interleave(S).to(device),
        position_T=torch.arange(first, first + S, device=device).repeat(B),
        document_T=batch.document_BS.flatten().to(device),
        valid_T=batch.valid_BS.flatten().to(device),
        num_rows=B,
        step=torch.tensor(step, device=device),
        step_tokens=valid_tokens.float(),
        step_rows=valid_rows.float(),
        sum_over_row=ranks.sum_over_row if ranks.layout.context > 1 else None,
    )


def _with_global_counts(state: State, batches: list[Batch], inputs: list[Tokens]) -> list[Tokens]:
    """Give the tokens what `global` scope needs: a way to sum counts over ranks, or the counts of a first pass."""
    if not needs_first_pass(state.run, state.ranks.layout):
        reduce = state.ranks.sum if state.ranks.world_size > 1 and len(batches) == 1 else None
        return [replace(tokens, sum_over_ranks=reduce) for tokens in inputs]
    model, moe = state.run.model, state.run.model.moe
    assert moe is not None
    counts_LE = torch.zeros(model.num_layers, moe.num_experts, dtype=torch.int64, device=state.ranks.device)
    with torch.no_grad():
        for batch, tokens in zip(batches, inputs, strict=True):
            call = partial(forward, state, batch, tokens, head=False)
            for layer in through_stages(state.ranks, state.model, batch.ids_BS, call).routing:
                counts_E = layer.statistics["counts_E"]
                counts_LE[layer.layer, : len(counts_E)] += counts_E
    counts_LE = state.ranks.sum(counts_LE)
    return [replace(tokens, step_counts_LE=counts_LE) for tokens in inputs]


def forward(state: State, batch: Batch, tokens: Tokens, **asked: Any) -> Output:
    """The model's output for a micro-batch, with recorded routing forced if the run replays one; `asked`: targets, or no head."""
    replay: tuple[Selection, ...] | None = None
    if state.replayer is not None:
        every = state.replayer.selections(int(tokens.step), batch.row_B, batch.ids_BS.shape[1], state.ranks.device)
        here = {layer for layer, _ in state.model.moe_layers()}
        replay = tuple(one for layer, one in zip(moe_layers(state.run.model), every, strict=True) if layer in here)
    ids_BS = batch.ids_BS.to(state.ranks.device)
    if state.teacher is not None and "targets_BS" in asked:
        asked["soft"] = state.teacher(ids_BS, tokens)
    return state.forward(ids_BS, tokens=tokens, replay=replay, **asked)


def _outputs(state: State, batches: list[Batch], inputs: list[Tokens], targets: Tensor, step: int) -> list[Output]:
    """Forward and backward of every micro-batch; returns the outputs without their graphs."""
    calls = [
        partial(
            forward,
            state,
            batch,
            tokens,
            targets_BS=batch.targets_BS.to(state.ranks.device),
            step_targets=targets.float(),
        )
        for batch, tokens in zip(batches, inputs, strict=True)
    ]
    if state.pipeline is not None:
        return train_stages(state.pipeline, state.model, calls, batches[0].ids_BS)
    return [_forward_backward(state, batch, call, step) for batch, call in zip(batches, calls, strict=True)]


def _forward_backward(state: State, batch: Batch, call: Callable[[], Output], step: int) -> Output:
    """Forward and backward of one micro-batch; returns the output without its graph."""
    state.ranks.progress.at("forward")
    output = call()
    assert output.objective is not None
    state.ranks.progress.at("backward")
    output.objective.backward()
    if state.recorder is not None:
        state.recorder.write(step, batch.row_B, batch.ids_BS.shape[1], [layer.selection for layer in output.routing])
    return without_graph(output)


def _reduce(
    outputs: list[Output], stop: bool, not_finite: Tensor, state: State, maxima: bool
) -> tuple[float, dict[str, float], bool, tuple[int, ...], list[tuple[int, dict[str, Tensor]]]]:
    """Sum losses, stop requests and statistics over micro-batches and ranks, in one collective (and one for maxima).

    With stages there is one more: statistics are of a stage's own layers, the rest of all. `not_finite`: whether this rank's
    part is not; the fourth of the results are the ranks that say so.
    """
    ranks, names = state.ranks, _loss_names(state, outputs)
    losses = [_sum_of([o.loss for o in outputs]), *(_sum_of([o.losses.get(name) for o in outputs]) for name in names)]
    culprits = torch.zeros(ranks.world_size, device=ranks.device)
    culprits[ranks.rank] = not_finite
    stopping = torch.tensor(float(stop), device=ranks.device)
    scalars = torch.cat([torch.stack([*(loss.to(ranks.device) for loss in losses), stopping]), culprits])
    keys = [(index, name) for index, layer in enumerate(outputs[0].routing) for name in layer.statistics if _sums(name)]
    parts = [_sum_of([o.routing[index].statistics[name] for o in outputs]) for index, name in keys]
    flat = ranks.sum(torch.cat([scalars.double(), *(part.double().flatten() for part in parts)]))
    # host sync: once per step, for the log and the check of finiteness
    values = ranks.sum_over_stages(flat[: len(scalars)]).tolist()
    statistics: list[tuple[int, dict[str, Tensor]]] = [(layer.layer, {}) for layer in outputs[0].routing]
    offset = len(scalars)
    for (index, name), part in zip(keys, parts, strict=True):
        statistics[index][1][name] = flat[offset : offset + part.numel()].view(part.shape)
        offset += part.numel()
    if maxima and statistics:
        _reduce_maxima([o.routing for o in outputs], statistics, ranks)
    count = 1 + len(names)
    wrong = tuple(rank for rank, flag in enumerate(values[count + 1 :]) if flag)
    return values[0], dict(zip(names, values[1:count], strict=True)), values[count] > 0, wrong, statistics


def _loss_names(state: State, outputs: list[Output]) -> tuple[str, ...]:
    """The auxiliary losses of all stages; a stage without expert layers has none of its own."""
    if state.pipeline is None:
        return tuple(outputs[0].losses)
    if state.loss_names is None:
        every = gather_stages(state.ranks, list(outputs[0].losses))
        state.loss_names = tuple(dict.fromkeys(name for names in every for name in names))
    return state.loss_names


def _reduce_maxima(
    routings: list[tuple[LayerRouting, ...]], statistics: list[tuple[int, dict[str, Tensor]]], ranks: Ranks
) -> None:
    keys = [(index, name) for index, layer in enumerate(routings[0]) for name in layer.statistics if not _sums(name)]
    parts = [torch.stack([routing[index].statistics[name] for routing in routings]).amax() for index, name in keys]
    for (index, name), value in zip(keys, ranks.max(torch.stack(parts)), strict=True):
        statistics[index][1][name] = value


def _sums(name: str) -> bool:
    return not name.endswith("_max")


def _sum_of(tensors: list[Tensor | None]) -> Tensor:
    there = [tensor.detach() for tensor in tensors if tensor is not None]
    return torch.stack(there).sum(0) if there else torch.zeros(())
