"""Expert parallelism: tokens travel to the ranks that hold their experts, and what the experts make of them travels back.

A *unit* is one vector that travels. Every rank sends, to each rank of the group, units and rows: a row is a (unit, expert,
weight), and names its unit by place. On arrival rows stand by sender, then expert; one permutation to expert order is folded
into the experts' own gather, and their weighted sum leaves one vector per unit to send home.

| dispatch       | a unit is                         | sizes                                                              |
|----------------|-----------------------------------|--------------------------------------------------------------------|
| `deduplicated` | a token, once per rank it goes to | read back from the device once per layer                           |
| `rows`         | a row                             | read back from the device once per layer                           |
| `capacity`     | a row                             | fixed: `capacity` rows per expert and sender; rows past it dropped |

Rows leave in expert order, tokens in token order, so every sum has one order and two runs are bitwise equal.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.parallel.placement import inverse
from moe.routing import Counts, Dispatch, Routing, count_rows, plan


@dataclass(frozen=True)
class Arrival:
    """What has come here, and what is needed to send it home."""

    units_UD: Tensor
    """Vectors for this rank's experts; on devices with streams still travelling until first used."""
    weight_R: Tensor
    """Gate weights of the rows that came, by sender and expert."""
    place_R: Tensor
    """Unit of each row that came."""
    counts_NG: Tensor
    """Rows that came, by sender and expert of this rank."""
    fixed: bool
    """Whether each (sender, expert) has the same number of places, filled or not."""
    home: "_Home"
    statistics: Counts
    """Additive: bytes that left this rank for others in this direction, and rows that were dropped."""


@dataclass(frozen=True)
class _Home:
    """Where units came from on the rank that sent them."""

    token_U: Tensor
    """Token of each unit; of one that stands for nothing, any."""
    order_U: Tensor
    """Units in token order, those that stand for nothing last."""
    offsets_T1: Tensor
    """Units of token t are order_U[offsets_T1[t] : offsets_T1[t+1]]."""
    sent: list[int]
    received: list[int]
    """Units per rank of the group."""


class Exchange:
    """The exchange of one layer's tokens over a group of ranks, each with an equal share of consecutive experts."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, dispatch: str, capacity_factor: float):
        self.group, self.ranks = group, dist.get_world_size(group)
        self.me = dist.get_rank(group)
        self.num_experts, self.local_experts = num_experts, num_experts // self.ranks
        self.dispatch, self.capacity_factor = dispatch, capacity_factor
        self.order: list[int] | None = None
        """The expert in each slot, rank after rank (moe/parallel/placement.py); None: in their own order."""

    def plan(self, routing: Routing) -> Dispatch:
        """Order a routing's rows by slot."""
        if self.order is None:
            return plan(routing)
        slot_E1 = torch.tensor([*inverse(self.order), self.num_experts], device=routing.expert_R.device)
        return plan(replace(routing, expert_R=slot_E1.index_select(0, routing.expert_R)))

    def start(self, x_TD: Tensor, dispatch: Dispatch, *, training: bool) -> Arrival:
        """Send the tokens of a dispatch off: x_TD [T, D]. Every rank of the group calls it, with any T, also 0.

        With `capacity` T is the same on every rank in training; in evaluation sizes are exact and nothing is dropped.
        """
        if self.dispatch == "capacity" and training:
            return self._start_fixed(x_TD, dispatch)
        return self._start_exact(x_TD, dispatch)

    def local(self, arrival: Arrival, dispatch: Dispatch) -> Dispatch:
        """The rows that came, in the order of this rank's experts; `dispatch` is the one that was sent."""
        rows, G = arrival.place_R.shape[0], self.local_experts
        counts_NG = arrival.counts_NG
        # rows stand by sender and expert; in fixed sizes each (sender, expert) has `slots` places, not all of them filled
        place_R = torch.arange(rows, device=counts_NG.device)
        if arrival.fixed:
            slots = rows // max(counts_NG.numel(), 1)
            filled_R = place_R % max(slots, 1) < counts_NG.flatten().repeat_interleave(slots, output_size=rows)
            expert_R = torch.where(filled_R, place_R // max(slots, 1) % G, G)
        else:
            expert_G = torch.arange(G, device=counts_NG.device).repeat(self.ranks)
            expert_R = expert_G.repeat_interleave(counts_NG.flatten(), output_size=rows)
        order_P = expert_R.argsort(stable=True)
        by_unit_R = arrival.place_R.argsort(stable=True)
        row_R = torch.empty_like(by_unit_R).scatter_(0, by_unit_R, place_R)
        counts_G = counts_NG.sum(0)
        return Dispatch(
            row_P=row_R.index_select(0, order_P),
            token_P=arrival.place_R.index_select(0, order_P),
            weight_P=arrival.weight_R.index_select(0, order_P),
            offsets_E1=nn.functional.pad(counts_G.cumsum(0), (1, 0)),
            counts_E=counts_G,
            weight_on=dispatch.weight_on,
        )

    def finish(self, y_UD: Tensor, arrival: Arrival, num_tokens: int) -> Tensor:
        """Send the experts' sums home and add them per token: y_UD [units here, D] to y_TD, in its type."""
        home = arrival.home
        back_UD = _travel(y_UD, home.received, home.sent, self.group)
        y_TD = _SumRows.apply(back_UD, home.token_U, home.order_U, home.offsets_T1)
        return y_TD if y_TD.shape[0] == num_tokens else y_TD[:num_tokens]

    # ------------------------------------------------------------------------------------------------------- sizes read

    def _start_exact(self, x_TD: Tensor, dispatch: Dispatch) -> Arrival:
        N, G, T = self.ranks, self.local_experts, x_TD.shape[0]
        counts_NG = dispatch.counts_E.view(N, G)
        if self.dispatch != "rows":
            unit_P, token_slots, units_N = self._unique(dispatch, T)
        else:
            unit_P, token_slots, units_N = None, dispatch.token_P, counts_NG.sum(1)
        counts = torch.cat((counts_NG, units_N.unsqueeze(1)), 1)
        arriving, sizes = _exchange_counts(counts, self.group.group_name)
        # host sync: one per layer, all-to-all takes its sizes on the host (already there when a block is recomputed)
        sent_rows, sent, received_rows, received = sizes.tolist()
        token_U = token_slots[: sum(sent)]
        order_U, offsets_T1 = _by_token(token_U, T)
        units_UD = _travel(_TakeRows.apply(x_TD, token_U, order_U, offsets_T1), sent, received, self.group)
        weight_R = _travel(dispatch.weight_P[: sum(sent_rows)], sent_rows, received_rows, self.group)
        bytes_sent = self._away(sent) * x_TD.shape[1] * x_TD.element_size()
        bytes_sent += self._away(sent_rows) * weight_R.element_size() + (N - 1) * (G + 1) * counts.element_size()
        if unit_P is None:
            place_R = torch.arange(sum(received_rows), device=x_TD.device)
        else:
            first_N = arriving[:, G].cumsum(0) - arriving[:, G]
            sent_places = unit_P[: sum(sent_rows)].int()
            place_R = _travel(sent_places, sent_rows, received_rows, self.group).long()
            bytes_sent += self._away(sent_rows) * sent_places.element_size()
            shift_R = first_N.repeat_interleave(arriving[:, :G].sum(1), output_size=len(place_R))
            place_R = place_R + shift_R
        return Arrival(
            units_UD=units_UD,
            weight_R=weight_R,
            place_R=place_R,
            counts_NG=arriving[:, :G],
            fixed=False,
            home=_Home(token_U, order_U, offsets_T1, sent, received),
            statistics=self._statistics(bytes_sent, torch.zeros((), device=x_TD.device)),
        )

    def _unique(self, dispatch: Dispatch, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's place among the units for its rank, the token of each unit (as many as could be), and units per rank."""
        N, E = self.ranks, self.num_experts
        device = dispatch.token_P.device
        row_P = torch.arange(dispatch.token_P.shape[0], device=device)
        rank_P = torch.searchsorted(dispatch.offsets_E1[1:].contiguous(), row_P, right=True).clamp(max=E)
        rank_P = rank_P // self.local_experts
        spot_P = rank_P * T + dispatch.token_P
        goes = torch.zeros((N + 1) * T, dtype=torch.int64, device=device).scatter_(0, spot_P, 1)[: N * T]
        place = goes.cumsum(0) - 1
        units_N = goes.view(N, T).sum(1)
        first_N = units_N.cumsum(0) - units_N
        token = torch.arange(T, device=device).repeat(N)
        slots = torch.zeros(N * T + 1, dtype=torch.int64, device=device)
        slots.scatter_(0, torch.where(goes > 0, place, N * T), token)
        unit_P = nn.functional.pad(place - first_N.repeat_interleave(T), (0, T)).index_select(0, spot_P)
        return unit_P, slots, units_N

    # ------------------------------------------------------------------------------------------------------ fixed sizes

    def _start_fixed(self, x_TD: Tensor, dispatch: Dispatch) -> Arrival:
        if x_TD.shape[0] == 0:
            x_TD = nn.functional.pad(x_TD, (0, 0, 0, 1))  # a place that empty slots can point to
        T, E, rows = x_TD.shape[0], self.num_experts, dispatch.token_P.shape[0]
        device = x_TD.device
        slots = max(1, math.ceil(self.capacity_factor * rows / E - 1e-9))
        row_P = torch.arange(rows, device=device)
        expert_P = torch.searchsorted(dispatch.offsets_E1[1:].contiguous(), row_P, right=True).clamp(max=E)
        rank_P = row_P - dispatch.offsets_E1.index_select(0, expert_P)
        kept_P = (expert_P < E) & (rank_P < slots)
        slot_P = torch.where(kept_P, expert_P * slots + rank_P, E * slots)
        row_S = torch.full((E * slots + 1,), rows, device=device).scatter_(0, slot_P, row_P)[: E * slots]
        token_S = nn.functional.pad(dispatch.token_P, (0, 1), value=T).index_select(0, row_S)
        weight_S = nn.functional.pad(dispatch.weight_P, (0, 1)).index_select(0, row_S)
        order_S, offsets = _by_token(token_S, T + 1)
        token_S = token_S.clamp(max=T - 1)
        x_SD = _TakeRows.apply(x_TD, token_S, order_S, offsets[: T + 1])
        equal = [self.local_experts * slots] * self.ranks
        counts_NG = dispatch.counts_E.clamp(max=slots).view(self.ranks, self.local_experts)
        arriving, _ = _exchange_counts(counts_NG, self.group.group_name, read=False)
        bytes_sent = self._away(equal) * (x_TD.shape[1] * x_TD.element_size() + weight_S.element_size())
        bytes_sent += (self.ranks - 1) * self.local_experts * counts_NG.element_size()
        return Arrival(
            units_UD=_travel(x_SD, equal, equal, self.group),
            weight_R=_travel(weight_S, equal, equal, self.group),
            place_R=torch.arange(E * slots, device=device),
            counts_NG=arriving,
            fixed=True,
            home=_Home(token_S, order_S, offsets[: T + 1], equal, equal),
            statistics=self._statistics(bytes_sent, dispatch.counts_E.sum() - counts_NG.sum()),
        )

    def _away(self, per_rank: list[int]) -> int:
        """What goes to other ranks, of a list of numbers per rank."""
        return sum(per_rank) - per_rank[self.me]

    def _statistics(self, bytes_sent: int, dropped: Tensor) -> Counts:
        return {
            "sent_bytes": torch.tensor(float(bytes_sent), dtype=torch.float64, device=dropped.device),
            "undelivered_rows": dropped.double(),
        }


def _by_token(token_U: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Units in token order, and the first unit of each token (with an end), for sums per token."""
    counts_T = count_rows(token_U, num_tokens)
    return token_U.argsort(stable=True), nn.functional.pad(counts_T.cumsum(0), (1, 0))


def _travel(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows, `sent` to and `received` from each rank; gradients travel the other way."""
    from torch.distributed import _functional_collectives as collectives  # late: a twentieth of `import moe.model`

    rows = rows.contiguous()
    if rows.requires_grad:
        return collectives.all_to_all_single_autograd(rows, received, sent, group)
    return collectives.all_to_all_single(rows, received, sent, group)


@torch.library.custom_op("moe_lab::exchange_counts", mutates_args=())
def _exchange_counts(counts: Tensor, group_name: str, read: bool = True) -> tuple[Tensor, Tensor]:
    """Every rank's counts for this rank [N, G (+ units)], and, on the host, rows and units per rank, sent and received.

    One operator, so that a recomputed block keeps its result instead of asking again.
    """
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group = resolve(group_name)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts.contiguous(), group=group)
    if not read:
        return arriving, counts.new_empty(0, device="cpu")
    lists = (counts[:, :-1].sum(1), counts[:, -1], arriving[:, :-1].sum(1), arriving[:, -1])
    return arriving, torch.stack(lists).cpu()


@_exchange_counts.register_fake
def _(counts, group_name, read=True):
    sizes = (4, counts.shape[0]) if read else (0,)
    return torch.empty_like(counts), counts.new_empty(sizes, device="cpu")


EXCHANGE_COUNTS = torch.ops.moe_lab.exchange_counts.default
"""The operator whose result a recomputed block keeps."""


def _sum_rows(rows_UD: Tensor, order_U: Tensor, offsets_T1: Tensor) -> Tensor:
    """Sum of each token's rows [T, D], in float32 or wider, returned in their type; the order of a sum is that of order_U."""
    dtype = torch.promote_types(rows_UD.dtype, torch.float32)
    sorted_UD = rows_UD.index_select(0, order_U).to(dtype)
    sums = torch.segment_reduce(sorted_UD, "sum", offsets=offsets_T1, axis=0, unsafe=True, initial=0)
    return sums.to(rows_UD.dtype)


class _TakeRows(torch.autograd.Function):
    """x_TD's rows token_U [U, D]; the gradient is a sum per token in a fixed order, never an atomic one."""

    @staticmethod
    def forward(ctx, x_TD, token_U, order_U, offsets_T1):
        ctx.save_for_backward(order_U, offsets_T1)
        return x_TD.index_select(0, token_U)

    @staticmethod
    def backward(ctx, *grads):
        return _sum_rows(grads[0], *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    """Sum of rows per token; the gradient of a row is its token's."""

    @staticmethod
    def forward(ctx, rows_UD, token_U, order_U, offsets_T1):
        ctx.save_for_backward(token_U)
        return _sum_rows(rows_UD, order_U, offsets_T1)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None, None
