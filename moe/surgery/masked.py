"""Training that moves some numbers of a model and leaves the others bitwise alone: for tickets and selected experts.

Gradients of the fixed numbers are zeroed before clipping sees them, and after every step they are put back, since decay
would move them. One process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from moe import parallel
from moe.config.schema import Run
from moe.data import prepare
from moe.errors import TrainingStopped
from moe.model import Transformer
from moe.train.step import build_state, train_step

Masks = Mapping[str, Tensor]
"""By parameter or buffer, True where it may move, of its shape or one that broadcasts to it; absent: all of it may."""


def train_masked(
    run: Run,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    *,
    steps: range | None = None,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> dict[str, Tensor]:
    """Train from `tensors` for the run's steps and return the state; what the masks fix keeps the value it has there.

    `steps` trains a part of the schedule. Raises TrainingStopped where a loss is not finite.
    """
    ranks = parallel.start(run.train.device)
    state = build_state(run, ranks, prepare(run.data))
    state.model.load_state_dict(dict(tensors))
    fixed = {name: tensors[name].to(ranks.device) for name in masks}
    with _only(state.model, {name: mask.to(ranks.device) for name, mask in masks.items()}, fixed) as put_back:
        for step in steps if steps is not None else range(run.train.steps):
            result = train_step(state, step)
            put_back()
            if result.skipped:
                raise TrainingStopped(f"the loss was not finite at step {step + 1}: lower train.optimizer.lr")
            on_step(step + 1, result.loss)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.model.state_dict().items()}


@contextmanager
def _only(model: Transformer, masks: Masks, fixed: Mapping[str, Tensor]) -> Iterator[Callable[[], None]]:
    """While it lasts, gradients outside the masks are zero; yields what puts the fixed numbers back."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in masks}
    handles = [parameter.register_hook(_masking(masks[name])) for name, parameter in parameters.items()]

    whole = {name: tensor for name, tensor in model.state_dict().items() if name in masks}

    @torch.no_grad()
    def put_back() -> None:
        for name, tensor in whole.items():
            tensor.copy_(torch.where(masks[name], tensor, fixed[name]))

    try:
        yield put_back
    finally:
        for handle in handles:
            handle.remove()


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: torch.where(mask, gradient, 0.0)
