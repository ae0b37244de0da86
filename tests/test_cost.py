"""moe/cost against torch's FlopCounterMode on the built model, its parameters, its masks, and what its autograd saves.

FLOPs run on SDPA's math backend, which shows the counter every product; chips' peaks are rebuilt from cores and clocks.
"""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.attention import attention_mask
from moe.config.load import load
from moe.config.schema import (
    AdamW,
    Data,
    GroupedQueryAttention,
    LatentAttention,
    Logging,
    Model,
    MoE,
    Run,
    Train,
    ffn_hidden,
    is_moe_layer,
)
from moe.cost import (
    dense_twin,
    flops_by_component,
    flops_by_layer,
    flops_per_step,
    forward_flops_per_token,
    memory_bytes,
    mfu,
    moe_layers,
    parameters,
    peak_flops,
    relative_difference,
    tokens_per_step,
    train_flops_per_token,
)
from moe.errors import ConfigError
from moe.model import Transformer
from moe.routers.expert_choice import Config as ExpertChoice
from moe.routers.hash import Config as Hash
from moe.routers.loss_free import Config as LossFree
from moe.routers.topk import Config as TopK
from moe_triton import chips

RECIPES = Path(__file__).parents[1] / "recipes"
GROUPED = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
LATENT = LatentAttention(num_heads=4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
EXPERTS = MoE(num_experts=4, top_k=2, expert_hidden=24, router=TopK(), backend="reference")
S = 16


TORCH = {"backend": "torch"}  # torch's counters see torch's operators


def model(**changes) -> Model:
    return Model(
        **({"vocab_size": 40, "dim": 32, "num_layers": 3, "ffn_hidden": 56, "attention": GROUPED} | TORCH | changes)
    )


def run_of(model: Model, **train) -> Run:
    settings = {"steps": 10, "batch_rows": 4, "micro_rows": 2, "optimizer": AdamW(lr=1e-3)} | train
    return Run(name="test", model=model, data=Data(sequence_length=S), train=Train(**settings))


MODELS = {
    "dense": model(),
    "tied": model(tied_head=True),
    "biases and head norms": model(attention=replace(GROUPED, qkv_bias=True, out_bias=True, qk_norm="head")),
    "full norms": model(attention=replace(GROUPED, qk_norm="full")),
    "windows": model(attention=replace(GROUPED, windows=(4, 0))),
    "sinks": model(attention=replace(GROUPED, sinks=True)),
    "latent": model(attention=LATENT),
    "latent with query rank": model(attention=replace(LATENT, q_rank=12), moe=EXPERTS),
    "experts": model(moe=EXPERTS),
    "shared and gated": model(moe=replace(EXPERTS, shared_hidden=20, shared_gate=True)),
    "latent experts": model(moe=replace(EXPERTS, latent_dim=12, shared_hidden=20)),
    "every other layer after one dense": model(num_layers=5, moe=replace(EXPERTS, first_dense=1, every=2)),
    "widths per layer": model(ffn_hidden_per_layer=(8, 24, 40)),
    "one of one": model(moe=replace(EXPERTS, num_experts=1, top_k=1, router=TopK(gate="full"))),
    "all experts": model(moe=replace(EXPERTS, top_k=4)),
    "all experts, of different widths": model(moe=replace(EXPERTS, top_k=4, expert_widths=(8, 24, 40, 17))),
    "loss free": model(moe=replace(EXPERTS, router=LossFree())),
    "gpt-oss's experts": model(moe=replace(EXPERTS, activation="swiglu_oai", expert_bias=True)),
    "hash": model(moe=replace(EXPERTS, router=Hash())),
    "expert choice": model(moe=replace(EXPERTS, router=ExpertChoice(capacity_factor=0.5))),
}


def counted(config: Model, rows: int = 2) -> tuple[float, float]:
    """Forward, and forward plus backward FLOPs per token, as torch counts them."""
    transformer = Transformer(config, seed=0)
    ids = torch.randint(0, config.vocab_size, (rows, S))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = transformer(ids, targets_BS=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
        return forward / ids.numel(), counter.get_total_flops() / ids.numel()


# ---------------------------------------------------------------------------------------------- parameters and FLOPs


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_exactly_those_that_torch_counts(name):
    forward, train = counted(MODELS[name])
    assert forward_flops_per_token(MODELS[name], S) == pytest.approx(forward, rel=1e-12)
    assert train_flops_per_token(MODELS[name], S) == pytest.approx(train, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_built_model_in_total_and_per_layer(name):
    config = MODELS[name]
    with torch.device("meta"):
        built = Transformer(config, seed=0)
    counts = parameters(config)
    assert counts.total == sum(p.numel() for p in built.parameters())
    assert [sum(layer.values()) for layer in counts.layers] == [
        sum(p.numel() for p in block.parameters()) for block in built.layers
    ]
    routers = sum(p.numel() for name, p in built.named_parameters() if ".router." in name)
    assert counts.components.get("router", 0) == routers
    assert sum(counts.components.values()) == counts.total
    assert sum(counts.active_components.values()) == counts.active


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet():
    counts, one_expert = parameters(MODELS["experts"]), 3 * 32 * 24
    assert counts.total - counts.active == 3 * (4 - 2) * one_expert
    assert parameters(MODELS["dense"]).total == parameters(MODELS["dense"]).active


def test_hand_counted_flops_of_each_component():
    """D=32, S=16, N·H=32, M·H=16, V=40, E=4, K=2, F=24, shared 20 with gate: 2 FLOPs per weight and token, 3 layers."""
    expected = {
        "attention": 3 * 2 * 32 * (32 + 16 + 16 + 32),
        "scores": 3 * 2 * 16 * 4 * (8 + 8),
        "router": 3 * 2 * 32 * 4,
        "experts": 3 * 2 * 2 * 3 * 32 * 24,
        "shared": 3 * 2 * (3 * 32 * 20 + 32),
        "head": 2 * 32 * 40,
    }
    assert flops_by_component(MODELS["shared and gated"], S) == expected
    layers = flops_by_layer(MODELS["shared and gated"], S)
    assert sum(sum(layer.values()) for layer in layers) == sum(expected.values()) - expected["head"]


def test_a_capacity_below_one_halves_the_experts_flops():
    half = model(moe=replace(EXPERTS, router=TopK(capacity_factor=0.5)))
    roomy = model(moe=replace(EXPERTS, router=TopK(capacity_factor=2.0)))
    assert flops_by_component(half, S)["experts"] == flops_by_component(MODELS["experts"], S)["experts"] / 2
    assert flops_by_component(roomy, S) == flops_by_component(MODELS["experts"], S)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 40])
def test_causal_scores_count_the_pairs_that_the_mask_leaves(window):
    config = model(attention=replace(GROUPED, windows=(window,)))
    mask = attention_mask(torch.arange(S), torch.zeros(1, S, dtype=torch.int64), window)
    assert mask is not None
    full, causal = (flops_by_component(config, S, causal_half=half)["scores"] for half in (False, True))
    assert causal / full == pytest.approx(mask.keys_allowed().sum().item() / (S * S))


# -------------------------------------------------------------------------------------------------------------- twin


def random_run(draw: random.Random) -> Run:
    """Sparse models between a laptop's and a cluster's."""
    heads, head_dim = draw.choice([2, 4, 8, 16]), draw.choice([16, 32, 64, 128])
    attention = (
        GroupedQueryAttention(
            num_heads=heads, num_kv_heads=draw.choice([1, 2]), head_dim=head_dim, windows=draw.choice([(0,), (64, 0)])
        )
        if draw.random() < 0.7
        else LatentAttention(num_heads=heads, kv_rank=64, nope_dim=head_dim, rope_dim=16, value_dim=head_dim)
    )
    E = draw.choice([2, 4, 7, 8, 16, 61, 64, 128])
    K = draw.randint(1, min(E, 8))
    layers = draw.randint(1, 12)
    first_dense = draw.randint(0, layers - 1) if draw.random() < 0.3 else 0
    config = Model(
        vocab_size=draw.choice([257, 4096, 50304]),
        dim=draw.choice([64, 96, 128, 256, 512, 2048]),
        num_layers=layers,
        ffn_hidden=draw.randint(32, 4096),
        attention=attention,
        tied_head=draw.random() < 0.5,
        moe=MoE(
            num_experts=E,
            top_k=K,
            expert_hidden=draw.randint(8, 2048),
            shared_hidden=draw.choice([0, 0, 64, 250]),
            shared_gate=draw.random() < 0.5,
            first_dense=first_dense,
            every=draw.choice([1, 1, 2]) if first_dense < layers - 1 else 1,
            router=TopK(gate="full", capacity_factor=draw.choice([0.0, 0.0, 0.75, 1.25])),
            expert_widths=tuple(draw.randint(8, 2048) for _ in range(E)) if draw.random() < 0.2 else (),
        ),
    )
    train = Train(steps=1, batch_rows=1, micro_rows=1, optimizer=AdamW(lr=1e-3))
    return Run(name="drawn", model=config, data=Data(sequence_length=draw.choice([128, 1024, 4096])), train=train)


def test_random_twins_agree_to_half_a_percent_and_differ_in_dense_width_only():
    draw, refused = random.Random(0), 0
    for _ in range(400):
        run = random_run(draw)
        try:
            twin = dense_twin(run)
        except ConfigError:
            refused += 1
            continue
        config, dense, length = run.model, twin.model, run.data.sequence_length
        for causal_half in (False, True):
            sparse_flops = train_flops_per_token(config, length, causal_half=causal_half)
            dense_flops = train_flops_per_token(dense, length, causal_half=causal_half)
            assert abs(dense_flops / sparse_flops - 1) <= 0.005
        for layer in range(config.num_layers):
            if is_moe_layer(config, layer):
                assert ffn_hidden(dense, layer) % 8 == 0
            else:
                assert ffn_hidden(dense, layer) == ffn_hidden(config, layer)
        widths = {"ffn_hidden": config.ffn_hidden, "ffn_hidden_per_layer": config.ffn_hidden_per_layer}
        assert replace(dense, moe=config.moe, **widths) == config
        assert replace(twin, name=run.name, model=config) == run
    assert refused < 8


def test_a_refused_twin_names_an_expert_width_that_is_accepted():
    """With one expert layer there is nothing to spread: E/3 + 2·F units against a multiple of 8."""
    refused = 0
    for width in range(8, 72):
        one = model(num_layers=1, moe=replace(EXPERTS, expert_hidden=width))
        try:
            dense_twin(run_of(one))
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert "0.5%" in message and "multiples of 8" in message
            suggested = int(message.split("use model.moe.expert_hidden=")[1])
            dense_twin(run_of(replace(one, moe=replace(EXPERTS, expert_hidden=suggested))))
    assert 20 < refused < 64


@pytest.mark.parametrize(
    "name", ["experts", "shared and gated", "every other layer after one dense", "loss free", "hash"]
)
def test_torch_counts_equal_flops_for_the_sparse_model_and_its_twin(name):
    moe = MODELS[name].moe
    assert moe is not None
    # The router is worth E/3 = 4/3 units of width: 2·47 + 4/3 = 95.3 against 96; with a shared expert 127.7 and 128.
    hidden = 48 if isinstance(moe.router, Hash) else 47
    moe = replace(moe, expert_hidden=hidden, shared_hidden=32 if moe.shared_hidden else 0)
    run = run_of(replace(MODELS[name], vocab_size=1000, moe=moe))
    twin = dense_twin(run)
    sparse, dense = counted(run.model), counted(twin.model)
    assert dense[0] == pytest.approx(sparse[0], rel=0.005)
    assert dense[1] == pytest.approx(sparse[1], rel=0.005)
    assert abs(relative_difference(run, twin)) <= 0.005


def test_the_twin_keeps_dense_layers_and_drops_routing_records():
    config = model(num_layers=5, vocab_size=1000, moe=replace(EXPERTS, first_dense=1, every=2, expert_hidden=47))
    run = replace(run_of(config), logging=Logging(record_routing=True))
    twin = dense_twin(run)
    assert twin.name == "test-dense"
    assert twin.model.moe is None and moe_layers(run.model) == (2, 4)
    assert twin.model.ffn_hidden_per_layer == (56, 56, 96, 56, 96)
    assert not twin.logging.record_routing


def test_a_twin_of_expert_layers_only_has_one_width():
    twin = dense_twin(run_of(model(vocab_size=1000, moe=replace(EXPERTS, expert_hidden=47))))
    assert (twin.model.ffn_hidden, twin.model.ffn_hidden_per_layer) == (96, ())


def test_widths_are_spread_over_the_layers_where_one_width_is_too_far_off():
    """2·32 + 8/3 = 66.7 units in each of three layers: 64, 64, 72 is exact, where 64 everywhere is 0.9 % off."""
    run = run_of(model(vocab_size=200, moe=replace(EXPERTS, num_experts=8, expert_hidden=32)))
    twin = dense_twin(run)
    assert sorted(twin.model.ffn_hidden_per_layer) == [64, 64, 72]
    assert relative_difference(run, twin) == pytest.approx(0, abs=1e-12)
    assert counted(twin.model)[1] == pytest.approx(counted(run.model)[1], rel=1e-12)


@pytest.mark.parametrize("recipe", sorted({path.stem for path in RECIPES.glob("*.py")} - {"life", "distil"}))
def test_every_recipe_of_a_sparse_run_has_a_twin(recipe):
    run = load(RECIPES / f"{recipe}.py")
    twin = load(dense_twin(run))
    assert abs(relative_difference(run, twin)) <= 0.005
    assert parameters(twin.model).active == pytest.approx(parameters(run.model).active, rel=0.01)


def test_a_dense_run_has_no_twin():
    with pytest.raises(ConfigError, match="test has no expert layer"):
        dense_twin(run_of(model()))


# ------------------------------------------------------------------------------------------------------------ memory


def saved_for_backward(config: Model, dtype: torch.dtype, rows: int, length: int) -> int:
    """Bytes that autograd holds after a forward pass, parameters apart."""
    transformer = Transformer(config, seed=0, dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # the tensor stays alive, so that no address comes twice
        return tensor

    ids = torch.randint(0, config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = transformer(ids, targets_BS=ids)
    assert output.loss is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "head norms", "latent", "experts", "widths", "shared", "clamps and biases"])
def test_activation_memory_is_what_autograd_saves_to_ten_percent(name, precision):
    """Of torch's operators; the compiled kernels keep less: no repeated key heads, nothing that is rotated, no mask of S x S."""
    attention = GroupedQueryAttention(num_heads=6, num_kv_heads=3, head_dim=16)
    moe = MoE(num_experts=8, top_k=2, expert_hidden=40, router=TopK(), backend="torch")
    base = Model(vocab_size=256, dim=96, num_layers=3, ffn_hidden=256, attention=attention, backend="torch")
    config = {
        "dense": replace(base, document_mask=False),
        "head norms": replace(base, attention=replace(attention, qk_norm="head")),
        "latent": replace(base, attention=replace(LATENT, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=24)),
        "experts": replace(base, moe=moe),
        "widths": replace(base, moe=replace(moe, expert_widths=(16, 24, 40, 40, 40, 72, 8, 56))),
        "clamps and biases": replace(base, moe=replace(moe, activation="swiglu_oai", expert_bias=True)),
        "shared": replace(base, moe=replace(moe, shared_hidden=64, shared_gate=True, first_dense=1)),
    }[name]
    run = replace(run_of(config, precision=precision, loss_chunk=0), data=Data(sequence_length=128))
    estimate = memory_bytes(run)
    kept = sum(estimate[part] for part in ("activations", "masks", "weight_casts")) + estimate["logits"] // 2
    saved = saved_for_backward(config, getattr(torch, precision), 2, 128)
    assert kept == pytest.approx(saved, rel=0.1)
    compiled = saved_for_backward(replace(config, backend="auto"), getattr(torch, precision), 2, 128)
    assert 0.6 * saved <= compiled <= saved


def test_states_of_adam_cost_sixteen_bytes_per_parameter():
    estimate = memory_bytes(run_of(MODELS["experts"]))
    held = sum(estimate[part] for part in ("parameters", "gradients", "optimizer"))
    assert held == 16 * parameters(MODELS["experts"]).total


def test_checkpointing_and_smaller_micro_batches_need_less_memory():
    whole = memory_bytes(run_of(MODELS["experts"]))["activations"]
    assert memory_bytes(run_of(MODELS["experts"], activation_checkpointing=True))["activations"] < whole
    assert memory_bytes(run_of(MODELS["experts"], micro_rows=1))["activations"] == pytest.approx(whole / 2, abs=1)


# -------------------------------------------------------------------------------------------------------- throughput


def test_tokens_and_flops_of_a_step():
    run = run_of(MODELS["experts"])
    assert tokens_per_step(run) == 4 * S
    assert flops_per_step(run) == 4 * S * train_flops_per_token(run.model, S)


def test_mfu_of_a_hand_worked_case():
    """1 GFLOP per token, 1,000 tokens per second, on 4 TFLOP/s: a quarter."""
    assert mfu(1e9, 1000, 4e12) == 0.25


@pytest.mark.parametrize(
    "device, precision, expected",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 66.9e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("AMD Instinct MI300X", "bfloat16", 1307.4e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),  # it has no such unit
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),  # not an A10
        ("cpu", "float32", None),
    ],
)
def test_peaks_are_found_by_the_device_name(device, precision, expected):
    assert peak_flops(device, precision) == (expected and pytest.approx(expected))


# Multiprocessors, boost clock in GHz, dense float16 FLOPs per clock and multiprocessor: the architecture's own figures.
CORES = {
    "V100 SXM2": (80, 1.53, 1024),
    "T4": (40, 1.59, 1024),
    "A100 SXM4 80GB": (108, 1.41, 2048),
    "A10": (72, 1.695, 1024),
    "RTX A6000": (84, 1.80, 1024),
    "RTX 3090": (82, 1.695, 512),
    "RTX 4090": (128, 2.52, 512),
    "L4": (58, 2.04, 1024),
    "L40S": (142, 2.49, 1024),
    "H100 HBM3": (132, 1.83, 4096),
    "H100 PCIE": (114, 1.62, 4096),
    "H200": (132, 1.83, 4096),
    "B200": (148, 1.86, 8192),
    "RTX 5090": (170, 2.407, 512),
    "MI250X": (110, 1.7, 1024),
    "MI300X": (304, 2.1, 2048),
    "MI325X": (304, 2.1, 2048),
    "MI350X": (256, 2.2, 4096),
    "MI355X": (256, 2.4, 4096),
}


@pytest.mark.parametrize("name", CORES)
def test_a_chips_peak_is_cores_times_clock_times_width(name):
    chip = next(chip for chip in chips.CHIPS if chip.name == name)
    multiprocessors, gigahertz, flops = CORES[name]
    assert chip.fp16 == pytest.approx(multiprocessors * gigahertz * 1e9 * flops, rel=0.015)


def test_every_chip_is_found_by_its_own_name_and_is_plausible():
    for chip in chips.CHIPS:
        assert chips.find(f"NVIDIA {chip.name}") == chip
        assert chip.source and chip.bf16 in (None, chip.fp16)
        assert chip.fp32 < chip.fp16
        assert chip.tf32 is None or chip.fp32 <= chip.tf32 < chip.fp16
        assert chip.fp8 is None or chip.fp8 == pytest.approx(2 * chip.fp16, rel=0.015)
        assert 64 * 1024 <= chip.shared_memory <= 256 * 1024
        assert 1e10 < chip.bandwidth < chip.fp16 / 20


# NVLink generation 2 to 5: GB/s of one link one way; links of a GPU.
NVLINKS = {"V100 SXM2": (25, 6), "A100 SXM4 80GB": (25, 12), "H100 HBM3": (25, 18), "H200": (25, 18), "B200": (50, 18)}


def test_links_are_of_known_chips_and_as_wide_as_their_lanes():
    assert set(chips.LINKS) <= {chip.name for chip in chips.CHIPS}
    for name, (rate, lanes) in NVLINKS.items():
        assert chips.LINKS[name].node == rate * lanes * 1e9
    for links in chips.LINKS.values():
        assert links.source and links.joined >= 8 and links.network < links.node


def test_cost_does_not_load_torch():
    code = "import sys, moe.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
