"""A run folder that starts from given weights: run.json and a checkpoint of step 0, for `moe resume` to go on from.

The optimizer of that checkpoint is as fresh as that of a new run (moe/checkpoint/fresh.py).
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe import checkpoint, parallel
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError, UserError
from moe.experts import resolve_backend
from moe.files import write_json
from moe.init import materialise
from moe.lora import merged
from moe.model import Transformer
from moe.optim import build_optimizer
from moe.train import record

ORIGIN = "origin.json"
"""What a run that starts from given weights was made from, in its folder."""


@dataclass(frozen=True)
class Source:
    """A trained run, read: its settings, its newest checkpoint's step, and every tensor of its model by name."""

    folder: Path
    run: Run
    step: int
    tensors: dict[str, Tensor]

    def model(self) -> Transformer:
        """The model on the CPU in float32, in evaluation mode."""
        return model_of(self.run, self.tensors)


def read_run(folder: Path, *, adapters: Literal["merged", "apart"] = "merged") -> Source:
    """Read a run's newest checkpoint, with the adapters that it may have added to their weights. Raises UserError for none."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no run.json: give the folder of a run ('moe import' makes one from an export)")
    run, saved = load(folder / "run.json"), checkpoint.newest(folder)
    if saved is None:
        raise CheckpointError(f"{folder} has no checkpoint: train it until it saves one")
    tensors = checkpoint.read_tensors(saved, checkpoint.stored_names(saved))
    if run.model.lora is not None and adapters == "merged":
        tensors = merged(tensors, run.model.lora)
        run = replace(run, model=replace(run.model, lora=None))
    return Source(folder, run, saved.step, tensors)


def model_of(run: Run, tensors: Mapping[str, Tensor]) -> Transformer:
    """A run's model with these tensors, on the CPU, in evaluation mode. Raises CheckpointError listing what does not fit."""
    model = _fitting(run, tensors)
    materialise(model, torch.device("cpu"))
    model.load_state_dict(dict(tensors))
    return model.eval()


def _fitting(run: Run, tensors: Mapping[str, Tensor]) -> Transformer:
    """A run's model without memory, on the device meta. Raises CheckpointError where its tensors are not as these."""
    with torch.device("meta"):
        model = Transformer(run.model, seed=run.seed)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
    if wrong:
        lines = "; ".join(f"{name}: given {given.get(name)}, model {wanted.get(name)}" for name in wrong[:5])
        raise CheckpointError(f"{len(wrong)} tensors do not fit the model ({lines}): nothing was written")
    return model


def begin_run(
    out: Path,
    run: Run,
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, Any],
    *,
    give: Callable[[str, Tensor], object] | None = None,
    fill: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write a run folder that starts from `tensors`, the whole state of the run's model; returns the folder.

    With `give`, which is asked to write each tensor by name into memory of its shape, only their shapes count, and one at a
    time is in memory.
    `origin` says what it was made from and goes into origin.json; `fill` writes what the run's data needs into the folder
    before they are prepared. run.json comes last, so a folder whose writing was cut short is no run. Raises ConfigError for a
    folder that is not free, DataError for the corpus, CheckpointError for tensors that do not fit; then nothing is left behind.
    """
    model = _fitting(run, tensors)
    record.claim_folder(out)
    try:
        fill(out)
        corpus = prepare(run.data)
        if corpus.vocab_size > run.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size ({run.model.vocab_size}) must be at least the tokenizer's vocabulary "
                f"({corpus.vocab_size}): choose the tokenizer that the model was trained with"
            )
        ranks = parallel.start("cpu")
        backend = resolve_backend(run.model.moe.backend) if run.model.moe is not None else "none"
        write_json(out / ORIGIN, dict(origin))
        optimizer = build_optimizer(model, run.train.optimizer)
        meta = {"run": dump(run), "tokens": 0, "world_size": 1, "threads": torch.get_num_threads()}
        checkpoint.save_fresh(out, model, optimizer, give or partial(_copy, tensors), meta)
        # last: a folder with run.json and no checkpoint, of a process that was killed, would be trained from first values
        record.write_run(out, run, ranks, backend, corpus.fingerprint)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def _copy(tensors: Mapping[str, Tensor], name: str, place: Tensor) -> None:
    place.copy_(tensors[name].detach())
