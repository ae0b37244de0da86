"""Settings of low-rank adapters on a trained model, and what follows from them."""

import math
from typing import Annotated, Literal

from annotated_types import MinLen

from moe.config.base import PositiveFloat, PositiveInt, config

Target = Literal["attention", "experts", "shared", "ffn"]


@config
class Lora:
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W + scale·A·B, of which A and B are trained, nothing else."""

    rank: PositiveInt
    """Columns of A and rows of B."""
    alpha: PositiveFloat = 16.0
    """The scale is alpha / rank."""
    scaling: Literal["rank", "root"] = "rank"
    """Divide alpha by the rank, or by its root, which keeps the size of what is learnt at large ranks (arXiv 2312.03732)."""
    targets: Annotated[tuple[Target, ...], MinLen(1)] = ("attention", "experts")
    """What gets adapters: the projections of attention, the routed experts (one pair of A and B per expert and matrix), the
    shared expert, the dense feed-forward layers."""


def lora_scale(lora: Lora) -> float:
    """What A·B is multiplied by."""
    return lora.alpha / (lora.rank if lora.scaling == "rank" else math.sqrt(lora.rank))
