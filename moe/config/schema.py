"""Every setting of a run, as frozen, keyword-only dataclasses; children nest in their parents.

A recipe builds one `Run`. Types and ranges are checked by pydantic in `load.py`; rules between fields in `check.py`.
A class with a `name` field is one member of a family (attention, tokenizer, source, schedule): changing the name on the
command line drops the old member's fields.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, Discriminator, WithJsonSchema

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Ge(0), Lt(1)]


T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a class a config: frozen, keyword-only, slotted, and validated without unknown fields or coercion."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@dataclass(frozen=True)
class Unnamed:
    """In a family's hint: which member an object without a name is, for files older than the family."""

    name: str


# ---------------------------------------------------------------------------------------------------------- model


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
    mscale: NonNegativeFloat = 1.0
    """Attention temperature coefficient applied to the rotary part (DeepSeek-V2's name)."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """Coefficient that, if not 0, scales the softmax over all dimensions instead (DeepSeek-V2)."""


@config
class Rotary:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-rotation layout."""

    base: PositiveFloat = 10_000.0
    """Base of the geometric frequency series."""
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of each head's dimensions that is rotated, from the front."""
    yarn: Yarn | None = None
    """Context extension, or none."""


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
    shared_hidden: NonNegativeInt = 0
    """Hidden size of the shared expert that every token passes; 0 for none."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a learned sigmoid of the token (Qwen2-MoE)."""
    latent_dim: NonNegativeInt = 0
    """Width that routed experts work in, between two matrices that they share (LatentMoE, arXiv 2601.18089); 0: dim."""
    router: Annotated[RouterConfig, WithJsonSchema({"type": "object"})]
    """Who goes where; see `moe/routers`."""
    backend: Literal["auto", "reference", "torch", "triton", "block_sparse"] = "auto"
    """What computes the experts; `auto` is resolved once at the start, printed and recorded."""
    precision: Literal["native", "fp8_row", "fp8_block"] = "native"
    """Operands of the experts' products and of those for their inputs' gradient: the model's own type, or e4m3 with a scale
    per row or per block (`triton`; `reference` rounds the same way and multiplies in float32). Weights' gradients: native."""
    first_dense: NonNegativeInt = 0
    """Layers at the bottom that keep a dense FFN."""
    every: PositiveInt = 1
    """Among the layers after first_dense, every n-th is an expert layer (the n-th, 2n-th, ...)."""


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


# ----------------------------------------------------------------------------------------------------------- data


@config
class ByteTokenizer:
    """UTF-8 bytes, and id 256 between documents: results are bits per byte with no further conversion."""

    name: Literal["bytes"] = "bytes"


@config
class BpeTokenizer:
    """A byte-level BPE trained on the run's own training text, then cached."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Ge(258)]
    """Entries to learn, the 256 bytes and the document separator included."""
    training_bytes: PositiveInt = 20_000_000
    """Text to learn from, taken from the front of the shuffled training documents."""


@config
class PretrainedTokenizer:
    """A tokenizer of the Hugging Face hub, or a local folder or tokenizer.json."""

    name: Literal["pretrained"] = "pretrained"
    path: Annotated[str, MinLen(1)]
    """Hub name, folder, or file."""


Tokenizer = Annotated[ByteTokenizer | BpeTokenizer | PretrainedTokenizer, Discriminator("name")]


@config
class StdlibSource:
    """The source code of the running Python's standard library, without its tests (about 12 MB)."""

    name: Literal["stdlib"] = "stdlib"
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


@config
class FilesSource:
    """Local text, jsonl or parquet files; a text file is one document."""

    name: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], MinLen(1)]
    """Files, folders or glob patterns."""
    text_field: str = "text"
    """Field that holds the text, in jsonl and parquet."""
    prompt_field: str = ""
    """Field whose text goes before the text and carries no loss; empty for none (jsonl and parquet)."""
    on_bad_file: Literal["error", "skip"] = "error"
    """What to do with an empty, binary or wrongly encoded file; skips are counted and reported."""
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


@config
class HubSource:
    """A dataset that `datasets.load_dataset` can load, by name or local path."""

    name: Literal["hub"] = "hub"
    dataset: Annotated[str, MinLen(1)]
    """First argument of load_dataset, e.g. "roneneldan/TinyStories" or "json"."""
    subset: str = ""
    """Configuration name of the dataset; empty for the default."""
    data_files: tuple[str, ...] = ()
    """Files, for the format builders (json, text, parquet)."""
    split: str = "train"
    """Split to read; validation documents are taken out of it by hash."""
    text_field: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read as a stream rather than downloading the whole dataset."""
    max_bytes: PositiveInt = 1_000_000_000
    """Text to take, in bytes; written to shards before training."""
    weight: PositiveFloat = 1.0
    """Share of the training batches, relative to the other sources."""


Source = Annotated[StdlibSource | FilesSource | HubSource, Discriminator("name")]


@config
class Data:
    """What is read, in which tokens, and in rows of which length."""

    sources: Annotated[tuple[Source, ...], MinLen(1)] = (StdlibSource(),)
    """Corpora; rows of a batch are drawn from them in proportion to their weights."""
    tokenizer: Tokenizer = ByteTokenizer()
    """How text becomes token ids."""
    sequence_length: PositiveInt = 256
    """S, tokens in a row."""
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the documents, chosen by hash, that only evaluation sees."""
    cache_dir: Annotated[str, MinLen(1)] = "~/.cache/moe-lab"
    """Where prepared shards and trained tokenizers live, keyed by content."""


# ------------------------------------------------------------------------------------------------------- training


@config
class AdamW:
    """AdamW (arXiv 1711.05101); weight decay acts on matrices only, not on norms, biases, embeddings or routers' states."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    """Peak learning rate."""
    beta1: OpenFraction = 0.9
    """Decay of the gradient's average."""
    beta2: OpenFraction = 0.95
    """Decay of the squared gradient's average."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay per unit of learning rate."""


@config
class Muon:
    """Muon for the matrices of blocks, each expert its own, AdamW for embedding, head, routers and vectors (moe/muon.py)."""

    name: Literal["muon"] = "muon"
    lr: PositiveFloat = 0.001
    """Peak learning rate, for both rules; an update's size is that of AdamW's."""
    momentum: OpenFraction = 0.95
    """Decay of the gradient's average, with Nesterov's look ahead."""
    iterations: PositiveInt = 5
    """Newton-Schulz iterations that make an update's singular values about equal."""
    update_rms: PositiveFloat = 0.2
    """Root mean square of an update whose singular values are all 1, over the learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay per unit of learning rate, for both rules."""
    beta1: OpenFraction = 0.9
    """AdamW's decay of the gradient's average, where that is used."""
    beta2: OpenFraction = 0.95
    """AdamW's decay of the squared gradient's average."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""


UpdateRule = Annotated[AdamW | Muon, Discriminator("name"), Unnamed("adamw")]


@config
class Cosine:
    """Linear warm-up, then half a cosine to the last step."""

    name: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to the peak."""
    final_fraction: Fraction = 0.1
    """Learning rate of the last step over the peak."""


@config
class Wsd:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, constant, linear down over the last steps."""

    name: Literal["wsd"] = "wsd"
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to the peak."""
    decay_steps: PositiveInt
    """Steps of the final decay."""
    final_fraction: Fraction = 0.0
    """Learning rate of the last step over the peak."""


Schedule = Annotated[Cosine | Wsd, Discriminator("name")]


@config
class Train:
    """The optimisation loop."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_rows: Annotated[int, Gt(0), Le(2**31)]
    """Rows of sequence_length tokens in one step, over all ranks and micro-batches."""
    micro_rows: PositiveInt
    """Rows in one forward pass of one rank; batch_rows = micro_rows · parallel.replicate · shard · accumulation."""
    optimizer: UpdateRule
    """Update rule."""
    schedule: Schedule = Cosine()
    """Learning rate as a function of the step."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm over all parameters; 0 for no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, router, softmax and losses stay float32."""
    compile: bool = False
    """Run the model through torch.compile."""
    activation_checkpointing: bool = False
    """Keep only block inputs and the routing decision; recompute the rest in backward."""
    loss_chunk: NonNegativeInt = 0
    """Tokens whose logits exist at once while the loss is computed, whatever the vocabulary; 0 for all of a micro-batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes an accelerator if there is one."""
    threads: Annotated[int, Ge(0), Le(4096)] = 0
    """CPU threads of torch; 0 keeps torch's choice. Results are bitwise repeatable for one number of threads."""
    max_nonfinite_steps: PositiveInt = 10
    """Stop after this many steps in a row whose loss or gradient is not finite (each is skipped and counted)."""


@config
class Parallel:
    """How the processes of a run share its work: pipeline · replicate · shard · context · tensor of them (docs/scaling.md).

    Ranks are counted in that order, tensor fastest. Rows of the batch are shared by the replicate · shard ranks.
    """

    replicate: NonNegativeInt = 0
    """Copies of the (sharded) model that see different rows; 0 takes the processes that the other sizes leave."""
    shard: PositiveInt = 1
    """Ranks that see different rows and hold a part of every parameter and of its optimizer state each (FSDP2)."""
    expert: PositiveInt = 1
    """Ranks that hold different experts and send each other tokens; taken out of replicate · shard · context ranks."""
    context: PositiveInt = 1
    """Ranks that share each row's tokens, and exchange heads for tokens around attention (Ulysses, arXiv 2309.14509)."""
    tensor: PositiveInt = 1
    """Ranks that share each matrix of attention and of dense feed-forward layers."""
    pipeline: PositiveInt = 1
    """Stages of consecutive blocks, each on other ranks; micro-batches pass through them one after the other."""
    pipeline_schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """Order of a stage's micro-batches: all forward, then all backward (arXiv 1811.06965), or a backward pass as soon as one can
    be, so that a stage keeps the activations of at most as many micro-batches as there are stages (arXiv 2006.09503)."""
    pipeline_blocks: tuple[PositiveInt, ...] = ()
    """Blocks of each stage; empty for the split whose dearest stage costs the fewest FLOPs, embedding and head included."""
    dispatch: Literal["deduplicated", "rows", "capacity"] = "deduplicated"
    """What travels to other ranks' experts: each token once per rank, each routed row, or a fixed number of rows per expert
    (no size is read back from the device; rows past it are dropped and counted)."""
    dispatch_capacity_factor: PositiveFloat = 2.0
    """Rows that `capacity` sends to each expert, over its balanced share."""
    placement: Literal["index", "load"] = "index"
    """Which rank of an expert group holds which experts: in their order, or, from the next resume on, by their loads in
    routing.jsonl, so that ranks are used evenly. Checkpoints are the same."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest wait for another rank within a step; a rank that waits longer ends the run and says for whom it waited."""


@config
class Evaluation:
    """Loss on a fixed set of validation rows, without auxiliary losses."""

    every_steps: NonNegativeInt = 0
    """Evaluate after every n steps; 0 for only at the end."""
    rows: PositiveInt = 64
    """Rows of the evaluations during training."""
    final_rows: PositiveInt = 256
    """Rows of the evaluation after the last step."""
    probe_rows: NonNegativeInt = 8
    """Validation rows on which each evaluation follows the routing (health.jsonl); 0 for no such measurements."""


@config
class Checkpoint:
    """What is saved, and how much of it is kept."""

    every_steps: NonNegativeInt = 0
    """Save after every n steps; 0 for only at the end (a signal always saves)."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Keep, besides, the checkpoint of lowest evaluation loss; saves after each evaluation that is a new best."""
    asynchronous: bool = True
    """Write while training goes on, from a copy of the state in host memory (12 bytes per parameter of a rank)."""


@config
class Logging:
    """What is written besides metrics.jsonl."""

    routing_every: PositiveInt = 10
    """Write routing.jsonl every n steps."""
    console: Literal["auto", "progress", "plain", "off"] = "auto"
    """A live line, one line per log step, or nothing; auto is live on a terminal and plain elsewhere."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror metrics to Weights & Biases; failing to reach it never stops a run."""
    tensorboard: bool = False
    """Mirror metrics to TensorBoard event files (extra: tensorboard)."""
    peak_tflops: NonNegativeFloat = 0.0
    """Peak of the device in TFLOP/s for MFU; 0 looks the device up and, if unknown, leaves MFU out."""
    record_routing: bool = False
    """Write every step's expert choices to replay/, for a later run to force."""
    replay_routing: str = ""
    """Folder of a run recorded with record_routing, whose choices are forced here; empty for none."""
    promise: str = ""
    """Seal of the promise (`moe promise`) that this run is started under, as `moe compare --promise` sets it; empty for none."""


@config
class Cost:
    """What a run is charged for energy, carbon and time; it changes nothing in training (docs/ledger.md)."""

    region: Annotated[str, MinLen(1)] = "WORLD"
    """ISO 3166-1 alpha-3 code of the country whose electricity it is, for gCO2e per kWh; or WORLD."""
    grid_gco2e_per_kwh: NonNegativeFloat = 0.0
    """Carbon intensity of the electricity; 0 takes the region's."""
    pue: Annotated[float, Ge(1)] = 1.0
    """Power usage effectiveness: what the building draws over what its computers do."""
    price_per_hour: NonNegativeFloat = 0.0
    """US dollars for one device (on a CPU: one process) and hour; 0 takes the table's for that device, if it has one."""
    price_per_kwh: NonNegativeFloat = 0.0
    """US dollars for electricity; with this and no price_per_hour, devices are yours and cost only their energy."""
    watts_per_thread: PositiveFloat = 3.5
    """Power of one busy hardware thread, for the model that stands in where the processor's counters cannot be read."""
    powercap: str = "/sys/class/powercap"
    """Folder of the processor's energy counters (RAPL), which a container may have elsewhere; empty for the model."""


@config
class Run:
    """Everything that determines a training run."""

    name: Annotated[str, MinLen(1)]
    """Label of the run, and of its default folder."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, data order and routing noise."""
    model: Model
    """The network."""
    data: Data = Data()
    """The corpus."""
    train: Train
    """The loop."""
    parallel: Parallel = Parallel()
    """The layout over processes."""
    evaluation: Evaluation = Evaluation()
    """Validation."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    logging: Logging = Logging()
    """Reporting."""
    cost: Cost = Cost()
    """Accounting."""


Json = dict[str, Any]


def balances(router: RouterConfig) -> list[tuple[str, Balance]]:
    """Every balance loss among a router's settings, with its name."""
    values = ((item.name, getattr(router, item.name)) for item in fields(router))  # type: ignore[arg-type]
    return [(name, value) for name, value in values if isinstance(value, Balance)]


def is_moe_layer(model: Model, layer: int) -> bool:
    """Whether block `layer` (0-based) has experts."""
    moe = model.moe
    return moe is not None and layer >= moe.first_dense and (layer - moe.first_dense + 1) % moe.every == 0


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
