"""What adapters are counted as, against the built model and the products that torch counts (FlopCounterMode)."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config.schema import AdamW, Data, GroupedQueryAttention, LatentAttention, Lora, Model, MoE, Run, Train
from moe.cost import forward_flops_per_token, memory_bytes, parameters, train_flops_per_token
from moe.model import Transformer
from moe.routers.topk import Config as TopK

S, RANK = 16, 3
GROUPED = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
LATENT = LatentAttention(num_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
EXPERTS = MoE(
    num_experts=4, top_k=2, expert_hidden=24, router=TopK(), backend="reference", shared_hidden=20, shared_gate=True
)
PLAIN = Model(vocab_size=40, dim=32, num_layers=3, ffn_hidden=56, attention=GROUPED, backend="torch")
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_is_that_of_frozen_weights_their_sums_and_trained_adapters(precision):
    """The copies of experts with adapters are what autograd keeps more than without, to 10 %; states are the adapters' alone."""
    model, _ = MODELS["all"]
    wide = replace(model, moe=replace(model.moe, backend="torch", expert_hidden=512, num_experts=8))
    lora = replace(wide, lora=Lora(rank=RANK, targets=("experts",)))
    plain, with_lora = (memory_bytes(run_of(each, precision)) for each in (wide, lora))
    counts = parameters(lora)
    experts = max(layer.get("experts", 0) for layer in counts.layers)
    assert with_lora["optimizer"] == 8 * counts.components["lora"]
    assert with_lora["gradients"] == 4 * (counts.components["lora"] + experts)
    assert with_lora["parameters"] - plain["parameters"] == 4 * counts.components["lora"]
    kept = kept_stacks(lora, getattr(torch, precision))
    assert kept == counts.components["experts"] * (4 if precision == "float32" else 2)
    if precision == "float32":
        assert with_lora["weight_casts"] - plain["weight_casts"] == kept


def run_of(model: Model, precision: str) -> Run:
    train = Train(steps=2, batch_rows=2, micro_rows=2, optimizer=AdamW(lr=1e-3), precision=precision)
    return Run(name="test", model=model, data=Data(sequence_length=S), train=train)


def kept_stacks(model: Model, dtype: torch.dtype) -> int:
    """Bytes of the tensors of experts' shape that autograd keeps from a forward pass, the parameters themselves apart."""
    built = Transformer(model, dtype=dtype)
    own, kept = {p.data_ptr() for p in built.parameters()}, {}

    def pack(tensor):
        shape = list(tensor.shape)
        stacked = len(shape) == 3 and shape[0] == model.moe.num_experts and model.moe.expert_hidden in shape
        if stacked and RANK not in shape and tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, model.vocab_size, (2, S), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = built(ids, targets_BS=ids)
    assert output.loss is not None
    return sum(tensor.nbytes for tensor in kept.values())


def test_adding_to_whole_experts_is_more_than_what_is_counted_as_the_model():
    """Rows are counted as if each met A and B; torch sees A·B of every expert, and no product of rows with either."""
    model = adapted("all")
    forward, _ = counted(model)
    rows = 2 * 2 * 2 * 3 * RANK * (32 + 24)  # two layers, K = 2
    merging = 2 * 2 * 4 * 3 * RANK * 32 * 24 / (2 * S)
    assert forward_flops_per_token(model, S) - rows + merging == pytest.approx(forward, rel=1e-12)
