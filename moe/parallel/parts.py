"""Parameters of which ranks hold parts: what is here, and how many hold the same."""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.parallel.ranks import Ranks


def part_here(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(parameter: Tensor, ranks: Ranks) -> int:
    """Ranks of a pipeline stage that hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return ranks.layout.stage_ranks
    mesh, placements = parameter.device_mesh, parameter.placements
    pieces = math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if placement.is_shard())
    return ranks.layout.stage_ranks // pieces
