"""What a run leaves in its folder besides metrics: run.json, the code's state, attempts, and the summary."""

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO

import torch

from moe.backend import compiled
from moe.config.load import dump
from moe.config.schema import Run
from moe.errors import CheckpointError, ConfigError
from moe.files import lock as lock_file
from moe.files import write_json, write_text
from moe.metrics import SCHEMA_VERSION, JsonLines
from moe.parallel import Ranks

_VERSIONED = ("moe-lab", "torch", "triton", "numpy", "datasets", "tokenizers")


def default_out(run: Run) -> Path:
    """runs/<name>-<local time>."""
    return Path("runs") / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def require_free(out: Path) -> None:
    """Refuse a folder that holds anything. Raises ConfigError."""
    if out.exists() and (not out.is_dir() or any(path.name != ".lock" for path in out.iterdir())):
        way = f"or continue that run with 'moe resume {out}'"
        if out.is_dir() and not (out / "run.json").is_file():
            way = "or remove it: it holds no run.json, so it is no run, or one that was stopped while it was made"
        raise ConfigError(f"out={str(out)!r} exists and is not empty: choose another folder, {way}")


def claim_folder(out: Path) -> None:
    """Make the run's folder, which must be free. Raises ConfigError where it is not, or cannot be made."""
    require_free(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"out={str(out)!r} cannot be made ({reason}): choose another folder") from error


def lock(out: Path) -> IO[bytes]:
    """Hold the run's folder for this process until the file is closed or the process ends, however it ends.

    Raises CheckpointError if another process trains there.
    """
    try:
        return lock_file(out / ".lock")
    except OSError as error:
        raise CheckpointError(f"{out} is being trained by another process: wait for it, or stop it") from error


def forget_end(out: Path) -> None:
    """Remove what describes the end of an earlier attempt, before the run goes on."""
    for name in ("summary.json", "final_rows.npz"):
        (out / name).unlink(missing_ok=True)


def write_run(out: Path, run: Run, ranks: Ranks, backend: str, fingerprint: str) -> None:
    """Write run.json (enough to start the run again) and git.diff if the code differs from its commit."""
    commit, diff = _git_state()
    meta = {
        "git_commit": commit,
        "git_dirty": bool(diff),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
        "backend": backend,
        "model_backend": "cpu" if compiled(run.model.backend) else "torch",
        "data_fingerprint": fingerprint,
        "device": _device_name(ranks.device),
        "hostname": platform.node(),
        "command": sys.argv,
        "started": _now(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
    }
    write_json(out / "run.json", {"schema_version": SCHEMA_VERSION, "run": dump(run), "meta": meta})
    if diff:
        write_text(out / "git.diff", diff)


def begin_attempt(out: Path, from_step: int, ranks: Ranks, overrides: list[str]) -> int:
    """Append a line to attempts.jsonl; returns this attempt's number, from 1."""
    path = out / "attempts.jsonl"
    attempt = 1 + (path.read_bytes().count(b"\n") if path.is_file() else 0)
    log = JsonLines(path, attempt)
    log.write(
        from_step=from_step,
        world_size=ranks.world_size,
        threads=torch.get_num_threads(),
        overrides=overrides,
        started=_now(),
    )
    log.close()
    return attempt


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, str]:
    """Commit and uncommitted difference of the code that runs; (None, "") outside a git checkout."""
    folder = Path(__file__).parents[2]
    commit = _git(folder, "rev-parse", "HEAD") if (folder / ".git").exists() else None
    return (commit.strip(), _git(folder, "diff", "HEAD") or "") if commit else (None, "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
