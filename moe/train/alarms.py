"""The doctor while a run trains: the same rules over the rows just written, spoken once when they begin to hold."""

from pathlib import Path
from typing import Any

from moe.analysis.doctor import diagnose
from moe.analysis.finding import Finding
from moe.analysis.history import History, read_history
from moe.config.load import dump
from moe.config.schema import Run
from moe.errors import UserError

LOOKS = 50
"""Times in a run, besides each evaluation, that the rules are looked at."""


class Alarms:
    """Keeps the history of a run and says which findings are new. For rank 0 of a sparse run."""

    def __init__(self, run: Run, out: Path, begin: int):
        self.history = History(dump(run))
        if begin:
            self._remember(out, begin)
        self.every = max(1, run.train.steps // LOOKS)
        self.looked = begin
        self.raised: dict[str, tuple[int, ...]] = {finding.cause: finding.layers for finding in diagnose(self.history)}

    def _remember(self, out: Path, begin: int) -> None:
        """A resumed run goes on with the rows of the steps that it keeps."""
        try:
            before = read_history(out)
        except UserError:
            return  # stopped before its first routing line
        for name, rows in (("metrics", {-1: before.metrics}), ("routing", before.routing), ("health", before.health)):
            for row in (row for of_layer in rows.values() for row in of_layer if row["step"] <= begin):
                self.history.add(name, row)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Take a row that was logged."""
        self.history.add(name, row)

    def due(self, step: int) -> bool:
        """Whether it is time to look, at a step whose routing was logged."""
        return step - self.looked >= self.every

    def look(self, step: int) -> list[Finding]:
        """Findings that were not there at the last look, or are now in further layers."""
        self.looked = step
        found = diagnose(self.history)
        fresh = [f for f in found if f.cause not in self.raised or not set(f.layers) <= set(self.raised[f.cause])]
        self.raised = {finding.cause: finding.layers for finding in found}
        return fresh
