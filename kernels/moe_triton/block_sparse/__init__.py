"""Block-sparse matrices: topologies, products with gradients, pruned linear layers, experts of different widths.

| file | what is in it |
| --- | --- |
| topology.py | which blocks are there, from a mask, a pruned matrix, widths of experts, or a routing without host sync |
| products.py | sdd, dsd, dds with gradients, as torch.library operators |
| torch_path.py, triton_path.py | the two products everything is made of: for CPUs, and as Triton kernels |
| linear.py | BlockSparseLinear: a layer whose weight is pruned by blocks |
| ffn.py, glu_kernels.py | the expert FFN for experts of different widths, and its activation on blocks |
| reference.py | what all of it means: masked dense products and a loop over experts |

Triton is imported by triton_path and glu_kernels only, at their first use.
"""

from moe_triton.block_sparse import ffn, products
from moe_triton.block_sparse.ffn import variable_width_ffn
from moe_triton.block_sparse.linear import BlockSparseLinear
from moe_triton.block_sparse.products import dds, dsd, sdd
from moe_triton.block_sparse.topology import (
    PackedExperts,
    Topology,
    from_mask,
    from_pruning,
    from_routing,
    from_widths,
)
from moe_triton.compile_case import CompileCase

__all__ = [
    "BlockSparseLinear",
    "PackedExperts",
    "Topology",
    "dds",
    "dsd",
    "from_mask",
    "from_pruning",
    "from_routing",
    "from_widths",
    "sdd",
    "variable_width_ffn",
]


def compile_cases() -> list[CompileCase]:
    """The compile gate's cases of every operator here."""
    return [*products.compile_cases(), *ffn.compile_cases()]
