"""What each expert is worth, from a forward pass over training text: five scores, and what merging needs to know.

For the rows that the router sends to expert e (token x, gate weight g as the layer uses it, output E_e(x)):

    reap            mean of g·|E_e(x)|   (REAP, arXiv 2510.13999; |E_e(g·x)| where the weight is on the input)
    mean_norm       mean of |E_e(x)|, gate-free  (arXiv 2606.15716)
    weighted_norm   sum of g·|E_e(x)|
    frequency       number of rows
    random          a draw, the control

An expert that no token chose scores 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moe.data import Batch, Corpus
from moe.model import Transformer
from moe.moe_layer import MoELayer
from moe.random import stable_seed
from moe.routing import Routing, Selection, Tokens, fixed_offsets, plan
from moe.train.health import every_output, watching

Score = Literal["reap", "mean_norm", "weighted_norm", "frequency", "random"]
SCORES: tuple[Score, ...] = ("reap", "mean_norm", "weighted_norm", "frequency", "random")
SAMPLED_TOKENS = 512
"""Tokens a layer, of all the text, on which every expert's output is seen, for clustering."""


@dataclass
class LayerUse:
    """Sums over the calibration text of one layer, by expert."""

    rows_E: Tensor
    norm_E: Tensor
    """Σ |E_e(x)| over routed rows."""
    weighted_E: Tensor
    """Σ g·|E_e(x)| over routed rows: the length of what the expert adds."""
    gates_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Σ g over routed rows."""
    outputs: list[Tensor] = field(default_factory=list)
    """Every expert's outputs on sampled tokens [E, tokens, D]."""
    logits: list[Tensor] = field(default_factory=list)
    """The router's logits of sampled tokens [tokens, E], where it is linear."""

    def score(self, name: Score, *, seed: int = 0, layer: int = 0) -> Tensor:
        """[E] float64, larger is worth more."""
        if name == "random":
            generator = torch.Generator().manual_seed(stable_seed(seed, f"random experts {layer}"))
            return torch.rand(len(self.rows_E), generator=generator, dtype=torch.float64)
        rows_E = self.rows_E.clamp(min=1)
        return {
            "reap": self.weighted_E / rows_E,
            "mean_norm": self.norm_E / rows_E,
            "weighted_norm": self.weighted_E,
            "frequency": self.rows_E,
        }[name]


def calibration_batches(corpus: Corpus, rows: int, *, seed: int, micro_rows: int = 8) -> Iterator[Batch]:
    """The first `rows` rows of the training text in the order of this seed: validation text is for measuring."""
    for start in range(0, rows, micro_rows):
        span = range(start, min(start + micro_rows, rows))
        yield corpus.train_batch(0, span, batch_rows=rows, seed=seed)


@torch.no_grad()
def measure_use(model: Transformer, batches: Iterator[Batch], *, rows: int) -> dict[int, LayerUse]:
    """What every expert layer does with `rows` rows of text, by block index."""
    found: dict[int, LayerUse] = {}
    for batch in batches:
        tokens = Tokens.of(batch.ids_BS, valid_BS=batch.valid_BS, document_BS=batch.document_BS)
        share = -(-SAMPLED_TOKENS * len(batch.row_B) // rows)
        with watching(model) as seen:
            rows_T = batch.row_B.repeat_interleave(batch.ids_BS.shape[1])
            model(batch.ids_BS, tokens=replace(tokens, row_T=rows_T), head=False)
        for one in seen:
            E = one.routing.num_experts
            use = found.setdefault(one.layer, _unused(E))
            _add(use, one.module, one.expert_x_TD, one.routing)
            stride = max(1, len(one.x_TD) // share)
            use.outputs.append(_through(one.module, every_output(one.module, one.expert_x_TD[::stride])))
            if hasattr(one.module.router, "weight_ED"):
                use.logits.append(one.x_TD[::stride].float() @ one.module.router.weight_ED.float().t())
    return found


def _unused(E: int) -> LayerUse:
    rows_E, norm_E, weighted_E, gates_E = torch.zeros(4, E, dtype=torch.float64).unbind()
    return LayerUse(rows_E, norm_E, weighted_E, gates_E)


def _add(use: LayerUse, layer: MoELayer, latent_TD: Tensor, routing: Routing) -> None:
    """Add one micro-batch's routed rows."""
    goes_R = routing.expert_R < routing.num_experts
    token_N, expert_N, weight_N = (part[goes_R] for part in (routing.token_R, routing.expert_R, routing.weight_R))
    x_ND, weight_N = latent_TD[token_N], weight_N.double()
    norm_N = _through(layer, row_outputs(layer, x_ND, expert_N)).double().norm(dim=-1)
    added_N = norm_N * weight_N
    if routing.weight_on == "input":
        weighed_ND = x_ND * weight_N.to(x_ND.dtype).unsqueeze(1)
        added_N = _through(layer, row_outputs(layer, weighed_ND, expert_N)).double().norm(dim=-1)
    use.rows_E.index_add_(0, expert_N, torch.ones_like(norm_N))
    use.gates_E.index_add_(0, expert_N, weight_N)
    use.norm_E.index_add_(0, expert_N, norm_N)
    use.weighted_E.index_add_(0, expert_N, added_N)


def row_outputs(layer: MoELayer, x_ND: Tensor, expert_N: Tensor) -> Tensor:
    """What expert expert_N[n] makes of x_ND[n], unweighted [N, D]."""
    N, E = len(expert_N), len(layer.experts.widths)
    token_N = torch.arange(N, device=x_ND.device)
    ones_N, offsets = torch.ones(N, device=x_ND.device), fixed_offsets(N, 1, x_ND.device)
    routing = Routing(token_N, expert_N, ones_N, offsets, E, Selection(token_N, expert_N))
    return layer.experts(x_ND, plan(routing))


def _through(layer: MoELayer, y: Tensor) -> Tensor:
    """Experts' outputs as they reach the residual stream: out of the latent width, if there is one."""
    return y if layer.out_of_latent is None else layer.out_of_latent(y)
