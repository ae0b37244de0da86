"""Bytes sent, shares of parameters and memory per rank against sums worked out by hand and against enumeration.

`test_measured_bytes_equal_the_model` runs real processes: the bytes of torch's own collectives against the closed forms.
"""

import json
from dataclasses import replace
from itertools import combinations
from math import ceil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_layouts import torchrun
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe.config.layout import Layout, resolve
from moe.config.load import load
from moe.config.schema import AdamW, Balance, Data, GroupedQueryAttention, Model, MoE, Parallel, Run, Train
from moe.cost import memory_bytes, parameters
from moe.cost.memory import stage_memory
from moe.cost.shares import needs_first_pass, parameters_per_rank, stage_parameters
from moe.cost.stages import stages_of
from moe.cost.traffic import expected_groups, sent_bytes, traffic
from moe.model import Transformer
from moe.parallel import Ranks
from moe.parallel.parts import part_here
from moe.routers.topk import Config as TopK
from moe.train.sharding import spread

ROOT = Path(__file__).parents[1]
D, S, E, K, F, V = 16, 32, 8, 2, 24, 40
BALANCE = Balance(weight=0.01, scope="sequence")


def run_of(parallel: Parallel | None = None, scope: str = "sequence", **train) -> Run:
    """Two blocks of experts after one dense block; 8 rows a step, in float32 unless told otherwise."""
    moe = MoE(
        num_experts=E,
        top_k=K,
        expert_hidden=F,
        first_dense=1,
        router=TopK(balance=replace(BALANCE, scope=scope)),
    )
    model = Model(
        vocab_size=V,
        dim=D,
        num_layers=3,
        ffn_hidden=32,
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=4),
        moe=moe,
    )
    settings = {"steps": 1, "batch_rows": 8, "micro_rows": 2, "optimizer": AdamW(lr=1e-3), **train}
    return Run(
        name="t", model=model, data=Data(sequence_length=S), train=Train(**settings), parallel=parallel or Parallel()
    )


# per block: query and output D·16 each, key and value D·8 each; the dense block's FFN; two norms; a router
ATTENTION, FFN, EXPERTS = D * (16 + 16 + 8 + 8), 3 * D * 32, 3 * D * F * E
MATRICES = 3 * ATTENTION + FFN
AROUND = 2 * V * D
WHOLE = 3 * 2 * D + 2 * E * D + D


@pytest.mark.parametrize(
    "experts, chosen, groups", [(4, 2, 2), (8, 2, 4), (8, 3, 2), (6, 5, 3), (8, 8, 4), (12, 1, 4), (9, 4, 9)]
)
def test_expected_groups_equal_the_mean_over_all_choices(experts, chosen, groups):
    hit = [len({expert * groups // experts for expert in choice}) for choice in combinations(range(experts), chosen)]
    assert expected_groups(experts, chosen, groups) == pytest.approx(sum(hit) / len(hit), rel=1e-12)


def test_one_process_sends_nothing():
    assert traffic(run_of(), Layout()) == []


def test_the_shares_of_all_ranks_make_the_whole_model():
    run = run_of()
    held = stage_parameters(run.model, range(3))
    assert sum(part.matrices + part.whole + part.experts for part in held) == parameters(run.model).total
    assert sum(part.whole for part in held) == WHOLE
    spread = Layout(replicate=2, shard=4, expert=2)
    each = parameters_per_rank(spread, held)
    assert each == pytest.approx((MATRICES + AROUND) / 4 + 2 * EXPERTS / (2 * 2) + WHOLE)


def test_pipeline_stages_share_the_blocks_and_hold_each_end_once():
    run = run_of()
    stages = [stage_parameters(run.model, blocks) for blocks in stages_of(run, Layout(pipeline=2))]
    total = sum(part.matrices + part.whole + part.experts for stage in stages for part in stage)
    assert total == parameters(run.model).total


def test_sharded_parameters_are_gathered_twice_per_pass_and_reduced_once():
    run = run_of()
    sent = sent_bytes(traffic(run, Layout(shard=2)))
    passes = 2  # 8 rows over 2 ranks, 2 at a time
    assert sent["parameters, gathered"] == passes * 4 * (2 * MATRICES + AROUND) / 2
    assert sent["gradients, scattered"] == passes * 4 * (MATRICES + AROUND) / 2
    assert sent["experts, gathered"] == passes * 4 * 2 * 2 * EXPERTS / 2
    assert sent["experts' gradients, scattered"] == passes * 4 * 2 * EXPERTS / 2
    assert sent["vectors and routers, summed"] == 4 * 2 * WHOLE / 2
    assert len(sent) == 5


def test_bfloat16_halves_what_is_gathered_and_not_what_is_reduced():
    wide, narrow = (
        sent_bytes(traffic(run_of(precision=precision), Layout(shard=2))) for precision in ("float32", "bfloat16")
    )
    assert narrow["parameters, gathered"] == wide["parameters, gathered"] / 2
    assert narrow["gradients, scattered"] == wide["gradients, scattered"]


def test_copies_sum_gradients_once_per_step_and_hybrid_shards_after_each_pass():
    sent = sent_bytes(traffic(run_of(), Layout(replicate=4)))
    assert sent["gradients, summed over copies"] == 4 * (MATRICES + AROUND) * 2 * 3 / 4
    assert sent["experts' gradients, summed over copies"] == 4 * 2 * EXPERTS * 2 * 3 / 4
    sent = sent_bytes(traffic(run_of(micro_rows=1), Layout(replicate=2, shard=2)))
    assert sent["gradients, summed over copies"] == 2 * 4 * (MATRICES + AROUND) / 2 * 2 / 2


@pytest.mark.parametrize("dispatch", ["deduplicated", "rows", "capacity"])
def test_tokens_travel_four_times_with_their_weights_and_places(dispatch):
    run = run_of(Parallel(expert=2, dispatch=dispatch, dispatch_capacity_factor=1.5), micro_rows=4)
    sent = sent_bytes(traffic(run, Layout(replicate=2, expert=2)))
    tokens, layers = 4 * S, 2
    units = {"deduplicated": 2 * (1 - 6 / 28), "rows": K, "capacity": E * ceil(1.5 * tokens * K / E) / tokens}[dispatch]
    rows = units if dispatch == "capacity" else K
    beside = {"deduplicated": 8, "rows": 4, "capacity": 4}[dispatch]
    counts = 8 * (E // 2 + (dispatch != "capacity"))
    vectors = tokens / 2 * units * D * 4
    assert sent["combine"] == sent["combine, backward"] == pytest.approx(layers * vectors)
    assert sent["dispatch"] == pytest.approx(layers * (vectors + tokens / 2 * rows * beside + counts))
    assert sent["dispatch, backward"] == pytest.approx(layers * (vectors + tokens / 2 * rows * 4))


def test_a_global_balance_loss_over_several_passes_sends_tokens_once_more():
    plain, counted = run_of(micro_rows=1), run_of(scope="global", micro_rows=1)
    layout = Layout(replicate=2, expert=2)
    assert not needs_first_pass(plain, layout) and needs_first_pass(counted, layout)
    before, after = (sent_bytes(traffic(run, layout)) for run in (plain, counted))
    assert after["combine"] == 2 * before["combine"]
    assert after["combine, backward"] == before["combine, backward"]


def test_heads_partial_sums_and_stage_boundaries():
    run = run_of(micro_rows=4)
    sent = sent_bytes(traffic(run, Layout(context=2)))
    per_token = 16 + 2 * 8 + 16  # queries, keys and values there, attention's output back
    assert sent["heads for tokens"] == 2 * 3 * 2 * 4 * S / 2 * per_token * 4 / 2
    sent = sent_bytes(traffic(run, Layout(tensor=2)))
    sums = 2 * (2 + 1 + 1)  # forward and backward of attention in three blocks and of one dense FFN
    assert sent["partial sums"] == 2 * sums * 4 * S * D * 4 * 2 / 2
    ends = [sent_bytes(traffic(run, Layout(pipeline=3), stage)).get("stage boundaries") for stage in range(3)]
    once = 2 * (4 * S * D * 4 + 4)
    assert ends == [once, 2 * once, once]


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_one_process_is_that_without_a_layout():
    for train in ({}, {"precision": "bfloat16"}, {"activation_checkpointing": True}):
        run = run_of(**train)
        assert memory_bytes(run, Layout()) == memory_bytes(run)


def test_memory_per_rank_is_the_share_of_parameters_and_tokens():
    run = run_of()
    alone, spread = memory_bytes(run), memory_bytes(run, Layout(shard=4, expert=2))
    assert spread["parameters"] == 4 * ((MATRICES + AROUND) / 4 + 2 * EXPERTS / 4 + WHOLE)
    assert spread["optimizer"] == 2 * spread["parameters"]
    assert spread["activations"] == alone["activations"], "micro_rows is per rank"
    assert spread["gathered"] == 12 * (ATTENTION + EXPERTS / 2) + 8 * AROUND
    assert alone["gathered"] == alone["exchange"] == 0 < spread["exchange"]
    assert memory_bytes(run, Layout(context=2))["activations"] == pytest.approx(alone["activations"] / 2, rel=1e-3)


def test_the_first_stage_of_1f1b_holds_as_many_passes_as_there_are_stages():
    run, layout = run_of(micro_rows=1, activation_checkpointing=True), Layout(pipeline=3)
    inputs = S * D * 4  # of one row in one block; routing choices, and the block that is recomputed, come on top
    dense, experts = (stage_memory(run, layout, stage)["activations"] for stage in (0, 1))
    shallow = stage_memory(replace(run, train=replace(run.train, batch_rows=1)), layout, 0)["activations"]
    assert dense - shallow == 2 * inputs, "three passes in flight, where the step has them"
    assert experts > 2 * inputs


# ------------------------------------------------------------------------------------------------------------ measured


@pytest.fixture(scope="module", params=["2 short", *(pytest.param(n, marks=pytest.mark.full) for n in ("2", "4"))])
def cases(request) -> dict[str, dict]:
    """Bytes per operation of one step in several layouts of 2 or 4 ranks, measured and modelled."""
    ranks, *short = request.param.split()
    return json.loads(torchrun(int(ranks), str(Path(__file__).parent / "traffic_cases.py"), *short))


def test_measured_bytes_equal_the_model(cases):
    """Real steps under gloo: in all, and for every operation that is a twentieth of it, to 2 %."""
    assert len(cases) >= 4
    for name, case in cases.items():
        measured, modelled = dict(case["measured"]), dict(case["modelled"])
        assert measured.pop("parameters") == modelled.pop("parameters"), "held by a rank, to the byte"
        total = sum(modelled.values())
        assert sum(measured.values()) == pytest.approx(total, rel=0.02), name
        for operation, value in modelled.items():
            if value > total / 20:
                assert measured[operation] == pytest.approx(value, rel=0.02), (name, operation)


def test_deduplication_saves_what_the_model_says(cases):
    pairs = [(case, cases[name.replace("rows", "deduplicated")]) for name, case in cases.items() if " rows " in name]
    assert pairs
    for rows, units in pairs:
        saved, expected = (
            1 - units[kind]["all_to_all"] / rows[kind]["all_to_all"] for kind in ("measured", "modelled")
        )
        assert saved == pytest.approx(expected, abs=0.01) and expected > 0.05


@pytest.mark.parametrize("recipe", ["recipes/qwen3_30b_a3b.py", "recipes/deepseek_v2_lite.py"])
@pytest.mark.parametrize("sizes", ["tensor=2", "tensor=2 shard=2", "shard=2 expert=4", "tensor=4"])
def test_what_a_rank_holds_is_what_the_model_says(recipe, sizes):
    """Parameters of a published model that torch gives to rank 1 of 8, on the meta device, with nobody at the other ranks."""
    overrides = [f"parallel.{size}" for size in sizes.split()]
    run = load(str(ROOT / recipe), ["train.batch_rows=8", "train.micro_rows=1", *overrides])
    layout = resolve(run, 8)
    dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    try:
        ranks = Ranks(1, 8, torch.device("cpu")).arranged(layout)
        with torch.device("meta"):
            model = Transformer(run.model)
        spread(model, run, ranks)
        held = sum(part_here(parameter).numel() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    expected = parameters_per_rank(layout, stage_parameters(run.model, range(run.model.num_layers)))
    assert held == pytest.approx(expected, rel=1e-6)
