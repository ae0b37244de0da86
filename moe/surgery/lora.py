"""Fine-tuning by low-rank adapters: a run that starts from another's weights, frozen, and what becomes of it afterwards.

The run is an ordinary one whose model has `model.lora` (moe/lora.py): the trainer trains, saves and resumes it, and every
command reads it. Commands that make another model of it read it merged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe import parallel
from moe.config.layout import resolve
from moe.config.load import dump, load
from moe.config.words import typed
from moe.data import prepare
from moe.errors import ConfigError
from moe.lora import adapter_names
from moe.model import Transformer
from moe.surgery.start import ORIGIN, begin_run, model_of, read_run
from moe.train import record, resume
from moe.train.evaluate import evaluate
from moe.train.loop import check_corpus


def fine_tune(folder: Path, out: Path, overrides: Sequence[str], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Train adapters on `folder`'s newest checkpoint in a new run `out`, to its last step; returns the receipt.

    Overrides name the task: data.sources=..., train.steps=..., train.optimizer.lr=... A run that is stopped or killed halfway
    goes on with `moe resume`. Raises ConfigError for targets that the model does not have, or a layout that cuts matrices.
    """
    source, ranks = read_run(folder), parallel.start("cpu")
    run = load(source.run, [*overrides, f"model.lora={typed(dict(lora))}"])
    if dump(replace(run.model, lora=None)) != dump(source.run.model):
        raise ConfigError(
            f"{folder} is the model: overrides of model.* would change it, so give none but model.lora's options"
        )
    if ranks.world_size > 1:
        raise ConfigError(
            f"moe lora begins in one process, and this is one of {ranks.world_size}: begin alone, stop it, and go on "
            "with torchrun ... -m moe.train --resume"
        )
    resolve(run, ranks.world_size)
    record.require_free(out)
    corpus = prepare(run.data)
    check_corpus(run, corpus)
    fresh = Transformer(run.model, seed=run.seed).state_dict()
    adapters = {name: fresh[name] for name in adapter_names(fresh)}
    tensors = {**source.tensors, **adapters}
    rows, model = run.evaluation.final_rows, model_of(run, tensors)
    origin = {
        "made_by": "lora",
        "source": str(folder),
        "source_step": source.step,
        "loss_before": evaluate(model, corpus, ranks, rows=rows, micro_rows=run.train.micro_rows).loss,
        "trained": sum(tensor.numel() for tensor in adapters.values()),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
    }
    begin_run(out, run, tensors, origin)
    resume(out)
    return receipt(out)


def receipt(out: Path) -> dict[str, Any]:
    """What is known of an adapted run: its origin, its steps, and the last evaluation's loss."""
    origin = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "evals.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next(row for row in reversed(rows) if row["final"])
    return {**origin, "steps": last["step"], "loss_after": last["loss"]}


def merge(folder: Path, out: Path) -> Path:
    """Write an adapted run as an ordinary one, its products added to the weights. Raises ConfigError for one without adapters."""
    adapted = load(folder / "run.json") if (folder / "run.json").is_file() else None
    if adapted is not None and adapted.model.lora is None:
        raise ConfigError(f"{folder} has no adapters (model.lora is null): it is an ordinary run already")
    source = read_run(folder)
    return begin_run(
        out, source.run, source.tensors, {"made_by": "lora merge", "source": str(folder), "source_step": source.step}
    )


def describe(receipt: dict[str, Any], out: Path) -> str:
    """The receipt in words."""
    share = receipt["trained"] / receipt["parameters"]
    return (
        f"{out}: {receipt['trained']:,} numbers in adapters trained, {share:.1%} of all {receipt['parameters']:,}, for "
        f"{receipt['steps']} steps\n"
        f"loss on the task's validation text: {receipt['loss_before']:.4f} -> {receipt['loss_after']:.4f}\n"
        f"'moe export {out}' and others read it merged; 'moe lora merge {out} --out DIR' writes it so"
    )
