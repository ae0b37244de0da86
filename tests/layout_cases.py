"""Run under torchrun: the steps of rank_cases.py in every layout for this many ranks, and alone; rank 0 prints the differences.

Float64, unequal padding and targets per rank: what a rank sends, gets and holds differs, and nothing else may.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pipeline_cases
import torch
from rank_cases import ROUTERS, ROWS, difference, health, run_of, steps

from moe import parallel
from moe.config.layout import resolve
from moe.config.schema import AdamW, Balance, GroupedQueryAttention, LatentAttention, Parallel, Run
from moe.parallel import Ranks
from moe.routers._scores import linear_logits
from moe.routers.topk import Config as TopK

LONG = 20
"""Steps of a run in single precision."""
LAYOUTS = {
    2: [
        Parallel(replicate=2),
        Parallel(shard=2),
        Parallel(expert=2),
        Parallel(expert=2, dispatch="rows"),
        Parallel(shard=2, expert=2),
        Parallel(context=2),
        Parallel(context=2, expert=2),
        Parallel(tensor=2),
    ],
    4: [
        Parallel(shard=4),
        Parallel(replicate=2, shard=2),
        Parallel(expert=4),
        Parallel(expert=2),
        Parallel(shard=4, expert=2),
        Parallel(replicate=2, shard=2, expert=2),
        Parallel(replicate=2, shard=2, expert=4),
        Parallel(replicate=2, context=2),
        Parallel(shard=2, context=2),
        Parallel(shard=2, context=2, expert=2),
        Parallel(shard=2, context=2, expert=4),
        Parallel(replicate=2, context=2, expert=2),
        Parallel(replicate=2, tensor=2),
        Parallel(shard=2, tensor=2),
        Parallel(shard=2, tensor=2, expert=2),
        Parallel(context=2, tensor=2),
    ],
}


ATTENTIONS = {
    "one key head": GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8, qkv_bias=True, out_bias=True),
    "windows and sinks": GroupedQueryAttention(
        num_heads=4, num_kv_heads=4, head_dim=8, windows=(4, 0), sinks=True, qk_norm="full"
    ),
    "latent": LatentAttention(num_heads=2, q_rank=6, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=6),
}
SHARED_HEADS = {
    "one key head": GroupedQueryAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, out_bias=True, qk_norm="head"
    ),
    "windows and sinks": GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=8, windows=(4, 0), sinks=True),
    "latent": LatentAttention(num_heads=4, q_rank=6, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=6),
}
"""The same in what tensor ranks can share."""
PARTIAL = {
    False: TopK(capacity_factor=0.8),
    True: TopK(noise="gaussian", noise_scale=0.5, balance=Balance(weight=1.0, scope="sequence")),
}
"""A router that looks at whole rows; and, where rows are cut, one whose draws and loss go by place in the row."""


def name_of(layout: Parallel) -> str:
    """The sizes that are not their defaults."""
    sizes = {name: getattr(layout, name) for name in ("replicate", "shard", "expert", "context", "tensor", "pipeline")}
    return " ".join([*(f"{name}={size}" for name, size in sizes.items() if size > 1), layout.dispatch])


def shaped(run: Run, layout: Parallel, attention: str, documents: bool = True) -> Run:
    """A run with this attention; for tensor ranks with heads that they can share, a dense layer and a shared expert."""
    attentions = SHARED_HEADS if layout.tensor > 1 else ATTENTIONS
    moe = run.model.moe
    assert moe is not None
    if attention == "windows and sinks":  # gpt-oss's, and so are its experts; the limit is one that is reached
        moe = replace(moe, activation="swiglu_oai", activation_limit=0.5, expert_bias=True)
    if layout.tensor > 1:
        moe = replace(moe, shared_hidden=12, shared_gate=True, first_dense=1)
    return replace(run, model=replace(run.model, moe=moe, attention=attentions[attention], document_mask=documents))


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


def furthest(found: list[list[float]], expected: list[list[float]]) -> float:
    """Largest relative difference of the losses and norms of some steps."""
    pairs = (pair for steps_ in zip(found, expected, strict=True) for pair in zip(*steps_, strict=True))
    return max(abs(a - b) / abs(b) for a, b in pairs)


def single_precision(started: Ranks) -> dict[str, dict[str, float | str]]:
    """20 steps in float32 of every layout × accumulation × recomputation, clipped; and 3 in bfloat16.

    `rounding` and `loss rounding`: how far the first gradients, and the losses and norms, of one process are from those in
    float32. Four ranks accumulate and recompute at once, and in bfloat16 neither.
    """
    alone, rows, exact = Ranks(0, 1, started.device), {}, SimpleNamespace()
    base = shaped(run_of(ROUTERS["global"], ROWS, False), Parallel(tensor=2), "one key head")
    base = replace(base, train=replace(base.train, clip_norm=1.0, optimizer=AdamW(lr=1e-3), steps=LONG))
    for precision, count in (("float32", LONG), ("bfloat16", 3)):
        run = replace(base, train=replace(base.train, precision=precision))
        expected = steps(run, alone, count, dtype=None)
        exact = expected if precision == "float32" else exact
        rounding = max(difference(expected.first[k], v) for k, v in exact.first.items())
        loss_rounding = furthest(expected.losses, exact.losses[:count])
        for layout in LAYOUTS[started.world_size]:
            ranks = started.arranged(
                resolve(replace(run, parallel=layout, train=replace(run.train, micro_rows=1)), started.world_size)
            )
            share = ROWS // ranks.layout.data_ranks
            ways = list(itertools.product((1, 2) if share > 1 else (1,), (False, True)))
            if started.world_size > 2:
                ways = ways[:: max(1, len(ways) - 1)] if precision == "float32" else ways[:1]
            for parts, recompute in ways:
                train = replace(run.train, micro_rows=share // parts, activation_checkpointing=recompute)
                with patch("moe.routers.topk.linear_logits", seen := Mock(wraps=linear_logits)):
                    ours = steps(replace(run, parallel=layout, train=train), ranks, count, dtype=None)
                dtype = seen.call_args.args[1].dtype
                moved = torch.cat([(ours.values[k] - v).flatten() for k, v in expected.values.items()]).norm()
                rows[f"{precision} {name_of(layout)} parts={parts} recompute={recompute}"] = {
                    "losses": furthest(ours.losses, expected.losses),
                    "first gradients": max(difference(ours.first[k], v) for k, v in expected.first.items()),
                    "parameters": (moved / torch.cat([v.flatten() for v in expected.values.values()]).norm()).item(),
                    "router dtype": str(dtype),
                    "rounding": rounding,
                    "loss rounding": loss_rounding,
                }
    return rows


def main() -> None:
    """Every layout with several routers, accumulation, recomputation and clipping; `single` for single precision."""
    started = parallel.start("cuda" if "cuda" in sys.argv else "cpu")
    if "single" in sys.argv:
        rows = single_precision(started)
        if started.first:
            json.dump(rows, sys.stdout)
        parallel.stop()
        return
    alone = Ranks(0, 1, started.device)
    rows = {}
    for layout in LAYOUTS[started.world_size]:
        ranks = None
        for name, (router, attention, documents), parts, recompute in [
            ("global", ("global", "one key head", True), 1, False),
            ("loss_free", ("loss_free", "windows and sinks", False), 1, True),
            ("cut rows" if layout.context > 1 else "drops", ("", "latent", False), 2, False),
        ]:
            run = run_of(ROUTERS.get(router) or PARTIAL[layout.context > 1], 1, recompute)
            run = shaped(run, layout, attention, documents)
            ranks = ranks or started.arranged(resolve(replace(run, parallel=layout), started.world_size))
            micro_rows = ROWS // ranks.layout.data_ranks // parts
            train = replace(run.train, micro_rows=micro_rows, clip_norm=0.5 if parts == 2 else 0.0)
            run = replace(run, parallel=layout, train=train)
            rows[f"{name_of(layout)} {name} parts={parts} recompute={recompute}"] = compare(run, ranks, alone)
        assert ranks is not None
        run = shaped(run_of(TopK(balance=Balance(weight=1.0, scope="global")), 3, False), layout, "one key head")
        with TemporaryDirectory() as folder:
            expected = health(replace(run, train=replace(run.train, micro_rows=ROWS)), alone, Path(folder) / "alone")
            run = replace(run, parallel=layout, train=replace(run.train, micro_rows=ROWS // ranks.layout.data_ranks))
            ours = health(run, ranks, Path(ranks.broadcast(folder)) / "ours")
            rows[f"{name_of(layout)} health"] = {"health": difference(ours, expected)}
            ranks.wait_for_all()
    rows |= pipeline_cases.cases(started)
    if started.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
