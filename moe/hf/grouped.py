"""Families with grouped-query attention: Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE, and dense Llama and Qwen3."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from moe.config.load import router_config
from moe.config.schema import Balance, GroupedQueryAttention, Model, MoE, RouterConfig, is_moe_layer
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

QKNorm = Literal["none", "head", "full"]
Windows = Literal["none", "all", "switched", "layers"]
"""Which windows a family has: none; one size in all layers (`sliding_window`; "switched": with `use_sliding_window`); or one size
in the layers that `layer_types` names."""


def grouped_values(
    model: Model,
    *,
    qk_norm: QKNorm,
    qkv_bias: bool | None,
    out_bias: bool | None,
    windows: Windows = "none",
    clips: bool = False,
) -> Values:
    """Attention of a family with these habits; a bias of None may be either, and both biases are then one setting."""
    attention = model.attention
    require(isinstance(attention, GroupedQueryAttention), "latent attention")
    assert isinstance(attention, GroupedQueryAttention)
    require(attention.qk_norm == qk_norm, f"attention.qk_norm='{attention.qk_norm}' (always '{qk_norm}' there)")
    require(clips or not attention.clip_qkv, f"attention.clip_qkv={attention.clip_qkv} (no bound there)")
    if qkv_bias is None:
        require(attention.qkv_bias == attention.out_bias, "attention.qkv_bias and attention.out_bias that differ")
    else:
        require(attention.qkv_bias == qkv_bias, f"attention.qkv_bias={attention.qkv_bias} (always {qkv_bias} there)")
        require(attention.out_bias == out_bias, f"attention.out_bias={attention.out_bias} (always {out_bias} there)")
    return {
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        **({"attention_bias": attention.qkv_bias} if qkv_bias is None else {}),
        **({"clip_qkv": attention.clip_qkv or None} if clips else {}),
        **_window_values(attention.windows, model.num_layers, windows),
    }


def _window_values(windows: tuple[int, ...], layers: int, habit: Windows) -> Values:
    size, kinds = window_values(windows, layers)
    if habit == "none":
        require(size is None, f"attention.windows={windows}")
        return {}
    if habit == "layers":
        return {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": kinds}
    require(len(set(kinds)) == 1, f"attention.windows={windows} (the same in every layer there)")
    return {"sliding_window": size, **({"use_sliding_window": size is not None} if habit == "switched" else {})}


def grouped_attention(
    values: Values, *, qk_norm: QKNorm, qkv_bias: bool, out_bias: bool, windows: Sequence[int] = (0,)
) -> GroupedQueryAttention:
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    require(head_dim % 2 == 0, f"head_dim={head_dim} (rotary positions turn pairs: an even number)")
    return GroupedQueryAttention(
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        windows=tuple(windows),
    )


def _window(values: Values) -> tuple[int]:
    """The window of every layer."""
    size = values.get("sliding_window")
    require(size is None or size > 0, f"sliding_window={size} (a token sees itself: 1 or more, or null)")
    return (size or 0,)


def _plain_router(moe: MoE) -> bool:
    """Whether a softmax top-k's weights are renormalised. Raises ConfigError for another router."""
    router: Any = moe.router
    name = router_name(router)
    require(name == "topk", f"router '{name}' (its files hold a plain softmax top-k, our 'topk')")
    require(router.capacity_factor == 0, f"router.capacity_factor={router.capacity_factor} (dropless there)")
    require(router.score == "softmax", f"router.score='{router.score}'")
    require(router.scaling_factor == 1, f"router.scaling_factor={router.scaling_factor}")
    return router.gate == "selected"


def _softmax_router(values: Values, normalized: bool) -> RouterConfig:
    K = values["num_experts_per_tok"]
    weight = float(values.get("router_aux_loss_coef") or 0.0) * K  # transformers does not divide f by K, we do
    return router_config(
        "topk", gate="selected" if normalized else "full", balance=Balance(weight=weight), z_weight=0.0
    )


def _every_layer(model: Model) -> None:
    require(all(is_moe_layer(model, i) for i in range(model.num_layers)), "dense layers among the expert layers")


def _no_shared(moe: MoE) -> None:
    require(moe.shared_hidden == 0, f"a shared expert (shared_hidden={moe.shared_hidden})")


def mixtral_values(model: Model) -> Values:
    moe = expert_layers(model)
    _every_layer(model)
    _no_shared(moe)
    require(_plain_router(moe), "router.gate='full' (its weights are renormalised)")
    return {
        **common_values(model),
        **grouped_values(model, qk_norm="none", qkv_bias=False, out_bias=False, windows="all"),
        "intermediate_size": moe.expert_hidden,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
    }


def mixtral_model(values: Values) -> Model:
    F = values["intermediate_size"]
    moe = MoE(
        num_experts=values["num_local_experts"],
        top_k=values["num_experts_per_tok"],
        expert_hidden=F,
        router=_softmax_router(values, True),
    )
    attention = grouped_attention(values, qk_norm="none", qkv_bias=False, out_bias=False, windows=_window(values))
    return base_model(values, attention=attention, moe=moe)


def olmoe_values(model: Model) -> Values:
    moe = expert_layers(model)
    _every_layer(model)
    _no_shared(moe)
    grouped = grouped_values(model, qk_norm="full", qkv_bias=None, out_bias=None, clips=True)
    require(model.attention.num_heads * grouped.pop("head_dim") == model.dim, "heads that do not fill model.dim")
    return {
        **common_values(model),
        **grouped,
        "intermediate_size": moe.expert_hidden,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": _plain_router(moe),
    }


def olmoe_model(values: Values) -> Model:
    bias = bool(values.get("attention_bias"))
    clip = values.get("clip_qkv")
    require(clip is None or clip > 0, f"clip_qkv={clip} (a bound above 0, or null)")
    moe = MoE(
        num_experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        expert_hidden=values["intermediate_size"],
        router=_softmax_router(values, bool(values["norm_topk_prob"])),
    )
    attention = grouped_attention(values, qk_norm="full", qkv_bias=bias, out_bias=bias)
    return base_model(values, attention=replace(attention, clip_qkv=float(clip or 0)), moe=moe)


def _sparse_pattern(model: Model) -> Values:
    """decoder_sparse_step where it says it all, else the dense layers one by one."""
    moe = expert_layers(model)
    if moe.first_dense == 0:
        return {"decoder_sparse_step": moe.every, "mlp_only_layers": list(moe.dense_layers)}
    dense = [i for i in range(model.num_layers) if not is_moe_layer(model, i)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def num_experts(values: Values) -> int:
    """E; some of the classes have two names for it."""
    return values["num_experts"] if "num_experts" in values else values["num_local_experts"]


def _pattern_of(values: Values) -> Values:
    """first_dense and every of a Qwen pattern; dense_layers where these two do not say it."""
    layers, step = values["num_hidden_layers"], values.get("decoder_sparse_step") or 1
    only_dense = set(values.get("mlp_only_layers") or ())
    sparse = [i not in only_dense and (i + 1) % step == 0 for i in range(layers)]
    none = (
        f"mlp_only_layers={sorted(only_dense)} with decoder_sparse_step={step} in {layers} layers leave no expert layer"
    )
    require(any(sparse) and num_experts(values) > 0, none)
    for every in range(1, layers + 1):
        for first in range(layers):
            if sparse == [i >= first and (i - first + 1) % every == 0 for i in range(layers)]:
                return {"first_dense": first, "every": every}
    return {"every": step, "dense_layers": tuple(i for i in range(layers) if (i + 1) % step == 0 and not sparse[i])}


def _qwen_values(model: Model) -> Values:
    moe = expert_layers(model)
    return {
        **common_values(model),
        **_sparse_pattern(model),
        "moe_intermediate_size": moe.expert_hidden,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": _plain_router(moe),
    }


def _qwen_moe(values: Values, **changes: Any) -> MoE:
    return MoE(
        num_experts=num_experts(values),
        top_k=values["num_experts_per_tok"],
        expert_hidden=values["moe_intermediate_size"],
        router=_softmax_router(values, bool(values["norm_topk_prob"])),
        **_pattern_of(values),
        **changes,
    )


def qwen2_moe_values(model: Model) -> Values:
    moe = expert_layers(model)
    require(moe.shared_hidden > 0 and moe.shared_gate, "expert layers without a gated shared expert")
    attention = model.attention
    bias = isinstance(attention, GroupedQueryAttention) and attention.qkv_bias
    grouped = grouped_values(model, qk_norm="none", qkv_bias=bias, out_bias=False, windows="layers")
    if attention.num_heads * grouped["head_dim"] == model.dim:
        del grouped["head_dim"]  # no setting of this family's own; its classes read it where it is there
    return {
        **_qwen_values(model),
        **grouped,
        "qkv_bias": bias,
        "shared_expert_intermediate_size": moe.shared_hidden,
    }


def qwen2_moe_model(values: Values) -> Model:
    windows = windows_of(values["layer_types"], values.get("sliding_window"))
    bias = bool(values["qkv_bias"])
    attention = grouped_attention(values, qk_norm="none", qkv_bias=bias, out_bias=False, windows=windows)
    moe = _qwen_moe(values, shared_hidden=values["shared_expert_intermediate_size"], shared_gate=True)
    return base_model(values, attention=attention, moe=moe)


def qwen3_moe_values(model: Model) -> Values:
    _no_shared(expert_layers(model))
    grouped = grouped_values(model, qk_norm="head", qkv_bias=None, out_bias=None, windows="switched")
    return {**_qwen_values(model), **grouped}


def qwen3_moe_model(values: Values) -> Model:
    bias = bool(values.get("attention_bias"))
    attention = grouped_attention(values, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=_window(values))
    return base_model(values, attention=attention, moe=_qwen_moe(values))


def _dense(model: Model) -> Values:
    require(model.moe is None, "expert layers")
    return common_values(model)


def llama_values(model: Model) -> Values:
    return {**_dense(model), **grouped_values(model, qk_norm="none", qkv_bias=None, out_bias=None)}


def llama_model(values: Values) -> Model:
    require(not values.get("mlp_bias"), "mlp_bias=true")
    bias = bool(values.get("attention_bias"))
    return base_model(values, attention=grouped_attention(values, qk_norm="none", qkv_bias=bias, out_bias=bias))


def qwen3_values(model: Model) -> Values:
    grouped = grouped_values(model, qk_norm="head", qkv_bias=None, out_bias=None, windows="layers")
    return {**_dense(model), **grouped}


def qwen3_model(values: Values) -> Model:
    bias = bool(values.get("attention_bias"))
    windows = windows_of(values["layer_types"], values.get("sliding_window"))
    attention = grouped_attention(values, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=windows)
    return base_model(values, attention=attention)
