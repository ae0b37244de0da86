"""Tensor parallelism: the plans by which DTensor shares the matrices of attention and of dense feed-forward layers.

What reads the residual stream is cut by its outputs and what writes to it by its inputs (arXiv 1909.08053), so a rank computes
whole heads, or hidden units, and one sum over the ranks in each direction of each layer is all that travels. Everything else,
routed experts included, every rank of the group computes alike from the same tokens: its gradients are the same on each.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)


def share_heads(attention: nn.Module, mesh: DeviceMesh, *, latent: bool) -> None:
    """Cut attention by heads: `query`, `key` and `value`, or `query` and `kv`, and `out`; and the sink of each head."""
    into = ("query", "kv") if latent else ("query", "key", "value")
    plan = {**{name: ColwiseParallel() for name in into}, "out": RowwiseParallel()}
    parallelize_module(attention, mesh, plan)
    if not latent:
        # one gradient for the three that read x_BSD, so one sum
        inputs = PrepareModuleInput(
            input_layouts=(Replicate(), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        )
        parallelize_module(attention, mesh, inputs)
    sink_N = getattr(attention, "sink_N", None)
    if sink_N is not None:
        here = sink_N.detach().chunk(mesh.size())[mesh.get_local_rank()]
        attention.sink_N = nn.Parameter(DTensor.from_local(here, mesh, [Shard(0)], run_check=False))


def share_hidden(ffn: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a SwiGLU by hidden units."""
    parallelize_module(ffn, mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
    inputs = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    parallelize_module(ffn, mesh, inputs)


def other_dim(parameter: nn.Parameter) -> Shard | None:
    """Where to cut a matrix further that is cut over tensor ranks: its other dimension; None for one that is not."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.mesh_dim_names != ("tensor",) or parameter.ndim != 2:
        return None
    placement = parameter.placements[0]
    return Shard(1 - placement.dim) if isinstance(placement, Shard) else None
