"""What a model costs, by arithmetic over its config alone (no torch): parameters, FLOPs, bytes, and the dense twin.

counting    parameters, forward and training FLOPs, per component and per layer
shares      what one rank of a layout has to do with: blocks, tokens, parameters
stages      the blocks of each stage of a pipeline
traffic     bytes that a rank sends in a step, by purpose
memory      bytes of a training step on a rank
step_time   seconds of a step on named GPUs, predicted
search      the layouts of a number of GPUs that hold a run, fastest first
twin        the dense runs of equal FLOPs per token, and of equal parameters in all
throughput  tokens and FLOPs of a step, model FLOPs utilisation, peaks of known devices
rates       tables: carbon of electricity by region, watts and prices of devices
totals      what a whole run is going to execute, save and hold
charges     from seconds and joules to kWh, carbon and money, each with how well it is known
"""

from moe.cost.charges import Charge, Graded, Rates, charge, planned_charge, rates_of
from moe.cost.counting import (
    Parameters,
    flops_by_component,
    flops_by_layer,
    forward_flops_per_token,
    moe_layers,
    parameters,
    train_flops_per_token,
)
from moe.cost.memory import memory_bytes
from moe.cost.stages import stage_blocks, stages_of
from moe.cost.throughput import flops_per_step, mfu, peak_flops, tokens_per_step
from moe.cost.twin import dense_total_twin, dense_twin, relative_difference

__all__ = [
    "Charge",
    "Graded",
    "Parameters",
    "Rates",
    "charge",
    "dense_total_twin",
    "dense_twin",
    "flops_by_component",
    "flops_by_layer",
    "flops_per_step",
    "forward_flops_per_token",
    "memory_bytes",
    "mfu",
    "moe_layers",
    "parameters",
    "peak_flops",
    "planned_charge",
    "rates_of",
    "relative_difference",
    "stage_blocks",
    "stages_of",
    "tokens_per_step",
    "train_flops_per_token",
]
