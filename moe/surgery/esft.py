"""Expert-selective fine-tuning (ESFT, Wang et al. 2024, arXiv 2407.01906): train the few experts that a task uses, nothing else.

On a sample of the task's text every layer's experts get a share, of the routed rows (`token`) or of the gate weights (`gate`);
the fewest experts whose shares reach a threshold are trained, and all other numbers stay bitwise what they were.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe import parallel
from moe.config.load import load
from moe.data import prepare
from moe.errors import ConfigError, UserError
from moe.surgery.masked import train_masked
from moe.surgery.scores import LayerUse, calibration_batches, measure_use
from moe.surgery.select import expert_dimension
from moe.surgery.start import begin_run, model_of, read_run
from moe.train.evaluate import evaluate
from moe.train.record import require_free


def chosen_experts(share_E: Tensor, threshold: float) -> list[int]:
    """The fewest experts whose shares sum to at least `threshold` of the whole, largest first."""
    order_E = share_E.argsort(descending=True, stable=True)
    before_E = share_E[order_E].cumsum(0) - share_E[order_E]
    return sorted(order_E[before_E < threshold * share_E.sum()].tolist())


def expert_masks(tensors: dict[str, Tensor], chosen: dict[int, list[int]]) -> dict[str, Tensor]:
    """True for the chosen experts' weights alone, by the name of every parameter and buffer."""
    masks = {}
    for name, tensor in tensors.items():
        masks[name] = torch.zeros([1] * tensor.ndim, dtype=torch.bool)
        for layer, experts in chosen.items():
            if name.startswith(f"layers.{layer}.moe.experts.") and expert_dimension(name) == 0:
                mask = torch.zeros(tensor.shape[0], dtype=torch.bool)
                mask[experts] = True
                masks[name] = mask.view(-1, *[1] * (tensor.ndim - 1))
    return masks


def fine_tune(
    folder: Path,
    out: Path,
    overrides: Sequence[str],
    *,
    score: Literal["token", "gate"] = "token",
    threshold: float = 0.2,
    rows: int = 32,
) -> dict[str, Any]:
    """Write `out`, a run that starts from `folder`'s newest checkpoint fine-tuned on the overrides' data; returns the receipt.

    Overrides name the task: data.sources=..., train.steps=..., train.optimizer.lr=... Raises ConfigError for a threshold
    outside (0, 1], UserError for a dense model.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold ({threshold}) must be above 0 and at most 1 (every expert that is used)")
    if score not in ("token", "gate"):
        raise ConfigError(f"score {score!r} is unknown: choose token or gate")
    require_free(out)
    source = read_run(folder)
    if source.run.model.moe is None:
        raise UserError(f"{folder} is a dense model, and this trains selected experts: give the folder of a sparse run")
    run = load(source.run, overrides)
    corpus, ranks = prepare(run.data), parallel.start("cpu")
    uses = measure_use(source.model(), calibration_batches(corpus, rows, seed=run.seed), rows=rows)
    chosen = {layer: chosen_experts(_share(use, score), threshold) for layer, use in uses.items()}
    masks = expert_masks(source.tensors, chosen)
    tensors = train_masked(run, source.tensors, masks)
    before, after = (
        evaluate(model, corpus, ranks, rows=run.evaluation.rows, micro_rows=8).loss
        for model in (source.model(), model_of(run, tensors))
    )
    receipt = {
        "made_by": "esft",
        "source": str(folder),
        "score": score,
        "threshold": threshold,
        "experts": {str(layer): experts for layer, experts in chosen.items()},
        "steps": run.train.steps,
        "loss_before": before,
        "loss_after": after,
        "trained": sum(int(mask.expand(source.tensors[name].shape).sum()) for name, mask in masks.items()),
        "parameters": sum(tensor.numel() for tensor in source.tensors.values()),
    }
    begin_run(out, run, tensors, receipt)
    return receipt


def _share(use: LayerUse, score: str) -> Tensor:
    return use.rows_E if score == "token" else use.gates_E


def describe(receipt: dict[str, Any], out: Path) -> str:
    """The receipt in words."""
    trained = receipt["trained"] / receipt["parameters"]
    experts = "; ".join(f"layer {layer}: {' '.join(map(str, chosen))}" for layer, chosen in receipt["experts"].items())
    return (
        f"{out}: {receipt['trained']:,} of {receipt['parameters']:,} numbers trained ({trained:.1%}) for {receipt['steps']} steps\n"
        f"experts: {experts}\nloss on the task's validation text: {receipt['loss_before']:.4f} -> {receipt['loss_after']:.4f}"
    )
