"""Settings of the optimisation loop, the layout, evaluation, saving, reporting and prices."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Discriminator

from moe.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Unnamed,
    config,
)


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
class Distil:
    """Learning from a trained model's probabilities beside the text (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: str
    """Folder of the teacher's run; its newest checkpoint is read when a run starts or resumes."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the divergence is multiplied by its square, which keeps the gradient's size."""
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the divergence in what is minimised; the rest is cross-entropy."""


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
    loss_chunk: NonNegativeInt = 512
    """Tokens whose logits exist at once where losses are computed, in training (without a teacher) and evaluation; 0: all."""
    distil: Distil | None = None
    """Learn from a teacher, or none."""
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
    fresh_rows: Annotated[int, Ge(0), Le(4096)] = 0
    """Validation rows, others at each evaluation, whose single losses are kept (fresh.jsonl), to test `forecast.promise` on."""


@config
class Forecast:
    """The gain of a sparse run over its dense twin, forecast and watched while it trains (docs/forecast.md)."""

    dense: str = ""
    """Folder of the dense twin, finished or training beside; empty for none. `moe compare` sets it beside past or promise."""
    past: str = ""
    """File of past runs to learn from, as `moe forecast collect` writes it; empty for none."""
    promise: NonNegativeFloat = 0.0
    """Nats per token that the run must be ahead at every evaluation from the anchor on, tested on fresh rows; 0 for none."""
    bound: PositiveFloat = 1.0
    """Nats per token: how far above the promise the gain of a single fresh row may lie."""
    anchor: Annotated[float, Gt(0), Lt(1)] = 0.08
    """Share of training after which the forecast begins."""
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.9
    """Of the forecast's interval."""
    false_alarm_rate: Annotated[float, Gt(0), Le(0.5)] = 0.05
    """Of the alarm, per whole run; half for each where both past runs and a promise are watched."""


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
