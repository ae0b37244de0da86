"""Block-sparse matrices: topologies, products with gradients, pruned linear layers, experts of different widths.

| file | what is in it |
| --- | --- |
| topology.py | which blocks are there, from a mask, a pruned matrix, widths of experts, or a routing without host sync |
| products.py | sdd, dsd, dds with gradients, as torch.library operators |
| torch_path.py, triton_path.py | the two products everything is made of: for CPUs, and as Triton kernels |
| linear.py | BlockSparseLinear: a layer whose weight is pruned by blocks |
| ffn.py, glu_kernels.py | the expert FFN for experts of different widths, and its activation on blocks |
| reference.py | what all of it means: masked dense products and a loop over experts |

A name is imported from its file when it is first asked for; Triton by triton_path and glu_kernels only, at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


_HOMES = {
    "BlockSparseLinear": "linear",
    "PackedExperts": "topology",
    "Topology": "topology",
    "dds": "products",
    "dsd": "products",
    "from_mask": "topology",
    "from_pruning": "topology",
    "from_routing": "topology",
    "from_widths": "topology",
    "sdd": "products",
    "variable_width_ffn": "ffn",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_triton.block_sparse' has no attribute {name!r}")
    return getattr(import_module(f"moe_triton.block_sparse.{_HOMES[name]}"), name)


def compile_cases() -> "list[CompileCase]":
    """The compile gate's cases of every operator here."""
    from moe_triton.block_sparse import ffn, products

    return [*products.compile_cases(), *ffn.compile_cases()]
