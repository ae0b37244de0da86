"""Run under torchrun: the exchange of tokens against all experts on one process, on routings made to be awkward.

Every rank draws every rank's tokens, so each can compute what the whole group should: outputs, gradients of tokens, of gate
weights and of every expert, in float64 with the reference backend. Rank 0 prints the largest difference of each case.
"""

import json
import sys

import torch
import torch.distributed as dist

from moe import parallel
from moe.experts import Experts
from moe.parallel.exchange import Exchange
from moe.routing import Routing, Selection, fixed_offsets, plan

E, D, F, SKEWED_STEPS = 8, 6, 5, 50


def to_one_rank(T: int, K: int, generator: torch.Generator) -> torch.Tensor:
    """Every choice among the first rank's experts."""
    return torch.stack([torch.randperm(E // dist.get_world_size(), generator=generator)[:K] for _ in range(T)])


def anywhere(T: int, K: int, generator: torch.Generator) -> torch.Tensor:
    """K different experts; now and then nobody."""
    chosen = (
        torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    )
    return torch.where(torch.rand(T, K, generator=generator) < 0.2, E, chosen)


CASES = {
    "unequal tokens": (lambda rank: 5 + 6 * rank, 2, anywhere, "output"),
    "weights on the input": (lambda rank: 5 + 6 * rank, 2, anywhere, "input"),
    "one choice": (lambda rank: 7, 1, anywhere, "output"),
    "every expert": (lambda rank: 3, E, anywhere, "output"),
    "all tokens to one expert": (lambda rank: 9, 1, lambda T, K, _: torch.full((T, K), E - 1), "output"),
    "all tokens to one rank": (lambda rank: 9, 2, to_one_rank, "output"),
    "no tokens on a rank": (lambda rank: 6 * (rank > 0), 2, anywhere, "output"),
    "no tokens at all": (lambda rank: 0, 2, anywhere, "output"),
    "nobody goes anywhere": (lambda rank: 4, 2, lambda T, K, _: torch.full((T, K), E), "output"),
}


def routing_of(expert_TK: torch.Tensor, weight_TK: torch.Tensor, weight_on) -> Routing:
    """A routing with these choices; what goes nowhere weighs nothing."""
    T, K = expert_TK.shape
    token_R = torch.arange(T).repeat_interleave(K)
    weight_R = torch.where(expert_TK < E, weight_TK, 0.0).flatten()
    selection = Selection(token_R, expert_TK.flatten())
    offsets = fixed_offsets(T, K, token_R.device)
    return Routing(token_R, expert_TK.flatten(), weight_R, offsets, E, selection, weight_on=weight_on)


def draw(case: str, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's tokens, choices, gate weights and gradient of the output."""
    count, K, choose, _ = CASES[case]
    generator = torch.Generator().manual_seed(1000 * step + rank)
    T = count(rank)
    expert_TK = choose(T, K, generator)
    x_TD, dy_TD = (torch.randn(T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return x_TD, expert_TK, torch.rand(T, K, generator=generator, dtype=torch.float64), dy_TD


def experts_of(exchange: Exchange | None) -> Experts:
    """All experts, or this rank's share of them and the exchange."""
    experts = Experts(E, D, F, "reference").double()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in list(experts.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if exchange is not None:
            values = values.chunk(exchange.ranks)[exchange.me].clone()
        setattr(experts, name, torch.nn.Parameter(values))
    experts.exchange = exchange
    return experts


def run(experts: Experts, case: str, rank: int, step: int = 0) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of tokens and gate weights, of one rank's tokens; gradients of experts add up in `experts`."""
    x_TD, expert_TK, weight_TK, dy_TD = draw(case, rank, step)
    x_TD.requires_grad_()
    weight_TK.requires_grad_()
    y_TD = experts(x_TD, plan(routing_of(expert_TK, weight_TK, CASES[case][3])))
    (y_TD * dy_TD).sum().backward()
    return y_TD.detach(), x_TD.grad, weight_TK.grad


def error_of(case: str, exchange: Exchange) -> float:
    """Largest absolute difference to one process that has all experts and everybody's tokens."""
    whole, ours = experts_of(None), experts_of(exchange)
    expected = [run(whole, case, rank) for rank in range(exchange.ranks)][exchange.me]
    found = run(ours, case, exchange.me)
    pairs = list(zip(found, expected, strict=True))
    for mine, all_of_them in zip(ours.parameters(), whole.parameters(), strict=True):
        pairs.append((mine.grad, all_of_them.grad.chunk(exchange.ranks)[exchange.me]))
    worst = max([(a - b).abs().max().item() for a, b in pairs if b.numel()], default=0.0)
    return largest(worst)


def largest(value: float) -> float:
    """Over ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def dropping(ranks: int, me: int) -> float:
    """`capacity` with little room equals one process that is given only the rows that fit."""
    case, factor = "unequal tokens", 0.5
    group = dist.group.WORLD
    exchange = Exchange(group, E, "capacity", factor)
    ours, whole = experts_of(exchange), experts_of(None)
    T, K = 12, 2
    generator = torch.Generator().manual_seed(me)
    expert_TK, x_TD = anywhere(T, K, generator), torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight_TK = torch.rand(T, K, generator=generator, dtype=torch.float64)
    slots = -(-factor * T * K // E)
    seen = dict.fromkeys(range(E + 1), 0)
    kept_TK = expert_TK.clone()
    for place, expert in enumerate(expert_TK.flatten().tolist()):
        seen[expert] += 1
        if seen[expert] > slots:
            kept_TK.view(-1)[place] = E
    dispatch = plan(routing_of(expert_TK, weight_TK, "output"))
    arrival = ours.start(x_TD, dispatch)
    found = ours(x_TD, dispatch, arrival)
    expected = whole(x_TD, plan(routing_of(kept_TK, weight_TK, "output")))
    dropped = int(((expert_TK < E) & (kept_TK == E)).sum())
    assert dropped > 0, case
    assert int(arrival.statistics["undelivered_rows"]) == dropped
    return largest((found - expected).abs().max().item())


def skewed_training(exchange: Exchange) -> float:
    """Many steps of descent with everything on one rank, and with a rank that has no tokens."""
    whole, ours = experts_of(None), experts_of(exchange)
    for step in range(SKEWED_STEPS):
        case = list(CASES)[4 + step % 3]
        for rank in range(exchange.ranks):
            run(whole, case, rank, step)
        run(ours, case, exchange.me, step)
        for experts in (whole, ours):
            for parameter in experts.parameters():
                assert parameter.grad is not None
                parameter.data -= 1e-3 * parameter.grad
                parameter.grad = None
    pairs = zip(ours.parameters(), whole.parameters(), strict=True)
    return largest(max((a - b.chunk(exchange.ranks)[exchange.me]).abs().max().item() for a, b in pairs))


def main() -> None:
    """Every case with every way to travel."""
    ranks = parallel.start("cpu", 60.0)
    assert dist.group.WORLD is not None
    errors = {}
    for way in ("deduplicated", "rows", "capacity"):
        exchange = Exchange(dist.group.WORLD, E, way, 8.0)
        for case in CASES:
            if way != "capacity" or len({CASES[case][0](rank) for rank in range(ranks.world_size)}) == 1:
                errors[f"{way}: {case}"] = error_of(case, exchange)
        if way != "capacity":
            errors[f"{way}: {SKEWED_STEPS} skewed steps"] = skewed_training(exchange)
    errors["capacity: rows that do not fit"] = dropping(ranks.world_size, ranks.rank)
    if ranks.first:
        json.dump(errors, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
