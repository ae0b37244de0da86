"""`moe prune` against loops written out here, hand-made cases, and transformers' own model of the pruned export."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import checkpoint
from moe.cli import main
from moe.config.load import load
from moe.cost import parameters
from moe.data import prepare
from moe.errors import ConfigError, UserError
from moe.model import Transformer
from moe.surgery.esft import fine_tune
from moe.surgery.prune import Plan, describe, look, prune, prune_tensors, pruned_model
from moe.surgery.scores import LayerUse, _add, _unused
from moe.surgery.select import aligned, best, expert_dimension, groups_by_output, groups_by_router, merge_experts
from moe.surgery.start import begin_run, read_run
from tests.tiny_runs import tiny_dict


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of 6 experts with weights that differ."""
    folder = tmp_path_factory.mktemp("prune")
    values = tiny_dict(folder)
    values["model"]["moe"]["num_experts"] = 6
    values["model"] |= {"init_std": 0.3, "document_mask": False}
    run = load(values)
    begin_run(folder / "run", run, Transformer(run.model, seed=3).state_dict(), {})
    return read_run(folder / "run")


def test_scores_equal_a_loop_over_tokens(source):
    """In float64, every routed row one by one, with the hidden states of layer 0 computed here from the embedding."""
    plan = Plan(rows=4)
    uses = look(source, plan)
    model = source.model().double()
    batch = prepare(source.run.data).train_batch(0, range(4), batch_rows=4, seed=source.run.seed)
    seen = []
    handle = model.layers[0].moe.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    model.dtype = torch.float64
    with torch.no_grad():
        model(batch.ids_BS)
    handle.remove()
    gate, up, down = (p.detach() for p in model.layers[0].moe.experts.parameters())
    rows, norm, weighted = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    for x, valid in zip(seen[0], batch.valid_BS.flatten(), strict=True):
        if not valid:
            continue
        logits = model.layers[0].moe.router.weight_ED.detach() @ x
        chosen = logits.topk(2).indices
        for e, g in zip(chosen.tolist(), logits[chosen].softmax(0).tolist(), strict=True):
            hidden = torch.nn.functional.silu(x @ gate[e]) * (x @ up[e])
            length = float((hidden @ down[e]).square().sum().sqrt())
            rows[e], norm[e], weighted[e] = rows[e] + 1, norm[e] + length, weighted[e] + g * length
    torch.testing.assert_close(uses[0].score("frequency"), rows)
    torch.testing.assert_close(uses[0].score("mean_norm"), norm / rows.clamp(min=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(uses[0].score("reap"), weighted / rows.clamp(min=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(uses[0].score("weighted_norm"), weighted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "weight"),
    [
        (["model.moe.router.gate=full"], lambda logits, e: float(logits.softmax(0)[e])),
        (["model.moe.router=llama4"], lambda logits, e: float(logits[e].sigmoid())),
    ],
    ids=["full softmax", "on the input"],
)
def test_weights_that_do_not_sum_to_one_enter_reap_as_the_layer_uses_them(router, weight, tmp_path):
    """One layer in float64, row by row: the length of what each expert adds; and without the gate."""
    run = load({**tiny_dict(tmp_path), "model": {**tiny_dict(tmp_path)["model"], "init_std": 0.3}}, router)
    model = Transformer(run.model, seed=3).eval()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    layer = model.layers[0].moe
    with torch.no_grad():
        _, routing = layer(x.unsqueeze(0))
        use = _unused(4)
        _add(use, layer, x, routing)
    gate, up, down = (p.detach().double() for p in layer.experts.parameters())

    def length(x, e):
        return float(((torch.nn.functional.silu(x @ gate[e]) * (x @ up[e])) @ down[e]).norm())

    rows, norm, added, gates = torch.zeros(4, 4, dtype=torch.float64)
    for x_D in x.double():
        logits = layer.router.weight_ED.detach().double() @ x_D
        for e in logits.topk(2).indices.tolist():
            g = weight(logits, e)
            rows[e], norm[e], gates[e] = rows[e] + 1, norm[e] + length(x_D, e), gates[e] + g
            added[e] += length(g * x_D, e) if router[0].endswith("llama4") else g * length(x_D, e)
    torch.testing.assert_close(use.score("reap"), added / rows.clamp(min=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(use.score("mean_norm"), norm / rows.clamp(min=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(use.gates_E, gates, rtol=1e-4, atol=1e-7)


def test_experts_stay_in_the_groups_that_limit_their_router(tmp_path):
    """Two groups of four, of which a token gets the better one: two of each stay, which closing the others confirms."""
    settings = {"num_experts": 8, "router": {"name": "loss_free", "num_groups": 2, "top_groups": 1}}
    values = tiny_dict(tmp_path)
    values["model"] |= {"init_std": 0.3, "moe": {**values["model"]["moe"], **settings}}
    run = load(values)
    tensors = Transformer(run.model, seed=3).state_dict()
    tensors["layers.0.moe.experts.w_down_EFD"][:3] *= 30
    begin_run(tmp_path / "run", run, tensors, {})
    origin = prune(tmp_path / "run", tmp_path / "out", Plan(keep=0.5, rows=4))
    score = origin["scores"]["0"]
    kept = [e for (e,) in origin["experts"]["0"]]
    assert kept == sorted(
        sorted(range(4), key=lambda e: -score[e])[:2] + sorted(range(4, 8), key=lambda e: -score[e])[:2]
    )
    assert len(prune(tmp_path / "run", tmp_path / "more", Plan(keep=0.3, rows=4))["experts"]["0"]) == 4
    with pytest.raises(ConfigError, match="best 1 of 2 groups"):
        prune(tmp_path / "run", tmp_path / "x", Plan(method="merge"))


def test_a_taken_folder_is_refused_before_the_text_is_read_and_fewer_choices_are_said(source, tmp_path, monkeypatch):
    text = describe(
        {**prune(source.folder, tmp_path / "one", Plan(keep=0.5, rows=4)), "top_k": {"before": 4, "after": 3}}, tmp_path
    )
    assert "experts per token: 3, 4 before" in text
    monkeypatch.setattr("moe.surgery.prune.look", lambda *_: pytest.fail("looked"))
    with pytest.raises(ConfigError, match="not empty"):
        prune(source.folder, tmp_path / "one", Plan())
    monkeypatch.setattr("moe.surgery.esft.measure_use", lambda *_, **__: pytest.fail("looked"))
    with pytest.raises(ConfigError, match="not empty"):
        fine_tune(source.folder, tmp_path / "one", [])


def test_a_run_whose_making_was_killed_is_not_trained_from_first_values(source, tmp_path, monkeypatch, capsys):
    """The process ends where the checkpoint is about to be written, and leaves its folder: SystemExit stands for the signal."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("moe.surgery.start.checkpoint.save_fresh", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr("moe.surgery.start.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            prune(source.folder, out, Plan(rows=4))
    assert (out / "origin.json").is_file()
    assert main(["resume", str(out)]) == 2 and not (out / "checkpoints").exists()
    assert main(["prune", str(source.folder), "--out", str(out), "--rows", "4"]) == 2
    assert "stopped while it was made" in capsys.readouterr().err


def test_a_hand_made_layer_is_ranked_as_its_formulas_say():
    use = LayerUse(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([4.0, 3.0, 0.0]), torch.tensor([2.0, 1.5, 0.0]))
    assert use.score("frequency").tolist() == [4, 1, 0]
    assert use.score("mean_norm").tolist() == [1, 3, 0]
    assert use.score("reap").tolist() == [0.5, 1.5, 0]
    assert use.score("weighted_norm").tolist() == [2, 1.5, 0]
    assert best(use.score("reap"), 2) == [0, 1] and best(use.score("mean_norm"), 1) == [1]
    draws = [use.score("random", seed=s, layer=0).tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_pruned_run_equals_the_whole_one_with_its_other_experts_closed(source):
    """Router rows of the dropped experts sent to -infinity by a large bias direction: the same logits to rounding."""
    uses = look(source, Plan(rows=4))
    plan = Plan(keep=0.5, rows=4)
    tensors, groups = prune_tensors(source.tensors, uses, plan, {0: 3, 1: 3})
    small = pruned_model(source, uses, plan)
    big = source.model()
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    handles = []
    for layer, experts in big.moe_layers():
        closed = [e for e in range(6) if [e] not in groups[layer]]
        handles.append(experts.router.register_forward_hook(_closing(closed, experts)))
    with torch.no_grad():
        expected, found = big(ids).logits_BSV, small(ids).logits_BSV
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert tensors["layers.1.moe.router.weight_ED"].shape == (3, 16)


def _closing(closed, layer):
    """Route again with the closed experts' rows at -infinity, by hand."""

    def hook(router, args, routing):
        x_TD = args[0]
        logits = x_TD @ router.weight_ED.t()
        logits[:, closed] = -torch.inf
        value, expert_TK = logits.topk(2, dim=1)
        return replace(routing, expert_R=expert_TK.flatten(), weight_R=value.softmax(1).flatten())

    return hook


def test_alignment_undoes_a_permutation_and_a_merge_of_equals_is_one_of_them(source):
    gate, up, down = (source.tensors[f"layers.0.moe.experts.{n}"] for n in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    shuffled = (gate[2][:, order], up[2][:, order], down[2][order])
    found = aligned((gate[2], up[2], down[2]), shuffled)
    assert torch.equal(order[found], torch.arange(8))
    tensors = dict(source.tensors)
    for name, value in zip(("w_gate_EDF", "w_up_EDF", "w_down_EFD"), shuffled, strict=True):
        whole = tensors[f"layers.0.moe.experts.{name}"].clone()
        whole[4] = value
        tensors[f"layers.0.moe.experts.{name}"] = whole
    use = LayerUse(torch.tensor([1.0, 1, 3, 1, 5, 1]), torch.ones(6), torch.ones(6))
    merged = merge_experts(tensors, {0: [[2, 4], [0]]}, {0: use})
    torch.testing.assert_close(merged["layers.0.moe.experts.w_gate_EDF"][0], gate[2])
    torch.testing.assert_close(merged["layers.0.moe.experts.w_down_EFD"][0], down[2])
    torch.testing.assert_close(merged["layers.0.moe.experts.w_up_EDF"][1], up[0])
    assert merged["layers.0.moe.router.weight_ED"].shape == (2, 16)


def test_alignment_is_the_best_of_all_permutations():
    torch.manual_seed(0)
    one, other = ((torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 5)) for _ in range(2))

    def distance(order):
        order = torch.tensor(order)
        return float(
            sum(
                (a - b).square().sum()
                for a, b in zip(one, (other[0][:, order], other[1][:, order], other[2][order]), strict=True)
            )
        )

    found = aligned(one, other).tolist()
    assert distance(found) == pytest.approx(min(distance(p) for p in itertools.permutations(range(4))))


def test_groups_are_the_planted_ones():
    """Experts 0, 2 and 4 do nearly the same, and so do 1 and 3; 5 stands alone."""
    torch.manual_seed(0)
    centres = torch.randn(3, 1, 7)
    kind = [0, 1, 0, 1, 0, 2]
    outputs = torch.cat([centres[k] + 0.01 * torch.randn(1, 7) for k in kind]).unsqueeze(1)
    logits = torch.randn(50, 3)[:, kind] + 0.01 * torch.randn(50, 6)
    rows = torch.tensor([9.0, 5, 1, 8, 2, 4])
    use = LayerUse(rows, torch.ones(6), torch.ones(6), outputs=[outputs], logits=[logits])
    assert sorted(map(sorted, groups_by_output(use, 3))) == [[0, 2, 4], [1, 3], [5]]
    assert [3, 1] in groups_by_output(use, 3), "the most used comes first"
    first, second = groups_by_router(use, 2)
    assert first[:3] == [0, 2, 4] and second[:2] == [3, 1]
    same = LayerUse(rows, torch.ones(6), torch.ones(6), outputs=[torch.zeros(6, 1, 7)])
    assert [len(groups_by_output(same, n)) for n in (1, 2, 5, 6)] == [1, 2, 5, 6]


@pytest.mark.parametrize("method", ["drop", "merge", "cluster"])
def test_a_pruned_run_is_evaluated_resumed_exported_and_pruned_again(method, source, tmp_path):
    folder, out = str(source.folder), tmp_path / "pruned"
    assert main(["prune", folder, "--out", str(out), "--method", method, "--rows", "4", "train.steps=1"]) == 0
    run = load(out / "run.json")
    assert run.model.moe is not None and run.model.moe.num_experts == 3 and run.train.steps == 1
    assert main(["export", str(out), "--out", str(tmp_path / "hf")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, read_run(out).model()(ids).logits_BSV, rtol=1e-4, atol=1e-5)
    assert main(["resume", str(out)]) == 0
    saved = checkpoint.newest(out)
    assert saved is not None and saved.step == 1
    assert main(["prune", str(out), "--out", str(tmp_path / "again"), "--keep", "0.67", "--rows", "4"]) == 0
    origin = json.loads((out / "origin.json").read_text())
    assert sum(len(group) for group in origin["experts"]["0"]) == (3 if method == "drop" else 6)


def test_a_global_budget_goes_where_the_scores_are():
    """Layer 0 has four experts of one kind, layer 1 one that matters: relative to the layer's mean, by hand."""
    ones = torch.ones(4, dtype=torch.float64)
    even = LayerUse(ones * 10, ones, ones)
    steep = LayerUse(torch.tensor([37.0, 1, 1, 1]), ones, ones)
    plan = Plan(keep=0.5, budget="global", score="frequency")
    assert plan.counts({0: even, 1: steep}, 1) == {0: 3, 1: 1}
    assert plan.counts({0: even, 1: steep}, 2) == {0: 2, 1: 2}
    assert Plan(keep=0.5).counts({0: even, 1: steep}, 1) == {0: 2, 1: 2}


def test_layers_of_different_numbers_of_experts_train_on_and_are_counted(source, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in source.tensors.items()}
    tensors["layers.1.moe.experts.w_down_EFD"][0] *= 30
    begin_run(tmp_path / "steep", source.run, tensors, {})
    out, options = tmp_path / "out", ["--budget", "global", "--rows", "4", "train.steps=2"]
    assert main(["prune", str(tmp_path / "steep"), "--out", str(out), *options]) == 0
    run = load(out / "run.json")
    assert run.model.moe is not None
    each = run.model.moe.num_experts_per_layer
    assert sum(each) == 6 and len(set(each)) == 2 and max(each) == run.model.moe.num_experts
    built = Transformer(run.model)
    assert [len(layer.experts.widths) for _, layer in built.moe_layers()] == list(each)
    assert parameters(run.model).total == sum(p.numel() for p in built.parameters())
    assert main(["resume", str(out), "train.micro_rows=2"]) == 0, (
        "two micro-batches: balance loads are counted over the step"
    )
    assert main(["eval", str(out), "--rows", "2"]) == 0
    assert main(["prune", str(out), "--out", str(tmp_path / "again"), "--keep", "0.7", "--rows", "4"]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "hf")]) == 2
    for wrong, says in (([3, 3, 3], "3 entries for 2"), ([9, 3], "largest"), ([6, 1], "at least top_k")):
        with pytest.raises(ConfigError, match=says):
            load(source.run, [f"model.moe.num_experts_per_layer={wrong}"])


def test_what_cannot_be_pruned_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ConfigError, match="keep"):
        prune(source.folder, tmp_path / "x", Plan(keep=1.5))
    with pytest.raises(ConfigError, match="'best' is unknown"):
        prune(source.folder, tmp_path / "x", Plan(score="best"))
    dense = load({**tiny_dict(tmp_path), "model": {**tiny_dict(tmp_path)["model"], "moe": None}})
    begin_run(tmp_path / "dense", dense, Transformer(dense.model).state_dict(), {})
    with pytest.raises(UserError, match="dense model"):
        prune(tmp_path / "dense", tmp_path / "x", Plan())
    hashed = load(tiny_dict(tmp_path), ["model.moe.router=hash"])
    begin_run(tmp_path / "hash", hashed, Transformer(hashed.model).state_dict(), {})
    with pytest.raises(ConfigError, match="router hash"):
        prune(tmp_path / "hash", tmp_path / "x", Plan())
    assert not (tmp_path / "x").exists()


def test_experts_are_found_by_the_letters_of_a_name():
    names = {
        "a.w_gate_EDF": 0,
        "a.bias_E": 0,
        "a.default_ED": 0,
        "a.weight_ED": 0,
        "norm.weight": None,
        "a.table_VK": None,
    }
    assert {name: expert_dimension(name) for name in names} == names
