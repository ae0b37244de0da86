"""The activations between an expert's two products, and their gradients, for use inside kernels.

`activate` gives the hidden value; `activate_bwd` recomputes it beside the gradients of the pre-activations, so that no
kernel ever reads or keeps it. Gated activations take (gate, up); the others take `up` alone and ignore `gate`.
"""

import triton
import triton.language as tl

GATED_ACTIVATIONS: tuple[str, ...] = ("swiglu", "geglu", "swiglu_oai")
"""silu(gate) · up; gelu(gate) · up, with the exact gelu; and (u + 1) · g · sigmoid(alpha · g), with g = min(gate, limit) and
u = up clamped to ±limit (gpt-oss)."""
PLAIN_ACTIVATIONS: tuple[str, ...] = ("relu2", "gelu", "silu")
"""relu(up)², gelu(up), silu(up)."""


_ALPHA, _LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)
"""For kernels that have another activation and pass none."""


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
def _clamped(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x within bounds, and NaN where it is NaN, which a minimum would hide."""
    x = tl.where(x > HIGH, HIGH, x)
    return tl.where(x < LOW, LOW, x)


@triton.jit
def _sigmoid_gate(gate, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """(v, dv/dgate) of v = g·σ(alpha·g): σ + alpha·v·(1 - σ), and 0 beyond the limit."""
    g = tl.where(gate > LIMIT, LIMIT, gate)
    sigmoid = tl.sigmoid(ALPHA * g)
    value = g * sigmoid
    return value, tl.where(gate > LIMIT, 0.0, sigmoid + ALPHA * value * (1 - sigmoid))


@triton.jit
def activate(
    gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr = _ALPHA, LIMIT: tl.constexpr = _LIMIT
):
    """The hidden value of a tile: f(gate) · up, or f(up); ALPHA and LIMIT are of swiglu_oai."""
    if ACTIVATION == "swiglu_oai":
        value, _ = _sigmoid_gate(gate, ALPHA, LIMIT)  # pyright: ignore[reportGeneralTypeIssues]
        return value * (_clamped(up, -LIMIT, LIMIT) + 1)
    elif GATED:
        value, _ = _function(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value * up
    else:
        value, _ = _function(up, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value


@triton.jit
def activate_bwd(
    gate,
    up,
    dhidden,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr = _ALPHA,
    LIMIT: tl.constexpr = _LIMIT,
):
    """(hidden, dgate, dup): d(f(g)·u) = f'(g)·u dg + f(g) du; without a gate dup = f'(up)·dhidden and dgate is unused."""
    if ACTIVATION == "swiglu_oai":
        value, slope = _sigmoid_gate(gate, ALPHA, LIMIT)  # pyright: ignore[reportGeneralTypeIssues]
        raised = _clamped(up, -LIMIT, LIMIT) + 1
        return value * raised, dhidden * raised * slope, tl.where(tl.abs(up) > LIMIT, 0.0, dhidden * value)
    elif GATED:
        value, slope = _function(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        return value * up, dhidden * up * slope, dhidden * value
    else:
        value, slope = _function(up, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues]
        dup = dhidden * slope
        return value, dup, dup
