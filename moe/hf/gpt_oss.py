"""gpt-oss: attention sinks, alternating windows, a router with a bias. Its experts' activation and biases are not ours.

Its experts compute (up + 1)·gate·sigmoid(alpha·gate), gate and up clamped, with biases on all products. Ours are SwiGLU, which is
alpha = 1, no clamp, a bias of -1 on up and none elsewhere: so our models are written in its files exactly, and of its models
those are read. The published ones (alpha 1.702, limit 7, learned biases) are refused by name. In bfloat16 arithmetic -1 + 1
costs small values their last bits: load an export in float32.
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
"""A clamp that nothing reaches."""


def gpt_oss_values(model: Model) -> Values:
    """Our model as its configuration. Raises ConfigError for what it cannot express."""
    moe, attention = expert_layers(model), model.attention
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
        "swiglu_alpha": 1.0,
        "swiglu_limit": NO_LIMIT,
    }


def gpt_oss_model(values: Values) -> Model:
    """The inverse. Raises ConfigError for what we do not model."""
    alpha, limit, K = values["swiglu_alpha"], values["swiglu_limit"], values["num_experts_per_tok"]
    require(alpha == 1.0, f"swiglu_alpha={alpha} (our experts are SwiGLU: 1)")
    require(limit >= NO_LIMIT, f"swiglu_limit={limit} (our experts do not clamp: {NO_LIMIT:g} or more)")
    bias = bool(values["attention_bias"])
    attention = GroupedQueryAttention(
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
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
    )
    return base_model(values, attention=attention, moe=moe)
