"""The transformer against formulas written out, transformers' modules, and itself under other layouts."""

import math
from dataclasses import replace

import pytest
import torch

from moe.attention import RotaryEmbedding, attention_mask, rotate
from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, Rotary, Yarn
from moe.init import initialise, materialise
from moe.model import IGNORE, Transformer, token_losses
from moe.moe_layer import MoELayer
from moe.random import normal, token_keys, uniform
from moe.routers.expert_choice import Config as Choice
from moe.routers.hash import Config as Hash
from moe.routers.random import Config as Random
from moe.routers.topk import Config as TopK
from moe.routing import Tokens

GQA = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
EXPERTS = MoE(num_experts=4, top_k=2, expert_hidden=16, router=TopK())


def tiny(**changes: object) -> Model:
    """A two-layer model of width 32."""
    settings = {"vocab_size": 61, "dim": 32, "num_layers": 2, "ffn_hidden": 48, "attention": GQA, "init_std": 0.2}
    return Model(**{**settings, **changes})


def ids_of(B: int = 2, S: int = 12) -> torch.Tensor:
    return torch.randint(0, 61, (B, S), generator=torch.Generator().manual_seed(1))


def float64(config: Model) -> Transformer:
    return Transformer(config, seed=4, dtype=torch.float64).double().eval()


def plain_attention(module, x, cos_sin, visible, *, sinks=None):
    """Softmax attention of one module written out per head; `visible` [B, S, S]."""
    c = module.config
    q, k, v = (p(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in (module.query, module.key, module.value))
    q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    group = c.num_heads // c.num_kv_heads
    outs = []
    for head in range(c.num_heads):
        logits = q[:, head] @ k[:, head // group].transpose(1, 2) / math.sqrt(c.head_dim)
        logits = logits.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            logits = torch.cat((logits, sinks[head].expand(*logits.shape[:2], 1)), dim=-1)
        share = logits.softmax(-1)[..., : x.shape[1]]
        outs.append(share @ v[:, head // group])
    return module.out(torch.cat(outs, dim=-1))


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_is_softmax_over_what_it_may_see(window, sinks, documents):
    config = tiny(attention=replace(GQA, windows=(window,), sinks=sinks))
    model = float64(config)
    module = model.layers[0].attention
    if sinks:
        with torch.no_grad():
            module.sink_N.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    position = torch.arange(12)
    document = (
        torch.tensor([[0] * 4 + [1] * 8, [0] * 9 + [1] * 3]) if documents else torch.zeros(2, 12, dtype=torch.int64)
    )
    visible = torch.zeros(2, 12, 12, dtype=torch.bool)
    for b in range(2):
        for i in range(12):
            for j in range(12):
                near = window == 0 or i - j < window
                visible[b, i, j] = j <= i and near and document[b, i] == document[b, j]
    cos_sin = model.rotary(position)
    mask = attention_mask(position, document if documents else None, window)
    expected = plain_attention(module, x, cos_sin, visible, sinks=module.sink_N)
    assert torch.allclose(module(x, cos_sin, mask), expected, atol=1e-12)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_turns_pairs_by_position_times_frequency(fraction):
    rotated = int(8 * fraction)
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    out = rotate(x, RotaryEmbedding(Rotary(base=100.0, fraction=fraction), rotated)(torch.arange(6)))
    half = rotated // 2
    for position in range(6):
        for pair in range(half):
            angle = position * 100.0 ** (-2 * pair / rotated)
            a, b = x[0, 0, position, pair], x[0, 0, position, pair + half]
            turned = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
            assert out[0, 0, position, pair].item() == pytest.approx(turned[0].item(), abs=1e-6)
            assert out[0, 0, position, pair + half].item() == pytest.approx(turned[1].item(), abs=1e-6)
    assert torch.equal(out[..., rotated:], x[..., rotated:])


def test_yarn_equals_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=512, rope_parameters=yarn
    )
    frequency, temperature = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = RotaryEmbedding(Rotary(yarn=Yarn(factor=8.0, original_length=64)), 32)
    assert torch.allclose(ours.frequency, frequency, rtol=1e-6)
    assert ours.scale == pytest.approx(temperature)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("attention", ["grouped_query", "latent"])
def test_later_tokens_never_change_earlier_logits(attention, qk_norm):
    if attention == "latent":
        config = tiny(
            attention=LatentAttention(num_heads=4, q_rank=12, kv_rank=10, nope_dim=8, rope_dim=4, value_dim=6)
        )
    else:
        config = tiny(attention=replace(GQA, qk_norm=qk_norm, qkv_bias=True, out_bias=True), moe=EXPERTS)
    model, ids = float64(config), ids_of()
    before = model(ids).logits_BSV
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 61
    after = model(changed).logits_BSV
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-12)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_packed_documents_do_not_see_each_other():
    model, ids = float64(tiny(moe=EXPERTS)), ids_of(1, 12)
    document = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(ids, tokens=Tokens.of(ids, document_BS=document)).logits_BSV
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 9) % 61
    after = model(changed, tokens=Tokens.of(changed, document_BS=document)).logits_BSV
    assert torch.allclose(packed[:, 5:], after[:, 5:], atol=1e-12)


def test_hashes_of_several_ids_stop_at_document_borders():
    hashed = replace(EXPERTS, router=Hash(ngram=3))
    model, ids = float64(tiny(moe=hashed)), ids_of(1, 12)
    document = torch.tensor([[0] * 5 + [1] * 7])
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 9) % 61
    packed, after = (model(i, tokens=Tokens.of(i, document_BS=document)).logits_BSV for i in (ids, changed))
    assert torch.allclose(packed[:, 5:], after[:, 5:], atol=1e-12)


def test_two_layers_of_one_seed_differ():
    first, again, second = (MoELayer(EXPERTS, 32, layer=layer) for layer in (0, 0, 1))
    for a, b, c in zip(first.parameters(), again.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router", [TopK(noise="gaussian", noise_scale=0.3, capacity_factor=0.9), Random(), Choice()])
def test_the_model_compiles_as_one_graph(router, recompute):
    """Forward and backward, traced by torch.compile without a break, give what eager gives."""
    same_when_compiled(tiny(moe=replace(EXPERTS, router=router)), recompute)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, tracing its own Function
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_documents_windows_sinks_and_chunks_compile_as_one_graph(backend, recompute):
    config = tiny(attention=replace(GQA, windows=(3, 0), sinks=True), backend=backend)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    same_when_compiled(config, recompute, documents, loss_chunk=5)


def same_when_compiled(config, recompute, documents=None, **settings):
    ids, results = ids_of(), []
    for compiled in (False, True):
        torch.compiler.reset()
        model = Transformer(config, seed=2, recompute=recompute, **settings).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        out = run(ids, ids.roll(-1, 1), tokens=Tokens.of(ids, document_BS=documents))
        out.objective.backward()
        results.append((out.objective, [p.grad for p in model.parameters()]))
    (plain, grads), (traced, traced_grads) = results
    assert torch.allclose(plain, traced, rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(grads, traced_grads, strict=True))


def test_rotary_positions_are_relative():
    model = float64(tiny())
    ids = ids_of(1, 6)
    alone = model(ids).logits_BSV
    behind = torch.cat((ids_of(1, 4), ids), dim=1)
    document = torch.tensor([[0] * 4 + [1] * 6])
    packed = model(behind, tokens=Tokens.of(behind, document_BS=document)).logits_BSV[:, 4:]
    assert torch.allclose(alone, packed, atol=1e-6)  # angles are float32


def test_loss_is_the_mean_over_targets_and_ignores_the_rest():
    model, ids = float64(tiny()), ids_of()
    targets = ids.roll(-1, 1)
    targets[0, 3:] = IGNORE
    logits = model(ids).logits_BSV
    nll = -logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    keep = targets != IGNORE
    assert model(ids, targets).loss.item() == pytest.approx(nll[keep].mean().item())
    assert torch.allclose(token_losses(logits, targets), torch.where(keep, nll, 0.0))
    none = torch.full_like(ids, IGNORE)
    assert model(ids, none).loss.item() == 0


def test_objective_adds_weighted_means_over_layers():
    router = TopK(z_weight=0.5)
    model, ids = float64(tiny(moe=replace(EXPERTS, router=router), num_layers=3)), ids_of()
    out = model(ids, ids.roll(-1, 1))
    weighted = 0.01 * out.losses["balance"] + 0.5 * out.losses["z"]
    assert (out.objective - out.loss).item() == pytest.approx(weighted.item())
    assert [report.layer for report in out.routing] == [0, 1, 2]


def test_layer_pattern_and_true_layer_indices():
    model = Transformer(tiny(num_layers=7, moe=replace(EXPERTS, first_dense=1, every=2)))
    assert [index for index, _ in model.moe_layers()] == [2, 4, 6]
    out = model(ids_of())
    assert [report.layer for report in out.routing] == [2, 4, 6]


def test_initial_values_depend_on_seed_name_and_expert_only():
    sparse = Transformer(tiny(moe=EXPERTS), seed=3).state_dict()
    dense = Transformer(tiny(), seed=3).state_dict()
    shared = [name for name in sparse if name in dense]
    assert len(shared) >= 2 + 2 * 6
    assert all(torch.equal(sparse[name], dense[name]) for name in shared)
    wider = Transformer(tiny(moe=replace(EXPERTS, num_experts=6)), seed=3).state_dict()
    name = "layers.1.moe.experts.w_up_EDF"
    assert torch.equal(wider[name][:4], sparse[name])
    other = Transformer(tiny(), seed=5).state_dict()
    assert not torch.equal(other["embedding.weight"], dense["embedding.weight"])


def test_initial_values_from_the_meta_device():
    config = tiny(moe=EXPERTS)
    direct = Transformer(config, seed=3)
    with torch.device("meta"):
        later = Transformer(config, seed=3)
    assert later.get_parameter("layers.0.moe.experts.w_up_EDF").is_meta
    materialise(later, torch.device("cpu"))
    initialise(later, seed=3, std=0.2, residual_scale=0.5)
    for (name, a), b in zip(direct.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(direct.named_buffers(), later.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_initial_deviations_follow_the_table():
    model = Transformer(tiny(dim=128, ffn_hidden=256, num_layers=8, init_std=0.02, moe=None))
    residual = 0.02 / math.sqrt(16)
    expected = {"attention.out.weight": residual, "ffn.down.weight": residual, "attention.query.weight": 0.02}
    for name, deviation in expected.items():
        weight = model.get_parameter(f"layers.3.{name}")
        assert weight.std().item() == pytest.approx(deviation, rel=0.05), name
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize("capacity_factor", [0.0, 0.8])
def test_recomputation_changes_nothing_and_counts_once(capacity_factor):
    config = tiny(moe=replace(EXPERTS, router=TopK(noise="gaussian", noise_scale=0.3, capacity_factor=capacity_factor)))
    ids = ids_of()
    results = []
    for recompute in (False, True):
        model = Transformer(config, seed=2, recompute=recompute).train()
        out = model(ids, ids.roll(-1, 1))
        out.objective.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (plain, grads), (again, regrads) = results
    assert torch.equal(plain.objective, again.objective)
    assert all(torch.equal(a, b) for a, b in zip(grads, regrads, strict=True))
    assert torch.equal(plain.routing[0].statistics["counts_E"], again.routing[0].statistics["counts_E"])


def test_recomputation_replays_the_choice():
    """The kept choice is used even if the scores have changed in between, as they do by rounding on other hardware."""
    config = tiny(moe=EXPERTS, num_layers=1)
    model, ids = Transformer(config, seed=2, recompute=True), ids_of()
    seen: list[torch.Tensor] = []
    layer = model.layers[0].moe
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].token_P.clone()))
    out = model(ids, ids.roll(-1, 1))
    with torch.no_grad():
        layer.router.weight_ED.neg_()
    out.objective.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_bfloat16_keeps_router_and_losses_in_float32():
    model = Transformer(tiny(moe=EXPERTS), seed=1, dtype=torch.bfloat16)
    ids = ids_of()
    out = model(ids, ids.roll(-1, 1))
    exact = Transformer(tiny(moe=EXPERTS), seed=1)(ids, ids.roll(-1, 1))
    assert out.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in out.losses.values())
    assert model(ids).logits_BSV.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    routing = model.layers[0].moe.router(x, Tokens.of(torch.zeros(1, 4, dtype=torch.int64)))
    assert routing.weight_R.dtype == torch.float32


def test_noise_is_a_function_of_the_tokens_place_only():
    ids = torch.zeros(4, 6, dtype=torch.int64)
    whole = token_keys(Tokens.of(ids, step=3), seed=1, layer=2, purpose="noise").view(4, 6)
    part = replace(Tokens.of(ids[:2], step=3), row_T=torch.tensor([2, 3]).repeat_interleave(6))
    assert torch.equal(token_keys(part, seed=1, layer=2, purpose="noise").view(2, 6), whole[2:])
    for changed in ({"step": 4}, {}):
        keys = token_keys(Tokens.of(ids, step=changed.get("step", 3)), seed=1, layer=2 + (not changed), purpose="noise")
        assert (keys.view(4, 6) != whole).all()


def test_noise_has_the_right_distribution():
    keys = token_keys(Tokens.of(torch.zeros(100, 100, dtype=torch.int64)), seed=0, layer=0, purpose="x")
    draws = uniform(keys, 16)
    assert 0 < draws.min() < draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.003)
    assert draws.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.05
    gauss = normal(keys, 4)
    assert gauss.mean().abs().item() < 0.02
    assert gauss.std().item() == pytest.approx(1, rel=0.02)


def test_tied_head_shares_the_embedding():
    tied, untied = Transformer(tiny(tied_head=True)), Transformer(tiny())
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 61 * 32
