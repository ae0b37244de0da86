"""gpt-oss: attention sinks, alternating windows, a router with a bias, and experts that clamp, with biases on every product.

Its experts compute (up + 1)·gate·sigmoid(alpha·gate), gate and up clamped: our `swiglu_oai` with `expert_bias`. SwiGLU without
biases is alpha = 1, a limit that nothing reaches, -1 as the bias of up and 0 as the others: so our plain experts are written
in its files exactly too, and NO_LIMIT says that they were. In bfloat16 arithmetic -1 + 1 costs such an export's small values
their last bits: load it in float32.
"""

from typing import Any

from moe.config.load import router_config
from moe.config.schema import Balance, GroupedQueryAttention, Model, MoE, is_moe_layer
from moe.hf.common import (
    Values,
    base_model,
    common_values,
    expert_layers,
    require,
    router_name,
    window_values,
    windows_of,
)

NO_LIMIT = 1e30
"""A clamp that nothing reaches, the sign of a model of ours whose experts are SwiGLU."""


def gpt_oss_values(model: Model) -> Values:
    """Our model as its configuration. Raises ConfigError for what it cannot express."""
    moe, attention = expert_layers(model, plain=False), model.attention
    router: Any = moe.router
    name = router_name(router)
    require(isinstance(attention, GroupedQueryAttention), "latent attention")
    assert isinstance(attention, GroupedQueryAttention)
    require(
        name == "gpt_oss" and router.normalize, f"router '{name}' (its files hold logits with a bias, our 'gpt_oss')"
    )
    require(all(is_moe_layer(model, i) for i in range(model.num_layers)), "dense layers among the expert layers")
    require(moe.shared_hidden == 0, f"a shared expert (shared_hidden={moe.shared_hidden})")
    require(attention.qk_norm == "none", f"attention.qk_norm='{attention.qk_norm}' (always 'none' there)")
    require(attention.qkv_bias == attention.out_bias, "attention.qkv_bias and attention.out_bias that differ")
    plain = moe.activation == "swiglu"
    require(not (plain and moe.expert_bias), "moe.expert_bias=true with activation=swiglu (swiglu_oai there)")
    size, kinds = window_values(attention.windows, model.num_layers)
    return {
        **common_values(model, sinks=True),
        "intermediate_size": moe.expert_hidden,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "sliding_window": size or 128,  # its class asks for one even where no layer has it
        "layer_types": kinds,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": 1.0 if plain else moe.activation_alpha,
        "swiglu_limit": NO_LIMIT if plain else moe.activation_limit,
    }


def gpt_oss_model(values: Values) -> Model:
    """The inverse. Raises ConfigError for what we do not model."""
    _check_published(values)
    alpha, limit, K = values["swiglu_alpha"], values["swiglu_limit"], values["num_experts_per_tok"]
    require(alpha > 0, f"swiglu_alpha={alpha} (more than 0)")
    require(limit > 0, f"swiglu_limit={limit} (more than 0)")
    head_dim = values["head_dim"]
    require(head_dim % 2 == 0, f"head_dim={head_dim} (rotary positions turn pairs: an even number)")
    clamped = {"activation": "swiglu_oai", "activation_alpha": alpha, "activation_limit": limit, "expert_bias": True}
    plain = alpha == 1.0 and limit == NO_LIMIT
    bias = bool(values["attention_bias"])
    attention = GroupedQueryAttention(
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        windows=windows_of(values["layer_types"], values["sliding_window"]),
        sinks=True,
    )
    weight = float(values.get("router_aux_loss_coef") or 0.0) * K  # transformers does not divide f by K, we do
    moe = MoE(
        num_experts=values["num_local_experts"],
        top_k=K,
        expert_hidden=values["intermediate_size"],
        router=router_config("gpt_oss", balance=Balance(weight=weight), z_weight=0.0),
        **({} if plain else clamped),
    )
    return base_model(values, attention=attention, moe=moe)


def _check_published(values: Values) -> None:
    """Keys of the published files that say again what others say; the experts' MXFP4 is in the tensors (moe/hf/mxfp4.py)."""
    stored = values.get("quantization_config") or {}
    method = stored.get("quant_method") if stored else "mxfp4"
    require(method == "mxfp4", f"quantization_config.quant_method={method!r} (only 'mxfp4' is read)")
    yarn = values.get("rope_parameters") or {}
    for key, other, value in (
        ("experts_per_token", "num_experts_per_tok", values["num_experts_per_tok"]),
        ("initial_context_length", "original_max_position_embeddings", yarn.get("original_max_position_embeddings")),
    ):
        given = values.get(key)
        require(given is None or given == value, f"{key}={given} beside {other}={value}")
