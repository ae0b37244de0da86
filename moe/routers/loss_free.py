"""Auxiliary-loss-free balancing (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437 section 2.1.2).

Score s = sigmoid(W x); choose the k largest of s + b; gate g = s over the chosen, divided by their sum, times a constant.
After each optimizer step b_e += rate·sign(mean load - load_e), with loads of the whole global batch. The bias b is in the
selection only: never in the gate, and without gradient. A sequence-wise balance loss of small weight is DeepSeek-V3's safeguard.
"""

import torch
from torch import Tensor, nn

from moe.balance import balance_loss, z_loss
from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, RouterConfig, config
from moe.errors import ConfigError
from moe.routers._parts import gate, linear_logits, token_choice, top_k
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of loss-free balancing; the defaults are DeepSeek-V3's, with its scaling factor left at 1."""

    bias_rate: NonNegativeFloat = 0.001
    """Step of the selection bias after each optimizer step."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight (DeepSeek-V3: 2.5)."""
    balance: Balance = Balance(weight=0.0001, scope="sequence")
    """Complementary load-balancing loss."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 0.0
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = "bias_rate 0.001 and sequence-wise balance 0.0001 as DeepSeek-V3, whose f is divided by K as ours is"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load."""
        return top_k * min(1.0, self.capacity_factor) if self.capacity_factor else float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        if top_k == 1 and self.normalize:
            raise ConfigError(
                "normalize=true with top_k=1 makes every weight exactly 1, so the router gets no gradient from the loss: "
                "use normalize=false or top_k=2"
            )


class Router(BaseRouter):
    """Sigmoid top-k router with a selection bias; see the module's docstring."""

    bias_E: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k, self.layer = config, top_k, layer
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.weights_sum = "one" if config.normalize and config.scaling_factor == 1 else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.sigmoid()
        share_TE = score_TE / score_TE.sum(1, keepdim=True)
        expert_TK = top_k(score_TE.detach() + self.bias_E, self.top_k, replay)
        token_R = torch.arange(x_TD.shape[0], device=x_TD.device).repeat_interleave(self.top_k)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize, scaling_factor=config.scaling_factor),
            tokens,
            num_experts=score_TE.shape[1],
            capacity_factor=config.capacity_factor,
            share_TE=share_TE,
            logits_TE=logits_TE,
            losses={
                "balance": balance_loss(share_TE, expert_TK.flatten(), token_R, tokens, config.balance, self.layer),
                "z": z_loss(logits_TE, tokens, config.z_weight),
            },
        )

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        load_E = counts_E.float()
        self.bias_E += self.config.bias_rate * (load_E.mean() - load_E).sign()
