"""Ten fine-tuned variants of one base in a store, and what they weigh there and as whole files; part of scripts/experiments/reuse.

Each variant is fine-tuned on one package of Python's standard library, in several ways: expert-selective (ESFT), and by low-rank
adapters (LoRA). Each way has a store of its own, which holds the base as well.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

from moe import hf
from moe.config.load import load
from moe.experiments.planned import Planned, state_of
from moe.surgery import esft, lora, store
from moe.train import resume

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
WAYS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "ESFT": ("variant", 1e-3, {}),
    "LoRA, experts and attention": ("lora", 3e-3, {"rank": 2, "alpha": 4.0, "targets": ["attention", "experts"]}),
    "LoRA, attention": ("lora-attention", 3e-3, {"rank": 8, "alpha": 16.0, "targets": ["attention"]}),
}
"""Prefix of the runs' folders, learning rate, and the adapters if any."""


def variants(out: Path, base: Path, steps: int) -> dict[str, Any]:
    """Every way's ten variants: bytes in its store, losses; and the bytes of the base as an export and as a checkpoint."""
    whole = out / "hf-base"
    if not whole.exists():
        hf.export_run(base, whole)
    checkpoint = sum(p.stat().st_size for p in base.glob("checkpoints/*/*") if p.is_file())
    return {
        "ways": {way: measured(out, base, way, steps) for way in WAYS},
        "export_bytes": sum(path.stat().st_size for path in whole.glob("*.safetensors")),
        "checkpoint_bytes": checkpoint // len(list(base.glob("checkpoints/step_*"))),
    }


def measured(out: Path, base: Path, way: str, steps: int) -> dict[str, Any]:
    """One way's variants, fine-tuned if they are not there yet, and their store's bytes."""
    prefix, lr, adapters = WAYS[way]
    place, rows = out / ("store" if prefix == "variant" else f"store-{prefix}"), []
    if "base" not in store.names(place):
        store.put(place, "base", base)
    for package in PACKAGES:
        folder = out / f"{prefix}-{package}"
        overrides = task(package, steps, lr)
        receipt = with_adapters(base, folder, overrides, adapters) if adapters else selected(base, folder, overrides)
        if package not in store.names(place):
            store.put(place, package, folder)
        kept = ("loss_before", "loss_after", "trained", "parameters")
        rows.append({"package": package, **{key: receipt[key] for key in kept}})
    return {"variants": rows, "store_bytes": store.size(place), "store_base_bytes": store.size(place, "base")}


def task(package: str, steps: int, lr: float) -> list[str]:
    """Overrides of a fine-tuning on one package's text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {"name": "files", "paths": [str(library / package / "**/*.py")], "on_bad_file": "skip"}
    return [
        f"data.sources={json.dumps([files])}", "data.validation_fraction=0.2", f"train.steps={steps}",
        f"train.optimizer.lr={lr}", "train.schedule.warmup_steps=2", "train.batch_rows=8", "train.micro_rows=8",
        "evaluation.rows=16", "evaluation.final_rows=16",
    ]  # fmt: skip


def selected(base: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The receipt of an expert-selective fine-tuning."""
    if not (folder / "origin.json").is_file():
        esft.fine_tune(base, folder, overrides)
    return json.loads((folder / "origin.json").read_text())


def with_adapters(base: Path, folder: Path, overrides: list[str], adapters: dict[str, Any]) -> dict[str, Any]:
    """The receipt of a fine-tuning by adapters, which is gone on with if it was stopped."""
    if not (folder / "run.json").is_file():
        return lora.fine_tune(base, folder, overrides, adapters)
    if state_of(Planned(folder, load(folder / "run.json"))) != "finished":
        resume(folder)
    return lora.receipt(folder)


def storage(stored: dict[str, Any]) -> list[str]:
    """The tables of bytes and of the variants."""
    ways = stored["ways"]
    first = next(iter(ways.values()))
    n = len(first["variants"])
    eleven = stored["export_bytes"] * (1 + n)
    lines = ["## Storage", "", "| what | bytes | share |", "| --- | --- | --- |"]
    for what, size in (
        (f"{n + 1} training checkpoints", stored["checkpoint_bytes"] * (1 + n)),
        (f"{n + 1} whole exports, float32", eleven),
        ("the store, base alone", first["store_base_bytes"]),
        *((f"the store, base and {n} variants: {way}", found["store_bytes"]) for way, found in ways.items()),
    ):
        lines.append(f"| {what} | {size:,} | {size / eleven:.1%} |")
    lines += ["", f"| nats per token on its text, before and after | before | {' | '.join(ways)} |"]
    lines.append("| --- |" + " --- |" * (1 + len(ways)))
    shares = (found["variants"][0]["trained"] / found["variants"][0]["parameters"] for found in ways.values())
    lines.append(f"| numbers trained, of the first variant | | {' | '.join(f'{share:.1%}' for share in shares)} |")
    for rows in zip(*(found["variants"] for found in ways.values()), strict=True):
        after = " | ".join(f"{row['loss_after']:.4f}" for row in rows)
        lines.append(f"| {rows[0]['package']} | {rows[0]['loss_before']:.4f} | {after} |")
    return lines
