"""What every rank is doing, and the end of a run in which one of them does not come.

A collective that one rank does not join holds all others for ever, or until a time-out that says nothing of who and where. So
each process keeps a `Progress`: the step, the part of it, the block; the trainer and hooks on the model's blocks move it. A
thread, the `Watch`, puts it into the store of the run every second, together with the collective that the process is in,
which it reads from the stack of the main thread. When nothing has moved for too long it compares what the ranks last said,
says which one is missing where, prints every stack, and ends the process, so that torchrun can start all of them again.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 60.0
"""How much longer than the time-out the watch itself may be held up."""
EXIT_CODE = 75
"""Of a process that ends because another rank did not come (EX_TEMPFAIL: worth trying again)."""
WAITS = {"trigger_wait", "wait_for_unshard", "wait_tensor"}
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "all_to_all_single_autograd",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "foreach_all_gather",
    "foreach_reduce",
    "reduce_scatter_tensor",
    "recv",
    "send",
    *WAITS,
}
"""Functions of torch.distributed in which a process waits for others; WAITS for one begun earlier."""


class Progress:
    """What this process is doing; kept by the trainer, read by the watch."""

    def __init__(self) -> None:
        self.step, self.phase, self.layer, self.marks = 0, "setting up", -1, 0
        self.limited = False
        """Whether this must not take longer than the time-out."""
        self.since = time.monotonic()

    def at(self, phase: str = "", *, step: int = 0, layer: int = -1, limited: bool = True) -> None:
        """Say that this phase (default: still the same), step or block has begun."""
        self.step, self.phase, self.layer = step or self.step, phase or self.phase, layer
        self.limited, self.marks, self.since = limited, self.marks + 1, time.monotonic()

    def where(self) -> str:
        """The place in words."""
        return f"{self.phase}{f' of layer {self.layer}' if self.layer >= 0 else ''} in step {self.step}"

    @contextmanager
    def unlimited(self, phase: str) -> Iterator[None]:
        """For as long as it takes: files, other people's services."""
        self.at(phase, limited=False)
        try:
            yield
        finally:
            self.at("between steps")

    def follow(self, layers: nn.ModuleList) -> None:
        """Move on when a block begins its forward or its backward pass."""

        def forward(layer: int) -> None:
            self.at("backward" if self.phase == "backward" else "", layer=layer)

        def backward(layer: int) -> None:
            self.at("backward", layer=layer)

        for name, block in layers.named_children():
            number = int(name)
            block.register_forward_pre_hook(lambda *_, n=number: forward(n), prepend=True)
            block.register_forward_hook(lambda _, __, output, n=number: _on_gradient(output, lambda: backward(n)))


def _on_gradient(output: Any, action: Any) -> None:
    """Call when the gradient of a block's output is known."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and first.requires_grad:
        first.register_hook(lambda _: action())


@dataclass(frozen=True)
class Entry:
    """What a rank last said."""

    marks: int
    step: int
    phase: str
    layer: int
    collective: str
    place: str
    pid: int

    def order(self) -> tuple[int, bool]:
        """How far it has come; every rank makes the same marks, and whoever waits in a collective has come to it."""
        return self.marks, bool(self.collective)

    def where(self) -> str:
        """The place in words."""
        layer = f" of layer {self.layer}" if self.layer >= 0 else ""
        inside = f"{self.collective} ({self.place}) in " if self.collective else ""
        outside = f", at {self.place}" if not self.collective and self.place else ""
        return f"{inside}{self.phase}{layer} in step {self.step}{outside}"


def stack_of(frame: FrameType | None) -> tuple[str, str]:
    """(collective that a thread waits in or "", innermost function of this package) from the thread's innermost frame."""
    collective, package = "", Path(__file__).parent.parent
    while frame is not None:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if not collective and name in COLLECTIVES and "distributed" in file.parts:
            collective = name
        if file.is_relative_to(package) and file != Path(__file__):
            if collective in WAITS and file.name == "exchange.py":
                collective = "all_to_all_single"
            return collective, f"{file.relative_to(package.parent)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return collective, ""


def explain(entries: dict[int, Entry | None], seconds: float) -> str:
    """Who keeps whom waiting, after `seconds` in which a rank has not moved; None: a rank that has not said anything."""
    heard = {rank: entry for rank, entry in entries.items() if entry is not None}
    front = max(heard.values(), key=Entry.order)
    come = [rank for rank, entry in heard.items() if entry.order() == front.order()]
    missing = [rank for rank in entries if rank not in come]
    if not missing:
        places = "; ".join(f"rank {rank} is in {entry.where()}" for rank, entry in heard.items())
        return f"for {seconds:.0f} s no rank has moved, and none is behind the others: {places}"
    seen = "; ".join(
        f"rank {rank} was last seen in {heard[rank].where()}"
        if rank in heard
        else f"rank {rank} never said where it is"
        for rank in missing
    )
    return (
        f"{_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not reached {front.where()}, where {_ranks(come)} "
        f"waited {seconds:.0f} s; {seen}"
    )


def _ranks(ranks: Sequence[object]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class Watch:
    """The thread that looks after the progress of a rank; use it as a context around training."""

    def __init__(
        self, progress: Progress, rank: int, world_size: int, timeout_seconds: float, store: Any, *, alike: bool = True
    ):
        """`store`: the run's, with a method to open another connection to it; `alike`: every rank makes the same marks."""
        self.progress, self.rank, self.world_size, self.timeout = progress, rank, world_size, timeout_seconds
        self.alike = alike
        # a client of its own: the main thread may be waiting in the process group's
        self.store = dist.PrefixStore("watch", store.clone())
        self.main = threading.get_ident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            # should the main thread hang inside C code without giving this thread a turn, this still ends the process
            faulthandler.dump_traceback_later(self.timeout + PATIENCE_SECONDS, exit=True)
            seconds = time.monotonic() - self.progress.since
            late = self.progress.limited and seconds > self.timeout
            try:
                self.store.set(str(self.rank), json.dumps(asdict(self.entry())))
                if self.store.check(["end"]):
                    return self._end(self.store.get("end").decode())
                if late:
                    return self._end(self._give_up(seconds))
            except dist.DistError as error:
                # the store went with the agent, or with rank 0: nobody can be asked, but nobody should wait either
                if late:
                    return self._end(f"rank {self.rank} has waited {seconds:.0f} s in {self.entry().where()} ({error})")

    def entry(self) -> Entry:
        """What this rank says now."""
        now, frames = self.progress, sys._current_frames()
        collective, place = stack_of(frames.get(self.main))
        marks = now.marks if self.alike else now.step
        return Entry(marks, now.step, now.phase, now.layer, collective, place, os.getpid())

    def _give_up(self, seconds: float) -> str:
        # others see the same at the same time: they have written what they are doing by the next look
        time.sleep(LOOK_SECONDS)
        message = explain({rank: self._read(rank) for rank in range(self.world_size)}, seconds)
        return self.store.compare_set("end", "", message).decode()

    def _read(self, rank: int) -> Entry | None:
        if rank == self.rank:
            return self.entry()
        return Entry(**json.loads(self.store.get(str(rank)))) if self.store.check([str(rank)]) else None

    def _end(self, message: str) -> None:
        """Say why and go, at once: the main thread cannot be woken."""
        if self.over.is_set():
            return
        stack = traceback.format_stack(sys._current_frames().get(self.main))
        # in one write, so that the ranks' words do not mix
        said = f"error: rank {self.rank} ends in {self.entry().where()}: {message}\n{''.join(stack)}"
        os.write(sys.stderr.fileno(), said.encode())
        os._exit(EXIT_CODE)
