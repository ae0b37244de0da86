"""The values that pass between a router, the dispatch and the experts: routing is a sparse T×E matrix in row triples.

`Tokens` describes the batch, `Router` turns hidden states into a `Routing`, `plan` orders its rows by expert into a
`Dispatch`. R = T·K or E·C, always known on the host; a row that goes nowhere carries expert E and weight 0 and sorts last.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Counts = dict[str, Tensor]


class Selection(NamedTuple):
    """Which token meets which expert in each routed row, before capacity: what router replay records and forces."""

    token_R: Tensor
    """Token index of each row, ascending, int64."""
    expert_R: Tensor
    """Expert index of each row, int64; E or more where the router selected none of the E experts."""


class SumOverRanks(Protocol):
    """Sums a tensor over ranks that see other tokens (no gradient)."""

    def __call__(self, tensor: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Tokens:
    """What routers and losses may know of a micro-batch besides hidden states. T = B·S, tokens of a row adjacent."""

    ids_T: Tensor | None
    """Token ids, int64; None where a layer stands alone and nobody gave them."""
    row_T: Tensor
    """Index of the token's row in the whole step's batch, int64: the same in every layout."""
    position_T: Tensor
    """Position in the row, int64."""
    document_T: Tensor
    """Index of the document within the row, int64, ascending."""
    valid_T: Tensor
    """False for padding: such tokens go nowhere and count nowhere, bool."""
    num_rows: int
    """B, rows in this micro-batch."""
    step: Tensor
    """Optimizer step, int64 scalar (a tensor, so that a new step does not recompile)."""
    step_tokens: Tensor
    """Valid tokens of the whole step, over ranks and micro-batches, float32 scalar."""
    step_rows: Tensor
    """Rows of the whole step with at least one valid token, float32 scalar."""
    step_counts_LE: Tensor | None = None
    """Rows per expert over the whole step, for every block (zeros for a dense one), if a first pass has counted them."""
    measured: bool = True
    """Whether to report the statistics that only a log reads; losses and router updates need none of them."""
    sum_over_ranks: SumOverRanks | None = None
    """Set when this micro-batch is all of this rank's share of the step: `global` scope sums its counts with it."""
    sum_over_row: SumOverRanks | None = None
    """Set when other ranks hold other parts of the same rows (parallel.context): sums over those ranks."""
    unfinished: bool = False
    """Whether the rows are still being written: capacity, a share of a row's length, is unknown then, and nothing is dropped."""

    def over_row(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all parts of the same rows, without gradient; itself where rows are whole."""
        return tensor if self.sum_over_row is None else self.sum_over_row(tensor)

    @staticmethod
    def of_hidden(x_BSD: Tensor, *, step: int = 0) -> "Tokens":
        """Tokens of hidden states [B, S, D] without ids: all valid, one document a row."""
        ids_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64, device=x_BSD.device)
        return replace(Tokens.of(ids_BS, step=step), ids_T=None)

    @staticmethod
    def of(
        ids_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        step: int = 0,
        first_position: int = 0,
    ) -> "Tokens":
        """Tokens of a batch that stands alone: ids_BS [B, S] int64; valid_BS bool and document_BS int64 of the same shape.

        `first_position` is that of the first column, where earlier tokens are in a cache.
        """
        B, S = ids_BS.shape
        device = ids_BS.device
        valid_T = torch.ones_like(ids_BS, dtype=torch.bool).flatten() if valid_BS is None else valid_BS.flatten()
        return Tokens(
            ids_T=ids_BS.flatten(),
            row_T=torch.arange(B, device=device).repeat_interleave(S),
            position_T=torch.arange(first_position, first_position + S, device=device).repeat(B),
            document_T=torch.zeros_like(ids_BS).flatten() if document_BS is None else document_BS.flatten(),
            valid_T=valid_T,
            num_rows=B,
            step=torch.tensor(step, device=device),
            step_tokens=valid_T.sum().float(),
            step_rows=valid_T.view(B, S).any(1).sum().float() if S else torch.zeros((), device=device),
        )


class Loss(NamedTuple):
    """An auxiliary loss of one layer."""

    value: Tensor
    """This micro-batch's additive part of the step's value, float32 scalar, with gradient if weight is not 0."""
    weight: float
    """Coefficient in the objective, after averaging over the MoE layers."""


@dataclass(frozen=True)
class Routing:
    """Who goes where, with what weight, at what price. Rows are in ascending token order (CSR)."""

    token_R: Tensor
    """Token of each row, int64."""
    expert_R: Tensor
    """Expert of each row, int64; E for a row that goes nowhere."""
    weight_R: Tensor
    """Gate weight of each row, float32, differentiable; 0 for a row that goes nowhere."""
    token_offsets: Tensor
    """Rows of token t are token_offsets[t] : token_offsets[t+1]; int64, T+1 entries."""
    num_experts: int
    selection: Selection
    """The choice before capacity and padding."""
    weight_on: Literal["output", "input"] = "output"
    """Whether the weight multiplies the expert's output or its input (Llama 4)."""
    losses: dict[str, Loss] = field(default_factory=dict)
    statistics: Counts = field(default_factory=dict)
    """Additive parts of the step's statistics, without gradient; a name ending in `_max` combines by maximum."""
    selected_R: Tensor | None = None
    """False for rows that are computed only for a gradient estimator, bool; None if every row is selected."""
    bypass_TD: Tensor | None = None
    """What reaches the output without any expert (zero, copy and constant experts); None for nothing."""


class Router(nn.Module):
    """Base of every router: `Router(config, dim=D, num_experts=E, top_k=K, layer=l, seed=s)` in `moe/routers/<name>.py`.

    Parameters and buffers are float32 whatever the model's dtype. State changes in `update` only, never in forward.
    """

    causal: bool = True
    """False if a token's routing can depend on later tokens of its row."""
    weights_sum: Literal["one", "at_most_one", "free"]
    """What a valid, undropped token's gate weights sum to."""
    exact_rows: bool = True
    """False if rows_per_token is what a loss or a controller aims at, rather than what every batch has."""
    output_stride: int = 0
    """If not 0, in training the layer adds the experts' mean outputs over every n-th token to the statistics."""
    fused: bool = False
    """Whether to score and choose with moe_triton's kernel, if the router can: the layer sets it where kernels compute experts."""

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        """Route x_TD [T, D]; with `replay`, take that selection instead of choosing one."""
        raise NotImplementedError

    def update(self, statistics: Counts) -> None:
        """Adapt state to the statistics of the whole optimizer step: those of `Routing.statistics` that add up, summed.

        The trainer calls it once per optimizer step, with the same sums on every rank. `counts_E`, the rows per expert,
        is always among them; a router that needs more puts it into the statistics of its routing.
        """

    @torch.no_grad()
    def relabel(self, order_E: Tensor) -> None:
        """Rename experts: new expert i is old expert order_E[i]. Finds the expert dimension by the letters of each name."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            letters = name.rsplit("_", 1)[-1]
            if "E" in letters:
                tensor.copy_(tensor.index_select(letters.index("E"), order_E))


@dataclass(frozen=True)
class Dispatch:
    """The rows of a `Routing` in expert order; P = R rows here, those that go nowhere last."""

    row_P: Tensor
    """Index into the routing's rows, int64."""
    token_P: Tensor
    """Token of each row, int64."""
    weight_P: Tensor
    """Gate weight of each row, float32, differentiable."""
    offsets_E1: Tensor
    """Rows of expert e are offsets_E1[e] : offsets_E1[e+1]; int64, E+1 entries."""
    counts_E: Tensor
    """Rows per expert, int64."""
    weight_on: Literal["output", "input"]


def plan(routing: Routing) -> Dispatch:
    """Order a routing's rows by expert; stable, so that rows of one expert stay in token order."""
    E = routing.num_experts
    row_P = routing.expert_R.argsort(stable=True)
    counts_E = count_rows(routing.expert_R, E)
    return Dispatch(
        row_P=row_P,
        token_P=routing.token_R.index_select(0, row_P),
        weight_P=routing.weight_R.index_select(0, row_P),
        offsets_E1=nn.functional.pad(counts_E.cumsum(0), (1, 0)),
        counts_E=counts_E,
        weight_on=routing.weight_on,
    )


def count_rows(expert_R: Tensor, num_experts: int) -> Tensor:
    """Rows per expert [E], int64; rows of expert index E are not counted. No host synchronisation."""
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_R.device).scatter_add_(
        0, expert_R, torch.ones_like(expert_R)
    )[:num_experts]


def fixed_offsets(num_tokens: int, rows_per_token: int, device: torch.device) -> Tensor:
    """Token offsets [T+1] when every token has the same number of rows."""
    return torch.arange(num_tokens + 1, device=device) * rows_per_token


def apply_capacity(expert_TK: Tensor, tokens: Tokens, num_experts: int, capacity: int) -> Tensor:
    """Send a token's choice nowhere if `capacity` choices of that expert precede it in its row.

    Order is (position, choice), so an earlier token is never dropped for a later one. Returns expert_TK with E for dropped.
    """
    T, K = expert_TK.shape
    expert_R = expert_TK.flatten()
    row_R = torch.arange(T, device=expert_R.device).repeat_interleave(K) // max(T // max(tokens.num_rows, 1), 1)
    group_R = row_R * (num_experts + 1) + expert_R
    order_R = group_R.argsort(stable=True)
    counts = torch.zeros(tokens.num_rows * (num_experts + 1), dtype=torch.int64, device=expert_R.device)
    starts = counts.scatter_add(0, group_R, torch.ones_like(group_R)).cumsum(0)
    starts = nn.functional.pad(starts, (1, 0)).index_select(0, group_R.index_select(0, order_R))
    rank_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(T * K, device=expert_R.device) - starts)
    return torch.where(rank_R < capacity, expert_R, num_experts).view(T, K)
