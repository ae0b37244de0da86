"""Rules between fields, checked before any device is touched. Each message: the rule, the numbers, the way out."""

import math
from collections.abc import Iterator, Sequence

from moe.config.adapters import adapter_problems
from moe.config.schema import (
    BpeTokenizer,
    ByteTokenizer,
    GroupedQueryAttention,
    LatentAttention,
    Model,
    MoE,
    Run,
    Wsd,
    expert_widths,
    is_moe_layer,
)
from moe.config.words import joined
from moe.errors import ConfigError

BYTE_VOCABULARY = 257
"""256 bytes and the document separator."""


def check(run: Run) -> None:
    """Raise ConfigError naming every rule between fields that the run breaks."""
    problems = [
        *_name(run),
        *_grouped(run.model),
        *_latent(run.model),
        *_rotary(run),
        *_layers(run.model),
        *(expert_problems(run.model.moe) if run.model.moe is not None else ()),
        *_vocabulary(run),
        *_batch(run),
        *_schedule(run),
        *_muon(run),
        *_saving(run),
        *_distil(run),
        *_replay(run),
        *_forecast(run),
        *adapter_problems(run),
    ]
    if problems:
        raise ConfigError(joined(problems))


# ------------------------------------------------------------------------------------------------------------ model


def _name(run: Run) -> Iterator[str]:
    if run.name != run.name.strip() or run.name.startswith(".") or any(c in "/\\:\0\n" for c in run.name):
        yield f"name ({run.name!r}) must be a folder's name, without / \\ : or a dot in front: use e.g. name=smoke"


def _grouped(model: Model) -> Iterator[str]:
    attention = model.attention
    if not isinstance(attention, GroupedQueryAttention):
        return
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if heads % kv_heads:
        near = " or ".join(map(str, sorted(sorted(_divisors(heads), key=lambda n: abs(n - kv_heads))[:2])))
        yield (
            f"model.attention.num_heads ({heads}) must be divisible by num_kv_heads ({kv_heads}): "
            f"use num_kv_heads={near}"
        )
    if len(attention.windows) > model.num_layers:
        yield (
            f"model.attention.windows has {len(attention.windows)} entries for model.num_layers={model.num_layers}, "
            f"so the last would have no effect: give at most {model.num_layers}"
        )


def _latent(model: Model) -> Iterator[str]:
    attention, fraction = model.attention, model.rotary.fraction
    if not isinstance(attention, LatentAttention):
        return
    if attention.rope_dim % 2:
        yield f"model.attention.rope_dim ({attention.rope_dim}) must be even: use rope_dim={attention.rope_dim + 1}"
    if fraction != 1:
        yield (
            f"model.rotary.fraction ({fraction}) must be 1 with latent attention, whose rope_dim ({attention.rope_dim})"
            " is the rotated part: use model.rotary.fraction=1 and another rope_dim"
        )


def _rotary(run: Run) -> Iterator[str]:
    rotary, attention = run.model.rotary, run.model.attention
    if rotary.base <= 1:
        yield f"model.rotary.base ({rotary.base}) must be greater than 1: use e.g. model.rotary.base=10000"
    if isinstance(attention, GroupedQueryAttention):
        dims = rotary.fraction * attention.head_dim
        if abs(dims - round(dims)) > 1e-6 or round(dims) % 2 or round(dims) < 2:
            near = min(max(2, 2 * round(dims / 2)), attention.head_dim)
            way_out = (
                f"use model.rotary.fraction={near / attention.head_dim:.6g} ({near} dimensions)"
                if near % 2 == 0
                else f"use model.attention.head_dim={attention.head_dim + 1}"
            )
            yield (
                f"model.rotary.fraction ({rotary.fraction}) of head_dim ({attention.head_dim}) is {dims:.6g} dimensions"
                f", and must be an even number of at least 2: {way_out}"
            )
    yarn, llama3 = rotary.yarn, rotary.llama3
    if (yarn is not None) + (llama3 is not None) + (rotary.linear != 1) > 1:
        yield "model.rotary.linear, yarn and llama3 exclude each other: keep one, with linear=1, yarn=null, llama3=null"
    if llama3 is not None and llama3.high_freq_factor <= llama3.low_freq_factor:
        yield (
            f"model.rotary.llama3.high_freq_factor ({llama3.high_freq_factor}) must be greater than low_freq_factor "
            f"({llama3.low_freq_factor}): use Llama 3.1's 4 and 1"
        )
    if yarn is None:
        return
    if yarn.factor < 1:
        yield f"model.rotary.yarn.factor ({yarn.factor}) must be at least 1: use extended length / original_length"
    if yarn.beta_fast <= yarn.beta_slow:
        yield (
            f"model.rotary.yarn.beta_fast ({yarn.beta_fast}) must be greater than beta_slow ({yarn.beta_slow}): "
            "use the paper's 32 and 1"
        )
    reach, length = yarn.factor * yarn.original_length, run.data.sequence_length
    if length > reach:
        yield (
            f"data.sequence_length ({length}) must not exceed yarn's factor ({yarn.factor}) times original_length "
            f"({yarn.original_length}), {reach:g}: use model.rotary.yarn.factor={-(-length // yarn.original_length)}"
        )


def _layers(model: Model) -> Iterator[str]:
    layers, widths, moe = model.num_layers, model.ffn_hidden_per_layer, model.moe
    if widths and len(widths) != layers:
        yield (
            f"model.ffn_hidden_per_layer has {len(widths)} entries for model.num_layers={layers}: "
            f"give {layers}, or [] to use ffn_hidden everywhere"
        )
    if moe is None:
        return
    if moe.latent_dim >= model.dim:
        yield (
            f"model.moe.latent_dim ({moe.latent_dim}) must be less than model.dim ({model.dim}), or it only adds two products: "
            f"use latent_dim={max(1, model.dim // 4)}, or 0 for experts in model.dim"
        )
    yield from _per_layer(model, moe)
    if moe.first_dense >= layers:
        yield (
            f"model.moe.first_dense ({moe.first_dense}) must be less than model.num_layers ({layers}): "
            f"use first_dense={layers - 1} or less, or model.moe=null for a dense model"
        )
    elif any(not moe.first_dense <= layer < layers for layer in moe.dense_layers):
        yield (
            f"model.moe.dense_layers ({list(moe.dense_layers)}) must be layers from first_dense ({moe.first_dense}) to "
            f"{layers - 1}: remove the others, which have no effect"
        )
    elif not any(is_moe_layer(model, layer) for layer in range(layers)) and moe.dense_layers:
        yield (
            f"model.moe.dense_layers ({list(moe.dense_layers)}) leaves no layer with experts: leave one out, or use "
            "model.moe=null for a dense model"
        )
    elif not any(is_moe_layer(model, layer) for layer in range(layers)):
        left = layers - moe.first_dense
        yield (
            f"model.moe.every ({moe.every}) must be at most the {left} layers after first_dense ({moe.first_dense} of "
            f"{layers}), or no layer has experts: use every={left} or less, or model.moe=null for a dense model"
        )


def _per_layer(model: Model, moe: MoE) -> Iterator[str]:
    each, layers = moe.num_experts_per_layer, sum(is_moe_layer(model, i) for i in range(model.num_layers))
    if not each:
        return
    if len(each) != layers:
        yield (
            f"model.moe.num_experts_per_layer has {len(each)} entries for {layers} expert layers: give {layers}, or [] to "
            f"use num_experts ({moe.num_experts}) everywhere"
        )
    if max(each) != moe.num_experts or min(each) < moe.top_k:
        yield (
            f"model.moe.num_experts_per_layer (from {min(each)} to {max(each)}) must have num_experts ({moe.num_experts}) as "
            f"its largest and be at least top_k ({moe.top_k}): use num_experts={max(each)} and "
            f"top_k={min(min(each), moe.top_k)} or less"
        )
    if moe.expert_widths:
        yield "model.moe.num_experts_per_layer and expert_widths exclude each other: use one width, expert_widths=[]"


def expert_problems(moe: MoE) -> Iterator[str]:
    """Sentences about every rule that expert layers break; paths are those of a Run."""
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k ({moe.top_k}) must be at most num_experts ({moe.num_experts}): "
            f"use top_k={moe.num_experts} or num_experts={moe.top_k}"
        )
        return
    if moe.shared_gate and not moe.shared_hidden:
        yield (
            "model.moe.shared_gate (true) needs a shared expert, and shared_hidden is 0: "
            f"use model.moe.shared_hidden={max(expert_widths(moe))} or shared_gate=false"
        )
    if moe.expert_widths and len(moe.expert_widths) != moe.num_experts:
        yield (
            f"model.moe.expert_widths has {len(moe.expert_widths)} entries for num_experts={moe.num_experts}: "
            f"give {moe.num_experts}, or [] to use expert_hidden ({moe.expert_hidden}) everywhere"
        )
    refusal = unequal_widths(moe.backend, expert_widths(moe))
    if refusal:
        yield f"model.moe.backend: {refusal}"
    refusal = low_precision(moe.backend, moe.precision, expert_widths(moe))
    if refusal:
        yield f"model.moe.precision: {refusal}"
    yield from _activation(moe)
    try:
        moe.router.check(num_experts=moe.num_experts, top_k=moe.top_k)
    except ConfigError as error:
        yield f"model.moe.router: {error}"


def _activation(moe: MoE) -> Iterator[str]:
    """The activation of the experts, its settings, and biases."""
    for name in ("activation_alpha", "activation_limit"):
        value, unset = getattr(moe, name), MoE.__dataclass_fields__[name].default
        if moe.activation == "swiglu" and value != unset:
            yield (
                f"model.moe.{name} ({value:g}) has no effect with activation=swiglu: "
                f"use model.moe.activation=swiglu_oai, or {name}={unset}"
            )
    refusal = biased_experts(
        moe.backend, moe.precision, expert_widths(moe), activation=moe.activation, bias=moe.expert_bias
    )
    if refusal:
        yield f"model.moe: {refusal}"


def biased_experts(backend: str, precision: str, widths: Sequence[int], *, activation: str, bias: bool) -> str:
    """Why an expert backend cannot compute this activation or these biases; empty if it can."""
    if activation == "swiglu" and not bias:
        return ""
    wanted = f"activation={activation}" if activation != "swiglu" else "expert_bias=true"
    if backend == "block_sparse":
        return (
            f"expert backend 'block_sparse' computes SwiGLU without biases, and the experts have {wanted}: use 'triton' "
            "(a GPU), 'torch' or 'reference'"
        )
    if precision != "native":
        return (
            f"precision '{precision}' is for SwiGLU without biases, and the experts have {wanted}: use precision=native"
        )
    if bias and len(set(widths)) > 1:
        return (
            f"expert_bias needs experts of one width, and these {len(widths)} have {len(set(widths))}, from {min(widths)} to "
            f"{max(widths)}: use expert_widths=[], or expert_bias=false"
        )
    return ""


def unequal_widths(backend: str, widths: Sequence[int]) -> str:
    """Why an expert backend cannot compute experts of these widths; empty if it can. Only `triton` needs one width."""
    if backend != "triton" or len(set(widths)) == 1:
        return ""
    return (
        f"expert backend 'triton' multiplies experts of one width, and these {len(widths)} have {len(set(widths))}, from "
        f"{min(widths)} to {max(widths)}: use 'block_sparse' (a GPU), 'torch' or 'reference', or give every expert the "
        "same width"
    )


def low_precision(backend: str, precision: str, widths: Sequence[int]) -> str:
    """Why an expert backend cannot compute in this precision; empty if it can."""
    if precision == "native":
        return ""
    if backend not in ("triton", "reference"):
        return (
            f"'{precision}' is computed by backend 'triton', or by 'reference' as rounding alone, and the backend is "
            f"'{backend}': use one of those, or precision=native"
        )
    if len(set(widths)) > 1:
        return f"'{precision}' takes experts of one width, and these have {len(set(widths))}: use precision=native"
    return ""


# ------------------------------------------------------------------------------------------------------------- rest


def _vocabulary(run: Run) -> Iterator[str]:
    tokenizer, rows = run.data.tokenizer, run.model.vocab_size
    if isinstance(tokenizer, ByteTokenizer):
        needed, what = BYTE_VOCABULARY, "256 bytes and the document separator"
    elif isinstance(tokenizer, BpeTokenizer):
        needed, what = tokenizer.vocab_size, "data.tokenizer.vocab_size"
    else:
        return
    if rows < needed:
        yield f"model.vocab_size ({rows}) must be at least {needed} ({what}): use model.vocab_size={needed} or more"


def _batch(run: Run) -> Iterator[str]:
    rows, micro = run.train.batch_rows, run.train.micro_rows
    if rows % micro:
        near = max(n for n in _divisors(rows) if n <= micro)
        yield (
            f"train.batch_rows ({rows}) must be divisible by micro_rows ({micro}): "
            f"use micro_rows={near} or batch_rows={_multiple_near(rows, micro)}"
        )


def _schedule(run: Run) -> Iterator[str]:
    steps, schedule = run.train.steps, run.train.schedule
    warmup = schedule.warmup_steps
    if warmup >= steps:
        yield (
            f"train.schedule.warmup_steps ({warmup}) must be less than train.steps ({steps}): "
            f"use train.schedule.warmup_steps={steps // 10} or train.steps={warmup + 1} or more"
        )
    elif isinstance(schedule, Wsd) and warmup + schedule.decay_steps > steps:
        yield (
            f"train.schedule.warmup_steps ({warmup}) plus decay_steps ({schedule.decay_steps}), "
            f"{warmup + schedule.decay_steps}, must be at most train.steps ({steps}): "
            f"use decay_steps={steps - warmup} or less"
        )


def _muon(run: Run) -> Iterator[str]:
    cuts = {name: getattr(run.parallel, name) for name in ("shard", "expert", "tensor")}
    cut = next((name for name, size in cuts.items() if size > 1), "")
    if run.train.optimizer.name == "muon" and cut:
        yield (
            f"train.optimizer 'muon' updates whole matrices, and parallel.{cut} ({cuts[cut]}) cuts them: "
            f"use parallel.{cut}=1 or train.optimizer=adamw"
        )


def _distil(run: Run) -> Iterator[str]:
    if run.train.distil is None:
        return
    cut = next((name for name in ("pipeline", "context") if getattr(run.parallel, name) > 1), "")
    if cut:
        yield (
            f"train.distil computes the teacher on whole rows on every rank, and parallel.{cut} "
            f"({getattr(run.parallel, cut)}) cuts them or the model: use parallel.{cut}=1"
        )


def _saving(run: Run) -> Iterator[str]:
    if run.checkpoint.keep_best and not run.evaluation.every_steps:
        yield (
            "checkpoint.keep_best (true) needs evaluations to choose by, and evaluation.every_steps is 0: "
            f"use evaluation.every_steps={max(1, run.train.steps // 10)} or checkpoint.keep_best=false"
        )


def _replay(run: Run) -> Iterator[str]:
    logging = run.logging
    if logging.record_routing and logging.replay_routing:
        yield (
            f"logging.record_routing (true) and replay_routing ({logging.replay_routing!r}) exclude each other, "
            "a replay would record itself: drop one"
        )
    used = "record_routing" if logging.record_routing else "replay_routing" if logging.replay_routing else ""
    if used and run.model.moe is None:
        yield f"logging.{used} needs expert layers, and model.moe is null: drop logging.{used}, or give model.moe"


def _forecast(run: Run) -> Iterator[str]:
    given, evaluation = run.forecast, run.evaluation
    used = [f"forecast.{name}" for name in ("dense", "past", "promise") if getattr(given, name)]
    if used and run.model.moe is None:
        yield f"{used[0]} is about a sparse run's gain over dense, and model.moe is null: drop it, or give model.moe"
    if given.dense and not evaluation.every_steps:
        yield (
            f"forecast.dense ({given.dense!r}) is compared at evaluations, and evaluation.every_steps is 0: "
            f"use evaluation.every_steps={max(1, run.train.steps // 25)}"
        )
    if given.promise and not evaluation.fresh_rows:
        yield (
            f"forecast.promise ({given.promise:g}) is tested on fresh rows, and evaluation.fresh_rows is 0: use "
            "evaluation.fresh_rows=32, in the dense twin too"
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _multiple_near(number: int, unit: int) -> int:
    """The multiple of `unit` nearest to `number`, at least one."""
    return max(1, round(number / unit)) * unit
