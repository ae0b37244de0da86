"""The trainer: `train` and `resume`, and `step_function` for those who time a step.

step       one optimizer step
placing    experts to ranks by load, on resume
sharding   the model over the ranks of a layout
loop       a run from set-up to summary
evaluate   loss on fixed validation rows
health     what each evaluation measures of the routing
alarms     the doctor's findings while a run trains
replay     recording and forcing of routing
runlog     metrics, routing, evaluations, summary
record     run.json, attempts, memory
ledger     what each piece of work used: seconds, joules, FLOPs, bytes
meters     energy counters, and models where there are none
flops      FLOPs as torch counts them
console    what a person sees
mirrors    Weights & Biases, TensorBoard
"""

from collections.abc import Callable

from moe import parallel
from moe.config.layout import resolve
from moe.config.schema import Run
from moe.data import prepare
from moe.train.loop import resume, train
from moe.train.step import build_state, train_step

__all__ = ["resume", "step_function", "train"]


def step_function(run: Run) -> Callable[[int], int]:
    """A function that does optimizer step i of a run in this process and returns its number of tokens; it writes nothing."""
    ranks = parallel.start(run.train.device, run.parallel.timeout_seconds)
    ranks = ranks.arranged(resolve(run, ranks.world_size))
    state = build_state(run, ranks, prepare(run.data))
    return lambda step: train_step(state, step).tokens
