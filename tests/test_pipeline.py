"""Stages of a pipeline: which blocks they hold, against every possible split; and what is refused, by its words.

Steps, evaluations and checkpoints of a pipeline against one process are in test_layouts.py.
"""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from tiny_runs import tiny_run

from moe.config.layout import resolve
from moe.config.schema import Parallel
from moe.cost import flops_by_component, flops_by_layer, stage_blocks
from moe.errors import ConfigError
from moe.model import Transformer


def stage_cost(model, blocks: range) -> float:
    """FLOPs per token of a stage; the last has the head."""
    layers = flops_by_layer(model, 128)
    head = flops_by_component(model, 128)["head"] if blocks.stop == model.num_layers else 0.0
    return sum(sum(layers[block].values()) for block in blocks) + head


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("vocab_size", [257, 20_000])
def test_the_dearest_stage_is_as_cheap_as_in_any_split(stages, vocab_size, tmp_path):
    model = tiny_run(tmp_path, "model.num_layers=7", "model.moe.first_dense=2", f"model.vocab_size={vocab_size}").model
    ours = stage_blocks(model, stages, 128)
    assert [block for held in ours for block in held] == list(range(7)) and all(len(held) for held in ours)
    every = [
        [range(first, end) for first, end in pairwise((0, *cuts, 7))] for cuts in combinations(range(1, 7), stages - 1)
    ]
    best = min(max(stage_cost(model, held) for held in split) for split in every)
    assert max(stage_cost(model, held) for held in ours) == pytest.approx(best)


def test_stages_together_have_the_parameters_of_the_whole_model_with_equal_first_values(tmp_path):
    model = tiny_run(tmp_path, "model.num_layers=3").model
    whole = dict(Transformer(model, seed=4).named_parameters())
    parts = [
        dict(Transformer(model, seed=4, blocks=blocks).named_parameters())
        for blocks in stage_blocks(model, 2, 128, (1, 2))
    ]
    assert not parts[0].keys() & parts[1].keys()
    together = parts[0] | parts[1]
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], value) for name, value in whole.items())
    assert "layers.1.attention_norm.weight" in parts[1] and "head.weight" in parts[1] and "embedding.weight" in parts[0]


REFUSED = {
    "more stages than blocks": (
        dict(pipeline=4),
        ["train.micro_rows=1"],
        r"parallel.pipeline \(4\) must be at most model.num_layers \(2\): use pipeline=2",
    ),
    "too few micro-batches": (
        dict(pipeline=2),
        ["train.micro_rows=8"],
        r"train.batch_rows \(8\) / \(micro_rows \(8\) · .* \(1\)\) = 1 micro-batches must be at least parallel.pipeline \(2\)"
        r".*use train.batch_rows=16, or train.micro_rows=4",
    ),
    "tied head": (
        dict(pipeline=2),
        ["model.tied_head=true"],
        r"model.tied_head \(true\) is one matrix .*: use tied_head=false, or pipeline=1",
    ),
    "compiled": (dict(pipeline=2), ["train.compile=true"], r"train.compile \(true\) does not go with"),
    "recording": (
        dict(pipeline=2),
        ["logging.record_routing=true"],
        r"logging.record_routing \(true\) .* parallel.pipeline \(2\) .*: record with pipeline=1",
    ),
    "blocks that do not add up": (
        dict(pipeline=2, pipeline_blocks=(1, 2)),
        [],
        r"parallel.pipeline_blocks \[1, 2\] must be 2 numbers, .* add up to model.num_layers \(2\)",
    ),
    "blocks without stages": (
        dict(pipeline_blocks=(1, 1)),
        [],
        r"parallel.pipeline_blocks \[1, 1\] must be 1 numbers",
    ),
    "context": (
        dict(pipeline=2, context=2),
        [],
        r"parallel.pipeline \(2\) does not go with parallel.context \(2\)",
    ),
    "tensor": (dict(pipeline=2, tensor=2), [], r"parallel.pipeline \(2\) does not go with parallel.tensor \(2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_with_numbers_and_a_way_out(case, tmp_path):
    sizes, overrides, words = REFUSED[case]
    micro_rows = () if any("micro_rows" in text for text in overrides) else ("train.micro_rows=2",)
    run = tiny_run(tmp_path, "model.num_layers=2", "train.batch_rows=8", *micro_rows, *overrides)
    world = sizes.get("pipeline", 1) * sizes.get("context", 1) * sizes.get("tensor", 1)
    with pytest.raises(ConfigError, match=words):
        resolve(replace(run, parallel=Parallel(**sizes)), world)


def test_a_pipeline_of_shards_and_experts_is_laid_out(tmp_path):
    run = tiny_run(tmp_path, "model.num_layers=2", "train.batch_rows=8", "train.micro_rows=1")
    layout = resolve(replace(run, parallel=Parallel(pipeline=2, shard=2, expert=2)), 8)
    assert [layout.stage(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
