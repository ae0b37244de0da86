"""Run under torchrun: the steps of rank_cases.py in every layout for this many ranks, and alone; rank 0 prints the differences.

Float64, unequal padding and targets per rank: what a rank sends, gets and holds differs, and nothing else may.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rank_cases import ROUTERS, ROWS, difference, health, run_of, steps

from moe import parallel
from moe.config.layout import resolve
from moe.config.schema import Balance, Parallel, Run
from moe.parallel import Ranks
from moe.routers.topk import Config as TopK

LAYOUTS = {
    2: [
        Parallel(replicate=2),
        Parallel(shard=2),
        Parallel(expert=2),
        Parallel(expert=2, dispatch="rows"),
        Parallel(shard=2, expert=2),
    ],
    4: [
        Parallel(shard=4),
        Parallel(replicate=2, shard=2),
        Parallel(expert=4),
        Parallel(expert=2),
        Parallel(shard=4, expert=2),
        Parallel(replicate=2, shard=2, expert=2),
        Parallel(replicate=2, shard=2, expert=4),
    ],
}


def name_of(layout: Parallel) -> str:
    """The sizes that are not their defaults."""
    sizes = {name: getattr(layout, name) for name in ("replicate", "shard", "expert", "context", "tensor", "pipeline")}
    return " ".join([*(f"{name}={size}" for name, size in sizes.items() if size > 1), layout.dispatch])


def compare(run: Run, ranks: Ranks, alone: Ranks) -> dict[str, float]:
    """Largest relative differences of a run in its layout from the same steps alone."""
    expected = steps(replace(run, parallel=Parallel(), train=replace(run.train, micro_rows=ROWS)), alone)
    ours = steps(run, ranks)
    flat = [
        torch.cat([torch.tensor(v).double().flatten() for r in result.loads for v in r]) for result in (ours, expected)
    ]
    moved = torch.cat([(ours.values[k] - v).flatten() for k, v in expected.values.items()]).norm()
    return {
        "losses": difference(
            torch.tensor(ours.losses, dtype=torch.float64), torch.tensor(expected.losses, dtype=torch.float64)
        ),
        "grads": max(difference(ours.grads[key], value) for key, value in expected.grads.items()),
        "loads": difference(*flat),
        "state": max(difference(ours.buffers[k].double(), v.double()) for k, v in expected.buffers.items()),
        "parameters": (moved / torch.cat([v.flatten() for v in expected.values.values()]).norm()).item(),
    }


def main() -> None:
    """Every layout with several routers, accumulation, recomputation and clipping."""
    started = parallel.start("cpu")
    alone = Ranks(0, 1, started.device)
    rows = {}
    routers = {"global": ROUTERS["global"], "loss_free": ROUTERS["loss_free"], "drops": TopK(capacity_factor=0.8)}
    for layout in LAYOUTS[started.world_size]:
        ranks = None
        for (name, router), parts, recompute in [
            (("global", routers["global"]), 1, False),
            (("loss_free", routers["loss_free"]), 1, True),
            (("drops", routers["drops"]), 2, False),
        ]:
            run = run_of(router, 1, recompute)
            ranks = ranks or started.arranged(resolve(replace(run, parallel=layout), started.world_size))
            micro_rows = ROWS // ranks.layout.data_ranks // parts
            train = replace(run.train, micro_rows=micro_rows, clip_norm=0.5 if parts == 2 else 0.0)
            run = replace(run, parallel=layout, train=train)
            rows[f"{name_of(layout)} {name} parts={parts} recompute={recompute}"] = compare(run, ranks, alone)
        assert ranks is not None
        run = run_of(TopK(balance=Balance(weight=1.0, scope="global")), 3, False)
        with TemporaryDirectory() as folder:
            expected = health(run_of(run.model.moe.router, ROWS, False), alone, Path(folder) / "alone")
            run = replace(run, parallel=layout, train=replace(run.train, micro_rows=ROWS // ranks.layout.data_ranks))
            ours = health(run, ranks, Path(ranks.broadcast(folder)) / "ours")
            rows[f"{name_of(layout)} health"] = {"health": difference(ours, expected)}
            ranks.wait_for_all()
    if started.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
