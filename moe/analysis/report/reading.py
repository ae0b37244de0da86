"""Runs for the report, finished or not, and which of them are one kind of model with several seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe import cost
from moe.analysis.ledger import account
from moe.analysis.promise import digest
from moe.analysis.rows import Json, RunRows, read_json, read_run
from moe.config.load import load
from moe.errors import UserError


@dataclass(frozen=True)
class Arm:
    """Runs of one config that differ in nothing but the seed."""

    name: str
    runs: tuple[RunRows, ...]
    """In ascending order of seeds."""
    flops_per_token: float
    """Of training, with the expert rows that were really routed; NaN if it is not known."""
    tokens_per_second: float | None = None
    """Of an interleaved timing, if there is one."""

    def label(self, run: RunRows) -> str:
        """A run of this arm, on a page where folders of other arms may have the same name."""
        return f"{self.name}, seed {run.config['seed']}"

    @property
    def sparse(self) -> bool:
        """Whether the model has experts."""
        return bool(self.runs[0].config["model"].get("moe"))


def read_so_far(directory: Path) -> RunRows:
    """Read a run that may still be going on, or was killed: what its missing or outdated summary.json would say is filled in."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    path = directory / "summary.json"
    if path.exists():
        run = read_run(directory)
        if not run.metrics or run.metrics[-1]["step"] <= run.summary["step"]:
            return run
    return read_run(directory, _summary(directory))


def _summary(directory: Path) -> Json:
    """What summary.json says of a run, as far as its settings say it; the rest is added from its log by `read_run`."""
    config = read_json(directory / "run.json", {"run": (dict,), "meta": (dict,)})["run"]
    try:
        run = load(config)
    except UserError:  # of another version: its log can still be read
        return {
            "status": "unfinished",
            "parameters_total": None,
            "parameters_active": None,
            "train_flops_per_token": math.nan,
        }
    parameters = cost.parameters(run.model)
    return {
        "status": "unfinished",
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "train_flops_per_token": cost.train_flops_per_token(run.model, run.data.sequence_length),
    }


def ledger_of(run: RunRows) -> Json | None:
    """What a run has used, by its ledger; None where it has none that can be read."""
    try:
        return account(run.path)
    except UserError:
        return None


def kind_of(run: RunRows) -> str:
    """A digest of everything in a run's settings that seeds of one arm share."""
    config = {name: value for name, value in run.config.items() if name not in ("name", "seed", "logging", "cost")}
    return digest(config)


def grouped(runs: Sequence[RunRows]) -> dict[str, list[RunRows]]:
    """Runs by arm, in the order given: those that differ in the seed only are one arm, named by what their folders share.

    Where a seed is there twice, runs of one folder stay together; where it is there twice in one, each run is an arm.
    """
    arms: dict[str, list[RunRows]] = {}
    for members in _apart(runs, kind_of):
        folders = [members] if _seeds_differ(members) else _apart(members, lambda run: str(run.path.resolve().parent))
        for together in folders:
            for group in [together] if _seeds_differ(together) else [[run] for run in together]:
                group = sorted(group, key=lambda run: run.config["seed"])
                arms[_free(_shared_name(group), arms, group[0].path)] = group
    return arms


def _apart(runs: Sequence[RunRows], key: Callable[[RunRows], str]) -> list[list[RunRows]]:
    found: dict[str, list[RunRows]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


def _seeds_differ(runs: Sequence[RunRows]) -> bool:
    return len({run.config["seed"] for run in runs}) == len(runs)


def _shared_name(runs: Sequence[RunRows]) -> str:
    """The beginning that the runs' folders share, without `seed` and separators at its end."""
    names = [run.path.resolve().name for run in runs]
    if len(names) == 1:
        return names[0]
    length = next(
        (i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), min(map(len, names))
    )
    name = names[0][:length].rstrip("0123456789")
    return name.removesuffix("seed").rstrip("-_. ") or names[0]


def _free(name: str, taken: dict[str, list[RunRows]], path: Path) -> str:
    """The name, or one with the folder before it if two arms would have the same."""
    while name in taken:
        path = path.resolve().parent
        name = f"{path.name}/{name}" if path.name else f"{name}'"
    return name
