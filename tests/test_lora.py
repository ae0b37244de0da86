"""Low-rank adapters: what they compute against W + s·B·A by hand and by autograd, what training moves, and what a merge keeps.

Reference values come from formulas in float64 written out here, from peft where it is installed, and from the base run itself.
"""

import json

import pytest
import torch

from moe.cli import main
from moe.config.load import load
from moe.errors import ConfigError
from moe.lora import adapter_names, is_adapter
from moe.model import Transformer
from moe.surgery import store
from moe.surgery.lora import fine_tune, merge
from moe.surgery.start import begin_run, read_run
from moe.train import resume, train
from tests.test_layouts import torchrun
from tests.tiny_runs import tiny_dict

LORA = {"rank": 3, "alpha": 6.0, "targets": ["attention", "experts"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A sparse run whose router has a state, and a text of one kind to fine-tune on."""
    folder = tmp_path_factory.mktemp("lora")
    run = load(tiny_dict(folder), ["model.init_std=0.2", "model.moe.router=loss_free"])
    begin_run(folder / "base", run, Transformer(run.model, seed=1).state_dict(), {})
    (folder / "task.jsonl").write_text("".join(json.dumps({"text": f"abcab {i} cab"}) + "\n" for i in range(99, 199)))
    return folder


@pytest.fixture(scope="module")
def tuned(base):
    """The run fine-tuned on that text for six steps, and its receipt."""
    return base / "tuned", fine_tune(base / "base", base / "tuned", task(base), LORA)


def task(base) -> list[str]:
    source = json.dumps([{"name": "files", "paths": [str(base / "task.jsonl")]}])
    return [f"data.sources={source}", "train.steps=6", "train.schedule.warmup_steps=0", "train.optimizer.lr=0.02"]


def with_random_b(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapter_names([name]):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def by_hand(model: Transformer, scale: float) -> dict[str, torch.Tensor]:
    """The state without adapters, W + scale · B·A in float64, matrix by matrix and expert by expert."""
    state = {name: tensor.to(torch.float64, copy=True) for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith((".lora.a_IJ", ".a_EIJ"))]:
        a, b = state.pop(name), state.pop(name.replace("a_IJ", "b_JO").replace("a_EIJ", "b_EJO"))
        if name.endswith(".lora.a_IJ"):
            weight = state[name.replace(".lora.a_IJ", ".weight")]
            weight += scale * (b.t() @ a.t())
        else:
            weight = state[name.replace(".lora.", ".").removesuffix(".a_EIJ")]
            for e in range(len(weight)):
                weight[e] += scale * a[e] @ b[e]
    return state


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("scaling", "scale"), [("rank", 2.0), ("root", 6 / 3**0.5)])
def test_an_adapted_model_computes_with_the_sum_of_base_and_product(base, backend, scaling, scale):
    options = [f"model.moe.backend={backend}", "model.moe.shared_hidden=8", "model.moe.first_dense=1"]
    options += ["model.moe.expert_bias=true"]
    lora = {**LORA, "scaling": scaling, "targets": ["attention", "experts", "shared", "ffn"]}
    run = load(tiny_dict(base), [*options, f"model.lora={json.dumps(lora)}"])
    plain = load(tiny_dict(base), options)
    adapted = with_random_b(Transformer(run.model, dtype=torch.float64).double())
    expected = Transformer(plain.model, dtype=torch.float64).double()
    expected.load_state_dict(by_hand(adapted, scale))
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    far = (adapted(ids).logits_BSV - expected(ids).logits_BSV).abs().max()
    assert far < 1e-5, "logits are float32 at the end"
    assert (adapted(ids).logits_BSV - Transformer(plain.model)(ids).logits_BSV).abs().max() > 1e-2


def test_gradients_are_those_of_the_explicit_formula(base):
    """Autograd through functional_call with W + s·B·A as the weights, made of leaves A and B."""
    run = load(tiny_dict(base), [f"model.lora={json.dumps(LORA)}"])
    plain = Transformer(load(tiny_dict(base)).model, dtype=torch.float64).double()
    adapted = with_random_b(Transformer(run.model, dtype=torch.float64).double())
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    adapted(ids, ids.roll(-1, 1)).objective.backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapted.named_parameters() if p.requires_grad}
    weights = dict(plain.state_dict())
    for name, a in leaves.items():
        if name.endswith("a_IJ"):
            b = leaves[name.replace("a_IJ", "b_JO")]
            place = name.replace(".lora.a_IJ", ".weight")
            weights[place] = weights[place] + 2.0 * (a @ b).t()
        elif name.endswith("a_EIJ"):
            b = leaves[name.replace("a_EIJ", "b_EJO")]
            place = name.replace(".lora.", ".").removesuffix(".a_EIJ")
            weights[place] = weights[place] + 2.0 * torch.stack([a[e] @ b[e] for e in range(len(a))])
    output = torch.func.functional_call(plain, weights, (ids, ids.roll(-1, 1)))
    output.objective.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (name in leaves)
        if name in leaves:
            torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-8)
            assert parameter.grad.abs().max() > 0
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["grouped_query", "latent"])
def test_nothing_changes_before_the_first_step(base, attention, precision):
    latent = '{"name":"latent","num_heads":2,"q_rank":8,"kv_rank":8,"nope_dim":8,"rope_dim":4,"value_dim":8}'
    options = [f"model.attention={latent}"] if attention == "latent" else []
    run = load(tiny_dict(base), [*options, f"model.lora={json.dumps(LORA)}"])
    plain, adapted = (
        Transformer(load(tiny_dict(base), options).model, dtype=precision),
        Transformer(run.model, dtype=precision),
    )
    ids = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(ids).logits_BSV, adapted(ids).logits_BSV)
    projections = 5 if attention == "latent" else 4
    assert len(adapter_names(adapted.state_dict())) == 2 * 2 * (projections + 3)


def test_only_adapters_move_and_only_they_have_optimizer_state(base, tuned):
    folder, receipt = tuned
    before, after = read_run(base / "base").tensors, read_run(folder, adapters="apart").tensors
    adapters = adapter_names(after)
    assert sorted(before) == sorted(set(after) - set(adapters))
    assert all(torch.equal(before[name], after[name]) for name in before), "weights and the router's state"
    assert all(after[name].abs().max() > 0 for name in adapters)
    assert receipt["trained"] == sum(after[name].numel() for name in adapters)
    assert receipt["loss_after"] < receipt["loss_before"]
    index = torch.distributed.checkpoint.FileSystemReader(
        next((folder / "checkpoints").glob("step_*6"))
    ).read_metadata()
    averaged = {name.split("state.")[1].rpartition(".")[0] for name in index.state_dict_metadata if ".exp_avg" in name}
    assert averaged == set(adapters)


def test_a_stopped_run_goes_on_bitwise(base, tuned, tmp_path):
    short = [*task(base), "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    fine_tune(base / "base", tmp_path / "b", short, LORA)
    for doomed in ("step_00000004", "step_00000006"):
        target = tmp_path / "b" / "checkpoints" / doomed
        target.rename(tmp_path / doomed)
    resume(tmp_path / "b")
    expected, found = (read_run(f, adapters="apart").tensors for f in (tuned[0], tmp_path / "b"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_merged_run_is_the_adapted_one(base, tuned, tmp_path, capsys):
    assert main(["lora", "merge", str(tuned[0]), "--out", str(tmp_path / "merged")]) == 0
    source, result = read_run(tuned[0], adapters="apart"), read_run(tmp_path / "merged")
    assert result.run.model.lora is None
    expected = by_hand(source.model(), 2.0)
    assert all(torch.equal(result.tensors[name], expected[name].to(result.tensors[name].dtype)) for name in expected)
    ids = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.model()(ids).logits_BSV, source.model()(ids).logits_BSV, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="has no adapters"):
        merge(tmp_path / "merged", tmp_path / "again")
    capsys.readouterr()


def test_a_store_keeps_the_base_once_and_adapters_apart(base, tuned, tmp_path):
    first = store.put(tmp_path / "store", "base", base / "base")
    second = store.put(tmp_path / "store", "tuned", tuned[0])
    adapters = adapter_names(read_run(tuned[0], adapters="apart").tensors)
    assert second["new_shards"] == len(adapters), "one each, and no other"
    assert second["new_bytes"] < first["new_bytes"]
    store.get(tmp_path / "store", "tuned", tmp_path / "back")
    back, expected = (read_run(folder, adapters="apart") for folder in (tmp_path / "back", tuned[0]))
    assert back.run.model == expected.run.model
    assert all(torch.equal(back.tensors[name], expected.tensors[name]) for name in expected.tensors)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            'model.lora={"rank":2,"targets":["experts","shared"]}',
            "has shared, and this model has only attention, experts",
        ),
        ('model.lora={"rank":2,"targets":["experts","experts"]}', "names one twice"),
        ('model.lora={"rank":2,"dropout":0.1}', "dropout"),
        ('model.lora={"rank":2,"targets":["router"]}', "router"),
        ("parallel.shard=2", "parallel.shard .2. cuts matrices"),
        ("parallel.expert=2", "parallel.expert .2. cuts matrices"),
        ("train.optimizer=muon", "muon"),
        ("model.moe.expert_widths=[8,4,8,4]", "widths"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(base, override, words):
    with pytest.raises(ConfigError, match=words):
        load(tiny_dict(base), [*(() if "lora" in override else ('model.lora={"rank":2}',)), override])


def test_a_run_from_nothing_takes_no_adapters(base, tmp_path):
    with pytest.raises(ConfigError, match="starts from none"):
        train(load(tiny_dict(base), ['model.lora={"rank":2}']), tmp_path / "run")
    with pytest.raises(ConfigError, match="overrides of model"):
        fine_tune(base / "base", tmp_path / "run", ["model.norm_eps=0.1"], LORA)
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("layout", ["parallel.replicate=2", "parallel.context=2"])
def test_two_ranks_train_the_same_adapters(layout, tmp_path):
    """In float32: 3e-8 and 7e-7 apart where this was written, after four steps of at most 0.01 each."""
    plain = load(tiny_dict(tmp_path), ["model.init_std=0.2", "train.steps=4", "train.micro_rows=2"])
    run = load(plain, [f"model.lora={json.dumps(LORA)}"])
    state = Transformer(run.model, seed=1).state_dict()
    for name in ("one", "two"):
        begin_run(tmp_path / name, run, state, {})
    resume(tmp_path / "one")
    torchrun(2, "-m", "moe.train", "--resume", str(tmp_path / "two"), layout)
    one, two = (read_run(tmp_path / name, adapters="apart").tensors for name in ("one", "two"))
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < (1e-5 if is_adapter(name) else 1e-30), name
