"""The rotary embedding in both directions: transformers' `rope_parameters` and our `Rotary`.

transformers multiplies cosines and sines by an attention factor; DeepSeek's classes also scale the softmax by mscale_all_dim,
the others do not. Ours scale by temperature(mscale) / temperature(mscale_all_dim), and the softmax by the square of the latter
in every kind of attention (moe/attention.py). Where the whole head is rotated, only temperature(mscale) is left of the two.
"""

import math

from moe.attention import yarn_temperature
from moe.config.schema import Llama3Scaling, Model, Rotary, Yarn
from moe.hf.refuse import Values, require

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    | {"attention_factor", "truncate"},
}
"""Settings of each rope_type, beyond rope_theta."""


def rope_values(model: Model, *, latent: bool) -> Values:
    """Our rotary embedding as rope_parameters."""
    rotary = model.rotary
    if rotary.llama3 is not None:
        llama3 = rotary.llama3
        return {
            "rope_type": "llama3",
            "rope_theta": rotary.base,
            "factor": llama3.factor,
            "original_max_position_embeddings": llama3.original_length,
            "low_freq_factor": llama3.low_freq_factor,
            "high_freq_factor": llama3.high_freq_factor,
        }
    if rotary.linear != 1:
        return {"rope_type": "linear", "rope_theta": rotary.base, "factor": rotary.linear}
    if rotary.yarn is None:
        return {"rope_type": "default", "rope_theta": rotary.base}
    yarn = rotary.yarn
    return {
        "rope_type": "yarn",
        "rope_theta": rotary.base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **({} if yarn.truncate else {"truncate": False}),
        **_temperatures(yarn, latent),
    }


def _temperatures(yarn: Yarn, latent: bool) -> Values:
    """The attention factor, in words that leave it as exact as it is."""
    over = yarn.mscale_all_dim if latent else 0.0
    if over and yarn.mscale:
        return {"mscale": yarn.mscale, "mscale_all_dim": over}
    if yarn.mscale == 1 and not over:
        return {}  # the default: 0.1·ln(factor) + 1
    factor = yarn_temperature(yarn.factor, yarn.mscale) / yarn_temperature(yarn.factor, over)
    return {"attention_factor": factor, **({"mscale_all_dim": over} if over else {})}


def rotary_of(values: Values, *, latent: bool) -> Rotary:
    """The inverse. Raises ConfigError for a kind, or a setting, that we do not model."""
    rope = dict(values.get("rope_parameters") or {})
    kind, base = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10_000.0))
    require(kind in _KEYS, f"rope_type='{kind}' (modelled: {', '.join(_KEYS)})")
    share = rope.get("partial_rotary_factor", 1.0)
    require(share == 1.0, f"partial_rotary_factor={share}")
    unknown = sorted(set(rope) - _KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    require(not unknown, f"rope_parameters {unknown} with rope_type='{kind}'")
    if kind == "default":
        return Rotary(base=base)
    if kind == "linear":
        return Rotary(base=base, linear=float(rope["factor"]))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            original_length=int(rope["original_max_position_embeddings"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
        )
        return Rotary(base=base, llama3=scaling)
    return Rotary(base=base, yarn=_yarn(rope, values, latent))


def _yarn(rope: Values, values: Values, latent: bool) -> Yarn:
    length = int(rope["original_max_position_embeddings"])
    stretch = rope.get("factor")
    stretch = float(stretch) if stretch is not None else values["max_position_embeddings"] / length
    over = float(rope.get("mscale_all_dim") or 0.0)
    return Yarn(
        factor=stretch,
        original_length=length,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        mscale=_mscale(rope, stretch, over, latent),
        mscale_all_dim=over if latent else 0.0,
        truncate=bool(rope.get("truncate", True)),
    )


def _mscale(rope: Values, stretch: float, over: float, latent: bool) -> float:
    """The coefficient whose temperature is the attention factor, times the temperature that the softmax is scaled by."""
    mscale, factor = rope.get("mscale"), rope.get("attention_factor")
    both = bool(mscale and over)
    if factor is None and both and latent:
        return float(mscale)  # pyright: ignore[reportArgumentType]
    if factor is None and not over:
        return 1.0
    if factor is None:
        factor = yarn_temperature(stretch, float(mscale or 1.0) if both else 1.0)
        factor /= yarn_temperature(stretch, over) if both else 1.0
    require(factor > 0, f"attention_factor={factor} (above 0)")
    temperature = factor * (yarn_temperature(stretch, over) if latent else 1.0)
    if stretch <= 1:
        require(temperature == 1.0, f"attention_factor={factor} without an extension (factor={stretch})")
        return 1.0
    found = (temperature - 1.0) / (0.1 * math.log(stretch))
    return found if abs(found) > 1e-9 else 0.0
