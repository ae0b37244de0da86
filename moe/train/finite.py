"""Which rank a value that is not finite comes from: once gradients are summed, every rank has it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.model import Output


class Finite:
    """Looks at this rank's losses and gradients before they are summed, without a host synchronisation.

    Gradients of sharded parameters are summed on the way (FSDP2) or come of other ranks' tokens (experts): of these it is the
    gradient of the first block's input that tells.
    """

    def __init__(self) -> None:
        self.wrong: list[Tensor] = []

    def follow(self, layers: nn.ModuleList) -> None:
        """Look at the gradient of the first block's input: what is not finite in a later gradient ends up in it."""

        def look(gradient: Tensor) -> None:
            self.wrong.append(gradient.isfinite().all().logical_not())

        def enter(_: nn.Module, arguments: tuple) -> None:
            if isinstance(arguments[0], Tensor) and arguments[0].requires_grad:
                arguments[0].register_hook(look)

        next(iter(layers)).register_forward_pre_hook(enter)

    def take(self, model: nn.Module, outputs: list[Output]) -> Tensor:
        """Whether anything of this rank's part of the step was not finite; bool scalar on the device."""
        parts = [output.loss.isfinite().logical_not() for output in outputs if output.loss is not None]
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients = [gradient for gradient in found if not isinstance(gradient, DTensor)]
        if gradients:
            # the sum of squares is not finite if one of them is not; if it overflows, so does the gradient's norm
            parts.append(torch.nn.utils.get_total_norm(gradients).isfinite().logical_not())
        parts += self.wrong
        self.wrong = []
        return torch.stack(parts).any() if parts else torch.zeros((), dtype=torch.bool)
