"""What all families' configurations share: widths, the rotary embedding, and the refusal of what cannot be said."""

from typing import Any

from moe.config.schema import GroupedQueryAttention, Model, MoE, Rotary, RouterConfig, Yarn, ffn_hidden, is_moe_layer
from moe.errors import ConfigError

Values = dict[str, Any]
"""A family's configuration, as config.json has it."""


def require(condition: bool, what: str) -> None:
    """Raise ConfigError with `what` there is that the other side cannot express, unless the condition holds."""
    if not condition:
        raise ConfigError(what)


def router_name(router: RouterConfig) -> str:
    """The router's name in our registry."""
    return type(router).__module__.rsplit(".", 1)[-1]


def expert_layers(model: Model) -> MoE:
    require(model.moe is not None, "a dense model")
    assert model.moe is not None
    require(not model.moe.expert_widths, "widths of single experts (moe.expert_widths)")
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
        "rope_parameters": rope_values(model.rotary),
    }


def rope_values(rotary: Rotary) -> Values:
    yarn = rotary.yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": rotary.base}
    return {
        "rope_type": "yarn",
        "rope_theta": rotary.base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def rotary_of(values: Values) -> Rotary:
    rope = dict(values.get("rope_parameters") or {})
    kind, base = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10_000.0))
    if kind == "default":
        require(
            rope.get("partial_rotary_factor", 1.0) == 1.0, f"partial_rotary_factor={rope.get('partial_rotary_factor')}"
        )
        return Rotary(base=base)
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    unknown = sorted(set(rope) - known - {"mscale", "mscale_all_dim", "truncate"})
    require(kind != "yarn" or rope.get("truncate", True), "rope_parameters truncate=false")
    require(kind == "yarn", f"rope_type='{kind}' (only 'default' and 'yarn' are modelled)")
    require(not unknown, f"rope_parameters {unknown}")
    return Rotary(
        base=base,
        yarn=Yarn(
            factor=float(rope["factor"]),
            original_length=int(rope["original_max_position_embeddings"]),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            mscale=float(rope.get("mscale") or 1.0),
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        ),
    )


def base_model(values: Values, **changes: Any) -> Model:
    require(values.get("hidden_act") == "silu", f"hidden_act={values.get('hidden_act')!r} (only 'silu' is modelled)")
    settings: Values = {
        "vocab_size": values["vocab_size"],
        "dim": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "ffn_hidden": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "tied_head": values["tie_word_embeddings"],
        "rotary": rotary_of(values),
    }
    return Model(**{**settings, **changes})
