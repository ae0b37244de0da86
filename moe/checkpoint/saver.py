"""Saving while training goes on: the copy blocks, writing does not.

`Saver.save` copies the state and returns; a thread of each rank writes the copy through torch's distributed checkpoint, over
a process group of its own, so that its messages never come between those of training. When every rank's bytes are on
the disk, rank 0 checks the index, adds checksums, and publishes the folder by one rename.
"""

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from moe.checkpoint import folder
from moe.checkpoint.state import one_process, state_bytes, state_of
from moe.config.schema import Checkpoint
from moe.errors import CheckpointError
from moe.parallel import Ranks

WRITE_TIMEOUT = timedelta(minutes=30)
"""Longest wait of one rank's writer for another's."""
GRACE_SECONDS = 20.0
"""How long a process that ends by an error waits for a checkpoint in writing; torchrun kills it after 30 s."""

KEEP_ALL = 2**31


class Saver:
    """Saves a run's checkpoints, one at a time. All ranks call `save` and `finish` together, the rest each by itself.

    A save that fails leaves nothing behind and is said; training goes on, and what was published before stays the newest.
    `say` prints a line; only rank 0's is used.
    """

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        config: Checkpoint,
        say: Callable[[str], None],
    ):
        self.out, self.model, self.optimizer, self.ranks, self.config, self.say = (
            out,
            model,
            optimizer,
            ranks,
            config,
            say,
        )
        group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT) if ranks.world_size > 1 else None
        assert not isinstance(group, int), "every rank is in it"
        self.group = group
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.step = 0
        self.writing: Future[None] | None = None
        self.error: str | None = None
        """Why the newest save failed, or None."""
        self.bytes_written = 0
        """Bytes of all checkpoints published so far, on rank 0."""

    def save(self, step: int, meta: dict[str, Any], best_step: int | None) -> None:
        """Save after `step` steps with fields for meta.json; returns once the state is copied, or if not asynchronous saved.

        Waits for the save before this one first. `best_step` is the checkpoint to keep besides the newest.
        """
        self._settle()
        self.step, self.error = step, None
        state = state_of(self.model, self.optimizer)
        size = state_bytes(state) * self.ranks.layout.pipeline  # stages are about as large as each other
        self.error = self.ranks.broadcast(self._begin(size) if self.ranks.first else None)
        if self.error is not None:
            self._complain()
            return
        if self.config.asynchronous:
            staged = self.stager.stage(state)
            assert isinstance(staged, dict)
            self.writing = self.executor.submit(self._write, staged, step, meta, best_step)
            return
        self.writing = Future()
        try:
            self.writing.set_result(self._write(state, step, meta, best_step))
        except (Exception, CheckpointException) as error:
            self.writing.set_exception(error)
        self._settle()

    def _begin(self, size: int) -> str | None:
        """Make the folder on rank 0; returns why it cannot be."""
        try:
            folder.begin(self.out, self.step, size)
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def _write(self, state: dict[str, Any], step: int, meta: dict[str, Any], best_step: int | None) -> None:
        """Write and publish; every rank's thread is here at the same time, and a failure of one is a failure of all."""
        path = folder.temporary(self.out, step)
        if self.group is None:
            with one_process():
                dcp.save(state, checkpoint_id=path, no_dist=True)
        else:
            dcp.save(state, checkpoint_id=path, process_group=self.group)
        if self.ranks.first:
            self.bytes_written += folder.finish(self.out, step, meta)
            folder.prune(self.out, self.config.keep_last, best_step)

    def look(self) -> None:
        """Say at once, on rank 0, that the write has failed."""
        if self.ranks.first and self.error is None and self.writing is not None and self.writing.done():
            self.error = self._outcome()
            self._complain()

    def finish(self) -> None:
        """Wait for the write. Raises CheckpointError if the newest save failed."""
        self._settle()
        self.executor.shutdown(wait=False)
        if self.error is not None:
            raise CheckpointError(f"{self._failed()}: make room, or choose a folder that can be written")

    def abandon(self) -> None:
        """Before the process ends by an error: let a write come to its end if that is soon. Other ranks may be gone."""
        if self.writing is not None:
            wait([self.writing], timeout=GRACE_SECONDS)

    def _settle(self) -> None:
        """Wait for the write, and make every rank know how it went."""
        if self.writing is None:
            return
        wait([self.writing])
        self.look()
        # rank 0 publishes last of all, so its outcome is that of the checkpoint
        self.error = self.ranks.broadcast(self.error)
        self.writing = None

    def _outcome(self) -> str | None:
        """Why the write failed on some rank, or None."""
        assert self.writing is not None
        error = self.writing.exception()
        if isinstance(error, CheckpointException):
            return "; ".join(f"rank {rank}: {_words(cause)}" for rank, (cause, _) in error.failures.items())
        return _words(error) if error is not None else None

    def _complain(self) -> None:
        if self.error is None or not self.ranks.first:
            return
        folder.discard(self.out, self.step)
        found = folder.steps(self.out)
        newest = f"the newest checkpoint is still that of step {found[-1]}" if found else "there is no checkpoint yet"
        self.say(f"WARNING: {self._failed()}; training goes on, and {newest}")

    def _failed(self) -> str:
        return f"the checkpoint of step {self.step} could not be saved ({self.error})"


def save(out: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: dict[str, Any], ranks: Ranks) -> Path:
    """Write and publish one checkpoint; on return it is whole. All ranks call it. Raises CheckpointError if it cannot be."""
    saver = Saver(out, model, optimizer, ranks, Checkpoint(asynchronous=False, keep_last=KEEP_ALL), lambda _: None)
    saver.save(step, meta, None)
    saver.finish()
    return folder.checkpoint_root(out) / f"step_{step:08d}"


def _words(error: BaseException) -> str:
    """An error in one line; of a disk that is full, that."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk"
    return f"{type(error).__name__}: {error}" if not isinstance(error, (OSError, CheckpointError)) else str(error)
