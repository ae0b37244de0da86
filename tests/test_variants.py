"""Fine-tuning of selected experts, and the store of variants: what may move, what must not, and what comes back."""

import json

import pytest
import torch

from moe.cli import main
from moe.config.load import load
from moe.errors import CheckpointError, ConfigError
from moe.model import Transformer
from moe.surgery import store
from moe.surgery.esft import chosen_experts, fine_tune
from moe.surgery.masked import train_masked
from moe.surgery.start import begin_run, read_run
from tests.tiny_runs import tiny_dict


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A sparse run, and a text of one kind to fine-tune on."""
    folder = tmp_path_factory.mktemp("variants")
    run = load(tiny_dict(folder), ["model.init_std=0.2", "model.moe.router=loss_free"])
    begin_run(folder / "base", run, Transformer(run.model, seed=1).state_dict(), {})
    (folder / "task.jsonl").write_text("".join(json.dumps({"text": f"abcab {i} cab"}) + "\n" for i in range(99, 199)))
    return folder


def task(base) -> list[str]:
    source = json.dumps([{"name": "files", "paths": [str(base / "task.jsonl")]}])
    return [f"data.sources={source}", "train.steps=6", "train.schedule.warmup_steps=0", "train.optimizer.lr=0.02"]


def test_the_fewest_experts_that_reach_the_threshold():
    share = torch.tensor([1.0, 5.0, 0.0, 4.0])
    assert chosen_experts(share, 0.2) == [1]
    assert chosen_experts(share, 0.5) == [1]
    assert chosen_experts(share, 0.51) == [1, 3]
    assert chosen_experts(share, 1.0) == [0, 1, 3]


@pytest.mark.parametrize("score", ["token", "gate"])
def test_only_the_chosen_experts_move(score, base, tmp_path):
    receipt = fine_tune(base / "base", tmp_path / "tuned", task(base), score=score, threshold=0.3, rows=8)
    before, after = read_run(base / "base").tensors, read_run(tmp_path / "tuned").tensors
    moved = 0
    for name, tensor in before.items():
        layer = name.split(".")[1]
        experts = receipt["experts"].get(layer, []) if ".experts." in name else []
        for e in range(len(tensor)) if ".experts." in name else [None]:
            same = torch.equal(tensor if e is None else tensor[e], after[name] if e is None else after[name][e])
            assert same == (e not in experts), (name, e)
            moved += 0 if same else tensor[e].numel()
    assert moved == receipt["trained"] > 0
    assert receipt["loss_after"] < receipt["loss_before"]


def test_masked_training_of_everything_is_training(base, tmp_path):
    run = load(base / "base" / "run.json", ["train.steps=3"])
    start = read_run(base / "base").tensors
    free = train_masked(run, start, {})
    assert main(["resume", str(base / "base"), "train.steps=3"]) == 0
    expected = read_run(base / "base").tensors
    assert all(torch.equal(free[name], expected[name]) for name in expected)
    closed = train_masked(run, start, {name: torch.tensor(False) for name in start})
    assert all(torch.equal(closed[name], start[name]) for name in start)


def test_variants_share_what_they_have_in_common(base, tmp_path, capsys):
    place = tmp_path / "store"
    first = store.put(place, "base", base / "base")
    assert first["new_shards"] <= first["shards"]
    assert store.put(place, "same", base / "base")["new_shards"] == 0
    assert main(["esft", str(base / "base"), "--out", str(tmp_path / "tuned"), "--threshold", "0.3", *task(base)]) == 0
    assert main(["store", "put", str(place), "tuned", str(tmp_path / "tuned")]) == 0
    capsys.readouterr()
    _, tensors = store.read(place, "tuned")
    expected = read_run(tmp_path / "tuned").tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) and tensors[n].dtype == expected[n].dtype for n in expected)
    experts = json.loads((tmp_path / "tuned" / "origin.json").read_text())["experts"]
    new = {path for path in (place / "blobs").rglob("*") if path.is_file()}
    assert len(new) == first["new_shards"] + 3 * sum(len(chosen) for chosen in experts.values())
    assert store.size(place, "tuned") < store.size(place) < 2 * store.size(place, "base")
    assert main(["store", "get", str(place), "tuned", "--out", str(tmp_path / "back")]) == 0
    back = read_run(tmp_path / "back").tensors
    assert all(torch.equal(back[n], expected[n]) for n in expected)


def test_a_damaged_store_names_the_file(base, tmp_path):
    store.put(tmp_path, "base", base / "base")
    with pytest.raises(ConfigError, match="has a variant 'base' already"):
        store.put(tmp_path, "base", base / "base")
    with pytest.raises(ConfigError, match="letters"):
        store.put(tmp_path, "../x", base / "base")
    with pytest.raises(CheckpointError, match="no variant 'x'; it has base"):
        store.read(tmp_path, "x")
    blob = next(path for path in (tmp_path / "blobs").rglob("*") if path.is_file())
    blob.write_bytes(b"\0" + blob.read_bytes()[1:-1])
    with pytest.raises(CheckpointError, match=rf"{blob.name} \(of base: "):
        store.read(tmp_path, "base")
    (tmp_path / "variants" / "base.json").write_text('{"x')
    with pytest.raises(CheckpointError, match=r"base\.json is damaged"):
        store.read(tmp_path, "base")
    assert store.remove(tmp_path, "base") > 0 and not list((tmp_path / "blobs").glob("*/*")), "a damaged one goes too"
    for use in (lambda: store.listing(tmp_path / "nowhere"), lambda: store.remove(tmp_path / "nowhere", "base")):
        with pytest.raises(CheckpointError):
            use()
    assert not (tmp_path / "nowhere").exists()


def test_removing_a_variant_deletes_what_it_alone_needs(base, tmp_path, capsys):
    store.put(tmp_path, "base", base / "base")
    alone = {path.name for path in (tmp_path / "blobs").glob("*/*")}
    run = load(base / "base" / "run.json")
    begin_run(tmp_path / "run", run, Transformer(run.model, seed=2).state_dict(), {})
    counts = store.put(tmp_path, "other", tmp_path / "run")
    assert main(["store", "list", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in store.listing(tmp_path)}
    own = counts["new_bytes"] - (tmp_path / "variants" / "other.json").stat().st_size
    assert rows["other"]["own_bytes"] == own > 0 and "2 variants" in capsys.readouterr().out
    assert main(["store", "remove", str(tmp_path), "other"]) == 0
    assert {path.name for path in (tmp_path / "blobs").glob("*/*")} == alone
    store.read(tmp_path, "base")
    assert store.remove(tmp_path, "base") > 0 and not list((tmp_path / "blobs").glob("*/*"))
    with pytest.raises(CheckpointError, match="no variant 'base'"):
        store.remove(tmp_path, "base")


def test_putting_the_run_again_mends_a_damaged_shard(base, tmp_path):
    store.put(tmp_path, "base", base / "base")
    blob = next(path for path in (tmp_path / "blobs").rglob("*") if path.is_file())
    whole = blob.read_bytes()
    blob.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert store.put(tmp_path, "again", base / "base")["new_shards"] == 1
    assert blob.read_bytes() == whole
    store.read(tmp_path, "base")
