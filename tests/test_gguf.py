"""Files for llama.cpp: numbers against the package gguf's own reader, probabilities and greedy text against llama.cpp itself.

The second part runs where its Python binding xllamacpp is installed (it has wheels; llama-cpp-python comes as source only).
"""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.cli import main
from moe.data.tokenizers import Bytes
from moe.errors import ConfigError
from moe.hf.tokenizer import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the extra gguf")
needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="needs the packages gguf and xllamacpp"
)
SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
QWEN = {**SMALL, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GPT_OSS = {
    **SMALL,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "llama, biased, llama3": ("llama", {**SMALL, "attention_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, yarn": ("llama", {**SMALL, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "llama, wide heads, linear": (
        "llama",
        {**SMALL, "head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4}),
    "mixtral, one expert": ("mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN, "num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    ),
    "olmoe": ("olmoe", {**SMALL, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 2.5}),
    "deepseek_v2, whole queries": ("deepseek_v2", {**LATENT, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss, yarn, every expert": (
        "gpt_oss",
        {**GPT_OSS, "num_hidden_layers": 3, "num_experts_per_tok": 4, "rope_parameters": YARN},
    ),
    "deepseek_v3, groups": ("deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
}


def theirs(case: str, folder):
    """transformers' model of the case with random weights and a tokenizer of bytes, saved."""
    family, values = CASES[case]
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **values, bos_token_id=None, eos_token_id=256)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(("norm" in name) + 0.15 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    save_tokenizer(Bytes(), folder, 128)
    return model


def read(path) -> dict[str, torch.Tensor]:
    """Every tensor of a file as gguf's reader widens it."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = GGUFReader(str(path)).tensors
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float() for t in tensors}


@needs_gguf
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_readers_numbers_are_the_models(dtype, tmp_path):
    """Each tensor under llama.cpp's name; bitwise for float32, to the type's spacing for others."""
    model = theirs("qwen2_moe", tmp_path / "theirs")
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf"), "--type", dtype]) == 0
    found, state = read(tmp_path / "m.gguf"), model.state_dict()
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in state.values())
    # the largest relative error of a block: half a step, of 127 or 8 steps to its largest weight
    off = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127, "q4_0": 1.1 / 8}[dtype]
    gate, up = state["model.layers.1.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    pairs = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "blk.1.ffn_gate_exps.weight": gate,
        "blk.1.ffn_up_exps.weight": up,
        "blk.1.ffn_down_exps.weight": state["model.layers.1.mlp.experts.down_proj"],
        "blk.0.attn_k.weight": state["model.layers.0.self_attn.k_proj.weight"],
        "blk.0.ffn_down_shexp.weight": state["model.layers.0.mlp.shared_expert.down_proj.weight"],
    }
    for name, expected in pairs.items():
        assert (found[name] - expected).abs().max() <= off * expected.abs().max(), name
    assert torch.equal(found["blk.0.ffn_gate_inp.weight"], state["model.layers.0.mlp.gate.weight"]), "routers stay"
    assert torch.equal(found["output_norm.weight"], state["model.norm.weight"])


@needs_gguf
def test_llamas_rotary_rows_are_neighbours(tmp_path):
    """Row i of a head's first half and row i of its second half are rows 2i and 2i + 1."""
    model = theirs("mixtral", tmp_path / "theirs")
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf"), "--type", "f32"]) == 0
    found = read(tmp_path / "m.gguf")["blk.1.attn_k.weight"]
    own = model.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    for head in range(2):
        for i in range(8):
            assert torch.equal(found[16 * head + 2 * i], own[16 * head + i])
            assert torch.equal(found[16 * head + 2 * i + 1], own[16 * head + 8 + i])


@needs_gguf
def test_rows_that_32_does_not_divide_are_float16_and_named(tmp_path, capsys):
    CASES["odd"] = ("mixtral", {**SMALL, "num_local_experts": 2, "intermediate_size": 40})
    theirs("odd", tmp_path / "theirs")
    del CASES["odd"]
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf"), "--type", "q8_0"]) == 0
    assert "2 matrices whose rows 32 does not divide are float16: blk.0.ffn_down_exps" in capsys.readouterr().out
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "values", "says"),
    [
        ("mixtral", {"num_local_experts": 4, "sliding_window": 8}, "attention.windows"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}, "router.gate='full'"),
        (
            "olmoe",
            {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
            "router.gate='selected'",
        ),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "fewer key/value heads"),
        (
            "qwen2_moe",
            {"num_experts": 4, "shared_expert_intermediate_size": 8, "moe_intermediate_size": 8, "qkv_bias": False},
            "qkv_bias=false",
        ),
        ("qwen3", {"attention_bias": True}, "qkv_bias"),
        ("gpt_oss", {**GPT_OSS, "swiglu_alpha": 1.0, "swiglu_limit": 1e30}, "moe.activation=swiglu with"),
        ("gpt_oss", {**GPT_OSS, "swiglu_limit": 5.0}, r"moe.activation_limit=5 \(7.0 there\)"),
        ("gpt_oss", {**GPT_OSS, "swiglu_alpha": 1.5}, r"moe.activation_alpha=1.5 \(1.702 there\)"),
        ("gpt_oss", {**GPT_OSS, "attention_bias": False}, "attention without biases"),
        ("gpt_oss", {**GPT_OSS, "layer_types": ["full_attention", "sliding_attention"]}, r"attention.windows=\(0, 6\)"),
        ("gpt_oss", {**GPT_OSS, "tie_word_embeddings": True}, "tied_head"),
        ("gpt_oss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}}, "truncate"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, values, says, tmp_path):
    from moe.config.schema import Model
    from moe.hf.families import FAMILIES
    from moe.hf.gguf_names import refuse

    model = FAMILIES[family].to_model(AutoConfig.for_model(family, **{**SMALL, **values}).to_dict())
    assert isinstance(model, Model)
    with pytest.raises(ConfigError, match=says):
        refuse(model, family)


@needs_llama_cpp
@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_has_the_same_probabilities_and_the_same_greedy_text(case, tmp_path):
    """float32 file and cache: log-probabilities after a prompt to 0.02 (llama.cpp rounds some activations to float16)."""
    xllamacpp = import_module("xllamacpp")

    model = theirs(case, tmp_path / "theirs")
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf"), "--type", "f32"]) == 0
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(tmp_path / "m.gguf"), 128, 1
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    text = "def f(x):\n  return ~~ x"
    # ids that are no printable text of their own are banned: the answer joins bytes to characters
    banned = [*range(32), *range(127, 257)]
    answer = server.handle_completions(
        {
            "prompt": text,
            "n_predict": 6,
            "temperature": 0,
            "n_probs": 5,
            "cache_prompt": False,
            "logit_bias": [[index, False] for index in banned],
        }
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    ids = torch.tensor([list(text.encode())])
    for step in steps:
        expected = model(ids).logits[0, -1].log_softmax(0)
        for top in step["top_logprobs"]:
            assert abs(top["logprob"] - float(expected[top["id"]])) < 0.02
        allowed = expected.clone()
        allowed[banned] = -torch.inf
        assert allowed.max() - allowed[step["id"]] < 0.02, "the chosen token is the most probable, or as good as"
        ids = torch.cat((ids, torch.tensor([[step["id"]]])), dim=1)
    assert len(steps) == 6


@needs_gguf
def test_gate_and_up_of_gpt_oss_take_turns_and_its_matrices_are_turned(tmp_path):
    model = theirs("gpt_oss", tmp_path / "theirs")
    assert main(["gguf", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.gguf"), "--type", "f32"]) == 0
    found, state = read(tmp_path / "m.gguf"), model.state_dict()
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in state.values())
    both = state["model.layers.1.mlp.experts.gate_up_proj"]
    biases = state["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"][2], both[2, :, 0::2].t())
    assert torch.equal(found["blk.1.ffn_up_exps.weight"][2], both[2, :, 1::2].t())
    assert torch.equal(found["blk.1.ffn_up_exps.bias"][2], biases[2, 1::2])
    down = state["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(found["blk.0.ffn_down_exps.weight"][3], down[3].t())
    assert torch.equal(found["blk.0.attn_sinks.weight"], state["model.layers.0.self_attn.sinks"])
