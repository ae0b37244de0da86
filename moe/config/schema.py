"""Every setting of a run, as frozen, keyword-only dataclasses; children nest in their parents.

A recipe builds one `Run`. Types and ranges are checked by pydantic in `load.py`; rules between fields in `check.py`.
A class with a `name` field is one member of a family (attention, tokenizer, source, schedule): changing the name on the
command line drops the old member's fields.
"""

from typing import Annotated, Any

from annotated_types import MinLen

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
from moe.config.corpus import (
    BpeTokenizer,
    ByteTokenizer,
    Data,
    FilesSource,
    HubSource,
    PretrainedTokenizer,
    Source,
    StdlibSource,
    Tokenizer,
)
from moe.config.lora import Lora
from moe.config.network import (
    Attention,
    Balance,
    GroupedQueryAttention,
    LatentAttention,
    Llama3Scaling,
    Model,
    MoE,
    Rotary,
    RouterConfig,
    Yarn,
    balances,
    expert_dim,
    expert_widths,
    ffn_hidden,
    is_moe_layer,
    layer_experts,
)
from moe.config.training import (
    AdamW,
    Checkpoint,
    Cosine,
    Cost,
    Distil,
    Evaluation,
    Forecast,
    Logging,
    Muon,
    Parallel,
    Schedule,
    Train,
    UpdateRule,
    Wsd,
)

__all__ = [
    "AdamW",
    "Attention",
    "Balance",
    "BpeTokenizer",
    "ByteTokenizer",
    "Checkpoint",
    "Cosine",
    "Cost",
    "Data",
    "Distil",
    "Evaluation",
    "FilesSource",
    "Forecast",
    "Fraction",
    "GroupedQueryAttention",
    "HubSource",
    "Json",
    "LatentAttention",
    "Llama3Scaling",
    "Logging",
    "Lora",
    "MoE",
    "Model",
    "Muon",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenFraction",
    "Parallel",
    "PositiveFloat",
    "PositiveInt",
    "PretrainedTokenizer",
    "Rotary",
    "RouterConfig",
    "Run",
    "Schedule",
    "Source",
    "StdlibSource",
    "Tokenizer",
    "Train",
    "Unnamed",
    "UpdateRule",
    "Wsd",
    "Yarn",
    "balances",
    "config",
    "expert_dim",
    "expert_widths",
    "ffn_hidden",
    "is_moe_layer",
    "layer_experts",
]

Json = dict[str, Any]


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
    forecast: Forecast = Forecast()
    """Watching the gain."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    logging: Logging = Logging()
    """Reporting."""
    cost: Cost = Cost()
    """Accounting."""
