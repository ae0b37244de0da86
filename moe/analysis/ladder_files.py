"""A ladder's runs read from their folders: final losses as a `Ladder`, and all evaluations as one file of loss curves."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis.curves import COLUMNS
from moe.analysis.ladder import Ladder
from moe.analysis.rows import read_run
from moe.errors import DataError
from moe.files import write_text

Json = dict[str, Any]
Folders = Mapping[str, Mapping[str, list[Path]]]
"""Run folders by size and arm (`dense`, or the number of experts), one per seed."""
DENSE = "dense"
ROUTER = "sparse"
HEADER = (*COLUMNS, "loss_validation", "k", "routing_frequency")


def ladder_of_runs(folders: Folders, sizes: Mapping[str, float], top_k: int) -> tuple[Ladder, list[Json], float]:
    """(ladder, a row per run, bits per byte of one nat per token) of finished runs.

    A size and number of experts is one row of the ladder: the mean over seeds of gains paired by seed. Experts count over
    those used, so that 1 is dense. Raises DataError for a run whose final loss is not finite.
    """
    runs: list[Json] = []
    cells: list[tuple[float, float, float, float]] = []
    ratio = math.nan
    for label, arms in folders.items():
        dense = [_final(folder) for folder in arms[DENSE]]
        ratio = dense[0]["tokens"] / dense[0]["bytes"] / math.log(2)
        runs += [_row(label, None, folder, loss) for folder, loss in zip(arms[DENSE], dense, strict=True)]
        for arm, seeds in arms.items():
            if arm == DENSE:
                continue
            sparse = [_final(folder) for folder in seeds]
            runs += [_row(label, int(arm), folder, loss) for folder, loss in zip(seeds, sparse, strict=True)]
            gains = [d["loss"] - s["loss"] for d, s in zip(dense, sparse, strict=True)]
            mean = math.fsum(row["loss"] for row in dense) / len(dense)
            cells.append((sizes[label], int(arm) / top_k, mean, math.fsum(gains) / len(gains)))
    size_R, experts_R, dense_R, gain_R = (np.array(column) for column in zip(*cells, strict=True))
    return Ladder(size_R, experts_R, np.full(len(cells), ROUTER), dense_R, gain_R), runs, ratio


def write_curves(path: Path, folders: Folders, sizes: Mapping[str, float], top_k: int, every: int) -> None:
    """All evaluations in the format that `moe ladder fit`, `moe ladder backtest` and `moe forecast` read (docs/forecast.md)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for label, arms in folders.items():
        for arm, seeds in arms.items():
            kind = ("Dense", 1) if arm == DENSE else (ROUTER, int(arm))
            shape = (*kind, round(sizes[label]), label)
            for folder in seeds:
                for row in read_run(folder).evals:
                    # The final evaluation is on more rows than the others, which a curve must not mix.
                    if not row["final"]:
                        writer.writerow((folder.name, row["step"], *shape, row["loss"], top_k, 1 / every))
    write_text(path, text.getvalue())


def _final(folder: Path) -> Json:
    row = read_run(folder).final
    if row["bits_per_byte"] is None:
        raise DataError(f"{folder} ended without a finite loss: delete it and try a smaller learning rate.")
    return {**row, "loss": row["bits_per_byte"] * math.log(2) * row["bytes"] / row["tokens"]}


def _row(label: str, experts: int | None, folder: Path, final: Json) -> Json:
    return {"size": label, "experts": experts, "run": folder.name, "loss": final["loss"]}
