"""Hash routing (arXiv 2106.04426): the token's id decides, nothing is learned.

Each (layer, id, expert) gets a pseudo-random score and the id goes to its k best experts, so one id always meets the same
experts. With `ngram` n the n-1 previous ids of its document take part. Every chosen expert weighs 1/k. A control: what a model
gains over dense with this router is capacity, not learned routing. Frequent ids unbalance the load.
"""

import torch
from torch import Tensor

from moe.config.schema import PositiveInt, RouterConfig, config
from moe.errors import UserError
from moe.random import mix, stable_seed
from moe.routers._parts import token_choice
from moe.routers._select import top_k
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of hash routing."""

    ngram: PositiveInt = 1
    """Ids that are hashed together: the token's own and the ngram-1 before it."""

    source = "no loss"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """None: nothing is learned."""
        return 0


class Router(BaseRouter):
    """Parameter-free router by token id; see the module's docstring."""

    weights_sum = "one"
    label_E: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k = config, top_k
        self.salt = stable_seed(seed, layer, "hash router")
        self.register_buffer("label_E", torch.arange(num_experts))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        if tokens.ids_T is None:
            raise UserError("the hash router needs token ids: pass tokens=Tokens.of(ids_BS) to the layer")
        key_T = mix(tokens.ids_T + self.salt)
        for back in range(1, self.config.ngram):
            inside_T = (tokens.position_T >= back) & (tokens.document_T == tokens.document_T.roll(back))
            earlier_T = torch.where(inside_T, tokens.ids_T.roll(back), -1)
            key_T = mix(key_T + mix(earlier_T))
        # 24 bits of a hash are exact in float32, and 2^-24 ties a million pairs break alike everywhere: topk is deterministic
        score_TE = ((mix(key_T.unsqueeze(1) + mix(self.label_E)) >> 40) & 0xFFFFFF).float() / 2**24
        expert_TK = top_k(score_TE, self.top_k, replay)
        share_TE = torch.zeros_like(score_TE).scatter(1, expert_TK, 1 / self.top_k)
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return token_choice(
            expert_TK, weight_TK, tokens, num_experts=len(self.label_E), share_TE=share_TE, logits_TE=score_TE, losses={}
        )
