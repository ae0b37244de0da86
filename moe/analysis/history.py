"""What a run has logged so far, by layer, as the doctor reads it: from a folder, finished or not, or fed by the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe.analysis.rows import Json, read_json, read_lines
from moe.errors import UserError

LONGEST = 2000
"""Lines kept per layer and log; beyond, every second line of the older half goes, so that memory stays bounded."""
METRICS = ("step", "tokens", "loss", "losses", "skipped")
"""What the rules read of a line of metrics: the rest of it would be most of what a trainer holds of a long run."""
SETTLING_STEPS = 1000
STEP = {"step": (int,)}
STEP_AND_LAYER = {"step": (int,), "layer": (int,)}
PROBES = {"step": (int,), "kind": (str,)}


@dataclass
class History:
    """Logged rows of one run, each list ascending by step."""

    config: Json
    """The resolved `Run`, as JSON."""
    metrics: list[Json] = field(default_factory=list)
    routing: dict[int, list[Json]] = field(default_factory=dict)
    """By layer."""
    health: dict[int, list[Json]] = field(default_factory=dict)
    """By layer."""
    probes: list[Json] = field(default_factory=list)
    """Counterfactuals of the last checkpoint that was probed."""

    @property
    def steps(self) -> int:
        """Steps that the run is to have."""
        return self.config["train"]["steps"]

    @property
    def step(self) -> int:
        """The last logged step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def grace(self) -> int:
        """Steps at the beginning that no rule judges: warm-up, and a tenth of the run, in which loads find their balance."""
        warmup = self.config["train"].get("schedule", {}).get("warmup_steps", 0)
        return max(warmup, self.steps // 10)

    @property
    def settling(self) -> int:
        """Steps in which loads may still be finding their balance: a third of the run, but at most SETTLING_STEPS."""
        return max(self.grace, min(self.steps // 3, SETTLING_STEPS))

    def settled(self, rows: Sequence[Json]) -> list[Json]:
        """Rows after the loads have had time to find their balance."""
        return [row for row in rows if row["step"] > self.settling]

    def lasting(self, rows: Sequence[Json]) -> int:
        """How many rows a lasting condition of the load takes: an eighth of the run's (but at most 50), at least 4."""
        steps = [row["step"] for row in rows[-2:]]
        apart = steps[1] - steps[0] if len(steps) == 2 else 1
        return max(4, min(50, self.steps // (8 * max(apart, 1))))

    def late(self, rows: Sequence[Json], fraction: float = 0.0) -> list[Json]:
        """Rows after the grace period and after a fraction of the run."""
        first = max(self.grace, int(fraction * self.steps))
        return [row for row in rows if row["step"] > first]

    def add(self, name: str, row: Json) -> None:
        """Take one row of metrics, routing or health, as the trainer writes it."""
        if name == "metrics":
            rows, row = self.metrics, {key: row[key] for key in METRICS if key in row}
        elif name in ("routing", "health"):
            rows = getattr(self, name).setdefault(row["layer"], [])
        else:
            return
        rows.append(row)
        if len(rows) > LONGEST:
            rows[: LONGEST // 2] = rows[: LONGEST // 2 : 2]


def read_history(directory: Path) -> History:
    """Read a run folder, of a run that is finished, interrupted or still going on.

    Raises UserError naming what is missing or malformed, and for a dense model.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the folder of a run")
    config = read_json(directory / "run.json", {"run": (dict,)})["run"]
    if config["model"].get("moe") is None:
        raise UserError(f"{directory} is a dense run, and the doctor reads routing: give the folder of a sparse run")
    history = History(config, metrics=read_lines(directory / "metrics.jsonl", STEP, lambda row: (row["step"],)))
    for name in ("routing", "health"):
        path = directory / f"{name}.jsonl"
        rows = read_lines(path, STEP_AND_LAYER, lambda row: (row["step"], row["layer"])) if path.exists() else []
        for row in rows:
            getattr(history, name).setdefault(row["layer"], []).append(row)
    probes = directory / "probes.jsonl"
    if probes.exists():
        rows = read_lines(probes, PROBES, lambda row: (row["step"], row["number"]))
        history.probes = [row for row in rows if row["step"] == rows[-1]["step"]]
    if not history.routing:
        raise UserError(
            f"{directory} has no routing.jsonl line yet: let the run reach step logging.routing_every "
            f"({config.get('logging', {}).get('routing_every', 10)})"
        )
    return history
