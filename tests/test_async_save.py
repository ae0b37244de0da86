"""Saving in the background, what a failed save leaves, and what loading checks; against the parameters at the moment of saving."""

import errno
import json
import pickle
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from moe import parallel
from moe.checkpoint import Saver, find, folder, newest, prune, published, read_tensors
from moe.checkpoint.content import tiling_error
from moe.config.schema import Checkpoint
from moe.errors import CheckpointError
from moe.train import resume, train
from moe.train.step import build_state


@pytest.fixture
def state(tmp_path):
    """Model and optimizer of a tiny run that has done one step with made-up gradients."""
    made = build_state(tiny_runs.tiny_run(tmp_path), parallel.start("cpu"), SimpleNamespace())
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    return made


def saver(state, out: Path, said: list[str], **settings) -> Saver:
    """A saver of one process."""
    return Saver(out, state.model, state.optimizer, state.ranks, Checkpoint(**settings), said.append)


def test_only_the_copy_blocks_and_it_is_what_is_saved(state, tmp_path, monkeypatch):
    begun, go_on, real = threading.Event(), threading.Event(), dcp.save

    def slow(*args, **kwargs):
        begun.set()
        assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", slow)
    expected = {name: value.clone() for name, value in state.model.state_dict().items()}
    ours = saver(state, tmp_path, [])
    ours.save(7, {}, None)
    assert begun.wait(60)
    assert not published(tmp_path)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)  # training goes on while the checkpoint is being written
    go_on.set()
    ours.finish()
    saved = newest(tmp_path)
    assert saved is not None and saved.step == 7
    stored = read_tensors(saved, expected)
    assert all(torch.equal(stored[name], value) for name, value in expected.items())


def test_a_save_waits_for_the_one_before(state, tmp_path, monkeypatch):
    order, real = [], folder.finish

    def finish(out, step, meta):
        order.append(step)
        return real(out, step, meta)

    monkeypatch.setattr(folder, "finish", finish)
    ours = saver(state, tmp_path, [], keep_last=9)
    for step in (1, 2, 3):
        ours.save(step, {}, None)
        assert order[: step - 1] == list(range(1, step)), "the one before is published before this one begins"
    ours.finish()
    assert [saved.step for saved in published(tmp_path)] == [1, 2, 3]
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.name != "meta.json"]
    assert ours.bytes_written == sum(path.stat().st_size for path in files)


class Full:
    """A stream of a disk that takes 1000 bytes more."""

    def __init__(self, stream):
        self.stream, self.room = stream, 1000

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)


def full_at(count: int, create_stream):
    """`FileSystem.create_stream`, except that the count-th file it opens for writing is on a full disk."""
    opened = []

    @contextmanager
    def wrapped(self, path, mode):
        with create_stream(self, path, mode) as stream:
            opened.extend([path] if "w" in mode else [])
            yield Full(stream) if "w" in mode and len(opened) == count else stream

    return wrapped


SAVE_EACH = ("train.steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=9", "logging.console=plain")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_costs_that_checkpoint_only(asynchronous, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileSystem, "create_stream", full_at(3, FileSystem.create_stream))
    run = tiny_runs.tiny_run(tmp_path, *SAVE_EACH, f"checkpoint.asynchronous={asynchronous}")
    out = train(run, tmp_path / "run")
    assert [saved.step for saved in published(out)] == [1, 3]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000001", "step_00000003"]
    said = capsys.readouterr().out
    assert "WARNING: the checkpoint of step 2 could not be saved (rank 0: no space left on the disk)" in said
    assert "training goes on, and the newest checkpoint is still that of step 1" in said


def test_the_last_checkpoint_must_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(FileSystem, "create_stream", full_at(5, FileSystem.create_stream))
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved .*no space left.*make room"):
        train(tiny_runs.tiny_run(tmp_path, *SAVE_EACH), tmp_path / "run")
    assert [saved.step for saved in published(tmp_path / "run")] == [1, 2]


def test_a_save_that_does_not_fit_is_not_begun(state, tmp_path, monkeypatch):
    said = []
    usage = folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    ours = saver(state, tmp_path, said)
    ours.save(1, {}, None)
    assert "no space left on the disk" in said[0] and "1,000 are free" in said[0]
    assert not list((tmp_path / "checkpoints").iterdir()), "what is left of the disk stays free for the logs"
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        ours.finish()


# ------------------------------------------------------------------------------------------------- what loading checks

EXPERTS = "model.layers.1.moe.experts.w_up_EDF"
TILINGS = [
    ("w", (4, 6), [((0, 0), (4, 3)), ((0, 3), (4, 3))], ""),
    ("w", (4, 6), [((0, 0), (2, 6)), ((3, 0), (1, 6))], "lacks 6 of 24 elements"),
    ("w", (4, 6), [((0, 0), (3, 6)), ((2, 0), (2, 6))], "that overlap"),
    ("w", (4, 6), [((0, 0), (4, 6)), ((4, 0), (1, 6))], "outside of it"),
    ("w", (5,), [((0,), (3,)), ((3,), (2,)), ((5,), (0,))], ""),
    (EXPERTS, (4, 2, 2), [((0, 0, 0), (2, 2, 2)), ((2, 0, 0), (2, 2, 2))], ""),
    (EXPERTS, (4, 2, 2), [((0, 0, 0), (2, 2, 2)), ((2, 0, 0), (1, 2, 2))], "lacks experts 3"),
    (EXPERTS, (4, 2, 2), [((0, 0, 0), (2, 2, 2)), ((1, 0, 0), (2, 2, 2))], "lacks experts 3 and has twice experts 1"),
    (EXPERTS, (2, 2, 2), [((0, 0, 0), (2, 2, 1)), ((0, 0, 1), (1, 2, 1))], "lacks experts 1"),
]


@pytest.mark.parametrize(("name", "size", "boxes", "wrong"), TILINGS)
def test_chunks_must_tile_their_tensor(name, size, boxes, wrong):
    found = tiling_error(name, size, boxes)
    assert wrong in found and bool(wrong) == bool(found)


def test_a_lost_expert_is_named_before_anything_is_loaded(state, tmp_path):
    """The index is rewritten as two ranks would leave it that saved experts 0 and 1 each under the name of all four."""
    ours = saver(state, tmp_path, [])
    ours.save(1, {}, None)
    ours.finish()
    path = published(tmp_path)[0].path
    index = pickle.loads((path / ".metadata").read_bytes())
    tensor = index.state_dict_metadata[EXPERTS]
    (whole,) = tensor.chunks
    tensor.chunks[:] = [replace(whole, sizes=torch.Size((2, *whole.sizes[1:])))]
    (path / ".metadata").write_bytes(pickle.dumps(index))
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][".metadata"] = [(path / ".metadata").stat().st_size, folder.checksum(path / ".metadata")]
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"layers\.1\.moe\.experts\.w_up_EDF \[4, 16, 8\] lacks experts 2, 3"):
        find(tmp_path)


DAMAGE = {
    "bit": lambda path: flip(path / "__0_0.distcp"),
    "cut": lambda path: (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-10]),
    "index": lambda path: flip(path / ".metadata"),
    "gone": lambda path: (path / "meta.json").unlink(),
}


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """A finished run of five steps with checkpoints 2, 4 and 5: (folder of the corpus, run's folder)."""
    base = tmp_path_factory.mktemp("five")
    run = tiny_runs.tiny_run(base, "train.steps=5", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    return train(run, base / "run")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, five_steps, tmp_path, capsys):
    out = tmp_path / "run"
    folder.shutil.copytree(five_steps, out)
    DAMAGE[damage](out / "checkpoints" / "step_00000005")
    resume(out, ["logging.console=plain"])
    said = capsys.readouterr().out
    assert "the checkpoint of step 5 is damaged" in said and "going back to step 4, which loses 1 steps" in said
    assert f"resuming {out} at step 4 of 5" in said
    names = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert names == ["damaged-step_00000005", "step_00000002", "step_00000004", "step_00000005"]
    again, before = (newest(run) for run in (out, five_steps))
    assert again is not None and before is not None
    tensors = [read_tensors(saved, ["layers.0.moe.experts.w_up_EDF", "embedding.weight"]) for saved in (again, before)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_without_a_whole_checkpoint_nothing_is_resumed(five_steps, tmp_path):
    out = tmp_path / "run"
    folder.shutil.copytree(five_steps, out)
    for path in (out / "checkpoints").iterdir():
        flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints .* is whole .*to resume from the start"):
        resume(out)


def test_what_is_set_aside_is_never_pruned_for_a_whole_one(five_steps, tmp_path):
    out = tmp_path / "run"
    folder.shutil.copytree(five_steps, out)
    flip(out / "checkpoints" / "step_00000005" / "__0_0.distcp")
    found, (damaged,) = find(out)
    assert found is not None and found.step == 4
    folder.set_aside(damaged)
    prune(out, 1, None)
    assert [saved.step for saved in published(out)] == [4]
