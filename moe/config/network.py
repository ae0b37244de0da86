"""Settings of the network, and what follows from them for each block."""

from dataclasses import fields, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le, MinLen
from pydantic import Discriminator, WithJsonSchema

from moe.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config
from moe.config.lora import Lora


@config
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071, section 3.4)."""

    factor: PositiveFloat
    """Ratio of the extended context to the original one."""
    original_length: PositiveInt
    """Context length of the original training, in tokens."""
    beta_fast: PositiveFloat = 32.0
    """Rotations over the original context above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Rotations below which a frequency is fully interpolated."""
    mscale: float = 1.0
    """Attention temperature coefficient applied to the rotary part (DeepSeek-V2's name); negative: a temperature below 1."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """Coefficient that, if not 0, scales the softmax over all dimensions instead (DeepSeek-V2)."""
    truncate: bool = True
    """Round the ramp's ends to whole pairs of dimensions (gpt-oss does not)."""


@config
class Llama3Scaling:
    """Llama 3.1's context extension: long wavelengths are stretched, short ones kept (arXiv 2407.21783; Meta's code)."""

    factor: PositiveFloat
    """What the longest wavelengths are multiplied by."""
    original_length: PositiveInt
    """Context length of the original training, in tokens."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above original_length over this are stretched whole."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below original_length over this are kept; those between are mixed."""


@config
class Rotary:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-rotation layout."""

    base: PositiveFloat = 10_000.0
    """Base of the geometric frequency series."""
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of each head's dimensions that is rotated, from the front."""
    linear: PositiveFloat = 1.0
    """Positions are divided by this (position interpolation, arXiv 2306.15595)."""
    yarn: Yarn | None = None
    """Context extension, or none."""
    llama3: Llama3Scaling | None = None
    """Llama 3.1's context extension, or none."""


@config
class GroupedQueryAttention:
    """Multi-head attention whose key/value heads are shared by groups of query heads (arXiv 2305.13245)."""

    name: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    """N, query heads."""
    num_kv_heads: PositiveInt
    """M, key/value heads; divides num_heads."""
    head_dim: PositiveInt
    """H, size of one head."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the output projection."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS normalisation of queries and keys: over each head, or over all heads at once."""
    clip_qkv: NonNegativeFloat = 0.0
    """Largest size of a number in queries, keys and values, before positions and norms of heads (OLMo); 0 for no bound."""
    windows: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = (0,)
    """Tokens that a token sees, itself included, repeated over the layers; 0 means all before it."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and carries no value (gpt-oss)."""


@config
class LatentAttention:
    """Multi-head latent attention: keys and values from one low-rank vector (DeepSeek-V2, arXiv 2405.04434)."""

    name: Literal["latent"] = "latent"
    num_heads: PositiveInt
    """N, heads."""
    q_rank: NonNegativeInt = 0
    """Rank of the query's down-projection; 0 projects queries directly."""
    kv_rank: PositiveInt
    """Rank of the shared key/value vector."""
    nope_dim: PositiveInt
    """Size of a head's part without rotary positions."""
    rope_dim: PositiveInt
    """Size of the rotary part, one key for all heads; even."""
    value_dim: PositiveInt
    """Size of a head's value."""
    bias: bool = False
    """Bias on the projections down to the ranks and on the output projection."""
    norm_eps: NonNegativeFloat = 0.0
    """As model.norm_eps, for the norms of the low-rank vectors; 0: that one."""


Attention = Annotated[GroupedQueryAttention | LatentAttention, Discriminator("name")]


@config
class Balance:
    """Load-balancing loss E·Σ f·P, with f the share of routed rows and P the mean score share: 1.0 is balance for every K and E."""

    weight: NonNegativeFloat = 0.01
    """Coefficient of the loss's mean over the MoE layers."""
    scope: Literal["sequence", "global", "micro_batch"] = "global"
    """Where f is counted: each batch row, the whole optimizer step, or the micro-batch (depends on the layout)."""


class RouterConfig:
    """Base of every router's `Config`: `moe/routers/<name>.py` defines one, and the folder is the registry."""

    __slots__ = ()
    source: ClassVar[str] = ""
    """The published convention and coefficient, as printed by `moe show`."""

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """Expected routed rows that are computed per token; used by cost and by the dense twin."""
        raise NotImplementedError

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """Learned parameters of one layer's router, all in matrices that every token passes; E·D unless overridden."""
        return num_experts * dim

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Raise ConfigError where this router contradicts the expert layer it is in."""

    def whole_rows(self, *, part: int) -> str:
        """Why this router cannot route rows in parts of `part` tokens, and a way out; empty if it routes each as in the whole.

        parallel.context refuses it with these words. Sums over a row that need no gradient are no reason: `Tokens.over_row`.
        """
        return ""


@config
class MoE:
    """The expert layers of a model."""

    num_experts: PositiveInt
    """E, routed experts in a layer."""
    num_experts_per_layer: tuple[PositiveInt, ...] = ()
    """E of each expert layer in their order, when they differ, as after pruning; num_experts is then the largest of them."""
    top_k: PositiveInt
    """K, experts per token (for expert choice: on average)."""
    expert_hidden: PositiveInt
    """F, hidden size of one routed expert."""
    expert_widths: tuple[PositiveInt, ...] = ()
    """F of each routed expert, when they differ (expert_hidden is unused then); empty: expert_hidden everywhere."""
    activation: Literal["swiglu", "swiglu_oai"] = "swiglu"
    """Of routed experts: silu(g)·u, or gpt-oss's (u' + 1)·g'·sigmoid(alpha·g'), with g' = min(g, limit) and u' = u clamped to
    ±limit. Shared experts and dense layers are SwiGLU always."""
    activation_alpha: PositiveFloat = 1.702
    """alpha of swiglu_oai."""
    activation_limit: PositiveFloat = 7.0
    """limit of swiglu_oai."""
    expert_bias: bool = False
    """A bias of each of a routed expert's three products (gpt-oss)."""
    shared_hidden: NonNegativeInt = 0
    """Hidden size of the shared expert that every token passes; 0 for none."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a learned sigmoid of the token (Qwen2-MoE)."""
    latent_dim: NonNegativeInt = 0
    """Width that routed experts work in, between two matrices that they share (LatentMoE, arXiv 2601.18089); 0: dim."""
    router: Annotated[RouterConfig, WithJsonSchema({"type": "object"})]
    """Who goes where; see `moe/routers`."""
    backend: Literal["auto", "reference", "torch", "cpu", "triton", "block_sparse"] = "auto"
    """What computes the experts; `auto` (`cpu` where there is a C compiler and no GPU, otherwise `torch`) is resolved once at the
    start, printed and recorded. `cpu`: kernels compiled for this processor, float32 and, with AVX512_BF16, bfloat16; the
    rest is torch's."""
    precision: Literal["native", "fp8_row", "fp8_block"] = "native"
    """Operands of the experts' products and of those for their inputs' gradient: the model's own type, or e4m3 with a scale
    per row or per block (`triton`; `reference` rounds the same way and multiplies in float32). Weights' gradients: native."""
    first_dense: NonNegativeInt = 0
    """Layers at the bottom that keep a dense FFN."""
    every: PositiveInt = 1
    """Among the layers after first_dense, every n-th is an expert layer (the n-th, 2n-th, ...)."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Further layers that keep a dense FFN, by index from 0 (Qwen's mlp_only_layers)."""


@config
class Model:
    """A decoder-only transformer: pre-norm blocks of attention and a SwiGLU FFN or an expert layer."""

    vocab_size: PositiveInt
    """V, rows of the embedding; at least the tokenizer's vocabulary."""
    dim: PositiveInt
    """D, width of the residual stream."""
    num_layers: PositiveInt
    """Blocks."""
    ffn_hidden: PositiveInt
    """F of the dense SwiGLU FFN, in the layers that have one."""
    ffn_hidden_per_layer: tuple[PositiveInt, ...] = ()
    """F of each layer's dense FFN, when they differ (unused in expert layers); empty: ffn_hidden everywhere."""
    attention: Attention
    """Grouped-query or latent attention."""
    rotary: Rotary = Rotary()
    """Position embedding."""
    moe: MoE | None = None
    """Expert layers, or none for a dense model."""
    lora: Lora | None = None
    """Adapters on a base that is frozen, as `moe lora` sets them; none trains every weight."""
    backend: Literal["auto", "torch", "cpu"] = "auto"
    """What computes attention, norms, dense layers and the head: torch's operators, or `cpu`, kernels compiled for this processor
    (float32; what they have not is torch's). `auto`: `cpu` where there is a C compiler and no GPU. Experts: moe.backend."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square inside every RMSNorm."""
    tied_head: bool = False
    """Use the embedding as the output head."""
    document_mask: bool = True
    """Keep attention within documents that are packed into one row."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of every weight matrix at the start."""
    init_depth_scaling: bool = True
    """Divide the deviation of matrices that write to the residual stream by sqrt(2·num_layers) (GPT-2)."""


def balances(router: RouterConfig) -> list[tuple[str, Balance]]:
    """Every balance loss among a router's settings, with its name."""
    values = ((item.name, getattr(router, item.name)) for item in fields(router))  # type: ignore[arg-type]
    return [(name, value) for name, value in values if isinstance(value, Balance)]


def is_moe_layer(model: Model, layer: int) -> bool:
    """Whether block `layer` (0-based) has experts."""
    moe = model.moe
    if moe is None or layer < moe.first_dense or layer in moe.dense_layers:
        return False
    return (layer - moe.first_dense + 1) % moe.every == 0


def layer_experts(model: Model, layer: int) -> MoE:
    """The expert layers' settings as those of block `layer`, which has experts."""
    moe = model.moe
    assert moe is not None
    if not moe.num_experts_per_layer:
        return moe
    place = sum(is_moe_layer(model, i) for i in range(layer))
    return replace(moe, num_experts=moe.num_experts_per_layer[place], num_experts_per_layer=())


def expert_dim(model: Model) -> int:
    """Width of what goes into and comes out of a routed expert."""
    return (model.moe.latent_dim if model.moe is not None else 0) or model.dim


def expert_widths(moe: MoE) -> tuple[int, ...]:
    """F of each routed expert."""
    return moe.expert_widths or (moe.expert_hidden,) * moe.num_experts


def ffn_hidden(model: Model, layer: int) -> int:
    """F of block `layer`'s dense FFN."""
    return model.ffn_hidden_per_layer[layer] if model.ffn_hidden_per_layer else model.ffn_hidden
