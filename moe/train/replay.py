"""Router replay: write every expert layer's choices of every step, and force them in a later run.

A file holds the choices of some rows of a step, by the row's place in the whole batch, so a run on any number of ranks
and micro-batches can replay a recording made on another. `index.json` says what was recorded, and is checked first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config.load import router_name
from moe.config.schema import Run, is_moe_layer
from moe.errors import ConfigError
from moe.files import write_json, write_whole
from moe.routing import Selection


def _index(run: Run) -> dict[str, Any]:
    """What a recording and the run that replays it must share."""
    moe = run.model.moe
    assert moe is not None
    return {
        "model.moe.num_experts": moe.num_experts,
        "model.moe.top_k": moe.top_k,
        "model.moe.router.name": router_name(moe.router),
        "expert layers": [layer for layer in range(run.model.num_layers) if is_moe_layer(run.model, layer)],
        "data.sequence_length": run.data.sequence_length,
        "train.batch_rows": run.train.batch_rows,
        "seed": run.seed,
    }


class Recorder:
    """Writes `step_<step>.rows_<first>_<end>.npz`: per expert layer i, `token_<i>` and `expert_<i>` [rows, R per row].

    A token is its position in its row.
    """

    def __init__(self, folder: Path, run: Run, *, first_rank: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if first_rank:
            write_json(folder / "index.json", _index(run))

    def write(self, step: int, row_B: Tensor, row_length: int, selections: list[Selection]) -> None:
        """Write the choices of the micro-batch that holds the consecutive rows row_B."""
        first, end = int(row_B[0]), int(row_B[-1]) + 1
        arrays = {}
        for index, selection in enumerate(selections):
            position = (selection.token_R % row_length).view(end - first, -1)
            arrays[f"token_{index}"] = position.cpu().numpy().astype(np.int32)
            arrays[f"expert_{index}"] = selection.expert_R.view(end - first, -1).cpu().numpy().astype(np.int32)
        path = self.folder / f"step_{step + 1:08d}.rows_{first:06d}_{end:06d}.npz"
        write_whole(path, lambda stream: np.savez(stream, **arrays))


class Replayer:
    """Reads what `Recorder` wrote. Raises ConfigError, before anything starts, for a recording that does not fit the run."""

    def __init__(self, folder: Path, run: Run):
        self.folder, self.num_layers = folder, len(_index(run)["expert layers"])
        self.files: dict[int, list[tuple[int, int, Path]]] = {}
        for path in sorted(folder.glob("step_*.rows_*.npz")):
            step, rows = path.stem.removeprefix("step_").split(".rows_")
            first, end = (int(part) for part in rows.split("_"))
            self.files.setdefault(int(step), []).append((first, end, path))
        if not self.files or not (folder / "index.json").is_file():
            raise ConfigError(
                f"logging.replay_routing={str(folder)!r} holds no recorded routing: "
                "name the replay/ folder of a run made with logging.record_routing=true"
            )
        self._check(run)

    def _check(self, run: Run) -> None:
        recorded = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        for name, value in _index(run).items():
            if recorded.get(name) != value:
                raise ConfigError(
                    f"the routing in {self.folder} was recorded with {name} = {recorded.get(name)}, this run has {value}: "
                    "replay it with the settings that made it"
                )
        batch_rows = run.train.batch_rows
        for step in range(1, run.train.steps + 1):
            there = {row for first, end, _ in self.files.get(step, []) for row in range(first, end)}
            if len(there) < batch_rows:
                raise ConfigError(
                    f"the routing in {self.folder} has {len(there)} of the {batch_rows} rows of step {step}, and "
                    f"train.steps is {run.train.steps}: set train.steps={step - 1} or record a run of as many steps"
                )

    def selections(self, step: int, row_B: Tensor, row_length: int, device: torch.device) -> tuple[Selection, ...]:
        """The recorded choices for rows row_B of step `step` (from 0), one per expert layer."""
        found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        rows = row_B.tolist()
        for first, end, path in self.files[step + 1]:
            wanted = [row for row in rows if first <= row < end]
            if wanted:
                with np.load(path) as arrays:
                    layers = [(arrays[f"token_{i}"], arrays[f"expert_{i}"]) for i in range(self.num_layers)]
                found |= {
                    row: [(token[row - first], expert[row - first]) for token, expert in layers] for row in wanted
                }
        shift_B1 = np.arange(len(rows))[:, None] * row_length
        return tuple(
            Selection(
                torch.from_numpy(np.stack([found[row][i][0] for row in rows]) + shift_B1).flatten().to(device),
                torch.from_numpy(np.stack([found[row][i][1] for row in rows])).long().flatten().to(device),
            )
            for i in range(self.num_layers)
        )
