"""Save on each layout of this many ranks, and load on each what others saved.

`reshard_cases.py FOLDER save|load|save,load LAYOUT[;...]`, under torchrun; a layout is a comma-separated list of overrides.
`save` trains STEPS steps and saves into FOLDER/<layout>. `load` loads every checkpoint of FOLDER into every layout. Both write
what they then hold into FOLDER/<what>-<ranks>.json: a hash of every whole tensor (parameters, optimizer state, router state)
and of the next step's batch, and the next step's loss and gradient norm.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_runs import tiny_run
from torch.distributed.tensor import DTensor

from moe import checkpoint, parallel
from moe.checkpoint.state import state_of
from moe.config.layout import resolve
from moe.config.schema import Run
from moe.data import prepare
from moe.parallel import Ranks
from moe.train.step import State, build_state, micro_ranges, train_step

STEPS = 3
ROWS = 8


def config(folder: Path, layout: str) -> Run:
    """The run in a layout."""
    overrides = [one for one in layout.split(",") if one != "alone"]
    router = ["model.moe.router=loss_free", "model.moe.router.bias_rate=0.01", "model.moe.shared_hidden=8"]
    sizes = [
        f"train.batch_rows={ROWS}",
        "train.micro_rows=1",
        f"train.steps={STEPS + 1}",
        "train.optimizer.eps=1e-3",
        "model.attention.num_kv_heads=2",
    ]
    return tiny_run(folder / "data", *router, *sizes, *overrides)


def digest(value) -> str:
    """Hash of a whole tensor's bytes, type and shape, or of another value's text."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    data = whole.detach().cpu().contiguous()
    text = f"{data.dtype} {tuple(data.shape)}".encode() + data.view(torch.uint8).numpy().tobytes() if data.ndim else (
        f"{data.dtype} {data.item()!r}".encode()
    )  # fmt: skip
    return hashlib.sha256(text).hexdigest()


def held(state: State) -> dict:
    """What a run holds before its next step, and the loss of that step."""
    tensors = {
        f"{part}.{name}": digest(value)
        for part, values in state_of(state.model, state.optimizer).items()
        for name, value in values.items()
        # settings of the optimizer's groups, which a resumed run takes from its configuration
        if isinstance(value, torch.Tensor)
    }
    run, ranks = state.run, state.ranks
    rows = {}
    for micro in micro_ranges(run, ranks):
        batch = state.corpus.train_batch(STEPS, micro, batch_rows=run.train.batch_rows, seed=run.seed)
        rows |= {row: batch.ids_BS[i].tolist() for i, row in enumerate(micro)}
    parts = [rows]
    if ranks.world_size > 1:
        parts = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(parts, rows)
    whole = {row: ids for part in parts for row, ids in part.items()}
    batch = digest(torch.tensor([whole[row] for row in sorted(whole)]))
    bias = [b for name, b in state.model.named_buffers() if "bias" in name]
    moved = bool(bias) and all(bool(b.any()) for b in bias)
    result = train_step(state, STEPS)
    return {"tensors": tensors, "batch": batch, "loss": result.loss, "norm": result.grad_norm, "moved": moved}


def save(folder: Path, layout: str, run: Run, ranks: Ranks) -> dict:
    """Train, save, and describe."""
    state = build_state(run, ranks, prepare(run.data))
    for step in range(STEPS):
        train_step(state, step)
    checkpoint.save(folder / layout, STEPS, state.model, state.optimizer, {}, state.ranks)
    return held(state)


def load(source: Path, run: Run, ranks: Ranks) -> dict:
    """Load and describe."""
    state = build_state(run, ranks, prepare(run.data))
    saved = checkpoint.newest(source)
    assert saved is not None
    checkpoint.load(saved, state.model, state.optimizer, state.ranks)
    return held(state)


def work(folder: Path, what: str, layouts: list[str], ranks: Ranks) -> dict[str, dict]:
    """Results by layout, or by 'checkpoint -> layout'."""
    results = {}
    for layout in layouts:
        run = config(folder, layout)
        here = ranks.arranged(resolve(run, ranks.world_size))  # its process groups, and gloo's threads, once
        if what == "save":
            results[layout] = save(folder, layout, run, here)
            continue
        for source in sorted(path for path in folder.iterdir() if (path / "checkpoints").is_dir()):
            results[f"{source.name} -> {layout}"] = load(source, run, here)
    return results


def main() -> None:
    """Every layout of this number of ranks."""
    folder, kinds, layouts = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(";")
    torch.set_num_threads(1)
    ranks = parallel.start("cpu")
    for what in kinds:
        results = work(folder, what, layouts, ranks)
        if ranks.first:
            (folder / f"{what}-{ranks.world_size}.json").write_text(json.dumps(results))
        ranks.wait_for_all()
    parallel.stop()


if __name__ == "__main__":
    main()
