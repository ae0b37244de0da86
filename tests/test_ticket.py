"""Masks of lottery tickets against hand-made matrices; what is pruned stays exactly zero, what is kept starts where it did."""

import json

import pytest
import torch

from moe.cli import main
from moe.errors import ConfigError
from moe.model import Transformer
from moe.surgery.start import read_run
from moe.surgery.ticket import Search, find, magnitude_masks, prunable, random_masks
from tests.tiny_runs import tiny_dict, tiny_run


def ones(**tensors) -> dict[str, torch.Tensor]:
    return {name: torch.ones(t.shape, dtype=torch.bool) for name, t in tensors.items()}


def test_the_largest_of_all_matrices_together_are_kept():
    tensors = {"a": torch.tensor([[1.0, -9.0], [2.0, 3.0]]), "b": torch.tensor([[8.0, 0.5], [-4.0, 7.0]])}
    masks = magnitude_masks(tensors, ones(**tensors), 0.5, 1)
    assert masks["a"].tolist() == [[False, True], [False, False]]
    assert masks["b"].tolist() == [[True, False], [True, True]]
    again = magnitude_masks({"a": tensors["a"] * 100, "b": tensors["b"]}, masks, 0.25, 1)
    assert again["a"].tolist() == [[False, True], [False, False]], "what is gone does not come back"
    assert again["b"].tolist() == [[True, False], [False, False]]


def test_blocks_go_together():
    tensor = torch.zeros(2, 4, 4)
    tensor[0, 2:, :2] = 1.0
    tensor[1, 0, 3] = 1.5
    (mask,) = magnitude_masks({"a": tensor}, ones(a=tensor), 0.125, 2).values()
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 2:, :2] = True
    assert torch.equal(mask, expected), "the block of root mean square 1, not the one of 0.75"
    (anywhere,) = random_masks({"a": mask}, 0, 2).values()
    assert anywhere.sum() == 4 and anywhere.unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2).float().mean(
        -1
    ).unique().tolist() == [0, 1]
    with pytest.raises(ConfigError, match="blocks of 3"):
        magnitude_masks({"a": tensor}, ones(a=tensor), 0.5, 3)


@pytest.mark.parametrize("control", ["none", "random", "reinitialised"])
def test_a_ticket_keeps_its_share_and_its_zeros(control, tmp_path):
    run = tiny_run(tmp_path, "train.steps=3")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_dict(tmp_path) | {"name": "tiny"}))
    receipt = find(path, tmp_path / "out", Search(keep=0.25, rounds=2, rewind=1, control=control), ["train.steps=3"])
    tensors = read_run(tmp_path / "out").tensors
    names = prunable(tensors)
    assert names and not any("router" in name or "norm" in name or "embedding" in name for name in names)
    nonzero = sum(int((tensors[name] != 0).sum()) for name in names)
    assert nonzero == receipt["kept"] == round(0.25 * receipt["places"])
    assert receipt["bytes"] < receipt["bytes_whole"]
    assert receipt["places"] == sum(tensors[name].numel() for name in names)
    assert run.model == read_run(tmp_path / "out").run.model


def test_kept_weights_start_where_the_whole_models_did(tmp_path):
    """No steps after rewinding to the first step but one, at a learning rate of almost nothing: kept = first values."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_dict(tmp_path)))
    tiny = ["train.steps=2", "train.optimizer.lr=1e-12", "train.schedule.warmup_steps=0"]
    find(path, tmp_path / "out", Search(keep=0.5, rounds=1), tiny)
    tensors = read_run(tmp_path / "out").tensors
    first = Transformer(tiny_run(tmp_path).model).state_dict()
    for name in prunable(tensors):
        kept = tensors[name] != 0
        assert torch.allclose(tensors[name][kept], first[name][kept], atol=1e-9)
        assert float(first[name][kept].abs().min()) >= 0


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_dict(tmp_path)))
    assert (
        main(["ticket", str(path), "--out", str(tmp_path / "out"), "--keep", "0.5", "--rounds", "1", "--block", "8"])
        == 0
    )
    assert "of" in capsys.readouterr().out
    assert main(["ticket", str(path), "--out", str(tmp_path / "x"), "--rewind", "2"]) == 2
    assert main(["ticket", str(path), "--out", str(tmp_path / "x"), "--keep", "2"]) == 2
    assert not (tmp_path / "x").exists()
