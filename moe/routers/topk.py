"""Top-k token choice: each token goes to the k experts of highest score.

Score s = softmax(W x) or sigmoid(W x); choose the k largest; gate g = s over the chosen (`full`), or s divided by its sum
over the chosen (`selected`, which for softmax equals the softmax over the chosen logits: Mixtral = Qwen3 with norm_topk_prob).
With k = 1, `full` and capacity 1.25 this is Switch (arXiv 2101.03961); with k = 2 and z-loss, ST-MoE (arXiv 2202.08906).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moe.balance import balance_loss, z_loss
from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, RouterConfig, config
from moe.errors import ConfigError
from moe.random import normal, token_keys, uniform
from moe.routers._parts import gate, linear_logits, token_choice, top_k
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of top-k routing; the defaults are Mixtral's gate with OLMoE's loss weights."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score of each expert: softmax over all experts, or a sigmoid of each."""
    gate: Literal["full", "selected"] = "selected"
    """Weights are the chosen scores, or the chosen scores divided by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight (DeepSeek's routed_scaling_factor)."""
    noise: Literal["none", "jitter", "gaussian"] = "none"
    """In training only: multiply the router's input by U(1-scale, 1+scale), or add scale·N(0, 1) to the logits."""
    noise_scale: NonNegativeFloat = 0.0
    """Size of the noise; 0 exactly when noise is "none"."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 0.0
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = (
        "f is divided by K (Switch, Megatron, OLMoE's own code): their coefficients are ours; where f is not divided by K "
        "(transformers' Mixtral, OLMoE and Qwen classes) the loss is K times ours, so our weight is their coefficient times K"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load."""
        return top_k * min(1.0, self.capacity_factor) if self.capacity_factor else float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero, and noise without size."""
        if top_k == 1 and self.gate == "selected":
            raise ConfigError(
                "gate 'selected' with top_k=1 makes every weight exactly 1, so the router gets no gradient from the loss: "
                "use gate='full' or top_k=2"
            )
        if (self.noise == "none") != (self.noise_scale == 0):
            raise ConfigError(
                f"noise '{self.noise}' does not go with noise_scale={self.noise_scale}: "
                "set noise to 'jitter' or 'gaussian' with a scale above 0, or both to 'none' and 0"
            )


class Router(BaseRouter):
    """Top-k router; see the module's docstring."""

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k, self.layer, self.seed = config, top_k, layer, seed
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        bounded = "at_most_one" if config.score == "softmax" else "free"
        self.weights_sum = "free" if config.scaling_factor != 1 else "one" if config.gate == "selected" else bounded

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = self._noisy_logits(x_TD, tokens)
        score_TE = logits_TE.softmax(1) if config.score == "softmax" else logits_TE.sigmoid()
        share_TE = score_TE if config.score == "softmax" else score_TE / score_TE.sum(1, keepdim=True)
        expert_TK = top_k(score_TE, self.top_k, replay)
        token_R = torch.arange(x_TD.shape[0], device=x_TD.device).repeat_interleave(self.top_k)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.gate == "selected", scaling_factor=config.scaling_factor),
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

    def _noisy_logits(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        noise = self.config.noise if self.training else "none"
        scale = self.config.noise_scale
        if noise == "none":
            return linear_logits(x_TD, self.weight_ED)
        key_T = token_keys(tokens, seed=self.seed, layer=self.layer, purpose=f"topk {noise}")
        if noise == "jitter":
            factor_TD = 1 + scale * (2 * uniform(key_T, x_TD.shape[1]) - 1)
            return linear_logits(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)) * factor_TD, self.weight_ED)
        return linear_logits(x_TD, self.weight_ED) + scale * normal(key_T, self.weight_ED.shape[0])
