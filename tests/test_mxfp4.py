"""gpt-oss as it is published, experts in MXFP4: against transformers' own widening, and its own model of the same folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe import hf
from moe.errors import CheckpointError, ConfigError
from moe.hf.mxfp4 import widened

PUBLISHED = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "initial_context_length": 16,
    "sliding_window": 5,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
IDS = torch.randint(0, 67, (2, 21), generator=torch.Generator().manual_seed(0))
NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def folder(tmp_path):
    """A folder in the form of the published ones: matrices bfloat16, experts' as random blocks and scales."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", **PUBLISHED)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(("norm" in name) + 0.3 * torch.randn(tensor.shape))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, K, N = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(122, 126, (E, N, K // 32), dtype=torch.uint8)
    save_file(stored, path, metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def change(folder, key: str, value: object) -> None:
    """Set one key of config.json."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: value}))


def test_every_byte_and_scale_is_widened_as_transformers_does():
    """All 256 bytes, and all scales whose numbers float32 has."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16).repeat(2, 16, 1, 1)
    scales = torch.arange(252, dtype=torch.uint8).repeat(3)[: 2 * 64 * 4].view(2, 64, 4)
    found = widened(blocks, scales)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 128, 64)
    assert torch.equal(found.float(), expected)
    assert found.unique().numel() > 1000 and found.isfinite().all()


@torch.no_grad()
def test_a_published_folder_is_loaded_and_has_transformers_logits(folder, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = hf.load(folder)
    expected, found = own(IDS).logits, ours(IDS).logits_BSV
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    hf.save(ours, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no scales", rf"missing: {NAME}.*unknown: {NAME}_blocks"),
        ("no blocks", rf"missing: {NAME}.*unknown: {NAME}_scales"),
        ("short scales", rf"{NAME}_blocks is \(3, 64, 1, 16\) and {NAME}_scales \(3, 64, 2\)"),
        ("transposed", rf"{NAME} is \(3, 64, 32\), the configuration says \(3, 32, 64\)"),
        ("signed", rf"{NAME}_blocks is I8: MXFP4 is stored in U8"),
        ("no number", rf"{NAME}_scales holds 255"),
        ("both", rf"holds {NAME} in MXFP4 and as it is"),
    ],
)
def test_damaged_blocks_are_named(damage, says, folder):
    path = folder / "model.safetensors"
    stored = load_file(path)
    blocks, scales = stored[f"{NAME}_blocks"], stored[f"{NAME}_scales"]
    if damage == "no scales":
        del stored[f"{NAME}_scales"]
    elif damage == "no blocks":
        del stored[f"{NAME}_blocks"]
    elif damage == "short scales":
        stored[f"{NAME}_scales"] = torch.cat((scales, scales), dim=2)
    elif damage == "transposed":
        stored[f"{NAME}_blocks"] = blocks.view(3, 32, 2, 16)
        stored[f"{NAME}_scales"] = scales.view(3, 32, 2)
    elif damage == "signed":
        stored[f"{NAME}_blocks"] = blocks.view(torch.int8)
    elif damage == "no number":
        stored[f"{NAME}_scales"][1, 2, 0] = 255
    else:
        stored[NAME] = torch.zeros(3, 32, 64)
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        hf.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method='bitsandbytes'"),
        ("experts_per_token", 3, "experts_per_token=3 beside num_experts_per_tok=2"),
        ("initial_context_length", 8, "initial_context_length=8 beside original_max_position_embeddings=16"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(key, value, says, folder):
    change(folder, key, value)
    with pytest.raises(ConfigError, match=says):
        hf.load(folder)
