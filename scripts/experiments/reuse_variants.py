"""Ten fine-tuned variants of one base in a store, and what they weigh there and as whole files; part of scripts/experiments/reuse.

Each variant is fine-tuned (ESFT) on one package of Python's standard library.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

from moe import hf
from moe.surgery import store
from moe.surgery.esft import fine_tune

PACKAGES = (
    "asyncio",
    "email",
    "unittest",
    "multiprocessing",
    "tkinter",
    "idlelib",
    "xml",
    "distutils",
    "lib2to3",
    "importlib",
)


def variants(out: Path, base: Path, steps: int) -> dict[str, Any]:
    """Ten fine-tuned variants in a store, and what they weigh there and as whole files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    place, rows = out / "store", []
    whole = out / "hf-base"
    if not whole.exists():
        hf.export_run(base, whole)
    if "base" not in store.names(place):
        store.put(place, "base", base)
    for package in PACKAGES:
        folder = out / f"variant-{package}"
        if not (folder / "origin.json").is_file():
            sources = json.dumps(
                [{"name": "files", "paths": [str(library / package / "**/*.py")], "on_bad_file": "skip"}]
            )
            task = [
                f"data.sources={sources}",
                "data.validation_fraction=0.2",
                f"train.steps={steps}",
                "train.optimizer.lr=1e-3",
                "train.schedule.warmup_steps=2",
                "train.batch_rows=8",
                "train.micro_rows=8",
                "evaluation.rows=16",
                "evaluation.final_rows=16",
            ]
            fine_tune(base, folder, task)
        if package not in store.names(place):
            store.put(place, package, folder)
        receipt = json.loads((folder / "origin.json").read_text())
        rows.append(
            {
                "package": package,
                **{key: receipt[key] for key in ("loss_before", "loss_after", "trained", "parameters")},
            }
        )
    export_bytes = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    checkpoint = sum(p.stat().st_size for p in base.glob("checkpoints/*/*") if p.is_file())
    return {
        "variants": rows, "store_bytes": store.size(place), "store_base_bytes": store.size(place, "base"),
        "export_bytes": export_bytes, "checkpoint_bytes": checkpoint // len(list(base.glob("checkpoints/step_*"))),
    }  # fmt: skip


def storage(stored: dict[str, Any]) -> list[str]:
    """The tables of bytes and of the variants."""
    n, eleven = len(stored["variants"]), stored["export_bytes"] * (1 + len(stored["variants"]))
    lines = ["## Storage", "", "| what | bytes | share |", "| --- | --- | --- |"]
    checkpoints = stored["checkpoint_bytes"] * (1 + n)
    for what, size in (
        (f"{n + 1} training checkpoints", checkpoints),
        (f"{n + 1} whole exports, float32", eleven),
        ("the store, base alone", stored["store_base_bytes"]),
        (f"the store, base and {n} variants", stored["store_bytes"]),
    ):
        lines.append(f"| {what} | {size:,} | {size / eleven:.1%} |")
    lines += ["", "| variant | numbers trained | loss on its text before | after |", "| --- | --- | --- | --- |"]
    for row in stored["variants"]:
        share = row["trained"] / row["parameters"]
        lines.append(
            f"| {row['package']} | {row['trained']:,} ({share:.1%}) | {row['loss_before']:.4f} | {row['loss_after']:.4f} |"
        )
    return lines
