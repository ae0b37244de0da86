"""What a run uses, a line per piece of work as soon as it is done: seconds, joules, FLOPs, bytes.

Each rank writes its own file, ledger.jsonl or ledger-rank<r>.jsonl, of which a line says what came since the line before,
so that the sum over all lines of all attempts is all the work, whatever was killed, repeated or thrown away. What a
process did after its last line is lost with it: at most one step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from moe.config.schema import Run
from moe.cost import flops_per_step, forward_flops_per_token
from moe.cost.charges import rates_of
from moe.metrics import JsonLines
from moe.parallel import Ranks
from moe.train import flops
from moe.train.memory import peak_memory_bytes
from moe.train.meters import meters, read_all


def device_name(device: torch.device) -> str:
    """The name under which tables know a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def ledger_file(rank: int) -> str:
    """Name of a rank's file."""
    return "ledger.jsonl" if rank == 0 else f"ledger-rank{rank}.jsonl"


class Meters:
    """The clocks of one attempt, running from before its set-up."""

    def __init__(self, run: Run, ranks: Ranks):
        self.rates = rates_of(run.cost, device_name(ranks.device))
        self.found = meters(run, ranks)
        self.clock = time.perf_counter()

    def read(self) -> tuple[float, dict[str, float | None]]:
        """Seconds and joules since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before, read_all(self.found)


class Ledger:
    """One rank's lines of one attempt."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        out: Path,
        attempt: int,
        begin: int,
        running: Meters,
        bytes_written: Callable[[], int],
    ):
        self.run, self.ranks, self.out, self.running, self.bytes_written = run, ranks, out, running, bytes_written
        self.step, self.written = begin, 0
        self.step_flops = flops_per_step(run) / ranks.world_size
        """Of this rank's part of a step, by formula."""
        self.row_flops = forward_flops_per_token(run.model, run.data.sequence_length) * run.data.sequence_length
        """Of the forward pass of one validation row, by formula."""
        self.counts = flops.countable(run)
        self.counted: dict[str, float] = {}
        """FLOPs of a unit of each kind of work, counted at its first time."""
        self.file = JsonLines(out / ledger_file(ranks.rank), attempt)
        self.file.write(
            kind="start",
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=device_name(ranks.device),
            from_step=begin,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            meters=[{"part": m.part, "grade": m.grade, "source": m.source} for m in running.found],
            complete=ranks.device.type == "cpu" or any(m.part == "gpu" for m in running.found),
            rates=running.rates.as_json(),
            flops="counted" if self.counts else "formula",
            formula_flops_per_step=self.step_flops,
        )
        self.done("setup", begin)

    @contextmanager
    def work(self, phase: str, step: int, units: float = 1.0, formula: float | None = None) -> Iterator[dict[str, Any]]:
        """Do a piece of work and write its line, whether or not it ends well; the caller may put fields into what this yields.

        phase: step, evaluate or health. FLOPs of a unit are counted in the attempt's first work of that phase; `formula`
        stands for them where they cannot be counted, and then `flops_grade` is estimated.
        """
        fields: dict[str, Any] = {}
        ended = False
        counting = flops.counter(self.run) if self.counts and phase not in self.counted else None
        try:
            with counting if counting is not None else nullcontext():
                yield fields
            if counting is not None:
                self.counted[phase] = counting.get_total_flops() / units
            ended = True
        finally:
            known = self.counted.get(phase, formula)
            if known is not None and ended:  # how far a failed step got, nobody knows
                grade = "measured" if phase in self.counted else "estimated"
                fields |= {"flops": known * units, "flops_grade": grade}
            self.done(phase, step, **fields)

    def done(self, phase: str, step: int, **fields: Any) -> None:
        """Write the line of what came since the last one: its wall clock, its joules by part, and what the caller knows of it."""
        seconds, joules = self.running.read()
        self.step, before, self.written = step, self.written, self.bytes_written()
        if self.written > before:  # a checkpoint that was written in the background came to be
            fields["bytes_written"] = self.written - before
        self.file.write(
            kind="work",
            phase=phase,
            step=step,
            seconds=seconds,
            joules=joules,
            peak_memory_bytes=peak_memory_bytes(self.ranks.device),
            **fields,
        )

    def close(self) -> None:
        """Write the last line, with the bytes of the checkpoints that are kept, and close; also when the run fails."""
        kept = {"bytes_kept": bytes_below(self.out / "checkpoints")} if self.ranks.first else {}
        self.done("end", self.step, **kept)
        self.file.close()


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if there is none. A file that is renamed meanwhile is left out."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return size
