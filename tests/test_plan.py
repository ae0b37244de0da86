"""`moe plan`: transfer times and a step worked out by hand, the search against the rules, the page against its script.

The published throughputs themselves are other people's measurements; their errors are in docs/scaling.md.
"""

import json
import runpy
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

from moe.cli import main
from moe.config.layout import Layout, resolve
from moe.config.load import load
from moe.cost.search import search, usable_memory
from moe.cost.step_time import OURS, Cluster, predict_step, transfer_seconds
from moe.cost.throughput import train_flops_per_token
from moe.cost.traffic import Transfer
from moe.errors import ConfigError, UserError
from moe.plan import cluster_of, plan
from moe_triton.chips import LINKS, Links
from moe_triton.roofline import MACHINES

ROOT = Path(__file__).parents[1]
OLMOE = str(ROOT / "recipes/olmoe_1b_7b.py")
published = runpy.run_path(str(ROOT / "scripts/plan_published.py"))
EXACT = replace(OURS, node=1.0, network=1.0, network_exchange=1.0, latency_seconds=0.0)


# ---------------------------------------------------------------------------------------------------------- transfers


@pytest.mark.parametrize(
    "operation, ranks, stride, sent, expected",
    [
        ("all_to_all", 8, 1, 4e9, 4 / 400),  # inside a node
        ("all_to_all", 16, 1, 15e9, 8 / 50),  # eight of fifteen others are in the other node
        ("all_to_all", 4, 8, 3e9, 3 / 50),  # one rank in each node
        ("all_gather", 8, 1, 7e9, 7 / 400),
        ("all_gather", 16, 1, 15e9, 15 / 400),  # 16 GB in all: 8 enter each node by 8 cards, in 1 / 50 s
        ("all_gather", 4, 8, 3e9, 3 / 50),  # 4 GB in all, 3 of them enter, by one card
        ("all_gather", 8, 4, 7e9, 3 / 50),  # 8 GB in all: 6 enter each node, by two cards
        ("all_reduce", 8, 4, 14e9, 6 / 50),
        ("send", 2, 8, 1e9, 1 / 50),
        ("send", 2, 4, 1e9, 1 / 400),
    ],
)
def test_transfers_take_the_slower_of_node_and_network(operation, ranks, stride, sent, expected):
    links = Links(joined=8, node=400e9, network=50e9, source="")
    move = Transfer("x", operation, ranks, stride, 1, sent)
    assert transfer_seconds(move, links, EXACT) == pytest.approx(expected)


def test_every_machine_has_links_and_every_link_a_source():
    for machine in MACHINES.values():
        links = Cluster.of(machine).links
        assert links.source and links.network < links.node < machine.chip.bandwidth
    assert LINKS["H800"].node < LINKS["H100 HBM3"].node


# --------------------------------------------------------------------------------------------------------------- steps


def test_the_parts_of_a_step_add_up_and_its_rates_follow():
    run = load(OLMOE, ["parallel.shard=8"])
    step = predict_step(run, Layout(shard=8), cluster_of("h100"))
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    tokens = run.train.batch_rows * run.data.sequence_length
    assert step.tokens_per_second == pytest.approx(tokens / step.seconds)
    flops = tokens * train_flops_per_token(run.model, run.data.sequence_length)
    assert step.mfu == pytest.approx(flops / step.seconds / (8 * 989.4e12))


def test_products_take_their_flops_over_their_rate():
    """A dense model of one block: 3 passes of 2 FLOPs per weight and token, at 0.8 of the rate of large products."""
    run = load(OLMOE, ["model.moe=null", "model.num_layers=1", "train.activation_checkpointing=false"])
    weights = 4 * 2048 * 2048 + 3 * 2048 * 1024 + 50304 * 2048
    step = predict_step(run, Layout(), cluster_of("h100"))
    expected = 6 * weights * run.train.batch_rows * 4096 / (0.8 * 798e12)
    assert step.parts["dense products"] == pytest.approx(expected)


def test_slower_links_skewed_routing_and_recomputation_never_help():
    run, layout = load(OLMOE, ["train.activation_checkpointing=false"]), Layout(shard=64, expert=64)
    base = predict_step(run, layout, cluster_of("h100")).seconds
    assert predict_step(run, layout, cluster_of("h100", 12.5)).seconds > base
    assert predict_step(run, layout, cluster_of("h100"), replace(OURS, imbalance=1.5)).seconds > base
    again = replace(run, train=replace(run.train, activation_checkpointing=True))
    assert predict_step(again, layout, cluster_of("h100")).seconds > base
    assert predict_step(run, layout, cluster_of("h100"), replace(OURS, hide_exchange=1.0)).seconds < base


# -------------------------------------------------------------------------------------------------------------- search


def test_every_plan_is_allowed_fits_and_is_what_its_overrides_give():
    run = load(OLMOE)
    found = search(run, 8, cluster_of("h100"))
    assert len(found.plans) > 3
    for one in found.plans:
        assert one.memory_total <= usable_memory(cluster_of("h100"))
    seconds = [one.step.seconds for one in found.plans]
    assert all(b > a / 1.031 for a, b in pairwise(seconds)), "fastest first, ties apart"
    record = plan(OLMOE, gpus=8, console=Console(file=StringIO()))
    for one in record["plans"]:
        typed = load(OLMOE, one["type"])
        layout = resolve(typed, 8)
        assert {name: getattr(layout, name) for name in one["layout"]} == one["layout"]
        assert typed.train.micro_rows == one["micro_rows"]


def test_what_is_typed_is_held():
    record = plan(OLMOE, ["parallel.expert=4", "train.micro_rows=2"], gpus=8, console=Console(file=StringIO()))
    assert {one["layout"]["expert"] for one in record["plans"]} == {4}
    assert {one["micro_rows"] for one in record["plans"]} == {2}


def test_more_gpus_are_faster_and_one_is_planned_too():
    smoke = str(ROOT / "recipes/tiny_stories_gpu.py")
    alone = plan(smoke, gpus=1, console=Console(file=StringIO()))["plans"][0]
    assert alone["sent_total"] == 0 and alone["layout"]["shard"] == 1
    few, many = (
        plan(OLMOE, gpus=gpus, console=Console(file=StringIO()))["plans"][0]["tokens_per_second"] for gpus in (8, 32)
    )
    assert 2 * few < many < 4.4 * few


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs():
    with pytest.raises(UserError, match=r"does not fit 4 h100: the leanest layout \(.*\) needs [\d.]+ GiB per GPU"):
        plan(str(ROOT / "recipes/mixtral_8x7b.py"), gpus=4)


def test_unknown_gpus_and_impossible_layouts_are_refused():
    with pytest.raises(ConfigError, match="gpu 'h1000' is not in the table of the roofline: use one of a100"):
        plan(OLMOE, gpus=8, gpu="h1000")
    with pytest.raises(ConfigError, match=r"parallel\.expert \(7\)"):
        plan(OLMOE, ["parallel.expert=7"], gpus=8)


def test_the_command_prints_tables_or_json(capsys):
    assert main(["plan", OLMOE, "--gpus", "16", "--top", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("layouts fit", "memory per GPU, plan 1", "sent by each GPU", "GPU hours", "torchrun --nnodes 2"):
        assert part in out
    assert main(["plan", OLMOE, "--gpus", "16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    best = record["plans"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert best["whole_run"]["gpu_hours"] == pytest.approx(
        16 * best["step_seconds"] * best["whole_run"]["steps"] / 3600
    )


# ------------------------------------------------------------------------------------------------ published trainings


@pytest.mark.parametrize("part", ["constants", "published", pytest.param("plans", marks=pytest.mark.full)])
def test_the_page_has_what_the_script_writes(part):
    page = (ROOT / "docs/scaling.md").read_text("utf-8")
    assert published["renewed"](page, [part]) == page, "run: python scripts/plan_published.py --write docs/scaling.md"


def test_predictions_are_as_near_to_published_trainings_as_the_page_says():
    errors = {(t.name, t.gpus): abs(rate / t.rate - 1) for t, rate in published["rows"]() if not t.fitted}
    assert len(errors) >= 6 and median(errors.values()) < 0.25
    assert sorted(errors.values())[-2] < 0.5, "all but OLMoE's, whose cause the page names"


def test_the_whole_run_is_charged_at_the_recipes_rates():
    given = ["cost.region=SWE", "cost.pue=1.1", "cost.price_per_hour=2.5", "checkpoint.every_steps=1000"]
    best = plan(OLMOE, given, gpus=16, as_json=True, console=Console(file=StringIO()))["plans"][0]["whole_run"]
    hours = best["gpu_hours"]
    assert best["dollars"]["value"] == pytest.approx(2.5 * hours)
    assert best["kwh"]["value"] == pytest.approx(0.7 * hours * 1.1)  # 700 W boards
    assert best["gco2e"]["value"] == pytest.approx(0.7 * hours * 1.1 * 41) and best["gco2e"]["grade"] == "assumed"
    run = load(OLMOE)
    assert best["flops"] > run.train.steps * run.train.batch_rows * run.data.sequence_length * train_flops_per_token(
        run.model, run.data.sequence_length
    )
    assert best["bytes_written"] == best["checkpoints"] * best["checkpoint_bytes"]
    printed = StringIO()
    plan(OLMOE, given, gpus=16, console=Console(file=printed, width=140))
    assert "US dollars" in printed.getvalue() and "cost.price_per_hour" in printed.getvalue()
