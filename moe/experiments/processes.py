"""Running child processes side by side: each with a log of its own, all stopped cleanly when one fails or on Ctrl-C."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 60.0
"""Time that a child gets between SIGTERM and SIGKILL: enough to write a checkpoint."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """One child process."""

    name: str
    command: tuple[str, ...]
    log: Path
    """Receives its standard output and error; appended to."""


def cpu_count() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def log_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def run_jobs(jobs: Iterable[Job], limit: int, on_end: Callable[[Job, int, float], None]) -> None:
    """Run jobs in order, at most `limit` at a time; `on_end(job, exit code, seconds)` is called as each ends.

    Whatever `on_end` raises, and Ctrl-C or SIGTERM, stops the other jobs with SIGTERM before it goes on up.
    """
    waiting, running = list(jobs), {}
    with _sigterm_as_exit():
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    job = waiting.pop(0)
                    running[job] = (_start(job), time.monotonic())
                time.sleep(POLL_SECONDS)
                for job, (process, start) in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[job]
                        on_end(job, code, time.monotonic() - start)
        finally:
            _stop([process for process, _ in running.values()])


def _start(job: Job) -> subprocess.Popen[bytes]:
    with job.log.open("ab") as log:
        # A group of its own: Ctrl-C in the terminal then reaches only us, and the child gets exactly one signal.
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to all, then SIGKILL to those that are still there after STOP_SECONDS (or at a second Ctrl-C)."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that `finally` blocks run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
