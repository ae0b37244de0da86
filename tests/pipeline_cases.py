"""Run under torchrun: the steps of rank_cases.py with the model's blocks on several ranks, and alone; rank 0 prints what differs.

Float64, a dense first block, unequal padding and targets per row; each case ends in an evaluation, and each layout in a
checkpoint that is loaded by the stages and by one process. layout_cases.py runs these cases too.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from rank_cases import ROUTERS, ROWS, STEPS, UnevenCorpus, difference, run_of, whole

from moe import checkpoint, parallel
from moe.config.layout import resolve
from moe.config.schema import Parallel, Run
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.parallel.pipeline import gather_stages
from moe.routers.topk import Config as TopK
from moe.train.evaluate import evaluate
from moe.train.sharding import build_model
from moe.train.step import State, train_step

LAYOUTS = {
    2: [Parallel(pipeline=2, pipeline_schedule="gpipe"), Parallel(pipeline=2, pipeline_blocks=(1, 2))],
    4: [
        Parallel(pipeline=4, pipeline_schedule="gpipe", pipeline_blocks=(1, 1, 1, 1)),
        Parallel(pipeline=2, shard=2),
        Parallel(pipeline=2, expert=2),
        Parallel(pipeline=2, shard=2, expert=2, pipeline_schedule="gpipe"),
        Parallel(pipeline=2, replicate=2),
    ],
}
CASES = {
    "global": (ROUTERS["global"], 0.0, False),
    "loss_free": (ROUTERS["loss_free"], 0.5, True),
    "drops": (TopK(capacity_factor=0.8), 0.5, False),
}
"""Router, norm to clip to, and whether blocks are recomputed."""


def case(router, layers: int, micro_rows: int, clip: float, recompute: bool) -> Run:
    """A run whose first block is dense, so that a stage may have no experts."""
    run = run_of(router, micro_rows, recompute)
    model = replace(run.model, num_layers=layers, moe=replace(run.model.moe, first_dense=1))
    return replace(run, model=model, train=replace(run.train, clip_norm=clip))


def state_of(run: Run, ranks: Ranks) -> State:
    """A float64 model with its optimizer, at step 0."""
    model = build_model(run, ranks, dtype=torch.float64)
    return State(run, ranks, UnevenCorpus(), model, model, build_optimizer(model, run.train.optimizer))


def everywhere(state: State, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all stages by name, whole."""
    here = {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}
    return {name: tensor for stage in gather_stages(state.ranks, here) for name, tensor in stage.items()}


def observed(state: State, count: int = STEPS) -> SimpleNamespace:
    """Losses, gradients, values, router state and statistics of a few steps, and an evaluation after them."""
    results = [train_step(state, step, maxima=True) for step in range(count)]
    model = state.model
    grads = everywhere(state, {name: p.grad for name, p in model.named_parameters()})
    values = everywhere(state, dict(model.named_parameters()))
    rows = evaluate(model, state.corpus, state.ranks, rows=5, micro_rows=2).nats_row
    return SimpleNamespace(
        losses=torch.tensor([[r.loss, r.grad_norm, *r.losses.values()] for r in results], dtype=torch.float64),
        layers=[layer for layer, _ in results[0].statistics],
        loads=torch.cat(
            [
                s[k].double().flatten().cpu()
                for r in results
                for _, s in r.statistics
                for k in sorted(s)
                if k not in ("sent_bytes", "undelivered_rows")
            ]
        ),
        rows=torch.from_numpy(rows),
        grads=grads,
        values=values,
        buffers=everywhere(state, dict(model.named_buffers())),
    )


def compare(ours: SimpleNamespace, expected: SimpleNamespace) -> dict[str, float]:
    """Largest relative differences; names and layers must be the same."""
    assert ours.grads.keys() == expected.grads.keys() and ours.buffers.keys() == expected.buffers.keys()
    assert ours.layers == expected.layers, (ours.layers, expected.layers)
    errors = {name: difference(getattr(ours, name), getattr(expected, name)) for name in ("losses", "loads", "rows")}
    for name in ("grads", "values", "buffers"):
        pairs = [(getattr(ours, name)[key].double(), value.double()) for key, value in getattr(expected, name).items()]
        errors[name] = max(difference(*pair) for pair in pairs)
    return errors


def saved_and_loaded(ours: State, alone: Ranks, out: Path) -> dict[str, float]:
    """A checkpoint of all stages, loaded by one process and by the stages again: what is not bitwise, and the next losses."""
    checkpoint.save(out, STEPS, ours.model, ours.optimizer, {}, ours.ranks)
    found, damaged = checkpoint.find(out)
    assert found is not None and not damaged
    values = everywhere(ours, dict(ours.model.named_parameters()))
    run = replace(ours.run, parallel=Parallel(), train=replace(ours.run.train, micro_rows=ROWS))
    single, again = state_of(run, alone), state_of(ours.run, ours.ranks)
    checkpoint.load(found, single.model, single.optimizer, alone)
    checkpoint.load(found, again.model, again.optimizer, ours.ranks)
    loaded = dict(single.model.named_parameters())
    differ = [name for name, value in values.items() if not torch.equal(loaded[name], value)]
    next_loss, here, expected = (train_step(state, STEPS - 1).loss for state in (ours, again, single))
    return {
        "saved": float(len(differ)),
        "resumed": abs(here - next_loss),
        "next": abs(here - expected) / abs(expected),
    }


def cases(started: Ranks) -> dict[str, dict[str, float]]:
    """Every layout with three routers, accumulation, recomputation and clipping, and its checkpoint."""
    alone = Ranks(0, 1, started.device)
    rows = {}
    for layout in LAYOUTS[started.world_size]:
        layers = max(3, layout.pipeline)
        ranks, ours, sizes = None, None, ""
        for name, (router, clip, recompute) in CASES.items():
            run = case(router, layers, 1, clip, recompute)
            run = replace(run, parallel=layout)
            ranks = ranks or started.arranged(resolve(run, started.world_size))
            single = replace(run, parallel=Parallel(), train=replace(run.train, micro_rows=ROWS))
            ours = state_of(run, ranks)
            sizes = f"{layout.pipeline_schedule} {ranks.layout.describe()} {list(layout.pipeline_blocks)}"
            rows[f"{sizes} {name} recompute={recompute}"] = compare(observed(ours), observed(state_of(single, alone)))
        with TemporaryDirectory() as folder:
            assert ours is not None
            rows[f"{sizes} checkpoint"] = saved_and_loaded(ours, alone, Path(started.broadcast(folder)) / "run")
            started.wait_for_all()
    return rows


def main() -> None:
    """The cases for this many ranks."""
    started = parallel.start("cpu")
    rows = cases(started)
    if started.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
