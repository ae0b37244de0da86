"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from typing import Literal

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINES = 20
"""Step lines of a run in plain mode, about."""


class Console:
    """Prints messages and step lines. `mode` as in the configuration; on ranks other than 0 nothing is printed."""

    def __init__(self, mode: Literal["auto", "progress", "plain", "off"], steps: int, *, first_rank: bool):
        if mode == "auto":
            mode = "progress" if sys.stdout.isatty() else "plain"
        self.mode = mode if first_rank else "off"
        self.steps = steps
        self.every = max(1, steps // PLAIN_LINES)
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self.started = time.perf_counter()
        self.progress: Progress | None = None

    def say(self, message: str) -> None:
        """One line, or paragraph, in every mode but off."""
        if self.mode != "off":
            self.rich.print(message, markup=False)

    def begin(self, step: int) -> None:
        """Start the live line at `step` finished steps."""
        self.started, self.first = time.perf_counter(), step
        if self.mode == "progress":
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=self.rich,
            )
            self.task = self.progress.add_task("train", total=self.steps, completed=step, line="")
            self.progress.start()

    def step(self, step: int, loss: float, lr: float, grad_norm: float, tokens_per_second: float) -> None:
        """Show step `step` (from 1)."""
        line = f"loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, line=line)
        elif self.mode == "plain" and (step % self.every == 0 or step in (self.first + 1, self.steps)):
            left = (time.perf_counter() - self.started) / (step - self.first) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {line}  {left:.0f} s left")

    def end(self) -> None:
        """Stop the live line."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
