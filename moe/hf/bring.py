"""`moe import`: a model in transformers' format as a run folder that trains on, evaluates, prunes and exports again."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.config.load import dump, load
from moe.config.schema import AdamW, Cosine, Data, Model, PretrainedTokenizer, Run, Train
from moe.errors import ConfigError
from moe.hf.reading import Folder
from moe.surgery.start import begin_run
from moe.train.record import require_free

TOKENIZER = "tokenizer"
"""Subfolder of the run with the model's tokenizer."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def import_model(
    folder: Path, out: Path, *, recipe: str = "", overrides: Sequence[str] = (), notices: list[str] | None = None
) -> Run:
    """Write `out` as a run that starts from the model in `folder`, with the model's tokenizer; returns the run.

    Data and training are the recipe's, or small defaults; overrides are applied last. Raises ConfigError for a model that
    we do not hold or a folder that is not free, CheckpointError with the list of tensors that are not accounted for.
    """
    require_free(out)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file() and not recipe:
        raise ConfigError(
            f"{folder} has no tokenizer.json, so nobody knows its tokenizer: give a recipe whose data has it, --recipe x.py"
        )
    with Folder(folder) as source:
        return _import(source, folder, out, recipe, overrides, notices)


def _import(
    source: Folder, folder: Path, out: Path, recipe: str, overrides: Sequence[str], notices: list[str] | None
) -> Run:
    has_tokenizer = (folder / "tokenizer.json").is_file()
    run = load(_settings(folder, source.model, recipe, out if has_tokenizer else None), overrides, notices=notices)

    def copy_tokenizer(run_folder: Path) -> None:
        if has_tokenizer:
            (run_folder / TOKENIZER).mkdir()
            for name in _TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, run_folder / TOKENIZER / name)

    empty = source.empty().state_dict()

    def give(name: str, place: Tensor) -> None:
        if not empty[name].is_meta:
            place.copy_(empty[name])  # a buffer that only training reads
        source.read(name, place)

    origin = {"made_by": "import", "family": source.family.model_type, "source": str(folder)}
    begin_run(out, run, empty, origin, give=give, fill=copy_tokenizer)
    return run


def _settings(folder: Path, model: Model, recipe: str, out: Path | None) -> dict[str, Any]:
    """The plain run before overrides. `out` is the run's folder if the model brings its tokenizer."""
    run = dump(load(recipe) if recipe else _small_run(folder, model))
    run["model"] = dump(model) | {"document_mask": run["model"]["document_mask"]}
    if out is not None:
        run["data"]["tokenizer"] = dump(PretrainedTokenizer(path=str((out / TOKENIZER).absolute())))
    return run


def _small_run(folder: Path, model: Model) -> Run:
    """Settings for a model that comes without a recipe: gentle, and short enough to try."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = min(256, int(values.get("max_position_embeddings") or 256))
    name = re.sub(r"[^\w.-]", "-", folder.resolve().name).lstrip(".-") or "imported"
    train = Train(steps=100, batch_rows=8, micro_rows=8, optimizer=AdamW(lr=1e-5), schedule=Cosine(warmup_steps=10))
    return Run(name=name, model=model, data=Data(sequence_length=length), train=train)
