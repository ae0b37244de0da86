"""Adapted runs in the files of others: merged, transformers computes our logits; apart, peft does, on the base's export.

peft is no dependency: its tests are skipped where it is not installed (pip install peft).
"""

import json
from pathlib import Path

import pytest
import torch

from moe import hf
from moe.cli import main
from moe.config.load import load
from moe.errors import ConfigError
from moe.lora import adapter_names
from moe.model import Transformer
from moe.surgery.start import begin_run, read_run
from tests.tiny_runs import tiny_dict

pytest.importorskip("transformers")
ALL = ["attention", "experts"]
DEEPSEEK = [
    'model.attention={"name":"latent","num_heads":2,"q_rank":8,"kv_rank":8,"nope_dim":8,"rope_dim":4,"value_dim":8}',
    "model.moe.shared_hidden=8", "model.moe.first_dense=1", "model.moe.router.gate=full",
]  # fmt: skip
OSS = [
    "model.attention.sinks=true", "model.attention.qkv_bias=true", "model.attention.out_bias=true",
    "model.attention.windows=[8,0]", "model.moe.router=gpt_oss", "model.norm_eps=1e-5",
    "model.moe.activation=swiglu_oai", "model.moe.expert_bias=true",
]  # fmt: skip
FAMILIES = {
    "mixtral": ([], ALL),
    "qwen2_moe": (["model.moe.shared_hidden=8", "model.moe.shared_gate=true", "model.attention.qkv_bias=true"], ALL),
    "qwen3_moe": (["model.attention.qk_norm=head"], ["experts"]),
    "deepseek_v2": (DEEPSEEK, ALL),
    "gpt_oss": (OSS, ALL),
    "llama": (["model.moe=null"], ["attention", "ffn"]),
}


def adapted(folder: Path, family: str) -> tuple[Path, Path]:
    """A base run and one with random adapters on it."""
    options, targets = FAMILIES[family]
    lora = {"rank": 3, "alpha": 6.0, "scaling": "root", "targets": targets}
    plain = load(tiny_dict(folder), ["model.init_std=0.2", *options])
    begin_run(folder / "base", plain, Transformer(plain.model, seed=1).state_dict(), {})
    run = load(plain, [f"model.lora={json.dumps(lora)}"])
    state, generator = Transformer(run.model, seed=1).state_dict(), torch.Generator().manual_seed(3)
    for name in adapter_names(state):
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.2
    begin_run(folder / "tuned", run, state, {})
    return folder / "base", folder / "tuned"


def ids() -> torch.Tensor:
    return torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def exported(base: Path, tuned: Path, folder: Path, family: str) -> torch.Tensor:
    """The base and the merged run as transformers' files, the adapters as peft's; returns our adapted model's logits."""
    assert main(["export", str(base), "--out", str(folder / "hf"), "--family", family]) == 0
    assert main(["export", str(tuned), "--out", str(folder / "merged"), "--family", family]) == 0
    arguments = ["--out", str(folder / "peft"), "--family", family, "--base", str(folder / "hf")]
    assert main(["lora", "export", str(tuned), *arguments]) == 0
    with torch.no_grad():
        return read_run(tuned, adapters="apart").model()(ids()).logits_BSV


def test_the_export_of_an_adapted_run_is_its_sum(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    expected = exported(*adapted(tmp_path, "mixtral"), tmp_path, "mixtral")
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids()).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids()).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 0.1


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_and_merges_what_the_run_does(family, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    expected = exported(*adapted(tmp_path, family), tmp_path, family)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    found = model.merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert found.keys() == merged.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-6)


def test_every_number_of_the_adapters_is_in_the_files(tmp_path):
    from safetensors.torch import load_file

    _, tuned = adapted(tmp_path, "mixtral")
    hf.export_adapters(tuned, tmp_path / "peft")
    tensors = read_run(tuned, adapters="apart").tensors
    ours = sorted(x for name in adapter_names(tensors) for x in tensors[name].flatten().tolist())
    theirs = [
        x for t in load_file(tmp_path / "peft" / "adapter_model.safetensors").values() for x in t.flatten().tolist()
    ]
    assert sorted(x for x in theirs if x) == ours
    with pytest.raises(ConfigError, match="not empty"):
        hf.export_adapters(tuned, tmp_path / "peft")
    with pytest.raises(ConfigError, match="has no adapters"):
        hf.export_adapters(tmp_path / "base", tmp_path / "x")


def test_what_peft_would_take_for_something_else_is_refused(tmp_path):
    lora = {"rank": 2, "targets": ["experts", "ffn"]}
    run = load(tiny_dict(tmp_path), ["model.moe.first_dense=1", f"model.lora={json.dumps(lora)}"])
    begin_run(tmp_path / "tuned", run, Transformer(run.model).state_dict(), {})
    with pytest.raises(ConfigError, match="peft takes adapters of ffn layers of a sparse model"):
        hf.export_adapters(tmp_path / "tuned", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
