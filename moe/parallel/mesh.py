"""The process groups of a layout: torch's device meshes over the two views of the ranks in moe/config/layout.py."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe.config.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """The groups that this rank is in; made by all ranks together."""

    tokens: dist.ProcessGroup
    """Ranks that hold the same parameters, or parts of them, and see other tokens."""
    dense: DeviceMesh
    """[replicate, shard · context], or [shard · context] for one copy: where dense parameters are sharded."""
    tensor: DeviceMesh
    """Ranks that share matrices and see the same tokens."""
    context: dist.ProcessGroup
    """Ranks that hold the parts of the same rows, in the order of the parts."""
    pipeline: dist.ProcessGroup
    """Ranks that hold the other blocks and see the same tokens, in the order of the stages."""
    experts: DeviceMesh
    """[expert_replicate, expert_shard, expert]: who holds the same experts, parts of them, and others."""

    @property
    def expert_axis(self) -> DeviceMesh:
        """The ranks that hold different experts and exchange tokens."""
        return self.experts["expert"]

    @property
    def expert_parts(self) -> DeviceMesh:
        """[expert_replicate, expert_shard], or [expert_shard] for one copy: where one rank's experts are sharded."""
        copied = self.experts.size(0) > 1
        return self.experts["expert_replicate", "expert_shard"] if copied else self.experts["expert_shard"]


def build(layout: Layout, device: torch.device) -> Mesh:
    """The meshes of a layout on the device's backend; every rank of the run calls it."""
    ranks = torch.arange(layout.world_size)
    dense_shape = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
    names = ("pipeline", "replicate", "shard", "tensor")
    dense = DeviceMesh(device.type, ranks.view(dense_shape), mesh_dim_names=names)
    # within a stage and a tensor rank, expert fastest
    by_tensor = ranks.view(layout.pipeline, -1, layout.tensor).transpose(1, 2)
    expert_shape = (layout.expert_replicate, layout.expert_shard, layout.expert)
    names = ("pipeline", "tensor", "expert_replicate", "expert_shard", "expert")
    experts = DeviceMesh(
        device.type, by_tensor.reshape(layout.pipeline, layout.tensor, *expert_shape), mesh_dim_names=names
    )
    tokens = dense["replicate", "shard"]._flatten("tokens").get_group()
    row_shape = (-1, layout.context, layout.tensor)
    rows = DeviceMesh(device.type, ranks.view(row_shape), mesh_dim_names=("row", "context", "tensor"))
    return Mesh(
        tokens=tokens,
        pipeline=dense.get_group("pipeline"),
        dense=dense["replicate", "shard"] if layout.replicate > 1 else dense["shard"],
        tensor=dense["tensor"],
        context=rows.get_group("context"),
        experts=experts["expert_replicate", "expert_shard", "expert"],
    )
