"""The model families that can be written and read: what each can express, as configuration in both directions.

A family is a class of transformers (`model_type`); its configuration says the same as our `Model` in other words. What one
side has and the other cannot express is refused by name, never dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from moe.config.schema import Model
from moe.hf import gpt_oss, grouped, latent
from moe.hf.common import Values
from moe.hf.links import Names


@dataclass(frozen=True)
class Family:
    """One model_type: the words of its configuration, and the names of its tensors."""

    model_type: str
    architecture: str
    to_values: Callable[[Model], Values]
    """Our model as the family's configuration. Raises ConfigError for what the family cannot express."""
    to_model: Callable[[Values], Model]
    """The inverse. Raises ConfigError for what we do not model."""
    names: Names = field(default_factory=Names)
    keys: frozenset[str] = frozenset()
    """Configuration keys that `to_model` reads, beyond COMMON_KEYS."""


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


COMMON_KEYS = words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act intermediate_size "
    "rms_norm_eps tie_word_embeddings rope_parameters rope_theta rope_scaling"
)


def _family(
    model_type: str,
    architecture: str,
    values: Callable[[Model], Values],
    model: Callable[[Values], Model],
    keys: str,
    names: Names | None = None,
) -> Family:
    return Family(model_type, architecture, values, model, names or Names(), words(keys))


_QWEN = "moe_intermediate_size num_experts num_local_experts num_experts_per_tok norm_topk_prob decoder_sparse_step mlp_only_layers"
_DEEPSEEK = (
    "moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok first_k_dense_replace q_lora_rank kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim routed_scaling_factor n_group topk_group norm_topk_prob "
    "attention_bias mlp_bias"
)
_W = Names(moe="block_sparse_moe", gate="w1", up="w3", down="w2")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _family(
            "mixtral",
            "MixtralForCausalLM",
            grouped.mixtral_values,
            grouped.mixtral_model,
            "sliding_window num_local_experts num_experts_per_tok",
            _W,
        ),
        _family(
            "olmoe",
            "OlmoeForCausalLM",
            grouped.olmoe_values,
            grouped.olmoe_model,
            "attention_bias num_experts num_experts_per_tok norm_topk_prob clip_qkv",
        ),
        _family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            grouped.qwen2_moe_values,
            grouped.qwen2_moe_model,
            f"{_QWEN} qkv_bias shared_expert_intermediate_size use_sliding_window sliding_window layer_types",
        ),
        _family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            grouped.qwen3_moe_values,
            grouped.qwen3_moe_model,
            f"{_QWEN} attention_bias use_sliding_window sliding_window",
        ),
        _family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            latent.deepseek_v2_values,
            latent.deepseek_v2_model,
            f"{_DEEPSEEK} topk_method",
            Names(shared="shared_experts"),
        ),
        _family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            latent.deepseek_v3_values,
            latent.deepseek_v3_model,
            f"{_DEEPSEEK} rope_interleave",
            Names(shared="shared_experts", selection_bias=True),
        ),
        _family(
            "gpt_oss",
            "GptOssForCausalLM",
            gpt_oss.gpt_oss_values,
            gpt_oss.gpt_oss_model,
            "sliding_window layer_types attention_bias num_local_experts num_experts_per_tok swiglu_alpha swiglu_limit "
            "quantization_config experts_per_token initial_context_length",
            Names(gpt_oss=True),
        ),
        _family("llama", "LlamaForCausalLM", grouped.llama_values, grouped.llama_model, "attention_bias mlp_bias"),
        _family(
            "qwen3",
            "Qwen3ForCausalLM",
            grouped.qwen3_values,
            grouped.qwen3_model,
            "attention_bias use_sliding_window sliding_window layer_types",
        ),
    )
}
"""Every family by its model_type, in the order in which `family="auto"` tries them."""
