"""Which layouts of a number of GPUs hold a run, and how fast each would be: everything that the rules allow, tried.

Besides the sizes of `parallel`, two settings that change no result are free: rows per forward pass and activation
checkpointing. Whatever the user has set is held.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product

from moe.config.layout import Layout, resolve
from moe.config.schema import Parallel, Run
from moe.cost.memory import memory_bytes
from moe.cost.step_time import OURS, Assumptions, Cluster, Step, predict_step
from moe.cost.traffic import sent_bytes, traffic
from moe.errors import ConfigError

USABLE = 0.92
"""Of the device's memory: the rest is for the context, the libraries' buffers and the allocator's gaps."""
SIZES = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
TIE = 1.03
"""Ratio of step times below which the prediction cannot tell two plans apart: the simpler one goes first."""


@dataclass(frozen=True)
class Plan:
    """A layout with its variant of the run, and what it would cost."""

    run: Run
    layout: Layout
    memory: dict[str, int]
    """Bytes per GPU by purpose."""
    sent: dict[str, float]
    """Bytes that one GPU sends in a step, by purpose; of the first pipeline stage."""
    step: Step

    @property
    def memory_total(self) -> int:
        """Bytes per GPU."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    plans: tuple[Plan, ...]
    """Fastest first, one per layout."""
    refused: int
    """Layouts that break a rule."""
    too_large: int
    """Variants that do not fit the memory."""
    smallest: tuple[int, Layout] | None
    """Bytes per GPU and layout of the variant that needs least, fitting or not."""


def usable_memory(cluster: Cluster) -> int:
    """Bytes of a GPU that a plan may fill."""
    return int(USABLE * cluster.machine.chip.memory)


def search(run: Run, gpus: int, cluster: Cluster, *, held: Collection[str] = (), assume: Assumptions = OURS) -> Found:
    """Try every layout of `gpus` processes. `held`: settings that the user chose, by path ("parallel.shard").

    Raises ConfigError, with the rule that a layout breaks, if none is allowed at all.
    """
    best: dict[Layout, Plan] = {}
    refused = too_large = 0
    smallest: tuple[int, Layout] | None = None
    error: ConfigError | None = None
    for parallel in _layouts(run, gpus, held):
        for variant in _variants(replace(run, parallel=parallel), gpus, held):
            try:
                layout = resolve(variant, gpus)
            except ConfigError as caught:
                # fewest rows come first: where they do not pass, no others do
                refused, error = refused + 1, error or caught
                break
            memory = memory_bytes(variant, layout)
            total = sum(memory.values())
            smallest = min(smallest or (total, layout), (total, layout), key=lambda pair: pair[0])
            if total > usable_memory(cluster):
                too_large += 1
                continue
            step = predict_step(variant, layout, cluster, assume)
            if layout not in best or step.seconds < best[layout].step.seconds:
                best[layout] = Plan(variant, layout, memory, sent_bytes(traffic(variant, layout)), step)
    if smallest is None and error is not None:
        raise error
    return Found(tuple(_ordered(best.values())), refused, too_large, smallest)


def _ordered(plans: Collection[Plan]) -> list[Plan]:
    """By time; of those within a few per cent of the fastest that is left, the one with fewest kinds of parallelism first."""
    rest, ordered = sorted(plans, key=lambda plan: plan.step.seconds), []
    while rest:
        tied = [plan for plan in rest if plan.step.seconds <= TIE * rest[0].step.seconds]
        tied.sort(key=lambda plan: (_kinds(plan.layout), plan.run.train.activation_checkpointing, plan.step.seconds))
        ordered += tied
        rest = rest[len(tied) :]
    return ordered


def _kinds(layout: Layout) -> int:
    return sum(getattr(layout, name) > 1 for name in SIZES)


def _layouts(run: Run, gpus: int, held: Collection[str]) -> Iterator[Parallel]:
    """Every choice of the sizes that are free, replicate taking what is left."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    few = [n for n in divisors if n <= 16]
    names = ("pipeline", "shard", "context", "tensor", "expert")
    free = (few, divisors, few, [n for n in few if n <= 8], divisors if run.model.moe is not None else [1])
    choices = [
        [getattr(run.parallel, name)] if f"parallel.{name}" in held else values
        for name, values in zip(names, free, strict=True)
    ]
    for sizes in product(*choices):
        pipeline, shard, context, tensor, _ = sizes
        if gpus % (pipeline * shard * context * tensor) == 0:
            yield replace(run.parallel, **dict(zip(names, sizes, strict=True)))


def _variants(run: Run, gpus: int, held: Collection[str]) -> Iterator[Run]:
    """A layout with every choice of what else is free, fewest rows first."""
    sizes = run.parallel
    ranks = gpus // (sizes.pipeline * sizes.context * sizes.tensor)
    share = run.train.batch_rows // ranks
    rows = sorted({*(n for n in (1, 2, 4, 8, 16) if share and share % n == 0), run.train.micro_rows})
    if "train.micro_rows" in held:
        rows = [run.train.micro_rows]
    checkpointing = [run.train.activation_checkpointing] if "train.activation_checkpointing" in held else [False, True]
    for micro_rows, again in product(rows, checkpointing):
        if share % micro_rows == 0 or len(rows) == 1:
            train = replace(run.train, micro_rows=micro_rows, activation_checkpointing=again)
            yield replace(run, train=train)
