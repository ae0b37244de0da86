"""Parameters of which ranks hold parts: what is here, and how many hold the same.

A DTensor is told by its methods: importing the class takes longer than the rest of the model, and most runs cut nothing.
"""

import math
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe.parallel.ranks import Ranks


def part_here(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    cut: Any = tensor
    return cut.to_local() if hasattr(cut, "to_local") else tensor


def used_by_heads(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """What every rank has and each uses for its own heads: the same values, and the gradient is the sum of the ranks'."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def copies(parameter: Tensor, ranks: Ranks) -> int:
    """Ranks of a pipeline stage that hold the same part of a parameter."""
    cut: Any = parameter
    if not hasattr(cut, "to_local"):
        return ranks.layout.stage_ranks
    mesh, placements = cut.device_mesh, cut.placements
    pieces = math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if placement.is_shard())
    return ranks.layout.stage_ranks // pieces
