"""What llama.cpp computes of our families: architectures, settings, and the refusal of what it would compute otherwise.

Its architectures fix what transformers' configurations leave open: whether gate weights are renormalised, which layers have
experts, where biases are. A file can hold more than llama.cpp reads, so every such setting is checked here. Seen by running its
Python binding on our files (tests/test_gguf.py): xllamacpp 2026.10.
"""

from collections.abc import Iterator
from typing import Any

from moe.config.schema import GroupedQueryAttention, LatentAttention, Model
from moe.hf.common import router_name
from moe.hf.refuse import require

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
"""Families to llama.cpp's architectures."""
_RENORMALISED = {"mixtral": True, "olmoe": False, "qwen2_moe": False, "qwen3_moe": True}
SOFTMAX, SIGMOID = 1, 2
"""Its numbers of the router's scores."""


def refuse(model: Model, family: str) -> None:
    """Raise ConfigError naming what llama.cpp would compute in another way."""
    attention, moe, yarn = model.attention, model.moe, model.rotary.yarn
    if family == "gpt_oss":
        _refuse_gpt_oss(model)
    if isinstance(attention, GroupedQueryAttention):
        windows = attention.windows
        require(family == "gpt_oss" or set(windows) == {0}, f"attention.windows={windows} with family '{family}'")
        biased = family in ("llama", "qwen2_moe", "gpt_oss")
        require(not attention.clip_qkv, f"attention.clip_qkv={attention.clip_qkv}")
        # seen: 0.034 nats from transformers without them, below 0.005 with them; why is not known
        seen = family != "qwen2_moe" or attention.qkv_bias
        require(seen, "attention.qkv_bias=false with family 'qwen2_moe' (its probabilities then differ by 0.03 nats)")
        require(biased or not attention.qkv_bias, f"attention.qkv_bias with family '{family}'")
        alike = attention.num_kv_heads == attention.num_heads or family != "olmoe"
        require(alike, "fewer key/value heads than heads with family 'olmoe'")
    else:
        require(not attention.bias, "attention.bias in latent attention")
        require(attention.norm_eps in (0, model.norm_eps), f"attention.norm_eps={attention.norm_eps} beside norm_eps")
        require(yarn is None, "rotary.yarn with latent attention")
    if yarn is not None:
        plain = yarn.mscale == 1 and yarn.mscale_all_dim == 0 and yarn.truncate
        require(plain, "rotary.yarn with mscale, mscale_all_dim or truncate")
    stretched = model.rotary.llama3 is not None
    require(not stretched or family in ("llama", "mixtral", "qwen3"), f"rotary.llama3 with family '{family}'")
    if moe is None:
        return
    require(moe.every == 1 and not moe.dense_layers, "dense layers after the first expert layer")
    require(not moe.first_dense or family.startswith("deepseek"), f"moe.first_dense with family '{family}'")
    router: Any = moe.router
    if family in _RENORMALISED:
        renormalised = router.gate == "selected"
        there = "always" if _RENORMALISED[family] else "never"
        require(renormalised == _RENORMALISED[family], f"router.gate='{router.gate}' ('{family}' renormalises {there})")
    if family == "deepseek_v2" and router_name(router) == "deepseek_v2":
        require(router.num_groups == 1, "router.num_groups in deepseek_v2 (groups are chosen as DeepSeek-V3 does)")


def _refuse_gpt_oss(model: Model) -> None:
    """Its architecture has one activation, biases everywhere, and windows in every other layer, from the first on."""
    attention, moe = model.attention, model.moe
    assert isinstance(attention, GroupedQueryAttention) and moe is not None
    require(
        moe.activation == "swiglu_oai" and moe.expert_bias, f"moe.activation={moe.activation} with family 'gpt_oss'"
    )
    for name, there in (("activation_alpha", 1.702), ("activation_limit", 7.0)):
        require(getattr(moe, name) == there, f"moe.{name}={getattr(moe, name):g} ({there} there)")
    require(attention.qkv_bias and attention.out_bias, "attention without biases with family 'gpt_oss'")
    windows = [attention.windows[i % len(attention.windows)] for i in range(model.num_layers)]
    wanted = [0 if i % 2 else windows[0] for i in range(model.num_layers)]
    require(
        windows[0] > 0 and windows == wanted, f"attention.windows={attention.windows} (one, and none, in turn there)"
    )
    require(not model.tied_head, "tied_head with family 'gpt_oss'")


def settings(model: Model, family: str, context_length: int) -> Iterator[tuple[str, int | float | bool | str]]:
    """Metadata under the architecture's prefix; the type says how it is stored."""
    attention, rotary, moe = model.attention, model.rotary, model.moe
    yield "block_count", model.num_layers
    yield "context_length", context_length
    yield "embedding_length", model.dim
    yield (
        "feed_forward_length",
        moe.expert_hidden if moe is not None and family in ("mixtral", "olmoe") else model.ffn_hidden,
    )
    yield "attention.head_count", attention.num_heads
    yield "attention.layer_norm_rms_epsilon", model.norm_eps
    yield "vocab_size", model.vocab_size
    yield "rope.freq_base", rotary.base
    if isinstance(attention, LatentAttention):
        yield from _latent(attention)
    else:
        yield "attention.head_count_kv", attention.num_kv_heads
        yield "attention.key_length", attention.head_dim
        yield "attention.value_length", attention.head_dim
        yield "rope.dimension_count", attention.head_dim
        if family == "gpt_oss":
            yield "attention.sliding_window", attention.windows[0]
    if rotary.linear != 1:
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", rotary.linear
    if rotary.yarn is not None:
        yield "rope.scaling.type", "yarn"
        yield "rope.scaling.factor", rotary.yarn.factor
        yield "rope.scaling.original_context_length", rotary.yarn.original_length
        yield "rope.scaling.yarn_beta_fast", rotary.yarn.beta_fast
        yield "rope.scaling.yarn_beta_slow", rotary.yarn.beta_slow
    if moe is not None:
        yield from _experts(model, family)


def _latent(attention: LatentAttention) -> Iterator[tuple[str, int]]:
    """The cache holds one vector for all heads; each head's own sizes have names of their own."""
    yield "attention.head_count_kv", 1
    yield "attention.q_lora_rank", attention.q_rank
    yield "attention.kv_lora_rank", attention.kv_rank
    yield "attention.key_length", attention.kv_rank + attention.rope_dim
    yield "attention.value_length", attention.kv_rank
    yield "attention.key_length_mla", attention.nope_dim + attention.rope_dim
    yield "attention.value_length_mla", attention.value_dim
    yield "rope.dimension_count", attention.rope_dim


def _experts(model: Model, family: str) -> Iterator[tuple[str, int | float | bool | str]]:
    moe = model.moe
    assert moe is not None
    router: Any = moe.router
    yield "expert_count", moe.num_experts
    yield "expert_used_count", moe.top_k
    if family not in ("mixtral", "olmoe"):
        yield "expert_feed_forward_length", moe.expert_hidden
    if family == "qwen2_moe":
        yield "expert_shared_feed_forward_length", moe.shared_hidden
    if not family.startswith("deepseek"):
        return
    yield "leading_dense_block_count", moe.first_dense
    yield "expert_shared_count", moe.shared_hidden // moe.expert_hidden
    yield "expert_weights_scale", float(router.scaling_factor)
    yield "expert_weights_norm", bool(getattr(router, "normalize", False))
    yield "expert_gating_func", SIGMOID if family == "deepseek_v3" else SOFTMAX
    if family == "deepseek_v3" and router.num_groups > 1:
        yield "expert_group_count", router.num_groups
        yield "expert_group_used_count", router.top_groups
