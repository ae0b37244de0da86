"""Run under torchrun: every loss of every router in every layout of a step, against one process with one micro-batch.

Layouts: these ranks × accumulation 1, 2, 4 × recomputation × rows that are padding throughout. Every loss weighs 1, so that its
gradient is as large as the language model's. Rank 0 prints the differences.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from rank_cases import ROWS, difference, run_of, steps

from moe import parallel
from moe.config.layout import resolve
from moe.config.load import known_routers, resolve_router
from moe.config.schema import Balance, Parallel, RouterConfig
from moe.errors import ConfigError
from moe.parallel import Ranks
from moe.routers.loss_free import Config as LossFree

LONG = 20
"""Steps after which router state is compared."""
STATEFUL = ("expert_threshold", "longcat", "loss_free", "quantile", "remoe", "smebu")


def weighed(config: RouterConfig, scope: str) -> RouterConfig:
    """The settings with every loss at weight 1 and balance losses of this scope."""
    changes = {}
    for field in fields(config):
        if isinstance(getattr(config, field.name), Balance):
            changes[field.name] = Balance(weight=1.0, scope=scope)
        elif field.name.endswith("_weight"):
            changes[field.name] = 1.0
    return replace(config, **changes)


def cases() -> Iterator[tuple[str, RouterConfig]]:
    """(name, settings) of every router, in both scopes where it has a balance loss that takes them."""
    for name in known_routers():
        base = resolve_router(name).Config()
        found = {weighed(base, scope): scope for scope in ("global", "sequence")}
        for config, scope in found.items():
            try:
                config.check(num_experts=4, top_k=2)
            except ConfigError:
                continue
            yield f"{name} {scope}", config


def state_cases() -> Iterator[tuple[str, RouterConfig]]:
    """(name, settings) of every router whose state changes, with steps that are large beside its start."""
    for name in STATEFUL:
        config = resolve_router(name).Config()
        rate = {"bias_rate": 0.05} if hasattr(config, "bias_rate") else {}
        yield name, replace(config, **rate)
    yield "default vectors", LossFree(bias_rate=0.05, estimator="default_vector")


def compared(ours: SimpleNamespace, expected: SimpleNamespace) -> dict[str, float]:
    """Relative differences of losses, of the worst gradient and of the worst buffer."""
    return {
        "losses": difference(torch.tensor(ours.losses), torch.tensor(expected.losses)),
        "grads": max(difference(ours.grads[key], value) for key, value in expected.grads.items()),
        "state": max(
            (difference(ours.buffers[k].double(), v.double()) for k, v in expected.buffers.items()), default=0.0
        ),
    }


def matrix(ranks: Ranks) -> dict[str, dict[str, float]]:
    """Every case in every layout of these ranks."""
    alone = Ranks(0, 1, ranks.device)
    rows: dict[str, dict[str, float]] = {}
    layouts = list(itertools.product((1, 2, 4), (False, True), (1, 2)))
    for name, config in cases():
        expected = steps(run_of(config, ROWS, False), alone, 2)
        for accumulation, recompute, padding in layouts:
            batch = ROWS * padding
            run = run_of(config, batch // ranks.world_size // accumulation, recompute, batch)
            key = f"{name}: accumulation {accumulation}, recompute {recompute}, {batch - ROWS} padded rows"
            rows[key] = compared(steps(run, ranks, 2), expected)
    for name, config in state_cases():
        expected = steps(run_of(config, ROWS, False), alone, LONG)
        run = run_of(config, 2 * ROWS // ranks.world_size // 4, True, 2 * ROWS)
        rows[f"{name}: state after {LONG} steps"] = compared(steps(run, ranks, LONG), expected)
    return rows


def spread(started: Ranks) -> dict[str, dict[str, float]]:
    """Every case with parameters cut over two ranks, with experts on two ranks, and with both."""
    alone = Ranks(0, 1, started.device)
    layouts = [Parallel(shard=2), Parallel(expert=2, dispatch="rows"), Parallel(shard=2, expert=2)]
    arranged = [started.arranged(resolve(replace(run_of(LossFree(), 4, False), parallel=one), 2)) for one in layouts]
    rows: dict[str, dict[str, float]] = {}
    for name, config in [*cases(), *state_cases()]:
        expected = steps(run_of(config, ROWS, False), alone, 2)
        for layout, ranks in zip(layouts, arranged, strict=True):
            run = replace(run_of(config, ROWS // 4, layout.expert > 1), parallel=layout)
            rows[f"{name}: shard {layout.shard}, expert {layout.expert}"] = compared(steps(run, ranks, 2), expected)
    return rows


def main() -> None:
    """Print the matrix of these ranks; `spread` for that of two ranks that hold different parameters."""
    ranks = parallel.start("cpu")
    rows = spread(ranks) if "spread" in sys.argv else matrix(ranks)
    if ranks.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
