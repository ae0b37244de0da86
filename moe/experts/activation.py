"""The experts' activation for the `torch` backend, forward and backward, on blocks of pre-activations and in given memory.

    swiglu        h = silu(g)·u
    swiglu_oai    h = (u' + 1)·g'·σ(alpha·g'),  g' = min(g, limit), u' = u clamped to ±limit  (gpt-oss, arXiv 2508.10925)

Of the second, with v = g'·σ(alpha·g'): dv/dg' = σ + alpha·v·(1 - σ), and what a clamp cuts off has gradient 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


class Activation(NamedTuple):
    """An activation's name and its settings, which `swiglu` has none of."""

    name: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0


def activate(kind: Activation, gate: Tensor, up: Tensor, hidden: Tensor, spare: Tensor) -> Tensor:
    """Write the hidden values of pre-activations [n, F] into `hidden`, and return it; `spare` [n, F] is overwritten."""
    if kind.name == "swiglu":
        return _silu(gate, out=hidden).mul_(up)
    return _gated(kind, gate, hidden, spare).mul_(_raised(kind, up, spare))


def gate_values(kind: Activation, gate: Tensor, act: Tensor, spare: Tensor) -> Tensor:
    """What the gate multiplies up by, silu(g) or v, into `act`."""
    return _silu(gate, out=act) if kind.name == "swiglu" else _gated(kind, gate, act, spare)


def multiplied(kind: Activation, act: Tensor, up: Tensor, hidden: Tensor) -> Tensor:
    """Hidden values of `gate_values` and up, into `hidden`."""
    if kind.name == "swiglu":
        return torch.mul(act, up, out=hidden)
    return _raised(kind, up, hidden).mul_(act)


def input_gradients(kind: Activation, gate: Tensor, up: Tensor, act: Tensor, dhidden: Tensor, spare: Tensor) -> None:
    """Turn `act`, the `gate_values`, into the gradient of up, and `dhidden` into that of gate. All [n, F]."""
    if kind.name == "swiglu":
        act.mul_(dhidden)
        _silu_backward(dhidden.mul_(up), gate, grad_input=dhidden)
        return
    clamped = gate.clamp(max=kind.limit)
    sigmoid = (kind.alpha * clamped).sigmoid_()
    slope = torch.neg(sigmoid, out=clamped).add_(1).mul_(act).mul_(kind.alpha).add_(sigmoid)
    act.mul_(dhidden).masked_fill_(up.abs() > kind.limit, 0)
    dhidden.mul_(_raised(kind, up, spare)).mul_(slope).masked_fill_(gate > kind.limit, 0)


def _gated(kind: Activation, gate: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """g'·σ(alpha·g')."""
    torch.clamp(gate, max=kind.limit, out=out)
    torch.mul(out, kind.alpha, out=spare)
    return out.mul_(spare.sigmoid_())


def _raised(kind: Activation, up: Tensor, out: Tensor) -> Tensor:
    """u' + 1."""
    return torch.clamp(up, -kind.limit, kind.limit, out=out).add_(1)
