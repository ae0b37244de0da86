"""Models of nine families against transformers' own classes: logits both ways, every tensor accounted for, by name.

transformers' models on random weights are the reference; small configurations with what is awkward in each family.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe import hf
from moe.checkpoint import newest, read_tensors
from moe.cli import main
from moe.config.load import load as load_run
from moe.config.load import router_config
from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, Rotary, Yarn
from moe.errors import CheckpointError, ConfigError
from moe.hf.links import entries
from moe.model import Transformer

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **SMALL,
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
GPT_OSS = {
    **SMALL,
    "head_dim": 8,
    "swiglu_limit": 0.7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
THEIRS = {
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4}),
    "mixtral, a window, every expert": ("mixtral", {**SMALL, "num_local_experts": 2, "sliding_window": 5}),
    "mixtral, wide heads": ("mixtral", {**SMALL, "num_local_experts": 3, "head_dim": 16}),
    "olmoe": ("olmoe", {**SMALL, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe, tied, biased, normalised": (
        "olmoe",
        {
            **SMALL,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**SMALL, **EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 12}),
    "qwen2_moe, every second, one expert": (
        "qwen2_moe",
        {
            **SMALL,
            **EXPERTS,
            "num_experts": 5,
            "shared_expert_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "num_experts_per_tok": 1,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**SMALL, **EXPERTS, "num_experts": 8, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe, dense below": (
        "qwen3_moe",
        {**SMALL, **EXPERTS, "num_experts": 8, "mlp_only_layers": [0, 1], "head_dim": 8, "attention_bias": True},
    ),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2, groups, ranks, yarn": (
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": 14,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 14, "n_group": 4, "topk_group": 2}),
    "deepseek_v3, no groups, yarn": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": YARN,
        },
    ),
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "gpt_oss, yarn, every expert": (
        "gpt_oss",
        {
            **GPT_OSS,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 7,
            "swiglu_alpha": 1.2,
            "swiglu_limit": 7.0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
        },
    ),
    "gpt_oss, SwiGLU": ("gpt_oss", {**GPT_OSS, "num_local_experts": 4, "swiglu_alpha": 1.0, "swiglu_limit": 1e30}),
    "llama": ("llama", {**SMALL, "rms_norm_eps": 1e-5}),
    "llama, biased, tied": ("llama", {**SMALL, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 16}),
}


def theirs(case: str, folder, dtype=torch.float32):
    """transformers' model of the case with random weights, saved; biases and norms random as well."""
    model_type, values = THEIRS[case]
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            centre = 1.0 if "norm" in name else 0.0
            tensor.copy_(centre + 0.3 * torch.randn(tensor.shape))
            if name.endswith("_proj_bias") and case == "gpt_oss, SwiGLU":  # the biases that make them SwiGLU
                tensor.zero_()
                if name.endswith("gate_up_proj_bias"):
                    tensor[:, 1::2] = -1.0
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 67, (2, 23), generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Every logit to `tolerance` of the largest."""
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("case", THEIRS)
def test_logits_equal_transformers_both_ways(case, tmp_path, ids):
    reference = theirs(case, tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(ids).logits
        close(ours(ids).logits_BSV, expected, 1e-5)
    hf.save(ours, tmp_path / "ours", family=THEIRS[case][0], context_length=64)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        close(again(ids).logits, expected, 1e-5)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    second = hf.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v3", "llama"])
def test_bfloat16_files_hold_the_rounded_weights(case, tmp_path, ids):
    theirs(case, tmp_path / "theirs", torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="float32", attn_implementation="eager")
    ours = hf.load(tmp_path / "theirs")
    with torch.no_grad():
        close(ours(ids).logits_BSV, reference(ids).logits, 1e-5)
    hf.save(ours, tmp_path / "ours", family=THEIRS[case][0], dtype="bfloat16")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    # a rounded selection bias would choose other experts
    rounded = {tensor.dtype for name, tensor in stored.items() if not name.endswith("e_score_correction_bias")}
    assert rounded == {torch.bfloat16}
    second = hf.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "case",
    ["mixtral", "qwen2_moe", "deepseek_v2, groups, ranks, yarn", "deepseek_v3", "gpt_oss", "llama, biased, tied"],
)
def test_every_number_has_one_place_on_both_sides(case, tmp_path):
    """Each of our tensors and each of the family's, filled with its elements' numbers, is a permutation after copying."""
    theirs(case, tmp_path)
    family, model = hf.read_config(tmp_path)
    state = Transformer(model).state_dict()
    for fused in (False, True):
        hits = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
        for entry in entries(model, family.names, fused=fused):
            covered = torch.zeros(entry.shape)
            for link in entry.links:
                link.their_view(covered).add_(1)
                link.our_view(hits[link.ours]).add_(1)
            for constant in entry.constants:
                constant.their_view(covered).add_(1)
            assert (covered == 1).all(), entry.name
        assert all((hit == 1).all() for hit in hits.values())


def test_experts_in_one_tensor_are_read(tmp_path, ids):
    reference = theirs("qwen3_moe", tmp_path)
    stored = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        close(hf.load(tmp_path)(ids).logits_BSV, reference(ids).logits, 1e-5)


def test_shards_hold_every_tensor_once(tmp_path, ids):
    reference = theirs("olmoe", tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    hf.save(model, tmp_path / "ours", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 5
    assert max(sum(t.nbytes for t in load_file(shard).values()) for shard in shards) <= 20_000
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in reference.state_dict().items())


WRONG = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("damage", ["missing", "unknown", "transposed", "twice"])
@pytest.mark.parametrize("case", ["olmoe", "gpt_oss"])
def test_a_damaged_tensor_is_named(damage, case, tmp_path):
    theirs(case, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = WRONG if case == "olmoe" else "model.layers.1.mlp.experts.gate_up_proj_bias"
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        name = name.replace("up_proj", "side_proj")
        tensors[name] = torch.zeros(1)
    elif damage == "transposed":
        tensors[name] = tensors[name].t().contiguous()
    else:
        save_file({name: tensors[name]}, tmp_path / "more.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        hf.load(tmp_path)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_biases_that_no_swiglu_has_are_named_where_the_limit_says_it_is_one(name, tmp_path):
    theirs("gpt_oss, SwiGLU", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.1.mlp.experts.{name}"][2, 3] = 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.experts\.{name} is not"):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, r"\['factor'\]"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": -0.5}}, "attention_factor=-0.5"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv=0.0"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "sliding_window=None"),
        ("gpt_oss", {"swiglu_alpha": -1.0}, "swiglu_alpha=-1.0"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0"),
        ("gpt_oss", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leave no expert layer"),
        ("deepseek_v3", {"surprise": 1}, "surprise=1"),
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2'"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(case, change, says, tmp_path):
    theirs(case, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=says):
        hf.load(tmp_path)


FOUR: dict = {"num_experts": 4, "top_k": 2, "expert_hidden": 24, "router": router_config("topk")}


def ours(**changes) -> Model:
    """A model in Mixtral's form, but for the changes."""
    settings: dict = {
        "vocab_size": 67,
        "dim": 32,
        "num_layers": 2,
        "ffn_hidden": 24,
        "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
        "moe": MoE(**FOUR),
    }
    return Model(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "family", "says"),
    [
        (
            {"moe": MoE(num_experts=4, top_k=2, expert_hidden=24, router=router_config("sinkhorn"))},
            "auto",
            "router 'sinkhorn'",
        ),
        (
            {
                "moe": MoE(
                    num_experts=2, top_k=1, expert_hidden=8, expert_widths=(8, 16), router=router_config("switch")
                )
            },
            "auto",
            r"widths of single experts \(moe.expert_widths\)",
        ),
        (
            {"moe": MoE(num_experts=2, top_k=1, expert_hidden=8, latent_dim=16, router=router_config("switch"))},
            "auto",
            r"moe.latent_dim=16",
        ),
        ({"moe": MoE(**FOUR, activation="swiglu_oai")}, "mixtral", r"moe.activation=swiglu_oai \(SwiGLU there\)"),
        ({"moe": MoE(**FOUR, expert_bias=True)}, "mixtral", r"moe.expert_bias=true \(none there\)"),
        (
            {
                "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, sinks=True),
                "moe": MoE(**{**FOUR, "router": router_config("gpt_oss")}, expert_bias=True),
            },
            "gpt_oss",
            "moe.expert_bias=true with activation=swiglu",
        ),
        ({"rotary": Rotary(fraction=0.5)}, "auto", "rotary.fraction=0.5"),
        ({"moe": None}, "mixtral", "a dense model"),
        ({}, "llama", "expert layers"),
        ({}, "deepseek_v3", "router 'topk'"),
        ({}, "gpt2", "family 'gpt2' is unknown"),
        ({"ffn_hidden_per_layer": (8, 16), "moe": None}, "auto", "different ffn_hidden"),
    ],
)
def test_a_model_that_no_family_holds_is_refused_before_anything_is_written(changes, family, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        hf.save(Transformer(ours(**changes)), tmp_path / "out", family=family)
    assert not list(tmp_path.iterdir())


def test_the_first_family_that_fits_is_found():
    latent = LatentAttention(num_heads=4, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8)
    shared = MoE(num_experts=4, top_k=2, expert_hidden=24, shared_hidden=24, router=router_config("loss_free"))
    yarn = Rotary(yarn=Yarn(factor=2.0, original_length=16))
    assert hf.family_of(ours()).model_type == "mixtral"
    assert hf.family_of(ours(moe=None, ffn_hidden_per_layer=(16, 16))).model_type == "llama"
    assert hf.family_of(ours(attention=latent, moe=shared, rotary=yarn)).model_type == "deepseek_v3"


def test_a_trained_run_is_exported_with_its_tokenizer(tmp_path, ids):
    """Trained here, loaded by transformers: same ids for a text with every kind of byte, same logits, same step."""
    run = tmp_path / "run"
    settings = [
        "train.steps=2",
        "train.schedule.warmup_steps=0",
        "train.batch_rows=2",
        "train.micro_rows=2",
        "evaluation.rows=2",
        "evaluation.final_rows=2",
    ]
    assert main(["train", "recipes/smoke.py", f"out={run}", *settings]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "hf"), "--shard-mib", "1"]) == 0
    text = "def f(x):\n\treturn 'déjà — 日本 \U0001f600' + \"\\x00\"\r\n  \x01"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.model_type == "mixtral"
    trained = Transformer(load_run(run / "run.json").model).eval()
    state = read_tensors(newest(run), trained.state_dict())
    trained.load_state_dict(state)
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        close(model(ids).logits, trained(ids).logits_BSV, 1e-5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    assert main(["export", str(run), "--out", str(tmp_path / "hf")]) == 2, "the folder is not empty"
    assert main(["export", str(run), "--out", str(tmp_path / "no"), "--family", "llama"]) == 2
    assert not (tmp_path / "no").exists()


@torch.no_grad()
def test_clamped_experts_without_biases_are_gpt_oss_with_zeros(tmp_path, ids):
    """Files of gpt-oss always have biases: what is read back has them too, and the same logits."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, sinks=True)
    experts = MoE(**{**FOUR, "router": router_config("gpt_oss")}, activation="swiglu_oai", activation_limit=0.01)
    model = Transformer(ours(attention=attention, moe=experts, init_std=0.3)).eval()
    hf.save(model, tmp_path / "out", family="gpt_oss")
    again = hf.load(tmp_path / "out")
    assert again.config.moe is not None and again.config.moe.expert_bias
    assert float(again.get_parameter("layers.0.moe.experts.b_up_EF").abs().max()) == 0
    their = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    close(again(ids).logits_BSV, model(ids).logits_BSV, 1e-6)
    close(their(ids).logits, model(ids).logits_BSV, 1e-5)
