"""What adapters are counted as, against the built model and the products that torch counts (FlopCounterMode)."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config.schema import GroupedQueryAttention, LatentAttention, Lora, Model, MoE
from moe.cost import forward_flops_per_token, parameters, train_flops_per_token
from moe.model import Transformer
from moe.routers.topk import Config as TopK

S, RANK = 16, 3
GROUPED = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
LATENT = LatentAttention(num_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
EXPERTS = MoE(
    num_experts=4, top_k=2, expert_hidden=24, router=TopK(), backend="reference", shared_hidden=20, shared_gate=True
)
PLAIN = Model(vocab_size=40, dim=32, num_layers=3, ffn_hidden=56, attention=GROUPED)
MODELS = {
    "attention": (PLAIN, ("attention",)),
    "latent attention": (replace(PLAIN, attention=LATENT, moe=EXPERTS), ("attention",)),
    "all but experts": (replace(PLAIN, moe=replace(EXPERTS, first_dense=1)), ("attention", "shared", "ffn")),
    "all": (replace(PLAIN, moe=replace(EXPERTS, first_dense=1)), ("attention", "experts", "shared", "ffn")),
    "latent experts": (replace(PLAIN, moe=replace(EXPERTS, latent_dim=12)), ("experts",)),
}


def adapted(name: str) -> Model:
    model, targets = MODELS[name]
    return replace(model, lora=Lora(rank=RANK, targets=targets))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_built_model(name):
    with torch.device("meta"):
        built = Transformer(adapted(name))
    counts = parameters(adapted(name))
    assert counts.total == sum(p.numel() for p in built.parameters())
    assert counts.components["lora"] == sum(p.numel() for p in built.parameters() if p.requires_grad)
    each = [sum(p.numel() for p in block.parameters()) for block in built.layers]
    assert [sum(layer.values()) for layer in counts.layers] == each
    assert counts.total - counts.components["lora"] == parameters(MODELS[name][0]).total


def counted(model: Model) -> tuple[float, float]:
    """Forward, and forward plus backward FLOPs per token, as torch counts them."""
    ids = torch.randint(0, model.vocab_size, (2, S), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = Transformer(model)(ids, targets_BS=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
        return forward / ids.numel(), counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("name", ["attention", "all but experts"])
def test_flops_are_those_that_torch_counts_but_for_the_first_input(name):
    """Nothing before the first block is trained, so its queries, keys and values, and their A, have no gradient of their input."""
    forward, train = counted(adapted(name))
    assert forward_flops_per_token(adapted(name), S) == pytest.approx(forward, rel=1e-12)
    spared = 2 * 32 * (32 + 16 + 16) + 2 * 3 * 32 * RANK
    assert train_flops_per_token(adapted(name), S) - spared == pytest.approx(train, rel=1e-12)


def test_adding_to_whole_experts_is_more_than_what_is_counted_as_the_model():
    """Rows are counted as if each met A and B; torch sees A·B of every expert, and no product of rows with either."""
    model = adapted("all")
    forward, _ = counted(model)
    rows = 2 * 2 * 2 * 3 * RANK * (32 + 24)  # two layers, K = 2
    merging = 2 * 2 * 4 * 3 * RANK * 32 * 24 / (2 * S)
    assert forward_flops_per_token(model, S) - rows + merging == pytest.approx(forward, rel=1e-12)
