"""Training speed of two configs, measured in turns in one process: `python -m moe.experiments.step_timing --help`.

Runs that share a machine, or run one after the other, measure the machine's other load as much as themselves. Here the
arms take turns on the same batches, and who goes first alternates too, so that drift hits both alike.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe.config.load import load
from moe.config.schema import Run
from moe.files import write_json
from moe.train import step_function

WARMUP_STEPS = 2
TURN_SECONDS = 0.5
"""An arm's turn is as many steps as take this long in the slower arm, at least one: shorter ones measure the clock."""
ARMS = ("sparse", "dense")


def _with_threads(run: Run, threads: int) -> Run:
    return replace(run, train=replace(run.train, threads=threads))


def interleave(
    steps: dict[str, Callable[[int], float]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Tokens per second of each arm and round. `steps[arm](i)` does training step i and returns its tokens."""
    speeds: dict[str, list[float]] = {arm: [] for arm in steps}
    slowest = 0.0
    for index in range(WARMUP_STEPS):
        for step in steps.values():
            start = clock()
            step(index)
            if index == WARMUP_STEPS - 1:
                slowest = max(slowest, clock() - start)
    turn = max(1, math.ceil(TURN_SECONDS / slowest))
    for index in range(rounds):
        order = list(steps) if index % 2 == 0 else list(steps)[::-1]
        first = WARMUP_STEPS + index * turn
        for arm in order:
            start = clock()
            tokens = sum(steps[arm](i) for i in range(first, first + turn))
            speeds[arm].append(tokens / (clock() - start))
    return speeds


def _synchronised(step: Callable[[int], float]) -> Callable[[int], float]:
    """The step, followed by waiting for the accelerator if there is one."""

    def timed(index: int) -> float:
        tokens = step(index)
        if torch.accelerator.is_available():
            # host sync: a step is over when its last kernel is.
            torch.accelerator.synchronize()
        return tokens

    return timed


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both configs and write timing.json."""
    parser = argparse.ArgumentParser(prog="python -m moe.experiments.step_timing", description=__doc__)
    parser.add_argument("sparse", type=Path, help="config file of the sparse arm (JSON)")
    parser.add_argument("dense", type=Path, help="config file of the dense arm (JSON)")
    parser.add_argument("out", type=Path, help="file to write, e.g. timing.json")
    parser.add_argument("--rounds", type=int, required=True, help="timed turns of each arm")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    steps = {
        arm: _synchronised(step_function(_with_threads(load(path), given.threads)))
        for arm, path in zip(ARMS, (given.sparse, given.dense), strict=True)
    }
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    result = {
        "schema_version": 1,
        "threads": given.threads,
        "rounds": given.rounds,
        "device": device,
        "torch": torch.__version__,
        **interleave(steps, given.rounds),
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()
