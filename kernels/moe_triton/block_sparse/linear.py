"""A linear layer whose weight is block-sparse: fewer weights, fewer FLOPs, on CPUs and GPUs.

Unstructured sparsity saves no time on matrix units or in cache lines; whole blocks do. The price is accuracy at equal
sparsity, which tests/test_block_sparse.py measures beside a dense layer and an unstructured mask.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_triton.block_sparse import products, torch_path
from moe_triton.block_sparse.topology import Topology, blocks_of, from_mask, from_pairs

_INDICES = ("row_offsets", "column_offsets", "row_index_t", "block_index_t", "row_bounds", "column_bounds")
"""Buffers that follow from the two that checkpoints hold."""


class BlockSparseLinear(nn.Module):
    """y = x Wᵀ + b, with W [out_features, in_features] kept as the blocks of a topology.

    Parameters: `values` [num_blocks, block, block] and `bias`. The state dict holds those and the place of each block
    (`row_index`, `column_index`), so that a layer loads one with other blocks if it has as many of them.
    """

    row_index: Tensor
    column_index: Tensor

    def __init__(
        self,
        topology: Topology,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        backend: products.Backend = "auto",
    ) -> None:
        """topology: of W, with uniform blocks (from_mask, from_pruning). Values start as nn.Linear's would, by their fan-in.

        backend: "torch", "triton", or "auto": triton where there is a GPU.
        """
        super().__init__()
        if not (topology.uniform_rows and topology.uniform_columns):
            raise ValueError("a weight's blocks must be uniform: build its topology with from_mask or from_pruning")
        self.out_features, self.in_features = topology.shape
        self.block = topology.block
        self.backend: products.Backend = backend
        device = topology.row_index.device
        self.register_buffer("row_index", topology.row_index.clone())
        self.register_buffer("column_index", topology.column_index.clone())
        self._set_indices(topology)
        self.values = nn.Parameter(torch.empty(topology.num_blocks, self.block, self.block, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_load_state_dict_post_hook(_rebuild_indices)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/√(fan-in), as nn.Linear, where the fan-in of an output is the number of its weights that exist."""
        topology = self.topology
        inside = torch_path.inside(topology)
        # a block's first row always exists, so it counts the block's columns inside the matrix
        inputs_N = inside[:, 0].sum(1).float()
        inputs_R = inputs_N.new_zeros(topology.num_block_rows).index_add(0, topology.row_index, inputs_N)
        bound_R = inputs_R.clamp(min=1).rsqrt()
        bound_N = bound_R.index_select(0, topology.row_index).to(self.values.dtype)
        self.values.uniform_(-1, 1).mul_(bound_N.view(-1, 1, 1)).mul_(inside)
        if self.bias is not None:
            bound_out = bound_R.repeat_interleave(self.block)[: self.out_features]
            self.bias.uniform_(-1, 1).mul_(bound_out.to(self.bias.dtype))

    @staticmethod
    def from_dense(
        weight: Tensor,
        block: int,
        sparsity: float,
        score: Literal["magnitude", "random"] = "magnitude",
        *,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: products.Backend = "auto",
    ) -> "BlockSparseLinear":
        """Prune a dense weight [out_features, in_features] to the best of its blocks, at least one.

        sparsity: share of blocks to drop, 0 to below 1. "magnitude" keeps the blocks with the largest sum of squares, which
        is the pruned matrix nearest to the dense one; "random" keeps any. Ties go to the earlier block.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity ({sparsity}) is the share of blocks to drop: it must be at least 0 and less than 1"
            )
        blocks_RCBB = blocks_of(weight.detach(), block)
        scores_RC = _SCORES[score](blocks_RCBB, generator)
        keep = max(round(scores_RC.numel() * (1 - sparsity)), 1)
        best = scores_RC.flatten().argsort(descending=True, stable=True)[:keep]
        mask_RC = torch.zeros_like(scores_RC, dtype=torch.bool).flatten().index_fill(0, best, True).view_as(scores_RC)
        topology = from_mask(mask_RC, block, (weight.shape[0], weight.shape[1]))
        layer = BlockSparseLinear(topology, bias=bias is not None, dtype=weight.dtype, backend=backend)
        with torch.no_grad():
            layer.values.copy_(blocks_RCBB[mask_RC])
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def topology(self) -> Topology:
        """The blocks of the weight, on the device of the layer."""
        return Topology(
            shape=(self.out_features, self.in_features),
            block=self.block,
            row_index=self.row_index,
            column_index=self.column_index,
            uniform_rows=True,
            uniform_columns=True,
            **{name: getattr(self, name) for name in _INDICES},
        )

    def to_dense(self) -> Tensor:
        """The weight [out_features, in_features] with zeros where no block is; differentiable."""
        rows, columns = self._blocks
        place = self.row_index.long() * columns + self.column_index
        blocks = self.values.new_zeros(rows * columns, self.block, self.block).index_copy(0, place, self.values)
        dense = blocks.view(rows, columns, self.block, self.block).transpose(1, 2).flatten(2).flatten(0, 1)
        return dense[: self.out_features, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        x_TK = x.reshape(-1, self.in_features)
        y_TM = products.dds(x_TK, self.values, self.topology, transpose=True, backend=self.backend)
        if self.bias is not None:
            y_TM = y_TM + self.bias
        return y_TM.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        rows, columns = self._blocks
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"blocks={self.row_index.shape[0]} of {rows * columns}, bias={self.bias is not None}"
        )

    @property
    def _blocks(self) -> tuple[int, int]:
        """Block rows and block columns of the weight."""
        return -(-self.out_features // self.block), -(-self.in_features // self.block)

    def _set_indices(self, topology: Topology) -> None:
        for name in _INDICES:
            self.register_buffer(name, getattr(topology, name), persistent=False)


def _rebuild_indices(layer: nn.Module, incompatible: Any) -> None:
    """After a state dict is loaded: what follows from its blocks' places. Raises ValueError if those do not fit the layer."""
    assert isinstance(layer, BlockSparseLinear)
    rows, columns = layer._blocks
    place = layer.row_index.long() * columns + layer.column_index
    fits = (layer.row_index < rows) & (layer.column_index < columns) & (layer.column_index >= 0)
    if not bool(fits.all() & (place.diff() > 0).all() & (place[:1] >= 0).all()):  # host sync: loading
        raise ValueError(
            f"the loaded blocks do not fit a weight of {layer.out_features}×{layer.in_features} with {rows}×{columns} blocks "
            f"of {layer.block}: row_index and column_index must be below these and ascend, by row and then by column"
        )
    layer._set_indices(
        from_pairs(layer.row_index, layer.column_index, layer.block, (layer.out_features, layer.in_features))
    )


def _magnitude(blocks_RCBB: Tensor, generator: torch.Generator | None) -> Tensor:
    return blocks_RCBB.float().square().sum((2, 3))


def _random(blocks_RCBB: Tensor, generator: torch.Generator | None) -> Tensor:
    # drawn on the CPU, so that a seed means the same blocks on every device
    return torch.rand(blocks_RCBB.shape[:2], generator=generator).to(blocks_RCBB.device)


_SCORES: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {"magnitude": _magnitude, "random": _random}
