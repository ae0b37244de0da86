"""Hash routing (arXiv 2106.04426): the token's id decides, nothing is learned.

Each (layer, id, expert) gets a pseudo-random score and the id goes to its k best experts, so one id always meets the same
experts. With `ngram` n the n-1 previous ids of its document take part. Every chosen expert weighs 1/k. A control: what a model
gains over dense with this router is capacity, not learned routing. Frequent ids unbalance the load, unless `frequencies`
says how frequent they are: then ids, most frequent first, go to the k experts with the least load so far (the paper's
balanced hash), and the pseudo-random score only breaks ties.

Scoring: hash of the id. Selection: k best, or a balanced table. Gate: 1/k. Balancing: none, or the table. Gradient estimator:
none needed.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe.config.schema import PositiveInt, RouterConfig, config
from moe.errors import ConfigError, UserError
from moe.random import mix, stable_seed
from moe.routers._parts import token_choice
from moe.routers._select import top_k
from moe.routers._tables import balanced_table, read_frequencies
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of hash routing."""

    ngram: PositiveInt = 1
    """Ids that are hashed together: the token's own and the ngram-1 before it."""
    frequencies: str = ""
    """File .npy of how often each token id occurs, to balance a table of ids by; empty: hash alone."""

    source = "no loss"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """None: nothing is learned."""
        return 0

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a table of n-grams."""
        if self.frequencies and self.ngram > 1:
            raise ConfigError(
                f"frequencies are of single ids, and ngram is {self.ngram}: use ngram=1 or frequencies=''"
            )

    def whole_rows(self, *, part: int) -> str:
        """The ids before a part's first token are in another part."""
        return f"ngram ({self.ngram}) reaches back to earlier tokens: use ngram=1" if self.ngram > 1 else ""


class Router(BaseRouter):
    """Parameter-free router by token id; see the module's docstring."""

    weights_sum = "one"
    label_E: Tensor
    table_VK: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k = config, top_k
        self.salt = stable_seed(seed, layer, "hash router")
        self.register_buffer("label_E", torch.arange(num_experts))
        if config.frequencies:
            counts_V = read_frequencies(Path(config.frequencies))
            order_VE = self._scores(torch.arange(len(counts_V))).argsort(1).numpy()
            self.register_buffer("table_VK", torch.from_numpy(balanced_table(counts_V, order_VE, top_k)))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        if tokens.ids_T is None:
            raise UserError("the hash router needs token ids: pass tokens=Tokens.of(ids_BS) to the layer")
        score_TE = self._scores(tokens.ids_T, tokens)
        if self.config.frequencies:
            # an id beyond the table, which the counted text did not have, is left to its hash
            last = len(self.table_VK) - 1
            listed_TK = self.table_VK[tokens.ids_T.clamp(max=last)].masked_fill((tokens.ids_T > last).unsqueeze(1), -1)
            score_TE = score_TE + (listed_TK.unsqueeze(2) == self.label_E).any(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        share_TE = torch.zeros_like(score_TE).scatter(1, expert_TK, 1 / self.top_k)
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=len(self.label_E),
            share_TE=share_TE,
            logits_TE=score_TE,
            losses={},
        )

    def _scores(self, ids_T: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Pseudo-random scores in [0, 1) of each id, or n-gram, and expert."""
        key_T = mix(ids_T + self.salt)
        for back in range(1, self.config.ngram):
            assert tokens is not None
            inside_T = (tokens.position_T >= back) & (tokens.document_T == tokens.document_T.roll(back))
            earlier_T = torch.where(inside_T, ids_T.roll(back), -1)
            key_T = mix(key_T + mix(earlier_T))
        # 24 bits of a hash are exact in float32, and 2^-24 ties a million pairs break alike everywhere: topk is deterministic
        return ((mix(key_T.unsqueeze(1) + mix(self.label_E)) >> 40) & 0xFFFFFF).float() / 2**24
