"""Every field of each family's configuration class, given other values: transformers' logits, or refused by name.

The fields are the class's own, so one that a later transformers adds is walked as well: if it changes transformers' logits and
we neither follow nor name it, the test fails. A value that transformers itself cannot build or run says nothing.
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe import hf
from moe.errors import ConfigError

IDS = torch.randint(2, 40, (2, 12), generator=torch.Generator().manual_seed(3))
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "olmoe": {"num_experts_per_tok": 2, "num_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 4},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 4},
    "llama": {},
    "qwen3": {"head_dim": 4},
}
NAMED_AS = {"hidden_size": "head_dim", "num_attention_heads": "head_dim"}
"""Refusals that name what follows from the field."""
ROPES = [
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 0.8},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 3.0},
]
LISTS = {
    "layer_types": [["full_attention", "sliding_attention"], ["chunked_attention", "full_attention"]],
    "mlp_only_layers": [[0], [0, 1]],
    "rope_parameters": [{"rope_theta": 1e4, **rope} for rope in ROPES],
    "topk_method": ["greedy", "noaux_tc"],
    "hidden_act": ["gelu", "relu", "swish"],
}


def others(field: str, value: Any) -> list[Any]:
    """Values to try in the place of a field's own."""
    if field in LISTS:
        return LISTS[field]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [None, 0, 1, 3, 2 * value]
    if isinstance(value, float):
        return [0.0, 2 * value + 0.3]
    return [True, 3, 0.5] if value is None else []


def theirs(family: str, values: dict[str, Any]):
    """transformers' model, every tensor random, or None where it cannot compute this."""
    torch.manual_seed(5)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), **PLAIN).eval()
        for name, tensor in model.state_dict().items():
            tensor.copy_(("norm" in name) + 0.3 * torch.randn(tensor.shape))
        return (model, model(IDS).logits)
    except Exception:
        return None


@torch.no_grad()
def outcome(family: str, field: str, value: Any, folder) -> str:
    """`equal`, `refused`, `theirs fails`, or what is wrong."""
    built = theirs(family, {**BASE, **FAMILIES[family], field: value})
    if built is None or not bool(built[1].isfinite().all()):
        return "theirs fails"
    built[0].save_pretrained(folder)
    try:
        found = hf.load(folder)(IDS).logits_BSV
    except ConfigError as error:
        names = (field, NAMED_AS.get(field, field), *(value if isinstance(value, dict) else ()))
        return "refused" if any(name in str(error) for name in names) else f"{field}={value!r}: {error}"
    far = float((found - built[1]).abs().max() / built[1].abs().max())
    return "equal" if far < 1e-5 else f"{field}={value!r}: logits differ by {far:.2g}"


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_configuration_is_followed_or_refused_by_name(family, tmp_path):
    settings = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family]}).to_dict()
    trials = [(field, value) for field in sorted(settings) for value in others(field, settings[field])]
    outcomes = [outcome(family, *trial, tmp_path / str(number)) for number, trial in enumerate(trials)]
    assert not [text for text in outcomes if text not in ("equal", "refused", "theirs fails")]
    assert outcomes.count("equal") > 20
