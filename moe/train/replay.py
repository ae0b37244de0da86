"""Router replay: write every expert layer's choices of every step, and force them in a later run.

A file holds the choices of some rows of a step, by the row's place in the whole batch, so a run on any number of ranks
and micro-batches can replay a recording made on another.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routing import Selection


class Recorder:
    """Writes `step_<step>.rows_<first>_<end>.npz`: per expert layer i, `token_<i>` and `expert_<i>` [rows, R per row].

    A token is its position in its row.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, row_B: Tensor, row_length: int, selections: list[Selection]) -> None:
        """Write the choices of the micro-batch that holds the consecutive rows row_B."""
        first, end = int(row_B[0]), int(row_B[-1]) + 1
        arrays = {}
        for index, selection in enumerate(selections):
            arrays[f"token_{index}"] = (
                (selection.token_R % row_length).view(end - first, -1).cpu().numpy().astype(np.int32)
            )
            arrays[f"expert_{index}"] = selection.expert_R.view(end - first, -1).cpu().numpy().astype(np.int16)
        path = self.folder / f"step_{step + 1:08d}.rows_{first:06d}_{end:06d}.npz"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)


class Replayer:
    """Reads what `Recorder` wrote. Raises ConfigError for a folder without recordings, or a step or row that is not in them."""

    def __init__(self, folder: Path, num_layers: int):
        self.folder, self.num_layers = folder, num_layers
        if not any(folder.glob("step_*.npz")):
            raise ConfigError(
                f"logging.replay_routing={str(folder)!r} holds no recorded routing: "
                "name the replay/ folder of a run made with logging.record_routing=true"
            )

    def selections(self, step: int, row_B: Tensor, row_length: int, device: torch.device) -> tuple[Selection, ...]:
        """The recorded choices for rows row_B of step `step` (from 0), one per expert layer."""
        token, expert = self._rows(step, row_B.tolist())
        shift = torch.arange(len(row_B)).unsqueeze(1) * row_length
        return tuple(
            Selection(
                (torch.from_numpy(t).long() + shift).flatten().to(device),
                torch.from_numpy(e).long().flatten().to(device),
            )
            for t, e in zip(token, expert, strict=True)
        )

    def _rows(self, step: int, rows: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        pieces: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for path in self.folder.glob(f"step_{step + 1:08d}.rows_*.npz"):
            first, end = (int(part) for part in path.stem.split("rows_")[1].split("_"))
            wanted = [row for row in rows if first <= row < end]
            if not wanted:
                continue
            with np.load(path) as arrays:
                if f"token_{self.num_layers - 1}" not in arrays or f"token_{self.num_layers}" in arrays:
                    raise ConfigError(
                        f"{path} was not recorded from a model with {self.num_layers} expert layers: "
                        "replay it with the model that made it"
                    )
                layers = [(arrays[f"token_{i}"], arrays[f"expert_{i}"]) for i in range(self.num_layers)]
            for row in wanted:
                pieces[row] = ([t[row - first] for t, _ in layers], [e[row - first] for _, e in layers])
        missing = [row for row in rows if row not in pieces]
        if missing:
            raise ConfigError(
                f"{self.folder} has no recorded routing for row {missing[0]} of step {step + 1}: "
                "replay a run of at least as many steps and rows"
            )
        indices = range(self.num_layers)
        return (
            [np.stack([pieces[row][0][i] for row in rows]) for i in indices],
            [np.stack([pieces[row][1][i] for row in rows]) for i in indices],
        )
