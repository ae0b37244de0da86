"""Top-k token choice: each token goes to the k experts of highest score.

Score s = softmax(W x), sigmoid(W x) or sqrt(softplus(W x)); choose the k largest; gate g = s over the chosen (`full`), or
s divided by its sum over the chosen (`selected`, which for softmax equals the softmax over the chosen logits: Mixtral =
Qwen3 with norm_topk_prob). With k = 1, `full`, jitter and capacity this is Switch; `full` is OLMoE's and Qwen2-MoE's gate.

Scoring: linear, with optional noise in training. Selection: k best. Gate: score, whole or renormalised. Balancing: loss,
z-loss. Gradient estimator: the chosen experts, DenseMixer, default vectors, or SparseMixer-v2, which samples in training.
"""

from typing import Literal

from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, RouterConfig, config
from moe.errors import ConfigError
from moe.random import normal, token_keys
from moe.routers._choice import choose
from moe.routers._estimators import Estimator, estimator_rows, hears_of_others, sampled_top_k, scaled
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, balance_and_z, kept_rows, row_needs, token_choice
from moe.routers._scores import Score, jittered, linear_logits, shares
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of top-k routing; the defaults are Mixtral's gate with OLMoE's loss weights."""

    score: Score = "softmax"
    """Score of each expert: softmax over all experts, or a sigmoid or the root of a softplus of each."""
    gate: Literal["full", "selected"] = "selected"
    """Weights are the chosen scores, or the chosen scores divided by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight (DeepSeek's routed_scaling_factor)."""
    noise: Literal["none", "jitter", "gaussian"] = "none"
    """In training only: multiply the router's input by U(1-scale, 1+scale), or add scale·N(0, 1) to the logits."""
    noise_scale: NonNegativeFloat = 0.0
    """Size of the noise; 0 exactly when noise is "none"."""
    estimator: Estimator = "chosen"
    """What teaches the router; moe/routers/_estimators.py. dense_mixer computes all experts (E/K of the FLOPs)."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 0.0
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = (
        "balance 0.01 and z 0.001 as OLMoE, whose f is divided by K as in Switch and Megatron: their coefficients are ours; "
        "transformers' Mixtral, OLMoE and Qwen classes do not divide: their loss is K times ours, our weight theirs times K"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load, and what an estimator computes besides."""
        return kept_rows(top_k, self.capacity_factor) + estimator_rows(
            self.estimator, num_experts=num_experts, top_k=top_k
        )

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero, and noise without size."""
        constant = self.gate == "selected" and not hears_of_others(self.estimator)
        refuse_constant_gate(top_k, constant, "gate 'selected'", "gate='full'")
        if (self.noise == "none") != (self.noise_scale == 0):
            raise ConfigError(
                f"noise '{self.noise}' does not go with noise_scale={self.noise_scale}: "
                "set noise to 'jitter' or 'gaussian' with a scale above 0, or both to 'none' and 0"
            )

    def whole_rows(self, *, part: int) -> str:
        """Capacity and stand-ins are over a row."""
        return row_needs(part, capacity_factor=self.capacity_factor, estimator=self.estimator)


class Router(LinearRouter):
    """Top-k router; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        bounded = "at_most_one" if config.score == "softmax" else "free"
        free = config.scaling_factor != 1 or config.estimator == "sparse_mixer"
        self.weights_sum = "free" if free else "one" if config.gate == "selected" else bounded

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, normalize = self.config, self.config.gate == "selected"
        logits_TE = self._noisy_logits(x_TD, tokens)
        sampling = self.training and config.estimator == "sparse_mixer"
        weighing = {"normalize": normalize, "scaling_factor": config.scaling_factor}
        weight_TK, expert_TK, score_TE = choose(
            config.score, logits_TE, self.top_k, replay, fused=self.fused and not sampling, **weighing
        )
        share_TE = shares(config.score, score_TE)
        if sampling:
            forced_TK = None if replay is None else expert_TK
            place = {"seed": self.seed, "layer": self.layer}
            expert_TK, factor_TK = sampled_top_k(share_TE, self.top_k, tokens, forced_TK=forced_TK, **place)
            weight_TK = scaled(gate(score_TE, expert_TK, **weighing), factor_TK)
        routing = token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=score_TE.shape[1],
            capacity_factor=config.capacity_factor,
            share_TE=share_TE,
            logits_TE=logits_TE,
            losses=balance_and_z(share_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )
        return self.with_estimator(routing, score_TE, expert_TK, tokens, normalize=normalize)

    def _noisy_logits(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        noise = self.config.noise if self.training else "none"
        scale = self.config.noise_scale
        if noise == "jitter":
            x_TD = jittered(x_TD, tokens, scale, seed=self.seed, layer=self.layer, purpose="topk jitter")
        logits_TE = linear_logits(x_TD, self.weight_ED)
        if noise == "gaussian":
            key_T = token_keys(tokens, seed=self.seed, layer=self.layer, purpose="topk gaussian")
            logits_TE = logits_TE + scale * normal(key_T, logits_TE.shape[1])
        return logits_TE
