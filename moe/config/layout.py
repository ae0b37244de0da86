"""Which rank holds what: the sizes of a run's layout, their rules, and each rank's place. Plain Python, no process needed.

Two views of the same ranks. Dense parameters: [pipeline, replicate, shard, context, tensor], tensor fastest; a parameter is
sharded over shard · context ranks and copied over replicate. Experts: the ranks of one pipeline stage as
[expert_replicate, expert_shard, expert], expert fastest, so that a group of ranks that exchanges tokens is consecutive.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe.config.cuts import cut_heads, cut_matrices, cut_rows
from moe.config.schema import Model, Run, expert_widths
from moe.config.words import joined
from moe.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Resolved sizes of the mesh."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Processes that hold the same blocks."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Ranks that see different rows."""
        return self.replicate * self.shard

    @property
    def dense_shards(self) -> int:
        """Parts that a sharded dense parameter is cut into."""
        return self.shard * self.context if self.shard > 1 else 1

    @property
    def expert_shard(self) -> int:
        """Parts that one rank's experts are cut into, over ranks that hold the same experts."""
        return max(1, self.dense_shards // self.expert)

    @property
    def expert_replicate(self) -> int:
        """Copies of each expert."""
        return self.stage_ranks // self.tensor // (self.expert * self.expert_shard)

    def data_rank(self, rank: int) -> int:
        """Which share of the rows a rank sees."""
        return rank % self.stage_ranks // (self.context * self.tensor)

    def context_rank(self, rank: int) -> int:
        """Which part of each row a rank sees."""
        return rank // self.tensor % self.context

    def stage(self, rank: int) -> int:
        """Which blocks a rank holds."""
        return rank // self.stage_ranks

    def describe(self) -> str:
        """The sizes that are not 1, as overrides are typed."""
        names = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
        sizes = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        return " ".join(sizes) or "one rank"


def resolve(run: Run, world_size: int) -> Layout:
    """The layout of a run over `world_size` processes. Raises ConfigError naming every rule that it breaks."""
    parallel = run.parallel
    fixed = parallel.pipeline * parallel.shard * parallel.context * parallel.tensor
    replicate = parallel.replicate or max(1, world_size // fixed)
    if fixed * replicate != world_size:
        raise ConfigError(_wrong_world(run, fixed, replicate, world_size))
    layout = Layout(
        replicate=replicate,
        shard=parallel.shard,
        context=parallel.context,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
    )
    problems = [*_unsupported(run, layout), *_batch(run, layout), *_stages(run, layout)]
    if layout.context > 1:
        problems += cut_rows(run, layout.context)
    if layout.context > 1 or layout.tensor > 1:
        problems += cut_heads(run, layout.context, layout.tensor)
    if layout.tensor > 1:
        problems += cut_matrices(run, layout.tensor, layout.dense_shards)
    if run.model.moe is not None and layout.expert > 1:
        problems += [*_expert_ranks(layout), *_experts(run.model, layout)]
    if run.model.moe is None and layout.expert > 1:
        problems.append(f"parallel.expert ({layout.expert}) needs expert layers, and model.moe is null: use expert=1")
    if problems:
        raise ConfigError(joined(problems))
    return layout


def _wrong_world(run: Run, fixed: int, replicate: int, world_size: int) -> str:
    sizes = " · ".join(
        f"{name} ({getattr(run.parallel, name)})"
        for name in ("pipeline", "shard", "context", "tensor")
        if getattr(run.parallel, name) > 1
    )
    if run.parallel.replicate:
        sizes = " · ".join(part for part in (f"replicate ({replicate})", sizes) if part)
        rule = f"parallel.{sizes} = {fixed * replicate} must be the number of processes ({world_size})"
        return f"{rule}: start {fixed * replicate}, or use parallel.replicate=0 to take what is left"
    near = max(fixed, world_size // fixed * fixed)
    return f"parallel.{sizes} = {fixed} must divide the number of processes ({world_size}): start {near} processes"


def _batch(run: Run, layout: Layout) -> Iterator[str]:
    train, ranks = run.train, layout.data_ranks
    per_pass = train.micro_rows * ranks
    if train.batch_rows % per_pass == 0:
        return
    rows = max(1, round(train.batch_rows / per_pass)) * per_pass
    share, rest = divmod(train.batch_rows, ranks)
    smaller = max((n for n in range(1, train.micro_rows + 1) if share % n == 0), default=0) if not rest and share else 0
    other = f", or train.micro_rows={smaller}" if smaller else ""
    what = "processes" if ranks == layout.world_size else f"ranks that see different rows, {layout.describe()}:"
    yield (
        f"train.batch_rows ({train.batch_rows}) must be divisible by micro_rows ({train.micro_rows}) times the number "
        f"of {what} ({ranks}), {per_pass}: use train.batch_rows={rows}{other}"
    )


def _expert_ranks(layout: Layout) -> Iterator[str]:
    """An expert group lies within the ranks that share a copy of the model, or holds whole copies."""
    expert, shards = layout.expert, layout.dense_shards
    ranks = layout.stage_ranks // layout.tensor
    if (expert <= shards and shards % expert) or (expert > shards and (expert % shards or ranks % expert)):
        fits = [n for n in range(2, ranks + 1) if shards % n == 0 or (n % shards == 0 and ranks % n == 0)]
        way_out = f"use parallel.expert={' or '.join(map(str, fits))}" if fits else "use parallel.expert=1"
        yield (
            f"parallel.expert ({expert}) must divide shard · context ({shards}), or be a multiple of it that divides "
            f"replicate · shard · context ({ranks}): {way_out}"
        )


def _experts(model: Model, layout: Layout) -> Iterator[str]:
    moe, expert = model.moe, layout.expert
    assert moe is not None
    if len(set(moe.num_experts_per_layer)) > 1:
        yield (
            f"parallel.expert ({expert}) needs as many experts in every layer, and model.moe.num_experts_per_layer has from "
            f"{min(moe.num_experts_per_layer)} to {max(moe.num_experts_per_layer)}: use parallel.shard to spread them"
        )
    elif moe.num_experts % expert:
        more = -(-moe.num_experts // expert) * expert
        divisors = [n for n in range(2, layout.stage_ranks + 1) if moe.num_experts % n == 0]
        other = f" or parallel.expert={max(divisors)}" if divisors else " or parallel.expert=1"
        yield (
            f"model.moe.num_experts ({moe.num_experts}) must be divisible by parallel.expert ({expert}): "
            f"use num_experts={more}{other}"
        )
    if len(set(expert_widths(moe))) > 1:
        yield (
            f"parallel.expert ({expert}) needs experts of one width, and model.moe.expert_widths has "
            f"{len(set(expert_widths(moe)))}: use parallel.shard to spread them, or one width"
        )
    elif layout.expert_shard > 1 and moe.expert_hidden % layout.expert_shard:
        yield (
            f"model.moe.expert_hidden ({moe.expert_hidden}) must be divisible by the ranks that share an expert, "
            f"shard · context / expert ({layout.expert_shard}): use expert_hidden="
            f"{-(-moe.expert_hidden // layout.expert_shard) * layout.expert_shard} or parallel.expert={layout.dense_shards}"
        )
    if moe.backend == "block_sparse":
        yield (
            f"expert backend 'block_sparse' computes all {moe.num_experts} experts on one rank, and parallel.expert is "
            f"{expert}: use backend=triton, torch or auto"
        )


def _stages(run: Run, layout: Layout) -> Iterator[str]:
    """Every stage has blocks, and enough micro-batches to work on at the same time."""
    train, given, stages = run.train, run.parallel.pipeline_blocks, layout.pipeline
    blocks = run.model.num_layers
    if given and (len(given) != stages or sum(given) != blocks):
        yield (
            f"parallel.pipeline_blocks {list(given)} must be {stages} numbers, one per stage (parallel.pipeline), that add up "
            f"to model.num_layers ({blocks}): use parallel.pipeline_blocks=[] for a split by cost"
        )
    if stages == 1:
        return
    if stages > blocks:
        yield f"parallel.pipeline ({stages}) must be at most model.num_layers ({blocks}): use pipeline={blocks} and shard"
    micro_batches = train.batch_rows // (train.micro_rows * layout.data_ranks)
    if micro_batches < stages:
        rows = stages * train.micro_rows * layout.data_ranks
        smaller = train.batch_rows // (stages * layout.data_ranks)
        other = (
            f", or train.micro_rows={smaller}"
            if smaller and train.batch_rows % (smaller * layout.data_ranks) == 0
            else ""
        )
        yield (
            f"train.batch_rows ({train.batch_rows}) / (micro_rows ({train.micro_rows}) · ranks that see different rows "
            f"({layout.data_ranks})) = {micro_batches} micro-batches must be at least parallel.pipeline ({stages}), so that "
            f"all stages work at once: use train.batch_rows={rows}{other}"
        )
    if run.model.tied_head:
        yield (
            f"model.tied_head (true) is one matrix in the first and the last stage of parallel.pipeline ({stages}): "
            "use tied_head=false, or pipeline=1 and shard"
        )
    if run.logging.record_routing:
        yield (
            f"logging.record_routing (true) writes the choices of all layers in one file, and parallel.pipeline ({stages}) "
            "has them on several ranks: record with pipeline=1 (a recording replays on any layout)"
        )
    for name in ("context", "tensor"):
        if getattr(layout, name) > 1:
            yield (
                f"parallel.pipeline ({stages}) does not go with parallel.{name} ({getattr(layout, name)}): use one of them "
                "with shard or expert"
            )


def _unsupported(run: Run, layout: Layout) -> Iterator[str]:
    """Combinations that are not built, by name."""
    sharded = max(layout.shard, layout.expert, layout.context, layout.tensor, layout.pipeline) > 1
    if run.train.compile and sharded:
        yield f"train.compile (true) does not go with a model spread over ranks ({layout.describe()}): use compile=false"
