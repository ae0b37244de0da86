"""The activations between an expert's two products, and their gradients, for use inside kernels.

`activate` gives the hidden value; `activate_bwd` recomputes it beside the gradients of the pre-activations, so that no
kernel ever reads or keeps it. Gated activations take (gate, up); the others take `up` alone and ignore `gate`.
"""

import triton
import triton.language as tl

GATED_ACTIVATIONS: tuple[str, ...] = ("swiglu", "geglu")
"""silu(gate) · up and gelu(gate) · up, with the exact gelu."""
PLAIN_ACTIVATIONS: tuple[str, ...] = ("relu2", "gelu", "silu")
"""relu(up)², gelu(up), silu(up)."""


@triton.jit
def _silu(x):
    """(f(x), f'(x)): x·σ and σ + x·σ·(1 - σ)."""
    sigmoid = tl.sigmoid(x)
    return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid)


@triton.jit
def _gelu(x):
    """(f(x), f'(x)): x·Φ and Φ + x·φ, of the normal distribution's Φ and density φ."""
    cumulative = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * cumulative, cumulative + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _relu2(x):
    """(f(x), f'(x)): relu(x)² and 2·relu(x)."""
    positive = tl.maximum(x, 0.0)
    return positive * positive, 2 * positive


@triton.jit
def _function(x, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation's scalar function."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        return _silu(x)
    elif ACTIVATION == "relu2":
        return _relu2(x)
    else:
        return _gelu(x)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """The hidden value of a tile: f(gate) · up, or f(up)."""
    if GATED:
        value, _ = _function(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value * up
    else:
        value, _ = _function(up, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value


@triton.jit
def activate_bwd(gate, up, dhidden, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """(hidden, dgate, dup): d(f(g)·u) = f'(g)·u dg + f(g) du; without a gate dup = f'(up)·dhidden and dgate is unused."""
    if GATED:
        value, slope = _function(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value * up, dhidden * up * slope, dhidden * value
    else:
        value, slope = _function(up, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        dup = dhidden * slope
        return value, dup, dup
