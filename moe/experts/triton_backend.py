"""The `triton` backend: grouped products of moe_triton, on a GPU, or in Python on the CPU under TRITON_INTERPRET=1."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from moe.errors import BackendError
from moe.experts.activation import Activation
from moe.routing import Dispatch
from moe_triton.block_sparse.topology import PackedExperts


def require(name: str = "triton") -> None:
    """Raise BackendError where no kernel can run: without triton, or without a GPU unless triton interprets."""
    if importlib.util.find_spec("triton") is None:
        raise BackendError(f"expert backend '{name}' needs the package triton (Linux only): install it, or use 'torch'")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"expert backend '{name}' needs a GPU, and torch sees none: use 'torch', or set TRITON_INTERPRET=1 to run the "
            "kernels in Python on the CPU (correct, and thousands of times slower)"
        )


def require_device(name: str, x_TD: Tensor) -> None:
    """Raise BackendError for tensors on the CPU, unless triton interprets."""
    if x_TD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"expert backend '{name}' was given tensors on the CPU: move the model to a GPU, use 'torch', or set "
            "TRITON_INTERPRET=1 to run the kernels in Python"
        )


def require_precision(precision: str) -> None:
    """Raise BackendError where this machine multiplies no operands of 8 bits and `precision` asks for them."""
    if precision == "native":
        return
    from moe_triton.low_precision.formats import fp8_dtype
    from moe_triton.runtime import target

    try:
        fp8_dtype(target())
    except ValueError as error:
        raise BackendError(f"expert backend 'triton': {error}") from error


def expert_ffn(
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    dispatch: Dispatch,
    packed: PackedExperts | None = None,
    precision: Literal["native", "fp8_row", "fp8_block"] = "native",
    activation: Activation | None = None,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type. Stacked weights only."""
    assert w_up_EDF.ndim == 3, "experts of different widths are refused when the layer is built"
    require_device("triton", x_TD)
    if precision != "native" and dispatch.weight_on == "input":
        raise BackendError(
            f"expert backend 'triton' has no products in '{precision}' for a router that weighs the experts' inputs: use "
            "model.moe.precision=native, or backend 'reference'"
        )
    # imported here because triton exists on Linux only
    from moe_triton import ffn, plan, tiles

    planned = plan.plan_from_order(dispatch.token_P, dispatch.row_P, dispatch.offsets_E1, num_tokens=x_TD.shape[0])
    weight_R = dispatch.weight_P.index_select(0, planned.reverse_R)
    weights, kind = tiles.Weights(w_gate_EDF, w_up_EDF, w_down_EFD, *(biases or ())), activation or Activation()
    return ffn.planned_ffn(
        x_TD,
        weights,
        weight_R,
        planned,
        activation=kind.name,
        alpha=kind.alpha,
        limit=kind.limit,
        weight_on=dispatch.weight_on,
        precision=precision,
    )
