"""Experts of different widths: the layer against a loop over nn modules in float64, and all that counts, shows or refuses them.

The `block_sparse` backend runs the same cases in kernels_interpreted/test_expert_widths_kernels.py.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import tiny_run, write_corpus
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from width_cases import CASES, check_experts, dispatch_of, loop, loop_of

from moe.analysis.rows import RunRows
from moe.analysis.summaries import measured_flops
from moe.checkpoint import published
from moe.config.load import dump, load
from moe.config.schema import MoE
from moe.cost import dense_twin, flops_by_component, memory_bytes, parameters, train_flops_per_token
from moe.errors import BackendError, ConfigError
from moe.experiments.probe import probe
from moe.experts import Experts
from moe.experts.activation import Activation
from moe.init import initialise, materialise
from moe.model import Transformer
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.profile import shape_of
from moe.routers.topk import Config as TopK
from moe.routing import plan
from moe.show import show
from moe.train import resume, train
from moe_triton.block_sizes import block_of, max_blocks

WIDTHS = (24, 7, 40, 16)
ROOT = Path(__file__).parents[1]
MIXED = f"{ROOT / 'recipes' / 'smoke.py'}:mixed_widths"
PLAIN = MoE(num_experts=4, top_k=2, expert_hidden=8, router=TopK(), backend="torch")
EXPERTS = replace(PLAIN, expert_widths=WIDTHS)


# ------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=CASES.values())
def test_experts_equal_a_loop_over_modules(backend, case):
    check_experts(backend, case)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layer_equals_a_loop_over_modules(backend):
    layer = MoELayer(replace(EXPERTS, backend=backend), 20, layer=0, init_std=0.3)
    x = torch.randn(2, 9, 20, requires_grad=True)
    y, routing = layer(x)
    wanted = loop(loop_of(layer.experts), x.detach().double().flatten(0, 1), plan(routing))
    torch.testing.assert_close(y.flatten(0, 1).double(), wanted, rtol=1e-5, atol=1e-5)
    (y.square().mean() + auxiliary_loss(routing)).backward()
    layer.update(routing.statistics)
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@pytest.mark.full
def test_torch_operator_contract():
    experts = Experts(4, 20, 8, "torch", widths=WIDTHS)
    initialise(experts, seed=0, std=0.3, prefix="layers.0.moe.experts.")
    x = torch.randn(6, 20, requires_grad=True)
    token, weight = torch.arange(6).repeat(2), torch.rand(12, requires_grad=True)
    rows = (token, weight, torch.tensor([0, 3, 3, 9, 12]), list(WIDTHS), False, True, *Activation())
    arguments = (x, *experts.parameters(), None, None, None, *rows)
    torch.library.opcheck(torch.ops.moe_lab.expert_ffn.default, arguments)


def test_experts_trace_as_one_graph():
    experts = Experts(4, 20, 8, "torch", widths=WIDTHS)
    initialise(experts, seed=0, std=0.3, prefix="layers.0.moe.experts.")
    dispatch, x = dispatch_of(9, 2, 4, "nowhere", "output"), torch.randn(9, 20)
    compiled = torch.compile(lambda x: experts(x, dispatch), fullgraph=True, backend="aot_eager")
    found = []
    for function in (lambda x: experts(x, dispatch), compiled):
        y = function(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))))
    torch.testing.assert_close(*found)


def test_rows_that_nobody_fills_are_zero_in_what_is_kept():
    experts = Experts(4, 20, 8, "torch", widths=WIDTHS)
    initialise(experts, seed=0, std=0.3, prefix="layers.0.moe.experts.")
    token, offsets = torch.arange(12), torch.tensor([0, 3, 3, 9, 10])
    weights = [w.detach() for w in experts.parameters()]
    rows = (token, torch.rand(12), offsets, list(WIDTHS), False, True, *Activation())
    x = torch.randn(12, 20)
    kept = torch.ops.moe_lab.expert_ffn(x, *weights, None, None, None, *rows)[1].flatten()
    used = 3 * 24 + 6 * 40 + 1 * 16
    assert kept.shape == (12 * 40,) and kept[:used].all() and not kept[used:].any()


# ------------------------------------------------------------------------------------------------ parameters and checkpoints


def test_parameters_have_their_names_and_an_experts_first_values_depend_on_no_other():
    def weights(widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        layer = MoELayer(replace(EXPERTS, expert_widths=widths), 20, layer=3, seed=5, init_std=0.3, residual_scale=0.5)
        return {name: w for name, w in layer.state_dict().items() if name.startswith("experts.")}

    one, other = weights(WIDTHS), weights((33, 7, 40, 16))
    assert {name: tuple(w.shape) for name, w in one.items()} == dict.fromkeys(
        ("experts.w_gate_FD", "experts.w_up_FD", "experts.w_down_FD"), (sum(WIDTHS), 20)
    )
    for name in one:
        assert torch.equal(one[name][24:], other[name][33:])
        deviation = 0.15 if "down" in name else 0.3
        assert one[name].std().item() == pytest.approx(deviation, rel=0.1)
    assert not torch.equal(one["experts.w_gate_FD"], one["experts.w_up_FD"])


def test_equal_widths_are_stacked_like_one_width():
    equal = MoELayer(replace(PLAIN, expert_widths=(24,) * 4), 20, layer=0)
    plain = MoELayer(replace(PLAIN, expert_hidden=24), 20, layer=0)
    torch.testing.assert_close(equal.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert MoE(num_experts=4, top_k=2, expert_hidden=24, router=TopK()).expert_widths == ()


def test_built_on_the_meta_device_and_materialised(tmp_path):
    config = tiny_run(tmp_path, f"model.moe.expert_widths={list(WIDTHS)}").model
    with torch.device("meta"):
        later = Transformer(config)
    assert later.get_parameter("layers.1.moe.experts.w_up_FD").is_meta
    materialise(later, torch.device("cpu"))
    initialise(later, seed=0, std=config.init_std, residual_scale=0.5)
    ids = torch.randint(0, 257, (2, 8))
    torch.testing.assert_close(later(ids).logits_BSV, Transformer(config)(ids).logits_BSV)


def test_a_run_resumes_and_the_state_has_the_packed_names(tmp_path):
    out = tmp_path / "run"
    run = tiny_run(tmp_path, "model.moe.expert_widths=[8,16,8,24]", "train.steps=3", "checkpoint.every_steps=2")
    train(run, out)
    first, last = published(out)
    end = read_lines(out / "evals.jsonl")[-1]["loss"]
    shutil.rmtree(last.path)
    resume(out)
    again = read_lines(out / "evals.jsonl")[-1]
    assert (first.step, again["attempt"], again["loss"]) == (2, 2, end)
    stored = dcp.FileSystemReader(first.path).read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix("model.layers.1.moe.experts."): tuple(t.size)
        for name, t in stored.items()
        if "model.layers.1.moe.experts" in name
    }
    assert shapes == dict.fromkeys(("w_gate_FD", "w_up_FD", "w_down_FD"), (56, 16))


def test_measurements_and_probes_know_different_widths(tmp_path):
    run = tiny_run(tmp_path, "model.moe.expert_widths=[8,16,8,24]", "train.steps=1")
    train(run, tmp_path / "run")
    (first, second) = read_lines(tmp_path / "run" / "health.jsonl")[-2:]
    assert [len(row["output_norms"]) for row in (first, second)] == [4, 4]
    # experts of different widths have no mean
    assert [row["kind"] for row in probe(tmp_path / "run", rows=4)] == [
        "random",
        "random",
        "random",
        "hash",
        "dropped",
        "alternative",
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pages_commands_load():
    text = (ROOT / "docs" / "block_sparse.md").read_text("utf-8")
    commands = re.findall(r"^moe (?:show|train|compare) (\S+) ?(\S+=\S+)?", text, re.MULTILINE)
    assert len(commands) == 3
    for recipe, setting in commands:
        run = load(str(ROOT / recipe), [setting] if setting else [])
        assert run.model.moe is not None
        assert run.model.moe.expert_widths == (16, 32, 48, 64, 64, 80, 96, 112)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["[8,16]"], ["expert_widths has 2 entries for num_experts=4: give 4, or [] to use expert_hidden (8)"]),
        (["[8,0,8,8]"], ["model.moe.expert_widths.1 must be an integer greater than 0, not 0"]),
        (["[8,-3,8,8]"], ["greater than 0, not -3"]),
        (["12"], ["model.moe.expert_widths must be a list"]),
        (
            ["[8,16,8,24]", "model.moe.backend=triton"],
            [
                "'triton'",
                "these 4 have 3, from 8 to 24",
                "'block_sparse' (a GPU), 'torch' or 'reference'",
                "same width",
            ],
        ),
    ],
)
def test_wrong_widths_are_refused_with_the_rule_and_a_way_out(tmp_path, overrides, parts):
    first, *rest = overrides
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, f"model.moe.expert_widths={first}", *rest)
    for part in parts:
        assert part in str(caught.value)


def test_the_triton_backend_refuses_different_widths_by_name():
    with pytest.raises(BackendError, match=r"'triton'.*'block_sparse'"):
        MoELayer(replace(EXPERTS, backend="triton"), 20, layer=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_block_sparse_backend_is_refused_without_a_gpu_naming_the_variable():
    with pytest.raises(BackendError, match=r"'block_sparse' needs a GPU.*TRITON_INTERPRET=1"):
        MoELayer(replace(EXPERTS, backend="block_sparse"), 20, layer=0)


def test_the_profile_of_grouped_kernels_refuses_different_widths():
    with pytest.raises(ConfigError, match=r"one width.* 7 \(16 to 112\).*expert_widths=\[\]"):
        shape_of(MIXED)


# ----------------------------------------------------------------------------------------------------------------- cost


def test_parameters_and_flops_by_hand():
    """D=16, E=4, K=2, two layers: an expert of width F has 3·D·F weights; a token meets K experts of the mean width."""
    config = load(tiny_model_of((8, 16, 8, 24))).model
    count = parameters(config)
    assert count.components["experts"] == 2 * 3 * 16 * (8 + 16 + 8 + 24)
    assert count.active_components["experts"] == 2 * 3 * 16 * 2 * 14
    assert flops_by_component(config, 32)["experts"] == 2 * 2 * 3 * 16 * 2 * 14
    uneven = parameters(load(tiny_model_of((8, 8, 8, 9))).model)
    assert uneven.active_components["experts"] == 2 * round(3 * 16 * 2 * 33 / 4)


def tiny_model_of(widths: tuple[int, ...], **changes) -> dict:
    """The plain tiny run with these widths, without a corpus: nothing is trained."""
    plain = dump(load(MIXED))
    plain["model"] |= {
        "dim": 16,
        "num_layers": 2,
        "attention": {"name": "grouped_query", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    }
    plain["model"]["moe"] |= {
        "num_experts": 4,
        "top_k": 2,
        "expert_widths": list(widths),
        "backend": "reference",
        **changes,
    }
    return plain


def test_measured_flops_are_those_that_torch_counts_for_the_rows_of_each_expert():
    run = load(
        tiny_model_of((8, 16, 8, 24)),
        ["train.batch_rows=2", "train.micro_rows=2", "data.sequence_length=16", "model.backend=torch"],
    )
    model = Transformer(run.model, seed=0)
    ids = torch.randint(0, 257, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(ids, targets_BS=ids)
        output.loss.backward()
    rows = [
        {"step": 0, "layer": report.layer, "counts": report.statistics["counts_E"].tolist(), "drop_rate": 0.0}
        for report in output.routing
    ]
    assert any(len(set(row["counts"])) > 1 for row in rows)
    expected = train_flops_per_token(run.model, 16)
    logged = RunRows(Path(), dump(run), {}, [], rows, [], {"train_flops_per_token": expected}, None)
    measured = measured_flops(logged, 2.0)
    assert measured == pytest.approx(counter.get_total_flops() / 32, rel=1e-12)
    assert measured != pytest.approx(expected, rel=1e-3)


def test_the_twin_has_equal_flops_as_torch_counts_them():
    """Every token meets every expert, so what is expected is what happens: 56 units of width and a router of 4/3."""
    run = load(tiny_model_of((8, 16, 8, 24), top_k=4), ["model.vocab_size=1000", "model.backend=torch"])
    twin = dense_twin(run)

    def counted(model) -> int:
        ids = torch.randint(0, 257, (2, 128))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            Transformer(model)(ids, targets_BS=ids).loss.backward()
        return counter.get_total_flops()

    assert counted(twin.model) == pytest.approx(counted(run.model), rel=0.005)
    assert twin.model.ffn_hidden == 56


def test_a_refused_twin_names_widths_that_are_accepted():
    refused = 0
    for width in range(40, 48):
        data = tiny_model_of((width, 8, 8, 8), first_dense=1)
        try:
            dense_twin(load(data))
        except ConfigError as error:
            refused += 1
            setting = str(error).split(": use ")[1]
            assert re.fullmatch(r"model\.moe\.expert_widths=\[[\d, ]+\]", setting)
            dense_twin(load(data, [setting]))
    assert 0 < refused < 8


def test_blocks_are_counted_for_the_fullest_routing():
    """Blocks of 16: widths of 1, 3 and 2 block columns; rows 40: the widest has 3 tiles, or 2 and the others one each."""
    assert (block_of((16, 48, 20)), block_of((128, 256, 120)), block_of((7, 9))) == (16, 128, 16)
    assert max_blocks((16, 48, 20), 40, 16) == 12
    run = load(tiny_model_of((16, 48, 20, 16), backend="block_sparse"))
    tokens = run.train.micro_rows * run.data.sequence_length
    other = replace(run, model=replace(run.model, moe=replace(run.model.moe, backend="torch")))
    difference = memory_bytes(run)["activations"] - memory_bytes(other)["activations"]
    blocks = max_blocks((16, 48, 20, 16), 2 * tokens, 16) * 16 * 16
    assert difference == 2 * 2 * 4 * (blocks - 2 * tokens * 48)


def test_show_says_that_active_is_an_expectation(capsys):
    show(load(MIXED), [])
    text = capsys.readouterr().out
    assert "2 of 8 experts of 16 to 112" in text
    assert "parameters, active per token (expected under uniform routing)" in text
    show(load(MIXED, ["model.moe.expert_widths=[]"]), [])
    text = capsys.readouterr().out
    assert "2 of 8 experts of 64" in text and "expected under uniform" not in text


# ------------------------------------------------------------------------------------------------------------- training


def test_the_recipe_trains_alike_on_both_backends(tmp_path):
    corpus = write_corpus(tmp_path)
    losses = {}
    for backend in ("reference", "torch"):
        settings = [
            "train.steps=3",
            "train.schedule.warmup_steps=1",
            "evaluation.rows=4",
            "data.sequence_length=32",
            "evaluation.every_steps=0",
        ]
        data = ["data.sources.0=files", f"data.sources.0.paths=[{json.dumps(str(corpus))}]", "logging.console=off"]
        cache = [f"data.cache_dir={tmp_path}/cache", "evaluation.final_rows=4", "data.validation_fraction=0.3"]
        train(load(MIXED, [f"model.moe.backend={backend}", *settings, *data, *cache]), tmp_path / backend)
        losses[backend] = [row["loss"] for row in read_lines(tmp_path / backend / "metrics.jsonl")]
    assert len(losses["torch"]) == 3
    assert losses["torch"] == pytest.approx(losses["reference"], rel=0, abs=1e-5)
