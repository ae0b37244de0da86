"""What all families' configurations share: widths, windows, and the refusal of what cannot be said."""

from typing import Any

from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, RouterConfig, ffn_hidden, is_moe_layer
from moe.hf.refuse import Values, require
from moe.hf.rope import rope_values, rotary_of


def router_name(router: RouterConfig) -> str:
    """The router's name in our registry."""
    return type(router).__module__.rsplit(".", 1)[-1]


def expert_layers(model: Model, *, plain: bool = True) -> MoE:
    """The settings of a model's expert layers. `plain`: whether the family's experts are SwiGLU without biases."""
    require(model.moe is not None, "a dense model")
    assert model.moe is not None
    require(not model.moe.expert_widths, "widths of single experts (moe.expert_widths)")
    if plain:
        require(model.moe.activation == "swiglu", f"moe.activation={model.moe.activation} (SwiGLU there)")
        require(not model.moe.expert_bias, "moe.expert_bias=true (none there)")
    each = model.moe.num_experts_per_layer
    require(len(set(each)) <= 1, f"layers of different numbers of experts (moe.num_experts_per_layer={each})")
    require(not model.moe.latent_dim, f"experts in a latent space (moe.latent_dim={model.moe.latent_dim})")
    return model.moe


def common_values(model: Model, *, sinks: bool = False) -> Values:
    """Settings that every family has. `sinks`: whether its attention has them, always."""
    attention = model.attention
    require(model.rotary.fraction == 1, f"rotary.fraction={model.rotary.fraction} is not 1")
    if isinstance(attention, GroupedQueryAttention):
        there = "always with them there" if sinks else "none there"
        require(attention.sinks == sinks, f"attention.sinks={attention.sinks} ({there})".replace("True", "true"))
    dense = {ffn_hidden(model, i) for i in range(model.num_layers) if not is_moe_layer(model, i)}
    require(len(dense) <= 1, f"dense layers of different ffn_hidden {sorted(dense)}")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": dense.pop() if dense else model.ffn_hidden,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "hidden_act": "silu",
        "rope_parameters": rope_values(model, latent=isinstance(attention, LatentAttention)),
    }


def windows_of(kinds: list[str], size: int | None) -> tuple[int, ...]:
    """Attention windows of layers of these `layer_types`, as the shortest tuple that repeats to them."""
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    require(not unknown, f"layer_types {unknown}")
    sliding = "sliding_attention" in kinds
    require(not sliding or bool(size), f"sliding_attention with sliding_window={size}")
    windows = tuple(size or 0 if kind == "sliding_attention" else 0 for kind in kinds)
    period = next(n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
    return windows[:period]


def window_values(windows: tuple[int, ...], layers: int) -> tuple[int | None, list[str]]:
    """The inverse: the one size of all windows, or None, and the `layer_types`."""
    each = [windows[i % len(windows)] for i in range(layers)]
    sizes = set(each) - {0}
    require(len(sizes) <= 1, f"attention.windows={windows} (one size there)")
    return (sizes.pop() if sizes else None), ["sliding_attention" if window else "full_attention" for window in each]


def base_model(values: Values, **changes: Any) -> Model:
    act = values.get("hidden_act")
    require(act in ("silu", "swish"), f"hidden_act={act!r} (only 'silu' is modelled)")
    settings: Values = {
        "vocab_size": values["vocab_size"],
        "dim": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "ffn_hidden": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "tied_head": values["tie_word_embeddings"],
        "rotary": rotary_of(values, latent=isinstance(changes["attention"], LatentAttention)),
    }
    return Model(**{**settings, **changes})
