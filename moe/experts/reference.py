"""The `reference` backend: `moe_triton.reference`, the float32 specification."""

from functools import partial

from torch import Tensor

from moe.experts.activation import Activation
from moe.routing import Dispatch
from moe_triton import reference
from moe_triton.block_sparse.reference import variable_width_ffn
from moe_triton.block_sparse.topology import PackedExperts


def expert_ffn(
    x_TD: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dispatch: Dispatch,
    packed: PackedExperts | None = None,
    precision: str = "native",
    activation: Activation | None = None,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type. Weights stacked or packed.

    Another precision rounds the products' operands as 8-bit products do.
    """
    rows = (dispatch.token_P, dispatch.weight_P, dispatch.offsets_E1)
    kind = activation or Activation()
    if w_up.ndim == 3:
        b_gate, b_up, b_down = biases or (None, None, None)
        return reference.expert_ffn(
            x_TD,
            w_gate,
            w_up,
            w_down,
            *rows,
            weight_on=dispatch.weight_on,
            activation=kind.name,
            alpha=kind.alpha,
            limit=kind.limit,
            b_gate_EF=b_gate,
            b_up_EF=b_up,
            b_down_ED=b_down,
            precision=precision,
        )
    assert packed is not None and biases is None, "packed weights need their widths, and have no biases"
    weights = (w_gate.t(), w_up.t(), w_down)
    if kind.name == "swiglu":
        return variable_width_ffn(x_TD, *weights, *rows, packed.widths, weight_on=dispatch.weight_on)
    clamped = partial(reference.swiglu_oai, alpha=kind.alpha, limit=kind.limit)
    return variable_width_ffn(x_TD, *weights, *rows, packed.widths, weight_on=dispatch.weight_on, hidden_of=clamped)
