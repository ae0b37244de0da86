"""Random tiny configurations of every family that we read, with what is awkward in each, as functions of a seed.

A draw is a dictionary for transformers' `AutoConfig.for_model`. It may hold what we do not model: then it must be refused by
the name of that setting.
"""

import random
from typing import Any

Values = dict[str, Any]
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama", "qwen3")


def draw(family: str, seed: int) -> Values:
    """Settings of a tiny model of the family."""
    rng = random.Random(f"{family} {seed}")
    values = _common(rng)
    if family.startswith("deepseek"):
        values |= _latent(rng, values, family)
    else:
        values |= _grouped(rng, values, family)
    if family not in ("llama", "qwen3"):
        values |= _experts(rng, values, family)
    return values


def _common(rng: random.Random) -> Values:
    values: Values = {
        "vocab_size": rng.choice([61, 67, 128]),
        "hidden_size": rng.choice([16, 24, 32]),
        "num_hidden_layers": rng.choice([1, 2, 3, 4]),
        "intermediate_size": rng.choice([5, 24, 33]),
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-6, 1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.3,
        "initializer_range": 0.1,
        "rope_parameters": _rope(rng),
    }
    if rng.random() < 0.2:
        values |= {"attention_dropout": 0.1, "use_cache": False, "pad_token_id": 0}
    return values


def _rope(rng: random.Random) -> Values:
    theta = rng.choice([10_000.0, 500_000.0, 1_000_000, 100.0])
    kind = rng.choice(["default", "default", "yarn", "yarn", "yarn", "linear", "llama3"])
    rope: Values = {"rope_type": kind, "rope_theta": theta}
    if kind == "linear":
        rope["factor"] = 2.0
    if kind == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "yarn":
        rope |= {
            "factor": rng.choice([1.0, 2.0, 4.0, 40]),
            "original_max_position_embeddings": rng.choice([2, 16, 32, 64, 4096]),
        }
        some = {
            "mscale": rng.choice([1.0, 0.707, 0.0, 2.0]),
            "mscale_all_dim": rng.choice([1.0, 0.707, 0.0, 0.3]),
            "attention_factor": rng.choice([1.0, 1.3, 0.8]),
            "beta_fast": rng.choice([32, 4.0, 16]),
            "beta_slow": rng.choice([1, 0.5, 2.0]),
            "truncate": rng.choice([True, False]),
        }
        rope |= {key: value for key, value in some.items() if rng.random() < 0.4}
    return rope


def _grouped(rng: random.Random, values: Values, family: str) -> Values:
    heads = rng.choice([1, 2, 4, 8]) if values["hidden_size"] % 8 == 0 else rng.choice([1, 2, 4])
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    more: Values = {"num_attention_heads": heads, "num_key_value_heads": rng.choice(divisors)}
    if family not in ("olmoe", "qwen2_moe") or rng.random() < 0.1 * (family == "qwen2_moe"):
        more["head_dim"] = rng.choice([2, 4, 6, 10, 16])
    elif values["hidden_size"] // heads % 2:
        more["num_attention_heads"] = more["num_key_value_heads"] = 1
    if rng.random() < 0.4:
        key = "qkv_bias" if family == "qwen2_moe" else "attention_bias"
        if family != "mixtral":
            more[key] = rng.random() < 0.6
    return more | _windows(rng, values["num_hidden_layers"], family)


def _windows(rng: random.Random, layers: int, family: str) -> Values:
    if family == "mixtral":
        return {"sliding_window": rng.choice([None, None, 1, 3, 7, 100])}
    kinds = rng.choices(["sliding_attention", "full_attention"], k=layers)
    if family == "gpt_oss":
        return {"sliding_window": rng.choice([1, 4, 9]), **({"layer_types": kinds} if rng.random() < 0.5 else {})}
    if family == "qwen3_moe" and rng.random() < 0.4:
        return {"use_sliding_window": True, "sliding_window": rng.choice([2, 5])}
    if family in ("qwen3", "qwen2_moe") and rng.random() < 0.4:
        more: Values = {"use_sliding_window": True, "sliding_window": rng.choice([2, 5])}
        return more | rng.choice([{"layer_types": kinds}, {"max_window_layers": rng.randrange(layers + 1)}])
    if family == "olmoe" and rng.random() < 0.15:
        return {"clip_qkv": rng.choice([0.5, 0.0])}
    if family == "llama" and rng.random() < 0.15:
        return {"mlp_bias": True}
    return {}


def _experts(rng: random.Random, values: Values, family: str) -> Values:
    E = rng.choice([1, 2, 3, 5, 8])
    K = rng.choice([1, 2, E, E])
    more: Values = {"num_experts_per_tok": min(K, E)}
    if family.startswith("deepseek"):
        return {}
    more["num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts"] = E
    if family == "gpt_oss":
        more |= {"swiglu_alpha": rng.choice([1.0, 1.702, 1.702]), "swiglu_limit": rng.choice([1e30, 7.0, 7.0, 0.5])}
    if family not in ("mixtral", "gpt_oss"):
        more["norm_topk_prob"] = rng.random() < 0.5
    if family.startswith("qwen"):
        layers = values["num_hidden_layers"]
        more["moe_intermediate_size"] = rng.choice([3, 8, 20])
        more |= rng.choice(
            [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"mlp_only_layers": [layers - 1]}]
        )
    if family == "qwen2_moe":
        more["shared_expert_intermediate_size"] = rng.choice([1, 12])
    return more


def _latent(rng: random.Random, values: Values, family: str) -> Values:
    groups = rng.choice([1, 2, 4])
    E = groups * rng.choice([2, 3])
    top = rng.randint(1, groups)
    K = rng.randint(1, top * (E // groups))
    heads = rng.choice([1, 2, 4])
    more: Values = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, 3, 14]),
        "kv_lora_rank": rng.choice([4, 12]),
        "qk_nope_head_dim": rng.choice([2, 8] if family == "deepseek_v2" else [2, 7, 8]),
        "qk_rope_head_dim": rng.choice([2, 4, 6]),
        "v_head_dim": rng.choice([3, 10]),
        "n_routed_experts": E,
        "n_shared_experts": rng.choice([1, 2]),
        "num_experts_per_tok": K,
        "moe_intermediate_size": rng.choice([3, 20]),
        "first_k_dense_replace": rng.randint(0, values["num_hidden_layers"]),
        "routed_scaling_factor": rng.choice([1.0, 2.5, 16.0]),
        "norm_topk_prob": rng.random() < (0.1 if family == "deepseek_v2" else 0.6),
        "n_group": groups,
        "topk_group": top,
    }
    if family == "deepseek_v2":
        more["topk_method"] = rng.choice(["greedy", "group_limited_greedy"])
        more["mlp_bias"] = rng.random() < 0.1
    else:
        more |= {"rope_interleave": rng.random() < 0.8, "num_nextn_predict_layers": rng.choice([0, 1, 2])}
    if rng.random() < 0.25:
        more["attention_bias"] = True
    return more
