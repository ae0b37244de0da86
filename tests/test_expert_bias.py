"""Experts with biases and gpt-oss's activation in what surrounds them: first values, optimizers, checks, surgery, settings.

What they compute is in test_experts.py, kernels_interpreted/test_ffn.py and test_hf.py; every layout in layout_cases.py.
"""

import json
from dataclasses import replace

import pytest
import torch

from moe.config.load import load
from moe.config.lora import Lora
from moe.config.schema import AdamW, GroupedQueryAttention, Model, MoE, Muon
from moe.errors import ConfigError
from moe.init import BIASES
from moe.lora import adapt
from moe.model import Transformer
from moe.muon import muon_groups
from moe.optim import build_optimizer, parameter_groups
from moe.routers.topk import Config as TopK
from moe.surgery.esft import expert_masks
from moe.surgery.scores import LayerUse
from moe.surgery.select import keep_experts, merge_experts
from moe.surgery.start import begin_run, read_run
from moe.surgery.store import get, put
from moe.surgery.ticket import prunable
from moe.surgery.upcycle import Change, upcycle
from tests.tiny_runs import tiny_dict, tiny_run

MOE = MoE(
    num_experts=4,
    top_k=2,
    expert_hidden=6,
    router=TopK(),
    activation="swiglu_oai",
    activation_limit=0.5,
    expert_bias=True,
)
MODEL = Model(
    vocab_size=20,
    dim=8,
    num_layers=2,
    ffn_hidden=8,
    attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4),
    moe=MOE,
    init_std=0.5,
)
NAMES = {f"layers.{layer}.moe.experts.{name}" for layer in (0, 1) for name in BIASES}
IDS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def filled() -> Transformer:
    """A model whose biases are not zero."""
    model = Transformer(MODEL, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in NAMES:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_biases_start_at_zero_and_move():
    model = Transformer(MODEL, seed=1)
    parameters = dict(model.named_parameters())
    assert parameters.keys() >= NAMES
    assert all(parameters[name].abs().max() == 0 for name in NAMES)
    loss = model(IDS, targets_BS=IDS).loss
    assert loss is not None
    loss.backward()
    build_optimizer(model, AdamW(lr=0.1)).step()
    assert all(parameters[name].abs().max() > 0 for name in NAMES)


@pytest.mark.parametrize("groups", [parameter_groups, muon_groups], ids=["adamw", "muon"])
def test_biases_do_not_decay_and_are_no_matrices_of_muons(groups):
    model = Transformer(MODEL)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups(model, 0.3):
        held = {names[id(p)] for p in group["params"]} & NAMES
        assert held == (NAMES if group["weight_decay"] == 0 and not group.get("muon") else set())


def test_muon_moves_biases_as_adamw_does():
    moved = []
    for config in (Muon(lr=0.05), AdamW(lr=0.05)):
        model = filled()
        loss = model(IDS, targets_BS=IDS).loss
        assert loss is not None
        loss.backward()
        build_optimizer(model, config).step()
        moved.append({name: p.detach() for name, p in model.named_parameters() if name in NAMES})
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in NAMES)


def test_dropped_experts_take_their_biases_with_them():
    state = filled().state_dict()
    kept = keep_experts(state, {0: [3, 1]})
    for name in BIASES:
        assert torch.equal(kept[f"layers.0.moe.experts.{name}"], state[f"layers.0.moe.experts.{name}"][[3, 1]])
        assert torch.equal(kept[f"layers.1.moe.experts.{name}"], state[f"layers.1.moe.experts.{name}"])


def test_a_merge_permutes_hidden_biases_with_their_units():
    """Expert 2 is made expert 0 with its hidden units in another order: merged, they are expert 0."""
    state = dict(filled().state_dict())
    prefix, order = "layers.0.moe.experts.", torch.tensor([4, 0, 5, 2, 1, 3])
    for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD", *BIASES):
        whole = state[prefix + name].clone()
        dimension = name.rsplit("_", 1)[1][1:].find("F")
        whole[2] = whole[0] if dimension < 0 else whole[0].index_select(dimension, order)
        state[prefix + name] = whole
    one = torch.ones(4, dtype=torch.float64)
    merged = merge_experts(state, {0: [[0, 2], [1, 3]]}, {0: LayerUse(one, one, one)})
    for name in BIASES:
        torch.testing.assert_close(merged[prefix + name][0], state[prefix + name][0])
        assert merged[prefix + name].shape[0] == 2


def test_fine_tuned_experts_are_masked_whole_and_tickets_leave_biases():
    state = filled().state_dict()
    masks = expert_masks(state, {1: [2]})
    for name in BIASES:
        assert masks[f"layers.1.moe.experts.{name}"].flatten().tolist() == [False, False, True, False]
        assert not masks[f"layers.0.moe.experts.{name}"].any()
    assert not NAMES & set(prunable(state))


def gpt_oss_like(folder, **changes) -> dict:
    """Settings of a tiny run whose experts clamp and have biases."""
    values = tiny_dict(folder)
    values["model"]["moe"] |= {"activation": "swiglu_oai", "expert_bias": True, **changes}
    return values


def test_a_variant_that_moves_one_experts_bias_adds_that_expert_alone_to_a_store(tmp_path):
    run = load(gpt_oss_like(tmp_path))
    state = Transformer(run.model, seed=1).state_dict()
    begin_run(tmp_path / "base", run, state, {})
    name = next(name for name in state if name.endswith("b_up_EF"))
    changed = {**state, name: state[name].clone()}
    changed[name][1] += 1
    begin_run(tmp_path / "variant", run, changed, {})
    put(tmp_path / "store", "base", tmp_path / "base")
    receipt = put(tmp_path / "store", "variant", tmp_path / "variant")
    assert receipt["new_shards"] == 1
    get(tmp_path / "store", "variant", tmp_path / "again")
    assert torch.equal(read_run(tmp_path / "again").tensors[name], changed[name])


def test_adapters_leave_biases_as_they_are():
    model = filled()
    before = model(IDS).logits_BSV
    adapt(model, Lora(rank=2), seed=0, std=0.1)
    loss = model(IDS, targets_BS=IDS).loss
    assert torch.equal(model(IDS).logits_BSV, before) and loss is not None
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not NAMES & moved and any("experts.lora" in name for name in moved)


@pytest.mark.parametrize("method", ["copy", "drop", pytest.param("noise", marks=pytest.mark.full)])
def test_upcycling_gives_experts_biases_of_zero(method, tmp_path):
    values = tiny_dict(tmp_path)
    values["model"] |= {"moe": None, "init_std": 0.3}
    dense = load(values)
    begin_run(tmp_path / "dense", dense, Transformer(dense.model, seed=3).state_dict(), {})
    settings = {"num_experts": 4, "top_k": 2, "expert_hidden": 32, "router": {"name": "topk"}, "expert_bias": True}
    receipt = upcycle(
        tmp_path / "dense", _written(tmp_path, values, settings), tmp_path / "new", Change(method=method), rows=4
    )
    assert method != "copy" or abs(receipt["difference"]) <= 1e-6
    tensors = read_run(tmp_path / "new").tensors
    assert all(tensors[name].abs().max() == 0 for name in tensors if name.endswith(BIASES))
    clamped = _written(tmp_path, values, {**settings, "activation": "swiglu_oai"})
    with pytest.raises(ConfigError, match="activation=swiglu_oai has no counterpart in a dense layer"):
        upcycle(tmp_path / "dense", clamped, tmp_path / "no", Change(method=method), rows=4)


def _written(folder, values: dict, moe: dict) -> str:
    path = folder / "target.json"
    path.write_text(json.dumps({**values, "model": {**values["model"], "moe": moe}}))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["activation_alpha=2"], r"activation_alpha \(2\) has no effect with activation=swiglu: use .*swiglu_oai, or"),
        (["activation_limit=3"], r"activation_limit \(3\) has no effect"),
        (["activation=swiglu_oai", "activation_limit=0"], "activation_limit must be a number greater than 0, not 0"),
        (["expert_bias=true", "backend=block_sparse"], "'block_sparse' computes SwiGLU without biases"),
        (["activation=swiglu_oai", "precision=fp8_row", "backend=reference"], "'fp8_row' is for SwiGLU without biases"),
        (["expert_bias=true", "expert_widths=[8,16,8,8]"], "expert_bias needs experts of one width"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(settings, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        tiny_run(tmp_path, *(f"model.moe.{setting}" for setting in settings))


def test_the_layer_without_biases_is_unchanged_by_biases_of_zero():
    plain = replace(MODEL, moe=replace(MOE, expert_bias=False))
    with torch.no_grad():
        assert torch.equal(Transformer(MODEL, seed=1)(IDS).logits_BSV, Transformer(plain, seed=1)(IDS).logits_BSV)
