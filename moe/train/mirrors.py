"""Copies of the metrics in Weights & Biases and TensorBoard. Our own files come first: a mirror that fails never stops a run."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config.load import dump
from moe.config.schema import Run
from moe.errors import ConfigError

Say = Callable[[str], None]


def require_tensorboard() -> None:
    """Raise ConfigError if TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard=true needs the package tensorboard: pip install 'moe-lab[tensorboard]'"
        ) from error
    assert torch.utils.tensorboard


class Mirrors:
    """Every mirror that the configuration asks for; numbers of each row are sent under their names."""

    def __init__(self, run: Run, out: Path, say: Say):
        self.say = say
        self.senders: dict[str, Callable[[dict[str, float], int], None]] = {}
        self.closers: list[Callable[[], None]] = []
        if run.logging.wandb != "off":
            self._guard("wandb", lambda: self._open_wandb(run, out))
        if run.logging.tensorboard:
            self._guard("tensorboard", lambda: self._open_tensorboard(out))

    def _open_wandb(self, run: Run, out: Path) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        session = wandb.init(
            project="moe-lab",
            name=out.name,
            id=hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16],  # a resumed run goes on in the same place
            dir=str(out),
            mode="online" if run.logging.wandb == "online" else "offline",
            config=dump(run),
            resume="allow",
        )
        self.senders["wandb"] = lambda row, step: session.log(row, step=step)
        self.closers.append(session.finish)

    def _open_tensorboard(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))

        def send(row: dict[str, float], step: int) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, step)

        self.senders["tensorboard"] = send
        self.closers.append(writer.close)

    def send(self, row: dict[str, Any], step: int) -> None:
        """Send every number of a row, nested ones as a/b."""
        numbers = _numbers(row)
        for name, sender in list(self.senders.items()):
            self._guard(name, lambda sender=sender: sender(numbers, step))

    def close(self) -> None:
        """Finish all mirrors."""
        for closer in self.closers:
            self._guard("mirror", closer)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        # a mirror is a convenience: whatever its client raises, training goes on and says so once
        try:
            action()
        except Exception as error:
            self.senders.pop(name, None)
            self.say(f"{name} is off from here: {type(error).__name__}: {error}")


def _numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat
