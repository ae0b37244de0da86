"""Products with a block-sparse operand or result, and their gradients: SDD, DSD, DDS and every transpose.

    sdd   values of (a @ b) at a topology             d values -> da = dsd(d values, b'), db = dds(a', d values)
    dsd   s @ dense, or s' @ dense                    d out -> d values = sdd(d out, dense'), d dense = dsd of s'
    dds   dense @ s, or dense @ s'                    (s' @ dense')', the same operator with a transposed result

A dense operand is transposed by passing its transposed view (any strides). Gradients are the same operators, so there are
second derivatives too; operands are saved, nothing else. Three implementations of one meaning: `reference` (masked
dense), `torch_path` (CPU), `triton_path` (GPU).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_triton.block_sparse import torch_path
from moe_triton.block_sparse.topology import PackedExperts, Topology, from_mask, from_widths
from moe_triton.compile_case import CompileCase

Backend = Literal["auto", "torch", "triton"]


def resolve_backend(backend: Backend, tensor: Tensor) -> str:
    """The path that `backend` means for this tensor: "auto" is torch on a CPU and triton elsewhere.

    Raises ValueError for triton on a CPU, unless its interpreter or the compile-only driver stands in for a device.
    """
    if backend == "auto":
        return "torch" if tensor.device.type == "cpu" else "triton"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend '{backend}' is unknown: use 'auto', 'torch' or 'triton'")
    if backend == "triton" and tensor.device.type == "cpu":
        from moe_triton.runtime import INTERPRETING, compiling_only

        if not INTERPRETING and not compiling_only():
            raise ValueError(
                "backend 'triton' needs a GPU, and these tensors are on the CPU: use backend 'torch', or set "
                "TRITON_INTERPRET=1 before triton is imported to run the kernels slowly in its interpreter"
            )
    return backend


def path(backend: str):
    """The module with `sdd` and `dsd`; triton is imported only where it is used, for it exists on Linux only."""
    if backend == "torch":
        return torch_path
    from moe_triton.block_sparse import triton_path

    return triton_path


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology, *, backend: Backend = "auto") -> Tensor:
    """Blocks of a @ b at a topology of shape (M, N): values [num_blocks, block, block], zeros outside the matrix.

    a_MK [M, K], b_KN [K, N] of one dtype, any strides. Raises ValueError if shapes do not fit.
    """
    shape = (a_MK.shape[0], b_KN.shape[1])
    if a_MK.shape[1] != b_KN.shape[0] or shape != topology.shape:
        raise ValueError(
            f"sdd: a {tuple(a_MK.shape)} times b {tuple(b_KN.shape)} at a topology of {topology.shape}: "
            "shapes must be [M, K], [K, N] and (M, N)"
        )
    _check_types("sdd", a_MK, b_KN)
    return _sdd(a_MK, b_KN, *topology.flat(), resolve_backend(backend, a_MK))


def dsd(
    values_NBB: Tensor, topology: Topology, dense_KN: Tensor, *, transpose: bool = False, backend: Backend = "auto"
) -> Tensor:
    """s @ dense, or sᵀ @ dense with transpose: [M, N], with s = (values, topology) of shape (M, K), or (K, M).

    Entries of values outside the matrix are ignored and get no gradient. Raises ValueError if shapes do not fit.
    """
    _check_values("dsd", values_NBB, topology)
    if dense_KN.shape[0] != topology.shape[0 if transpose else 1]:
        raise ValueError(
            f"dsd: s of shape {topology.shape}{', transposed,' if transpose else ''} times dense {tuple(dense_KN.shape)}: "
            "the dense operand needs as many rows as s has columns (rows if transposed)"
        )
    _check_types("dsd", values_NBB, dense_KN)
    return _dsd(values_NBB, dense_KN, *topology.flat(), transpose, False, resolve_backend(backend, dense_KN))


def dds(
    dense_MK: Tensor, values_NBB: Tensor, topology: Topology, *, transpose: bool = False, backend: Backend = "auto"
) -> Tensor:
    """dense @ s, or dense @ sᵀ with transpose: [M, N], with s = (values, topology) of shape (K, N), or (N, K).

    Entries of values outside the matrix are ignored and get no gradient. Raises ValueError if shapes do not fit.
    """
    _check_values("dds", values_NBB, topology)
    if dense_MK.shape[1] != topology.shape[1 if transpose else 0]:
        raise ValueError(
            f"dds: dense {tuple(dense_MK.shape)} times s of shape {topology.shape}{', transposed' if transpose else ''}: "
            "the dense operand needs as many columns as s has rows (columns if transposed)"
        )
    _check_types("dds", dense_MK, values_NBB)
    backend_name = resolve_backend(backend, dense_MK)
    return _dsd(values_NBB, dense_MK.t(), *topology.flat(), not transpose, True, backend_name)


def _check_values(op: str, values_NBB: Tensor, topology: Topology) -> None:
    wanted = (topology.num_blocks, topology.block, topology.block)
    if values_NBB.shape != wanted:
        raise ValueError(f"{op}: values have shape {tuple(values_NBB.shape)}, the topology has {wanted}")


def _check_types(op: str, left: Tensor, right: Tensor) -> None:
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"{op}: operands are {left.dtype} on {left.device} and {right.dtype} on {right.device}: "
            "cast or move one, both must agree"
        )


# Operators take tensors and numbers only, and no defaults: torch leaves a default argument out of the inputs that its
# autograd formula must answer for.


@torch.library.custom_op("moe_triton::block_sparse_sdd", mutates_args=())
def _sdd(a_MK: Tensor, b_KN: Tensor, indices: Sequence[Tensor], sizes: Sequence[int], backend: str) -> Tensor:
    return path(backend).sdd(a_MK, b_KN, Topology.of_flat(indices, sizes))


@_sdd.register_fake
def _(a_MK, b_KN, indices, sizes, backend):
    topology = Topology.of_flat(indices, sizes)
    return a_MK.new_empty(topology.num_blocks, topology.block, topology.block)


def _sdd_saves(ctx, inputs, output) -> None:
    a_MK, b_KN, indices, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(a_MK, b_KN, *indices)


def _sdd_backward(ctx, dvalues_NBB):
    a_MK, b_KN, *indices = ctx.saved_tensors
    arguments = (indices, ctx.sizes)
    da = db = None
    dvalues_NBB = dvalues_NBB.contiguous()
    if ctx.needs_input_grad[0]:
        da = _dsd(dvalues_NBB, b_KN.t(), *arguments, False, False, ctx.backend)
    if ctx.needs_input_grad[1]:
        db = _dsd(dvalues_NBB, a_MK, *arguments, True, True, ctx.backend)
    return da, db, [None] * len(indices), None, None


_sdd.register_autograd(_sdd_backward, setup_context=_sdd_saves)


@torch.library.custom_op("moe_triton::block_sparse_dsd", mutates_args=())
def _dsd(
    values_NBB: Tensor,
    dense_KN: Tensor,
    indices: Sequence[Tensor],
    sizes: Sequence[int],
    transpose: bool,
    transpose_out: bool,
    backend: str,
) -> Tensor:
    topology, module = Topology.of_flat(indices, sizes), path(backend)
    # sdd's values are contiguous; a parameter may be a view
    values_NBB = values_NBB.contiguous()
    return module.dsd(values_NBB, dense_KN, topology, transpose=transpose, transpose_out=transpose_out)


@_dsd.register_fake
def _(values_NBB, dense_KN, indices, sizes, transpose, transpose_out, backend):
    M, N = sizes[1 if transpose else 0], dense_KN.shape[1]
    return dense_KN.new_empty((N, M) if transpose_out else (M, N))


def _dsd_saves(ctx, inputs, output) -> None:
    values_NBB, dense_KN, indices, ctx.sizes, ctx.transpose, ctx.transpose_out, ctx.backend = inputs
    ctx.save_for_backward(values_NBB, dense_KN, *indices)


def _dsd_backward(ctx, dout):
    values_NBB, dense_KN, *indices = ctx.saved_tensors
    arguments = (indices, ctx.sizes)
    dout = dout.contiguous()  # an expanded gradient has strides of 0
    dout_MN = dout.t() if ctx.transpose_out else dout
    dvalues = ddense = None
    if ctx.needs_input_grad[0]:
        a, b = (dense_KN, dout_MN.t()) if ctx.transpose else (dout_MN, dense_KN.t())
        dvalues = _sdd(a, b, *arguments, ctx.backend)
    if ctx.needs_input_grad[1]:
        ddense = _dsd(values_NBB, dout_MN, *arguments, not ctx.transpose, False, ctx.backend)
    return dvalues, ddense, [None] * len(indices), None, None, None, None


_dsd.register_autograd(_dsd_backward, setup_context=_dsd_saves)


def compile_cases() -> list[CompileCase]:
    """Every product, forward and backward, at the widest and the narrowest block, whole and ragged."""

    def products(topology: Topology, dtype: torch.dtype, D: int) -> None:
        M, N = topology.shape
        a, b, x = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((M, D), (D, N), (D, M)))
        values = sdd(a, b, topology, backend="triton")
        dsd(values, topology, b.t(), backend="triton").sum().backward(retain_graph=True)
        dds(x, values, topology, backend="triton").sum().backward()

    def uniform(block: int):
        def run(dtype: torch.dtype, D: int, F: int) -> None:
            mask = torch.ones(2, -(-F // block), dtype=torch.bool)
            products(from_mask(mask, block, (2 * block, F)), dtype, D)

        return run

    def ragged(dtype: torch.dtype, D: int, F: int) -> None:
        products(from_widths((64, 30), PackedExperts.of((F, 64), 64)), dtype, D)

    ops = ("sdd", "dsd")
    blocks = [CompileCase(f"block_{block}", True, uniform(block), ops=ops, height=block) for block in (16, 32, 64, 128)]
    return [*blocks, CompileCase("ragged", True, ragged)]
