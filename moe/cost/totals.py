"""What a whole run is going to use, before it begins: executed FLOPs, bytes of checkpoints, memory of a process on a CPU.

`moe plan` prints these and `moe ledger` measures them; tests/test_totals.py holds the one to the other within 10 %.
"""

import math
from dataclasses import dataclass

from moe.config.layout import Layout
from moe.config.schema import GroupedQueryAttention, Model, Run, expert_dim, expert_widths, is_moe_layer
from moe.cost.counting import flops_by_component, moe_layers, parameters
from moe.cost.memory import block_bytes, memory_bytes
from moe.cost.shares import needs_first_pass, tokens_per_pass

BYTES_PER_PARAMETER = 12
"""In a checkpoint: the parameter and Adam's two averages, float32."""
BYTES_PER_TENSOR = 23_600
"""That a checkpoint adds for every parameter tensor: names, shapes, settings of its optimizer. Measured, torch 2.13."""
SAMPLE_TOKENS = 256
"""Tokens of the probe rows, about, that moe/train/health.py sends through every expert."""
PROCESS_BYTES = 420 * 2**20
"""Python, torch and the libraries in a training process on a CPU. Measured here, torch 2.13; larger where torch has CUDA."""

KERNEL_BYTES = 0.65 * 2**20
"""That oneDNN keeps of a matrix product in 16 bits on a CPU, for every shape. Measured, torch 2.13: 260 MiB for 400 shapes."""
KERNEL_KINDS = 7
"""Products of an expert, forward and backward, whose shapes depend on its rows: kernels compiled per row count, as counted with
ONEDNN_VERBOSE (docs/benchmarks.md)."""
KERNEL_OCTAVES = 3
"""From an expert's fewest rows to its most, about, in powers of two."""


@dataclass(frozen=True)
class Totals:
    """Of all steps, evaluations and saves."""

    flops: float
    """Executed matrix products over all ranks."""
    step_flops: float
    """Of one step."""
    checkpoints: int
    """Saves; with keep_best those of new bests come on top."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    bytes_written: int
    bytes_kept: int


def totals(run: Run, layout: Layout | None = None) -> Totals:
    """Totals of a run in a layout; None: one rank."""
    step, saves, size = executed_flops(run, layout), saves_of(run), checkpoint_bytes(run.model)
    kept = min(saves, run.checkpoint.keep_last) + run.checkpoint.keep_best
    return Totals(
        flops=run.train.steps * step + evaluation_flops(run, step),
        step_flops=step,
        checkpoints=saves,
        checkpoint_bytes=size,
        bytes_written=saves * size,
        bytes_kept=kept * size,
    )


def executed_flops(run: Run, layout: Layout | None = None) -> float:
    """FLOPs of one step over all ranks, as torch counts them: with everything that is computed twice.

    Fused attention computes the scores again in its backward pass (5 products for 4); checkpointing every block's
    forward pass; a first pass for the balance loss as much.
    """
    length = run.data.sequence_length
    parts = flops_by_component(run.model, length)
    forward = sum(parts.values())
    per_token = 3 * forward + parts["scores"] / 2
    if run.train.activation_checkpointing:
        per_token += forward - parts["head"]
    if needs_first_pass(run, layout or Layout()):
        per_token += forward - parts["head"]
    return per_token * run.train.batch_rows * length


def evaluation_flops(run: Run, step_flops: float) -> float:
    """FLOPs of all evaluations: the rows' forward passes, and what health.jsonl is measured from."""
    evaluation, length = run.evaluation, run.data.sequence_length
    forward = sum(flops_by_component(run.model, length).values()) * length
    every = evaluation.every_steps
    times = (run.train.steps // every if every else 0) + (0 if every and run.train.steps % every == 0 else 1)
    rows = times * evaluation.rows + evaluation.final_rows
    return rows * forward + times * _health_flops(run, step_flops, forward)


def _health_flops(run: Run, step_flops: float, row_flops: float) -> float:
    """FLOPs of one measurement of health, about: a step, its balance losses' way back through all but the outer blocks, the
    probe rows, and a sample of their tokens through every expert.
    """
    moe, layers = run.model.moe, moe_layers(run.model)
    if moe is None or not layers or not run.evaluation.probe_rows:
        return 0.0
    batch = run.train.batch_rows * row_flops
    inner = 2 * batch * max(0, run.model.num_layers - 2) / run.model.num_layers
    again = batch if run.train.activation_checkpointing else 0.0
    sample = min(SAMPLE_TOKENS, run.evaluation.probe_rows * run.data.sequence_length) * len(layers)
    experts = sample * 6 * expert_dim(run.model) * sum(expert_widths(moe))
    return step_flops + inner + again + run.evaluation.probe_rows * row_flops + experts


def saves_of(run: Run) -> int:
    """Checkpoints that a run of its own writes, the last one included."""
    every, steps = run.checkpoint.every_steps, run.train.steps
    return (steps // every if every else 0) + (0 if every and steps % every == 0 else 1)


def checkpoint_bytes(model: Model) -> int:
    """Bytes of one checkpoint."""
    return _state_bytes(model) + BYTES_PER_TENSOR * tensors(model)


def _state_bytes(model: Model) -> int:
    """Bytes of parameters and averages; of a frozen base there are no averages."""
    counts = parameters(model)
    frozen = counts.total - counts.components["lora"] if model.lora is not None else 0
    return BYTES_PER_PARAMETER * counts.total - 8 * frozen


def tensors(model: Model) -> int:
    """Parameter tensors of a model, biases and norms inside attention left out."""
    attention = 4 if isinstance(model.attention, GroupedQueryAttention) else 6
    count = 2 if model.tied_head else 3
    for layer in range(model.num_layers):
        count += 2 + attention + (3 if not is_moe_layer(model, layer) else _expert_tensors(model))
    return count


def _expert_tensors(model: Model) -> int:
    moe = model.moe
    assert moe is not None
    router = moe.router.parameters(dim=model.dim, num_experts=moe.num_experts, top_k=moe.top_k) > 0
    return 3 + 3 * moe.expert_bias + router + 3 * (moe.shared_hidden > 0) + moe.shared_gate + 2 * (moe.latent_dim > 0)


def process_bytes(run: Run, *, native: bool = False) -> int:
    """Peak resident memory of a run in one process on a CPU: libraries, the step's plan, and the copy that is being saved.

    With recomputation also the gradients of the block that is being recomputed, which come on top of its activations; without
    it, they fit where activations of blocks above have been. In bfloat16 also the kernels that are compiled for each number
    of rows of an expert. `native`: moe_cpu's kernels compute what they can of this run's type; they need no masks of S x S in
    float32 and no kernels for row counts in bfloat16. Not in it: what health measurements hold beyond a step.
    """
    copy, parts = _state_bytes(run.model) if run.checkpoint.asynchronous else 0, memory_bytes(run)
    if native and run.train.precision == "float32":
        parts["masks"] = 0
    kernels = 0 if native else _kernel_bytes(run)
    return PROCESS_BYTES + sum(parts.values()) + copy + _recomputed_bytes(run) + kernels


def _recomputed_bytes(run: Run) -> int:
    """Gradients of the largest block's activations."""
    if not run.train.activation_checkpointing:
        return 0
    tokens, size = tokens_per_pass(run, Layout()), 2 if run.train.precision == "bfloat16" else 4
    return round(tokens * max(block_bytes(run.model, layer, size, tokens) for layer in range(run.model.num_layers)))


def _kernel_bytes(run: Run) -> int:
    """Kernels of experts' products in bfloat16, which `row_blocks.py` rounds to 64 row counts an octave, at least 4 apart.

    As many counts as that many draws from all that are likely leave: one of every expert, layer and forward pass. Experts as
    wide as the model need fewer kernels, since their shapes coincide.
    """
    moe, layers = run.model.moe, len(moe_layers(run.model))
    if moe is None or not layers or run.train.precision != "bfloat16":
        return 0
    most = 2 * run.train.micro_rows * run.data.sequence_length * moe.top_k / moe.num_experts
    counts = max(1.0, min(64.0 * KERNEL_OCTAVES, most / 4))
    draws = run.train.steps * run.train.batch_rows / run.train.micro_rows * layers * moe.num_experts
    return round(KERNEL_KINDS * KERNEL_BYTES * counts * (1 - math.exp(-draws / counts)))
