"""Run under torchrun: one optimizer step in several layouts; rank 0 prints the bytes that torch's collectives were given.

With the argument `short` only a few layouts.

A dispatch mode sees every collective that FSDP2, the exchange and the trainer start, and counts what leaves the rank: of an
all-gather or reduce-scatter of N bytes N·(n-1)/n, of an all-reduce twice that, of an all-to-all what is not for itself.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe import parallel
from moe.config.layout import Layout, resolve
from moe.config.schema import AdamW, Balance, Data, GroupedQueryAttention, Model, MoE, Parallel, Run, Train
from moe.cost.memory import memory_bytes
from moe.cost.traffic import traffic
from moe.data import Batch
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.parallel.parts import part_here
from moe.routers.topk import Config as TopK
from moe.train.sharding import build_model
from moe.train.step import State, train_step

ROWS, S, VOCABULARY = 16, 512, 64
SHORT = [Parallel(shard=2), Parallel(expert=2), Parallel(expert=2, dispatch="rows"), Parallel(shard=2, expert=2)]
LAYOUTS = {
    2: [
        Parallel(replicate=2),
        Parallel(shard=2),
        Parallel(expert=2),
        Parallel(expert=2, dispatch="rows"),
        Parallel(expert=2, dispatch="capacity"),
        Parallel(shard=2, expert=2),
        Parallel(context=2),
        Parallel(context=2, expert=2),
    ],
    4: [
        Parallel(shard=4),
        Parallel(replicate=2, shard=2),
        Parallel(expert=4),
        Parallel(expert=4, dispatch="rows"),
        Parallel(shard=4, expert=2),
        Parallel(replicate=2, shard=2, expert=4),
        Parallel(shard=2, context=2, expert=2),
    ],
}


class Bytes(TorchDispatchMode):
    """Bytes that this rank sends to others, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name, value = sent_by(func.__name__.split(".")[0], args)
            self.sent[name] += value
        return func(*args, **(kwargs or {}))


def sent_by(name: str, args: Any) -> tuple[str, float]:
    """(operation, bytes to other ranks) of one call of torch's collectives."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
    sizes = [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]
    if name == "allreduce_":
        n = group_of(args).size()
        return "all_reduce", 2 * sum(sizes) * (n - 1) / n
    if name == "_allgather_base_":
        return "all_gather", (group_of(args).size() - 1) * args[1].nbytes
    if name == "_reduce_scatter_base_":
        n = group_of(args).size()
        return "reduce_scatter", args[1].nbytes * (n - 1) / n
    if name == "alltoall_base_":
        return "all_to_all", away(args[1], args[4], group_of(args))
    if name == "all_to_all_single":
        group: Any = dist.distributed_c10d._resolve_process_group(args[3])
        return "all_to_all", away(args[0], args[2], group)
    return f"other: {name}", 0.0


def group_of(args: Any) -> Any:
    """The process group among a call's arguments."""
    boxed = next(arg for arg in args if type(arg).__name__ == "ScriptObject" and "ProcessGroup" in str(arg._type()))
    return dist.ProcessGroup.unbox(boxed)


def away(tensor: torch.Tensor, splits: list[int], group: Any) -> float:
    """Bytes of an all-to-all's input that are for others."""
    n, row = group.size(), prod(tensor.shape[1:]) * tensor.element_size()
    splits = splits or [tensor.shape[0] // n] * n
    return (sum(splits) - splits[group.rank()]) * row


class FullCorpus:
    """Random rows without padding."""

    data = SimpleNamespace(sources=("one",), sequence_length=S)

    def train_batch(self, step: int, rows: range, *, batch_rows: int, seed: int) -> Batch:
        """Rows of a step, each a function of (step, row)."""
        draws = [torch.Generator().manual_seed(1000 * step + row) for row in rows]
        ids = torch.stack([torch.randint(0, VOCABULARY, (S,), generator=draw) for draw in draws])
        valid = torch.ones_like(ids, dtype=torch.bool)
        row_B = torch.tensor(list(rows))
        return Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), valid, row_B, torch.full((len(rows),), float(S)))

    def train_sources(self, step: int, rows: list[int], *, batch_rows: int) -> torch.Tensor:
        """One source."""
        return torch.zeros(len(rows), dtype=torch.int64)


def run_of(layout: Parallel, *, passes: int, recompute: bool) -> Run:
    """A run of two expert layers whose router is trained, and so noisy that it draws K of E at random."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16)
    router = TopK(noise="gaussian", noise_scale=5.0, balance=Balance(weight=0.01, scope="sequence"))
    moe = MoE(num_experts=8, top_k=2, expert_hidden=64, router=router)
    model = Model(vocab_size=VOCABULARY, dim=64, num_layers=2, ffn_hidden=64, attention=attention, moe=moe)
    train = Train(steps=1, batch_rows=ROWS, micro_rows=1, optimizer=AdamW(lr=1e-3), activation_checkpointing=recompute)
    ranks = dist.get_world_size()
    run = Run(name="bytes", model=model, data=Data(sequence_length=S), train=train, parallel=layout)
    rows = ROWS // resolve(run, ranks).data_ranks // passes
    return replace(run, train=replace(train, micro_rows=rows))


def measured(run: Run, ranks: Ranks) -> dict[str, float]:
    """Bytes that a rank sends in one step by operation, and those of its parameters: the mean over ranks."""
    model = build_model(run, ranks)
    corpus: Any = FullCorpus()
    state = State(run, ranks, corpus, model, model, build_optimizer(model, run.train.optimizer))
    with Bytes() as counter:
        train_step(state, 0)
    held = sum(part_here(parameter.detach()).nbytes for parameter in model.parameters())
    sums: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(sums, {**counter.sent, "parameters": held})
    names = {name for row in sums for name in row}
    return {name: sum(row.get(name, 0.0) for row in sums) / len(sums) for name in sorted(names)}


def modelled(run: Run, layout: Layout) -> dict[str, float]:
    """The same by the closed forms."""
    sums: Counter[str] = Counter()
    for move in traffic(run, layout):
        sums[move.operation] += move.sent
    return {**sums, "parameters": memory_bytes(run, layout)["parameters"]}


def main() -> None:
    """Every layout, with one pass and with two passes and recomputation."""
    started = parallel.start("cpu")
    rows, short = {}, sys.argv[1:] == ["short"]
    for layout in SHORT if short else LAYOUTS[started.world_size]:
        for passes, recompute in [(2, True)] if short else [(1, False), (2, True)]:
            run = run_of(layout, passes=passes, recompute=recompute)
            ranks = started.arranged(resolve(run, started.world_size))
            name = f"{ranks.layout.describe()} {layout.dispatch} passes={passes} recompute={recompute}"
            rows[name] = {"measured": measured(run, ranks), "modelled": modelled(run, ranks.layout)}
    if started.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
