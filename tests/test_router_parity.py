"""Choices, weights and balance losses against the routers of transformers' models, on random weights in float32."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe.balance import balance_loss
from moe.config.schema import Balance
from moe.routers import deepseek_v2, gpt_oss, grin, llama4, loss_free, topk
from moe.routing import Tokens

D, E, K, B, S = 32, 16, 4, 3, 40
GROUPS = {"n_group": 4, "topk_group": 2}
OURS = {"num_groups": 4, "top_groups": 2}
CASES = {
    "mixtral": (
        modeling_mixtral.MixtralTopKRouter,
        MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K),
        topk,
        topk.Config(),
    ),
    "olmoe": (
        modeling_olmoe.OlmoeTopKRouter,
        OlmoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False),
        topk,
        topk.Config(gate="full"),
    ),
    "qwen2_moe": (
        modeling_qwen2_moe.Qwen2MoeTopKRouter,
        Qwen2MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False),
        topk,
        topk.Config(gate="full"),
    ),
    "qwen3_moe": (
        modeling_qwen3_moe.Qwen3MoeTopKRouter,
        Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True),
        topk,
        topk.Config(),
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(
            hidden_size=D,
            n_routed_experts=E,
            num_experts_per_tok=K,
            routed_scaling_factor=16.0,
            topk_method="group_limited_greedy",
            **GROUPS,
        ),
        deepseek_v2,
        deepseek_v2.Config(scaling_factor=16.0, **OURS),
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(
            hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=2.5, norm_topk_prob=True, **GROUPS
        ),
        loss_free,
        loss_free.Config(scaling_factor=2.5, **OURS),
    ),
    "glm4_moe": (
        Glm4MoeTopkRouter,
        Glm4MoeConfig(
            hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=1.5, norm_topk_prob=True,
            n_group=1, topk_group=1,
        ),
        loss_free,
        loss_free.Config(scaling_factor=1.5),
    ),
    "gpt_oss": (
        modeling_gpt_oss.GptOssTopKRouter,
        GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K),
        gpt_oss,
        gpt_oss.Config(),
    ),
    "llama4": (
        Llama4Router,
        Llama4TextConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=1),
        llama4,
        llama4.Config(),
    ),
    "phimoe": (
        PhimoeTopKRouter,
        PhimoeConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.1),
        grin,
        grin.Config(jitter=0.1),
    ),
}  # fmt: skip
LOSSES = {
    "mixtral": modeling_mixtral.load_balancing_loss_func,
    "olmoe": modeling_olmoe.load_balancing_loss_func,
    "qwen2_moe": modeling_qwen2_moe.load_balancing_loss_func,
    "qwen3_moe": modeling_qwen3_moe.load_balancing_loss_func,
    "gpt_oss": modeling_gpt_oss.load_balancing_loss_func,
}
WEIGHTS = {"weight": "weight_ED", "bias": "logit_bias_E", "e_score_correction_bias": "bias_E"}


def pair(name: str, seed: int = 0) -> SimpleNamespace:
    """Their router and ours with the same random weights, and inputs."""
    theirs_class, their_config, module, config = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    theirs = theirs_class(their_config).eval()
    top_k = their_config.num_experts_per_tok
    ours = module.Router(config, dim=D, num_experts=E, top_k=top_k, layer=0, seed=0).eval()
    mine = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    copied = set()
    with torch.no_grad():
        for key, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if key == "weight" else 0.1))
            mine[WEIGHTS[key]].copy_(value)
            copied.add(WEIGHTS[key])
    assert copied == set(mine), "nothing of ours is left at its start"
    return SimpleNamespace(theirs=theirs, ours=ours, K=top_k, x=torch.randn(B * S, D, generator=generator))


def dense(expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weights as a matrix [T, E], whatever the order of the choices."""
    return torch.zeros(B * S, E).scatter(1, expert_TK, weight_TK)


def tokens_of(rows: int = B) -> Tokens:
    return Tokens.of(torch.zeros(rows, S, dtype=torch.int64))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_choices_and_weights_are_those_of_transformers(name):
    p = pair(name)
    routing = p.ours(p.x, tokens_of())
    ours = dense(routing.expert_R.view(-1, p.K), routing.weight_R.view(-1, p.K))
    if name == "llama4":
        theirs = p.theirs(p.x)[0]
    else:
        _, weight_TK, expert_TK = p.theirs(p.x)
        theirs = dense(expert_TK, weight_TK)
    assert torch.equal(ours > 0, theirs > 0)
    assert (ours > 0).sum() == B * S * p.K
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_the_balance_loss_of_one_layer_is_theirs_over_k(name):
    p = pair(name)
    logits = p.theirs(p.x)[0]
    theirs = LOSSES[name]((logits,), E, p.K)
    assert p.ours(p.x, tokens_of()).losses["balance"].value.item() == pytest.approx(theirs.item() / p.K, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_over_layers_theirs_pools_where_ours_averages(name):
    """They count over all layers at once, so layers that lean to different experts look balanced."""
    pairs = [pair(name, seed) for seed in range(3)]
    theirs = LOSSES[name](tuple(p.theirs(p.x)[0] for p in pairs), E, K).item() / K
    routings = [p.ours(p.x, tokens_of()) for p in pairs]
    expert_R = torch.cat([routing.expert_R for routing in routings])
    share_TE = torch.cat([p.theirs(p.x)[0].softmax(1) for p in pairs])
    token_R = torch.arange(3 * B * S).repeat_interleave(K)
    pooled = balance_loss(share_TE, expert_R, token_R, tokens_of(3 * B), Balance(), 0).value.item()
    assert pooled == pytest.approx(theirs, rel=1e-6)
    mean = sum(routing.losses["balance"].value.item() for routing in routings) / 3
    assert mean > theirs * 1.01


@torch.no_grad()
def test_padding_is_left_out_of_the_balance_loss_as_in_theirs():
    p = pair("mixtral")
    valid = torch.arange(S).expand(B, S) < torch.tensor([[40], [25], [7]])
    theirs = LOSSES["mixtral"]((p.theirs(p.x)[0],), E, K, valid.long()).item() / K
    tokens = Tokens.of(torch.zeros(B, S, dtype=torch.int64), valid_BS=valid)
    assert p.ours(p.x, tokens).losses["balance"].value.item() == pytest.approx(theirs, rel=1e-6)
