"""Which rank holds which experts, by how much each is used: packing, replication, and the move of their weights.

A placement is an order of the experts: slot s of S = ranks · slots per rank holds expert order[s], and rank r has the slots
from r·S/ranks on. What is computed does not depend on it, only which rank computes it. Packing gives every rank as many
experts and the fullest rank as little as a greedy choice with exchanges finds (multiway number partitioning is NP-hard;
the greedy rule for groups of equal size is that of Dell'Olmo, Hansen, Pallottino and Storchi 2005). Replication gives
further slots to the experts whose copies are fullest, as for inference; a copy takes an equal part of its expert's rows.
"""

import heapq
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def pack(load_E: Sequence[float], ranks: int) -> list[int]:
    """The expert of each slot, E slots in all, so that ranks are loaded evenly; their own order where none is better.

    Heaviest first, each goes to the least loaded rank with room; then pairs on the fullest rank and any other change places
    while that lowers the fuller of the two.
    """
    room = len(load_E) // ranks
    assert room * ranks == len(load_E)
    heap: list[tuple[float, int]] = [(0.0, rank) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        total, rank = heapq.heappop(heap)
        held[rank].append(expert)
        if len(held[rank]) < room:
            heapq.heappush(heap, (total + load_E[expert], rank))
    while _swap(load_E, held):
        pass
    by_first = sorted((sorted(experts) for experts in held), key=lambda experts: experts[0] if experts else 0)
    order, own = [expert for experts in by_first for expert in experts], list(range(len(load_E)))
    return order if imbalance(load_E, order, ranks) < imbalance(load_E, own, ranks) else own


def _swap(load_E: Sequence[float], held: list[list[int]]) -> bool:
    """Exchange two experts so that the fullest rank gets lighter and the other stays below it; False if none does."""
    totals = [sum(load_E[e] for e in experts) for experts in held]
    full = max(range(len(held)), key=lambda rank: totals[rank])
    best, pair = totals[full], None
    for other, experts in enumerate(held):
        for i, mine in enumerate(held[full]):
            for j, theirs in enumerate(experts):
                moved = load_E[mine] - load_E[theirs]
                worse = max(totals[full] - moved, totals[other] + moved)
                if other != full and moved > 0 and worse < best * (1 - 1e-12):
                    best, pair = worse, (i, other, j)
    if pair is None:
        return False
    i, other, j = pair
    held[full][i], held[other][j] = held[other][j], held[full][i]
    return True


def replicate(load_E: Sequence[float], slots: int) -> list[int]:
    """Copies of each expert, `slots` in all, that make the fullest copy as light as can be (one at a time is optimal)."""
    assert slots >= len(load_E)
    copies = [1] * len(load_E)
    for _ in range(slots - len(load_E)):
        fullest = max(range(len(load_E)), key=lambda e: (load_E[e] / copies[e], -e))
        copies[fullest] += 1
    return copies


def pack_copies(load_E: Sequence[float], ranks: int, slots: int) -> list[int]:
    """The expert of each of `slots` slots (a multiple of ranks): hot experts copied, copies packed."""
    copies = replicate(load_E, slots)
    expert_S = [expert for expert, count in enumerate(copies) for _ in range(count)]
    order = pack([load_E[expert] / copies[expert] for expert in expert_S], ranks)
    return [expert_S[place] for place in order]


def imbalance(load_E: Sequence[float], expert_S: Sequence[int], ranks: int) -> float:
    """Load of the fullest rank over the mean, for experts in this order; 1 is even. An expert's copies share its load."""
    copies = {expert: list(expert_S).count(expert) for expert in expert_S}
    each = len(expert_S) // ranks
    totals = [sum(load_E[e] / copies[e] for e in expert_S[r * each : (r + 1) * each]) for r in range(ranks)]
    return max(totals) * ranks / sum(totals) if sum(totals) > 0 else 1.0


def inverse(order: Sequence[int]) -> list[int]:
    """The slot of each expert."""
    slot_E = [0] * len(order)
    for slot, expert in enumerate(order):
        slot_E[expert] = slot
    return slot_E


def move_rows(rows: Tensor, order: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Row s of the whole becomes what row order[s] was, where every rank of a group holds as many consecutive rows.

    rows [G, ...] are this rank's; returns a new tensor of that shape. Every rank of the group calls it.
    """
    ranks, me, G = dist.get_world_size(group), dist.get_rank(group), rows.shape[0]
    owner = [source // G for source in order]
    sent = [[order[s] % G for s in range(r * G, (r + 1) * G) if owner[s] == me] for r in range(ranks)]
    here = range(me * G, (me + 1) * G)
    taken = [[s % G for s in here if owner[s] == r] for r in range(ranks)]
    flat = rows.reshape(G, -1)
    picked = flat.index_select(0, torch.tensor([row for part in sent for row in part], device=rows.device))
    arrived = torch.empty_like(flat)
    dist.all_to_all_single(arrived, picked, [len(part) for part in taken], [len(part) for part in sent], group=group)
    moved = torch.empty_like(flat)
    moved[torch.tensor([row for part in taken for row in part], device=rows.device)] = arrived
    return moved.view(rows.shape)
