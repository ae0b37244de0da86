"""A rank of a training run with faults, under torchrun: `fault_run.py FAULT:RANK:STEP[,...] -- arguments of moe.train`.

A fault strikes rank RANK in optimizer step STEP (from 1) of the first attempt; those after a restart are healthy.
FAULT: `kill`, `stop` (SIGSTOP), `terminate`, `sleep` (before the step), `sleep_layer` (in block 1's forward pass),
`nan_loss`, `nan_gradient`, `full_disk` (the files of that step's checkpoint take 1000 bytes).
Writes the moments of the fault, of the end by a watch, and of the first step after a restart into `times`, beside the run.
"""

import errno
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moe.model import Block
from moe.train import __main__, loop
from moe.train import step as steps

FAULTS = [(kind, int(rank), int(step)) for kind, rank, step in (one.split(":") for one in sys.argv[1].split(","))]
attempt, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ["RANK"])
sys.argv = ["moe.train", *sys.argv[3:]]
(out,) = (argument.removeprefix("out=") for argument in sys.argv if argument.startswith("out="))
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
now = done = 0


def note(what: str) -> None:
    """Append a line to `times`."""
    with (Path(out).parent / "times").open("a") as file:
        file.write(f"{what} {time.time()}\n")


def strikes(*kinds: str, step: int = 0) -> str:
    """The fault of these kinds that strikes this rank in this attempt and step, or nothing."""
    found = [kind for kind in kinds if (kind, rank, step or now) in FAULTS and attempt == 0]
    return found[0] if found else ""


def train_step(state, step, **settings):
    global now, done
    now = step + 1
    fault = strikes(*SIGNALS, "sleep")
    if fault:
        note(fault)
        os.kill(os.getpid(), SIGNALS[fault]) if fault in SIGNALS else time.sleep(10_000)
    result = real_step(state, step, **settings)
    done += 1
    if attempt > 0 and done == 1:
        note("recovered")
    return result


def forward(block, *arguments, **named):
    if strikes("sleep_layer") and block is blocks[1]:
        note("sleep_layer")
        time.sleep(10_000)
    return real_block(block, *arguments, **named)


def forward_backward(state, *arguments):
    blocks[:] = state.model.layers
    output = real_forward_backward(state, *arguments)
    if strikes("nan_gradient"):
        next(state.model.parameters()).grad.view(-1)[3] = float("nan")
    return replace(output, loss=torch.full_like(output.loss, float("nan"))) if strikes("nan_loss") else output


@contextmanager
def create_stream(system, path, mode):
    with real_stream(system, path, mode) as stream:
        # the folder's name is that of the step, whichever step the trainer is at when the file is opened
        step = int(Path(path).parent.name.rpartition("_")[2]) if "w" in mode else 0
        if step and strikes("full_disk", step=step):
            stream.write(b" " * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        yield stream


def leave(code: int) -> None:
    note("ended")
    real_exit(code)


blocks: list[torch.nn.Module] = []
real_exit, os._exit = os._exit, leave
real_step, loop.train_step = loop.train_step, train_step
real_block, Block.forward = Block.forward, forward
real_forward_backward, steps._forward_backward = steps._forward_backward, forward_backward
real_stream, FileSystem.create_stream = FileSystem.create_stream, create_stream
if __name__ == "__main__":
    from moe.errors import run_main

    sys.exit(run_main(__main__.main))
