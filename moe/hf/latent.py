"""Families with multi-head latent attention: DeepSeek-V2 and DeepSeek-V3."""

from typing import Any

from moe.config.load import router_config
from moe.config.schema import LatentAttention, Model, MoE, RouterConfig
from moe.hf.common import Values, base_model, common_values, expert_layers, require, router_name

LATENT_EPS = 1e-6
"""What its latent norms add, whatever rms_norm_eps is."""


def _deepseek_values(model: Model) -> Values:
    moe, attention = expert_layers(model), model.attention
    require(isinstance(attention, LatentAttention), "grouped-query attention")
    assert isinstance(attention, LatentAttention)
    require(moe.every == 1, f"moe.every={moe.every} (only the first layers may be dense there)")
    require(not moe.dense_layers, f"moe.dense_layers={moe.dense_layers} (only the first layers may be dense there)")
    require(not moe.shared_gate, "moe.shared_gate=true")
    shared, rest = divmod(moe.shared_hidden, moe.expert_hidden)
    require(
        shared > 0 and rest == 0, f"shared_hidden={moe.shared_hidden}, no multiple of expert_hidden={moe.expert_hidden}"
    )
    eps = attention.norm_eps or model.norm_eps
    require(
        eps == LATENT_EPS, f"a norm_eps of {eps} in latent attention (always {LATENT_EPS}: model.attention.norm_eps)"
    )
    return {
        **common_values(model),
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_rank or None,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "moe_intermediate_size": moe.expert_hidden,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": shared,
        "num_experts_per_tok": moe.top_k,
        "first_k_dense_replace": moe.first_dense,
        "attention_bias": attention.bias,
    }


def _deepseek_model(values: Values, router: RouterConfig) -> Model:
    require(not values.get("mlp_bias"), "mlp_bias=true")
    F, E, rope = values["moe_intermediate_size"], values["n_routed_experts"], values["qk_rope_head_dim"]
    groups, shared = values.get("n_group") or 1, values.get("n_shared_experts") or 0
    require(rope % 2 == 0, f"qk_rope_head_dim={rope} (rotary positions turn pairs: an even number)")
    require(
        values.get("head_dim") in (None, rope),
        f"head_dim={values.get('head_dim')} (qk_rope_head_dim, {rope}, turns there)",
    )
    require(E % groups == 0, f"n_group={groups} does not divide n_routed_experts={E}")
    if getattr(router, "num_groups", 1) > 1:
        top = values["topk_group"]
        require(1 <= top <= groups, f"topk_group={top} (1 to n_group={groups})")
    require(shared > 0, "n_shared_experts=null (its classes always have a shared expert)")
    attention = LatentAttention(
        num_heads=values["num_attention_heads"],
        q_rank=values.get("q_lora_rank") or 0,
        kv_rank=values["kv_lora_rank"],
        nope_dim=values["qk_nope_head_dim"],
        rope_dim=rope,
        value_dim=values["v_head_dim"],
        bias=bool(values.get("attention_bias")),
        norm_eps=0.0 if values["rms_norm_eps"] == LATENT_EPS else LATENT_EPS,
    )
    moe = MoE(
        num_experts=E,
        top_k=values["num_experts_per_tok"],
        expert_hidden=F,
        shared_hidden=shared * F,
        first_dense=values["first_k_dense_replace"],
        router=router,
    )
    return base_model(values, attention=attention, moe=moe)


def deepseek_v2_values(model: Model) -> Values:
    router: Any = expert_layers(model).router
    name = router_name(router)
    if name == "deepseek_v2":
        require(not router.normalize, "router.normalize=true")
        grouped = router.num_groups > 1
        groups = {"topk_method": "group_limited_greedy", "n_group": router.num_groups, "topk_group": router.top_groups}
        scaling = router.scaling_factor
    else:
        require(
            name == "topk" and router.score == "softmax" and router.gate == "full",
            f"router '{name}' with these settings",
        )
        require(router.capacity_factor == 0, f"router.capacity_factor={router.capacity_factor} (dropless there)")
        grouped, groups, scaling = False, {}, router.scaling_factor
    return {
        **_deepseek_values(model),
        **(groups if grouped else {"topk_method": "greedy", "n_group": None, "topk_group": None}),
        "routed_scaling_factor": scaling,
        "norm_topk_prob": False,
    }


def deepseek_v2_model(values: Values) -> Model:
    """The inverse. norm_topk_prob says nothing: transformers' class leaves it unread, and no published model sets it."""
    method = values.get("topk_method")
    require(method in ("greedy", "group_limited_greedy"), f"topk_method={method!r}")
    limited = method == "group_limited_greedy"
    router = router_config(
        "deepseek_v2",
        num_groups=values["n_group"] if limited else 1,
        top_groups=values["topk_group"] if limited else 1,
        scaling_factor=float(values["routed_scaling_factor"]),
    )
    return _deepseek_model(values, router)


def deepseek_v3_values(model: Model) -> Values:
    router: Any = expert_layers(model).router
    name = router_name(router)
    require(name in ("loss_free", "smebu"), f"router '{name}' (its files hold sigmoid scores and a selection bias)")
    require(getattr(router, "score", "sigmoid") == "sigmoid", "router.score other than 'sigmoid'")
    require(getattr(router, "capacity_factor", 0) == 0, "router.capacity_factor above 0")
    return {
        **_deepseek_values(model),
        "n_group": getattr(router, "num_groups", 1),
        "topk_group": getattr(router, "top_groups", 1),
        "routed_scaling_factor": getattr(router, "scaling_factor", 1.0),
        "norm_topk_prob": getattr(router, "normalize", True),
        "rope_interleave": True,
    }


def deepseek_v3_model(values: Values) -> Model:
    router = router_config(
        "loss_free",
        num_groups=values["n_group"],
        top_groups=values["topk_group"],
        normalize=bool(values["norm_topk_prob"]),
        scaling_factor=float(values["routed_scaling_factor"]),
    )
    return _deepseek_model(values, router)
