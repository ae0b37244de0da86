"""The rungs of a ladder: smaller models of a recipe's shape, with other numbers of experts, their dense twins, and how they train.

Width and depth shrink alike. What else must follow from the size follows published rules of the run's compute C (DeepSeek
LLM, arXiv 2401.02954, equation 1): learning rate by C^-0.125 and batch by C^0.327, starting from the recipe's own. Initial
weights keep their deviation times the square root of the width. Experts of one size train alike, as their dense twin does.
"""

import math
from dataclasses import dataclass, replace

from moe.config.load import load
from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, Parallel, Run, Wsd, ffn_hidden
from moe.cost import moe_layers, parameters, train_flops_per_token
from moe.errors import ConfigError

RATE_POWER = -0.125
BATCH_POWER = 0.3271
MULTIPLE = 8
EVALUATIONS = 12
"""During a rung's training, besides the final one."""
MIN_STEPS = 30
"""Below these a rung has hardly left its warm-up."""
WIDTHS = (1 / 6, 1 / 4, 2 / 5)
"""Of the default ladder: about 1/216, 1/64 and 1/16 of the target's parameters, at 2 or 3 % of its FLOPs."""


@dataclass(frozen=True)
class Rung:
    """One size: a sparse run for each number of experts, and the dense run that all of them are held against."""

    label: str
    sparse: dict[int, Run]
    dense: Run

    @property
    def size(self) -> int:
        """Active parameters of the dense run without embedding and head."""
        return active_size(self.dense.model)

    @property
    def compute(self) -> float:
        """Training FLOPs of the dense run."""
        return compute(self.dense)

    @property
    def tokens(self) -> int:
        """Tokens that each run sees."""
        return tokens_of(self.dense)


def active_size(model: Model) -> int:
    """Parameters that a token uses, embedding, head and routers left out: the size that laws of scale are stated in."""
    counts = parameters(model)
    around = (counts.active_components.get(name, 0) for name in ("embedding", "head", "router"))
    return counts.active - sum(around)


def tokens_of(run: Run) -> int:
    """Tokens of all steps."""
    return run.train.steps * run.train.batch_rows * run.data.sequence_length


def compute(run: Run) -> float:
    """FLOPs of all steps, forward and backward."""
    return tokens_of(run) * train_flops_per_token(run.model, run.data.sequence_length)


def expert_counts(moe: MoE) -> tuple[int, ...]:
    """The recipe's own number of experts and two more: a half and a quarter of it, as far as those exceed top_k."""
    E = moe.num_experts
    for counts in ((E // 4, E // 2, E), (E // 2, E, 2 * E)):
        if counts[0] > moe.top_k:
            return counts
    return (E, 2 * E, 4 * E)


def rungs(
    target: Run, widths: tuple[float, ...], experts: tuple[int, ...], *, tokens: float, tokens_per_parameter: float
) -> list[Rung]:
    """The ladder below a sparse run, smallest size first.

    widths: shares of the target's width. tokens: of every run, or 0; tokens_per_parameter: instead, for each active one, or 0 for
    the target's own ratio. Raises ConfigError for a ladder that cannot be built, naming what to change.
    """
    _refuse_what_is_per_expert(target.model)
    ratio = tokens_per_parameter or tokens_of(target) / active_size(target.model)
    built = []
    for width in sorted(widths):
        base = replace(target, model=shrink(target.model, width), parallel=Parallel())
        dense = dense_of(base)
        budget = tokens or ratio * active_size(dense.model)
        dense = with_budget(dense, target, budget)
        sparse = {count: replace(dense, model=with_experts(base.model, count)) for count in sorted(experts)}
        built.append(Rung(f"d{dense.model.dim}", sparse, dense))
    sizes = [rung.size for rung in built]
    if len(set(sizes)) < len(sizes) or len({rung.label for rung in built}) < len(built):
        raise ConfigError(
            f"widths ({', '.join(f'{width:g}' for width in sorted(widths))}) of dim {target.model.dim} round to the same size: "
            "choose widths that lie further apart, or a wider target"
        )
    for rung in built:
        if rung.dense.train.steps < MIN_STEPS:
            raise ConfigError(
                f"{rung.label} would train {rung.dense.train.steps} steps of {rung.dense.train.batch_rows} rows, {MIN_STEPS} "
                "are needed: raise --tokens or --tokens-per-parameter, or lower train.batch_rows"
            )
        for run in (rung.dense, *rung.sparse.values()):
            load(run)
    return built


def shrink(model: Model, width: float) -> Model:
    """The model at a share of its width and depth: heads, hidden sizes and blocks rounded, at least one block with experts.

    Sizes are multiples of 8. Heads keep their dimension where several are left, and groups of query heads stay whole.
    """
    moe = model.moe
    assert moe is not None
    first = min(moe.first_dense, math.ceil(width * moe.first_dense))
    periods = max(1, round(width * (model.num_layers - moe.first_dense) / moe.every))
    dim, num_layers = _multiple(width * model.dim), first + moe.every * periods
    smaller = replace(
        moe,
        expert_hidden=_multiple(width * moe.expert_hidden),
        shared_hidden=_multiple(width * moe.shared_hidden) if moe.shared_hidden else 0,
        latent_dim=_multiple(width * moe.latent_dim) if moe.latent_dim else 0,
        first_dense=first,
    )
    return replace(
        model,
        dim=dim,
        num_layers=num_layers,
        ffn_hidden=_multiple(width * model.ffn_hidden),
        attention=_shrink_attention(model.attention, width, num_layers),
        init_std=model.init_std * math.sqrt(model.dim / dim),
        moe=smaller,
    )


def with_experts(model: Model, experts: int) -> Model:
    """The same layers with another number of experts of the same width: equal active parameters, but for the router."""
    assert model.moe is not None
    return replace(model, moe=replace(model.moe, num_experts=experts))


def dense_of(run: Run) -> Run:
    """The dense run whose feed-forward layers have the active parameters of the sparse ones, the router left out.

    Unlike `moe.cost.dense_twin` it is the same for every number of experts.
    """
    moe, layers = run.model.moe, moe_layers(run.model)
    assert moe is not None
    counts = parameters(run.model).layers[layers[0]]
    active = counts["experts"] * moe.top_k / moe.num_experts + counts.get("latent", 0) + counts.get("shared", 0)
    hidden = _multiple(active / (3 * run.model.dim))
    widths = tuple(hidden if layer in layers else ffn_hidden(run.model, layer) for layer in range(run.model.num_layers))
    same = len(set(widths)) == 1
    per_layer = () if same else widths
    model = replace(
        run.model, moe=None, ffn_hidden=hidden if same else run.model.ffn_hidden, ffn_hidden_per_layer=per_layer
    )
    logging = replace(run.logging, record_routing=False, replay_routing="")
    return replace(run, model=model, logging=logging)


def with_budget(run: Run, target: Run, tokens: float) -> Run:
    """The run trained on so many tokens, with rate, batch, warm-up and evaluations that follow from the target's own."""
    length = run.data.sequence_length
    share = tokens * train_flops_per_token(run.model, length) / compute(target)
    batch = max(1, round(target.train.batch_rows * min(1.0, share) ** BATCH_POWER))
    micro = min(batch, target.train.micro_rows)
    batch = micro * round(batch / micro)
    steps = max(1, round(tokens / (batch * length)))
    ratio = steps / target.train.steps
    schedule = replace(target.train.schedule, warmup_steps=round(target.train.schedule.warmup_steps * ratio))
    if isinstance(schedule, Wsd):
        schedule = replace(schedule, decay_steps=max(1, round(schedule.decay_steps * ratio)))
    rate = target.train.optimizer.lr * share**RATE_POWER
    train = replace(
        target.train,
        steps=steps,
        batch_rows=batch,
        micro_rows=micro,
        optimizer=replace(target.train.optimizer, lr=float(f"{rate:.3g}")),
        schedule=schedule,
    )
    every = target.checkpoint.every_steps
    return replace(
        run,
        train=train,
        evaluation=replace(target.evaluation, every_steps=max(1, steps // EVALUATIONS), probe_rows=0),
        checkpoint=replace(target.checkpoint, every_steps=max(1, round(every * ratio)) if every else 0, keep_last=1),
    )


def _shrink_attention(
    attention: GroupedQueryAttention | LatentAttention, width: float, num_layers: int
) -> GroupedQueryAttention | LatentAttention:
    if isinstance(attention, LatentAttention):
        heads = max(1, round(width * attention.num_heads))
        q_rank = _multiple(width * attention.q_rank) if attention.q_rank else 0
        return replace(attention, num_heads=heads, kv_rank=_multiple(width * attention.kv_rank), q_rank=q_rank)
    group = attention.num_heads // attention.num_kv_heads
    kv_heads = max(1, round(width * attention.num_kv_heads))
    total = width * attention.num_heads * attention.head_dim
    head_dim = max(2, 2 * round(total / (kv_heads * group) / 2))
    windows = attention.windows[:num_layers]
    return replace(attention, num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, windows=windows)


def _multiple(value: float) -> int:
    return max(MULTIPLE, MULTIPLE * round(value / MULTIPLE))


def _refuse_what_is_per_expert(model: Model) -> None:
    moe = model.moe
    if moe is None:
        raise ConfigError("a ladder needs a recipe with expert layers (model.moe)")
    for name in ("expert_widths", "num_experts_per_layer"):
        if getattr(moe, name):
            raise ConfigError(
                f"a ladder changes the number of experts, which model.moe.{name} fixes expert by expert: leave it empty"
            )
    if model.ffn_hidden_per_layer:
        raise ConfigError(
            "a ladder changes the number of layers, which model.ffn_hidden_per_layer fixes one by one: leave it empty"
        )
