"""From counts to rates: tokens and FLOPs of a step, model FLOPs utilisation, and the peaks of known devices."""

from moe.config.schema import Run
from moe.cost.counting import train_flops_per_token
from moe_triton.chips import find


def tokens_per_step(run: Run) -> int:
    """Tokens of one optimizer step over all ranks, padding included."""
    return run.train.batch_rows * run.data.sequence_length


def flops_per_step(run: Run) -> float:
    """FLOPs of one optimizer step over all ranks: forward and backward; the update is elementwise and not counted."""
    return tokens_per_step(run) * train_flops_per_token(run.model, run.data.sequence_length)


def mfu(flops_per_token: float, tokens_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: FLOP/s of the model over the peak of all devices (PaLM, arXiv 2204.02311)."""
    return flops_per_token * tokens_per_second / peak_flops


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s at float32 or bfloat16 of a device named as torch names it; None if unknown."""
    chip = find(device_name)
    if chip is None:
        return None
    return {"float32": chip.fp32, "bfloat16": chip.bf16}[precision]
