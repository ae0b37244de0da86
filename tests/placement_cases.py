"""Run under torchrun, two ranks: a checkpoint loaded with experts in another place; rank 0 prints what differs.

The same run goes on from step 2 with experts in their order and packed by load; what they compute, and what they save, must
be the same. Float64, so that nothing but the order of sums can differ.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rank_cases import ROUTERS, ROWS, UnevenCorpus, difference, run_of, whole

from moe import checkpoint, parallel
from moe.config.layout import resolve
from moe.config.schema import Parallel, Run
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.train.placing import place_by_load
from moe.train.sharding import build_model
from moe.train.step import State, train_step

LOADS = [9, 8, 1, 2]


def state_of(run: Run, ranks: Ranks) -> State:
    """A fresh state."""
    model = build_model(run, ranks, dtype=torch.float64)
    return State(run, ranks, UnevenCorpus(), model, model, build_optimizer(model, run.train.optimizer))


def saved(state: State) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint would hold, whole."""
    parts = checkpoint.state.state_of(state.model, state.optimizer)
    return {
        f"{part}.{name}": whole(value).clone()
        for part, values in parts.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def go_on(run: Run, ranks: Ranks, out: Path, placement: str) -> tuple[dict[str, torch.Tensor], list, list[float]]:
    """Load the newest checkpoint and do two steps: what it holds right after loading, where experts are, losses."""
    state = state_of(replace(run, parallel=replace(run.parallel, placement=placement)), ranks)
    place_by_load(state, out)
    found = checkpoint.newest(out)
    assert found is not None
    checkpoint.load(found, state.model, state.optimizer, ranks)
    loaded = saved(state)
    results = [train_step(state, step) for step in (2, 3)]
    orders = [layer.experts.exchange.order for _, layer in state.model.moe_layers()]
    return loaded, orders, [number for r in results for number in (r.loss, r.grad_norm)]


def main() -> None:
    """Expert parallelism alone, and with the rest cut."""
    started = parallel.start("cpu")
    rows = {}
    for layout in (Parallel(expert=2), Parallel(shard=2, expert=2)):
        run = replace(run_of(ROUTERS["loss_free"], ROWS // 2, False), parallel=layout)
        ranks = started.arranged(resolve(run, 2))
        with TemporaryDirectory() as folder:
            out = Path(ranks.broadcast(folder))
            state = state_of(run, ranks)
            for step in range(2):
                train_step(state, step)
            before = saved(state)
            checkpoint.save(out, 2, state.model, state.optimizer, {}, ranks)
            if ranks.first:
                lines = [json.dumps({"layer": layer, "step": 2, "counts": LOADS}) for layer in (0, 1)]
                (out / "routing.jsonl").write_text("\n".join(lines) + "\n")
            ranks.wait_for_all()
            kept, _, expected = go_on(run, ranks, out, "index")
            moved, orders, found = go_on(run, ranks, out, "load")
            rows[f"shard {layout.shard}"] = {
                "orders": orders,
                "bitwise": all(torch.equal(before[k], kept[k]) and torch.equal(before[k], moved[k]) for k in before),
                "tensors": len(before),
                "losses": difference(torch.tensor(found).double(), torch.tensor(expected).double()),
            }
            ranks.wait_for_all()
    if started.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
