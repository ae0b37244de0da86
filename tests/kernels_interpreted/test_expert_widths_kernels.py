"""The `block_sparse` backend under the interpreter: experts of any width against a loop over nn modules, and whole runs.

The other backends run the same cases in ../test_expert_widths.py.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_dict, write_corpus
from torch import Tensor
from width_cases import CASES, check_experts, loop, loop_of

from moe.config.load import load
from moe.config.schema import MoE
from moe.cost import memory_bytes
from moe.model import Transformer
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.routers.topk import Config as TopK
from moe.routing import plan
from moe.train import train

SMOKE = str(Path(__file__).parents[2] / "recipes" / "smoke.py")


@pytest.mark.parametrize("case", CASES, ids=CASES.values())
def test_experts_equal_a_loop_over_modules(case):
    check_experts("block_sparse", case)


def test_layer_equals_a_loop_over_modules(launches):
    config = MoE(
        num_experts=4,
        top_k=2,
        expert_hidden=8,
        expert_widths=(24, 7, 40, 16),
        router=TopK(),
        backend="block_sparse",
    )
    layer = MoELayer(config, 20, layer=0, init_std=0.3)
    x = torch.randn(2, 9, 20, requires_grad=True)
    y, routing = layer(x)
    products = [name for name in launches if name in ("sdd_kernel", "dsd_kernel")]
    assert products == ["sdd_kernel", "sdd_kernel", "dsd_kernel"]
    wanted = loop(loop_of(layer.experts), x.detach().double().flatten(0, 1), plan(routing))
    torch.testing.assert_close(y.flatten(0, 1).double(), wanted, rtol=1e-5, atol=1e-5)
    (y.square().mean() + auxiliary_loss(routing)).backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@pytest.mark.parametrize("variant", [pytest.param("run", marks=pytest.mark.full), "mixed_widths"])
def test_memory_plan_is_what_autograd_saves_to_ten_percent(variant):
    settings = [
        "model.moe.backend=block_sparse",
        "train.micro_rows=2",
        "data.sequence_length=48",
        "train.loss_chunk=0",
        "model.backend=torch",
    ]
    run = load(f"{SMOKE}:{variant}", settings)
    model = Transformer(run.model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 257, (2, 48))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(ids, targets_BS=ids)
    plan_bytes = memory_bytes(run)
    planned = sum(plan_bytes[part] for part in ("activations", "masks", "weight_casts")) + plan_bytes["logits"] // 2
    assert planned == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.1)


def losses_of(source: str | dict, folder: Path, backend: str, *settings: str) -> list[float]:
    """Training losses of three steps on a few short rows."""
    few = (
        "train.steps=3",
        "train.schedule.warmup_steps=1",
        "train.batch_rows=2",
        "train.micro_rows=2",
        "evaluation.every_steps=0",
        "evaluation.rows=1",
        "evaluation.final_rows=1",
        "logging.console=off",
    )
    train(load(source, [f"model.moe.backend={backend}", *few, *settings]), folder / backend)
    lines = (folder / backend / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_losses(source: str | dict, folder: Path, *settings: str) -> None:
    losses = {backend: losses_of(source, folder, backend, *settings) for backend in ("reference", "block_sparse")}
    assert len(losses["reference"]) == 3 and losses["reference"][2] < losses["reference"][0]
    assert losses["block_sparse"] == pytest.approx(losses["reference"], rel=0, abs=1e-5)


def test_a_run_trains_with_the_references_losses(tmp_path):
    small = ("model.num_layers=1", "data.sequence_length=12", "model.init_std=0.1")
    check_losses(tiny_dict(tmp_path), tmp_path, "model.moe.expert_widths=[8,16,8,24]", *small)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", ["run", "mixed_widths"])
def test_the_recipe_trains_with_the_references_losses(variant, tmp_path):
    corpus = json.dumps(str(write_corpus(tmp_path)))
    data = ("data.sources.0=files", f"data.sources.0.paths=[{corpus}]", f"data.cache_dir={tmp_path}/cache")
    rows = ("data.sequence_length=64", "data.validation_fraction=0.3")
    check_losses(f"{SMOKE}:{variant}", tmp_path, *data, *rows)
