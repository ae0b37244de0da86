"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum whose singular values are made about equal.

A matrix's gradients are averaged, the average's singular values are brought close to 1 by five Newton-Schulz iterations, and
that is the update. Every expert is a matrix of its own: a stack [E, D, F] is E matrices, and packed rows of experts of
different widths are cut into them. The update is scaled by 0.2·sqrt(max(rows, columns)), which gives it the root mean square
of a usual AdamW update (Liu et al. 2025, "Muon is scalable for LLM training", arXiv 2502.16982): rates can be compared.

| parameters                                                    | rule                          |
|---------------------------------------------------------------|-------------------------------|
| matrices of attention, feed-forward layers and experts        | Muon                          |
| embedding, head, routers                                      | AdamW (decay: not embeddings) |
| norms, biases, attention sinks                                | AdamW without decay           |
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from moe.config.schema import Muon as Config
from moe.experts import Experts
from moe.init import is_bias
from moe.routing import Router

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic x -> a·x + b·x³ + c·x⁵: chosen by Jordan et al. for the steepest rise at 0 that stays bounded."""


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """U·S'·Vᵀ of matrices U·S·Vᵀ [..., rows, columns]: S' is near 1 (from 0.7 to 1.2 after five iterations) but for tiny S."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for matrices and AdamW for the rest, by the module's table; the learning rate is set in every group before a step."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.config = config
        self.widths = {
            id(parameter): module.widths
            for module in model.modules()
            if isinstance(module, Experts)
            for name, parameter in module.named_parameters()
            if parameter.ndim == 2 and not is_bias(name)
        }
        super().__init__(muon_groups(model, config.weight_decay), {"lr": config.lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._muon(parameter, group["lr"], group["weight_decay"])
            else:
                self._adamw(parameters, group["lr"], group["weight_decay"])

    def _muon(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - self.config.momentum)
        ahead = gradient.lerp(state["momentum"], self.config.momentum)  # Nesterov's: the average as it will be
        parameter.mul_(1 - lr * weight_decay)
        widths = self.widths.get(id(parameter), parameter.shape[:1] if parameter.ndim == 2 else ())
        pieces = (
            zip(parameter.split(list(widths)), ahead.split(list(widths)), strict=True)
            if widths
            else [(parameter, ahead)]
        )
        for piece, change in pieces:
            scale = self.config.update_rms * math.sqrt(max(piece.shape[-2:]))
            piece.add_(orthogonalised(change, self.config.iterations), alpha=-lr * scale)

    def _adamw(self, parameters: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device), **averages
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups by the module's table, `muon` 1 or 0. Asserts that every parameter is in one group."""
    by_adamw = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | Router) or name == "head"
        for parameter in module.parameters()
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not is_bias(name)
        decay = weight_decay if is_matrix and id(parameter) not in embeddings else 0.0
        groups.setdefault((int(is_matrix and id(parameter) not in by_adamw), decay), []).append(parameter)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    return [
        {"params": parameters, "muon": muon, "weight_decay": decay}
        for (muon, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
