"""The expert layer: route, order rows by expert, apply the experts, add the shared expert."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from moe.config.load import resolve_router, router_name
from moe.config.schema import MoE
from moe.experts import Experts
from moe.experts.activation import Activation
from moe.experts.means import output_sums
from moe.init import initialise, off_meta
from moe.routing import Counts, Routing, Selection, Tokens
from moe_cpu.product import linear

MIN_ROWS = 64
"""Of fewer rows a compiled product spends its time packing the weight: generation stays with torch's."""


def fits(*tensors: Tensor) -> bool:
    """Whether moe_cpu's kernels can take these: whole float32 tensors on a CPU."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and not hasattr(t, "to_local") for t in tensors)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, compiled: bool) -> Tensor:
    """x @ weightᵀ + bias [..., N] of x [..., D] and weight [N, D], by moe_cpu's kernels if `compiled` and they apply."""
    if compiled and fits(x, weight):
        rows = x.flatten(0, -2)
        if rows.shape[0] >= MIN_ROWS:
            y = linear(rows, weight).unflatten(0, x.shape[:-1])
            return y if bias is None else y + bias
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear map whose float32 parameters are cast to the input's type at use.

    `lora`: what is added (moe/lora.py sets it). `compiled`: by moe_cpu's kernels (the model sets it).
    """

    def __init__(self, inner: int, outer: int, *, bias: bool):
        super().__init__(inner, outer, bias=bias)
        self.lora: nn.Module | None = None
        self.compiled = False

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = multiply(x, self.weight.to(x.dtype), bias, compiled=self.compiled)
        return y if self.lora is None else y + self.lora(x)


class SwiGLU(nn.Module):
    """Dense feed-forward network (silu(x W_gate) · (x W_up)) W_down (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate, self.up = Linear(dim, hidden, bias=False), Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class MoELayer(nn.Module):
    """A drop-in for a feed-forward block: x_BSD [B, S, D] to (y_BSD of the same shape and type, Routing).

    `layer` is the block's index in the model and `seed` that of the run: first values and routing noise are functions of
    both, so two layers of one model need two indices. The caller adds `auxiliary_loss(routing)` to its loss, and calls
    `update` once per optimizer step.
    """

    def __init__(
        self,
        config: MoE,
        dim: int,
        *,
        layer: int,
        seed: int = 0,
        init_std: float = 0.02,
        residual_scale: float = 1.0,
    ):
        super().__init__()
        router = resolve_router(router_name(config.router)).Router
        with off_meta():
            self.router = router(
                config.router, dim=dim, num_experts=config.num_experts, top_k=config.top_k, layer=layer, seed=seed
            )
        latent = config.latent_dim
        self.into_latent = Linear(dim, latent, bias=False) if latent else None
        self.experts = Experts(
            config.num_experts,
            latent or dim,
            config.expert_hidden,
            config.backend,
            widths=config.expert_widths,
            precision=config.precision,
            activation=Activation(config.activation, config.activation_alpha, config.activation_limit),
            bias=config.expert_bias,
        )
        self.out_of_latent = Linear(latent, dim, bias=False) if latent else None
        self.router.fused = self.experts.backend in ("triton", "block_sparse")
        self.shared = SwiGLU(dim, config.shared_hidden) if config.shared_hidden else None
        self.shared_gate = Linear(dim, 1, bias=False) if config.shared_gate else None
        initialise(self, seed=seed, std=init_std, residual_scale=residual_scale, prefix=f"layers.{layer}.moe.")

    def forward(
        self, x_BSD: Tensor, tokens: Tokens | None = None, replay: Selection | None = None
    ) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        tokens = tokens if tokens is not None else Tokens.of_hidden(x_BSD)
        routing = self.router(x_TD, tokens, replay)
        dispatch = self.experts.plan(routing)
        # with latent experts D is their width between the two shared matrices, and the model's outside
        latent_TD = x_TD if self.into_latent is None else self.into_latent(x_TD)
        travelling = self.experts.start(latent_TD, dispatch)
        shared_TD = self._shared(x_TD)
        y_TD = self.experts(latent_TD, dispatch, travelling)
        if travelling is not None:
            routing = replace(routing, statistics={**routing.statistics, **travelling.statistics})
        if self.out_of_latent is not None:
            y_TD = self.out_of_latent(y_TD)
        if routing.bypass_TD is not None:
            y_TD = y_TD + routing.bypass_TD.to(y_TD.dtype)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if self.router.output_stride and self.training and torch.is_grad_enabled():
            means = output_sums(
                self.experts, self.out_of_latent, latent_TD, routing, tokens, stride=self.router.output_stride
            )
            routing = replace(routing, statistics={**routing.statistics, **means})
        return y_TD.view_as(x_BSD), routing

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        """What the shared expert adds; computed while tokens travel."""
        if self.shared is None:
            return None
        shared_TD = self.shared(x_TD)
        return shared_TD * self.shared_gate(x_TD).sigmoid() if self.shared_gate is not None else shared_TD

    def update(self, statistics: Counts) -> None:
        """Let the router adapt to the statistics of the whole optimizer step: the sum of its routings' statistics."""
        self.router.update(statistics)


def auxiliary_loss(routing: Routing) -> Tensor:
    """Weighted sum of a routing's losses, float32 scalar."""
    zero = torch.zeros((), device=routing.weight_R.device)
    return sum((loss.value * loss.weight for loss in routing.losses.values() if loss.weight), start=zero)
