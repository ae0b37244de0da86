"""Synthetic run and comparison directories in the trainer's log format, for tests of what reads them. Needs numpy only.

As a program it is a fake trainer: `fake_runs.py CONFIG.json out=DIR` or `fake_runs.py --resume DIR`.
"""

import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "name": "fake",
    "seed": 0,
    "model": {
        "vocab_size": 257,
        "dim": 96,
        "num_layers": 3,
        "ffn_hidden": 256,
        "moe": {
            "num_experts": 8,
            "top_k": 1,
            "expert_hidden": 256,
            "router": {"name": "topk", "balance": {"weight": 0.01, "scope": "global"}},
        },
    },
    "data": {"sequence_length": 128, "sources": [{"name": "stdlib", "weight": 1.0}]},
    "train": {"steps": 400, "batch_rows": 32, "optimizer": {"lr": 0.003}, "threads": 1},
}
FLOPS_PER_TOKEN = 2_400_000.0
FINAL_ROWS, ROW_BYTES = 4096, 128


def config(*, sparse: bool = True, seed: int = 0, steps: int = 400, lr: float = 0.003) -> dict:
    """A config dict of one arm, shaped like a dumped Run."""
    run = copy.deepcopy(CONFIG)
    run["seed"], run["train"]["steps"], run["train"]["optimizer"]["lr"] = seed, steps, lr
    run["name"] = f"fake-{'sparse' if sparse else 'dense'}-seed{seed}"
    if not sparse:
        run["model"]["moe"], run["model"]["ffn_hidden"] = None, 264
    return run


def write_lines(path: Path, rows: list[dict], attempt: int = 1) -> None:
    """Append JSON lines with schema_version and attempt."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"schema_version": 1, "attempt": attempt, **row}) + "\n")


def bits_at(step: int, steps: int, final: float) -> float:
    """A smooth learning curve in bits per byte that starts at 8 and ends at `final`."""
    return final + (8 - final) * (1 + 30 * step / steps) ** -0.9 - (8 - final) * 31**-0.9


def _routing(
    random: np.random.Generator, step: int, steps: int, layers: list[int], experts: int, rows: int
) -> list[dict]:
    """Loads that start skewed, settle towards balance, and keep one starved expert in the last layer."""
    lines = []
    for index, layer in enumerate(layers):
        skew = 1.2 * math.exp(-6 * step / steps) + 0.08 + 0.1 * index
        logits = skew * np.sin(1.7 * np.arange(experts) + layer)
        share = np.exp(logits) / np.exp(logits).sum()
        if index == len(layers) - 1:
            share[-1] *= max(0.0, 1 - 2 * step / steps)
            share /= share.sum()
        counts = random.multinomial(rows, share)
        load = counts / counts.sum()
        entropy = float(-(load * np.log(np.where(load > 0, load, 1))).sum())
        lines.append(
            {
                "step": step,
                "layer": layer,
                "counts": counts.tolist(),
                "load_entropy": entropy / math.log(experts),
                "effective_experts": math.exp(entropy),
                "max_vio": float(load.max() * experts - 1),
                "max_vio_floor": math.sqrt(2 * math.log(experts) * experts / rows),
                "dead_experts": int((load < 0.01 / experts).sum()),
                "drop_rate": 0.0,
                "router_entropy": 0.9 - 0.5 * step / steps,
                "logit_max": 2.0 + 3 * step / steps,
                "margin": 0.1 + 0.4 * step / steps,
            }
        )
    return lines


def write_run(
    directory: Path, run: dict, *, bits: float, rows: int = FINAL_ROWS, layers: int = 3, every: int = 5
) -> Path:
    """Write a finished run whose final evaluation is `bits` bits per byte to the last digits. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    moe, seed, steps = run["model"].get("moe"), run["seed"], run["train"]["steps"]
    random = np.random.default_rng(100 * seed + bool(moe))
    tokens = run["train"]["batch_rows"] * run["data"]["sequence_length"]
    meta = {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "threads": run["train"].get("threads", 1),
        "world_size": 1,
        "backend": "torch" if moe else None,
        "versions": {"python": "3.11.4", "torch": "2.13.0", "moe-lab": "0.1.0"},
        "device": "cpu",
        "started": "2026-11-22T10:00:00Z",
    }
    (directory / "run.json").write_text(json.dumps({"schema_version": 1, "run": run, "meta": meta}))
    seconds = 0.19 if moe else 0.13
    metrics = [
        {
            "step": step,
            "loss": bits_at(step, steps, bits) * math.log(2) + float(random.normal(0, 0.04)),
            "losses": {"balance": 1.01} if moe else {},
            "lr": 0.003,
            "grad_norm": 0.8,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens": step * tokens,
            "memory_bytes": 300_000_000,
            "skipped": False,
        }
        for step in range(1, steps + 1)
    ]
    write_lines(directory / "metrics.jsonl", metrics)
    if moe:
        experts = moe["num_experts"]
        chosen = tokens * moe["top_k"]
        for step in range(every, steps + 1, every):
            lines = _routing(random, step, steps, list(range(layers)), experts, chosen)
            write_lines(directory / "routing.jsonl", lines)
    sizes = np.full(rows, float(ROW_BYTES))
    # Difficulty of a row is shared by all runs; a run adds a little noise of its own, which sums to 0.
    nats = bits * math.log(2) * sizes * np.random.default_rng(7).gamma(20, 1 / 20, rows)
    nats += random.normal(0, 5, rows)
    nats *= bits * math.log(2) * sizes.sum() / nats.sum()
    np.savez(directory / "final_rows.npz", nats_row=nats, bytes_row=sizes, tokens_row=sizes)
    evals = [
        {
            "step": s,
            "final": False,
            "rows": 64,
            "bits_per_byte": bits_at(s, steps, bits) + float(random.normal(0, 0.004)),
        }
        for s in range(max(1, steps // 20), steps + 1, max(1, steps // 20))
    ]
    evals.append(
        {"step": steps, "final": True, "rows": rows, "bits_per_byte": float(nats.sum() / sizes.sum() / math.log(2))}
    )
    for line in evals:
        line |= {
            "tokens": line["rows"] * 128,
            "bytes": line["rows"] * ROW_BYTES,
            "loss": line["bits_per_byte"] * math.log(2),
        }
    write_lines(directory / "evals.jsonl", evals)
    summary = {
        "schema_version": 1,
        "status": "finished",
        "reason": "",
        "step": steps,
        "tokens": steps * tokens,
        "seconds": steps * seconds,
        "parameters_total": 1_940_000 if moe else 394_000,
        "parameters_active": 396_000 if moe else 394_000,
        "train_flops_per_token": FLOPS_PER_TOKEN * (1 if moe else 1.0012),
        "peak_memory_bytes": 812_000_000 if moe else 604_000_000,
        "skipped_steps": 0,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_ledger(directory: Path) -> None:
    """Write the ledger of a finished run: 10 W estimated, and a price of one dollar an hour."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    known = {"value": 1.0, "grade": "measured", "source": "cost.price_per_hour"}
    start = {
        "kind": "start",
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "meters": [{"part": "cpu", "grade": "estimated", "source": "model: 10 W"}],
        "complete": True,
        "rates": {
            "grid": {"value": 480.0, "grade": "assumed", "source": "WORLD"},
            "pue": {"value": 1.0, "grade": "assumed", "source": "cost.pue"},
            "per_hour": known,
            "per_kwh": known | {"value": 0.0, "source": "cost.price_per_kwh"},
        },
    }
    work = [
        {
            "kind": "work",
            "phase": "step",
            "step": row["step"],
            "seconds": row["step_seconds"],
            "joules": {"cpu": 10 * row["step_seconds"]},
            "peak_memory_bytes": row["memory_bytes"],
            "tokens": row["tokens"] // row["step"],
            "flops": 1e9,
            "flops_grade": "measured",
        }
        for row in rows
    ]
    write_lines(directory / "ledger.jsonl", [start, *work])


def write_forecast(directory: Path) -> None:
    """Write a run's forecasts at every tenth of training, the last one cut off by a kill."""
    steps = json.loads((directory / "run.json").read_text())["run"]["train"]["steps"]
    rows = [
        {"step": share * steps // 10, "share": share / 10, "gain": 0.01 * share, "low": 0.05 - 0.01 / share}
        | {"high": 0.05 + 0.01 / share, "forecast": 0.05, "alarm": False}
        for share in range(1, 10)
    ]
    write_lines(directory / "forecast.jsonl", rows)
    with (directory / "forecast.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "atte')


DENSE, GAINS = (2.767, 2.754, 2.821), (0.081, 0.092, 0.068)


def write_comparison(
    directory: Path, *, dense=DENSE, gains=GAINS, steps: int = 400, rows: int = FINAL_ROWS, timing: bool = True
) -> Path:
    """Write a comparison directory of one pair of runs per gain; sparse ends at dense minus gain bits per byte."""
    seeds = list(range(len(gains)))
    for seed, base, gain in zip(seeds, dense, gains, strict=False):
        write_run(
            directory / f"sparse-seed{seed}", config(sparse=True, seed=seed, steps=steps), bits=base - gain, rows=rows
        )
        write_run(directory / f"dense-seed{seed}", config(sparse=False, seed=seed, steps=steps), bits=base, rows=rows)
    compare = {
        "schema_version": 1,
        "contract": "equal active FLOPs per token",
        "recipe": "recipes/quickstart.py",
        "overrides": [],
        "command": "moe compare recipes/quickstart.py --seeds 3 --jobs 2",
        "seeds": seeds,
        "jobs": 2,
        "arms": {arm: [f"{arm}-seed{seed}" for seed in seeds] for arm in ("sparse", "dense")},
        "twin": {
            "ffn_hidden": 264,
            "flops_sparse": FLOPS_PER_TOKEN,
            "flops_dense": FLOPS_PER_TOKEN * 1.0012,
            "relative_difference": 0.0012,
            "rows_per_token": 1.0,
        },
        "learning_rate": {
            "value": 0.003,
            "found_by": "a grid on the dense arm with seed 0",
            "grid": [0.001, 0.003, 0.01],
            "tried": [[0.001, 2.853], [0.003, 2.767], [0.01, None]],
        },
    }
    (directory / "compare.json").write_text(json.dumps(compare))
    if timing:
        random = np.random.default_rng(3)
        speeds = {"sparse": 22_000 * random.normal(1, 0.05, 15), "dense": 31_000 * random.normal(1, 0.05, 15)}
        header = {"schema_version": 1, "threads": 2, "rounds": 15, "device": "cpu"}
        (directory / "timing.json").write_text(json.dumps(header | {k: v.tolist() for k, v in speeds.items()}))
    return directory


# ----------------------------------------------------------------------------------------------------- fake trainer


def active_size(model: dict) -> int:
    """Active parameters without embedding, head and router; heads are as many as key-value heads."""
    attention, moe = model["attention"], model.get("moe")
    per_layer = 4 * model["dim"] * attention["num_heads"] * attention["head_dim"] + 2 * model["dim"]
    hidden = moe["top_k"] * moe["expert_hidden"] if moe else model["ffn_hidden"]
    return model["num_layers"] * (per_layer + 3 * model["dim"] * hidden) + model["dim"]


def law_gain(size: float, experts: float) -> float:
    """Nats that FAKE_GAIN times ln(experts per expert used) says, falling by a twentieth per factor e of size from 10,000."""
    return float(os.environ["FAKE_GAIN"]) * math.log(experts) * (1 - 0.05 * math.log(size / 1e4))


def law_nats(run: dict) -> float:
    """Nats per byte of a dense power law, less the gain; a seed shifts all arms alike."""
    size, moe = active_size(run["model"]), run["model"].get("moe")
    gain = law_gain(size, moe["num_experts"] / moe["top_k"]) if moe else 0.0
    return 5 * size**-0.1 + 0.01 * (run["seed"] % 100) - gain


def fake_bits(run: dict) -> float:
    """Final bits per byte of the fake trainer: sparse gains about 0.08, and learning rate 0.003 is best.

    With FAKE_GAIN in the environment, a known truth by size instead: `law_nats`.
    """
    if "FAKE_GAIN" in os.environ:
        return law_nats(run) / math.log(2)
    moe, seed, lr = run["model"]["moe"], run["seed"], run["train"]["optimizer"]["lr"]
    return 2.8 + 0.03 * seed - (0.08 + 0.004 * seed if moe else 0) + 0.1 * math.log10(lr / 0.003) ** 2


def _log_event(kind: str, name: str) -> None:
    with Path(os.environ["FAKE_EVENTS"]).open("a") as file:
        file.write(json.dumps([kind, name, os.getpid(), time.monotonic()]) + "\n")


def main(arguments: list[str]) -> int:
    """A fake trainer and a fake timing. FAKE_EVENTS names a log; FAKE_MODES maps a run's name to a behaviour."""
    if arguments[0] == "--timing":
        sparse, dense, out, _, rounds, _, threads = arguments[1:]
        _log_event("timing", f"{Path(sparse).stem} {Path(dense).stem}")
        result = {"schema_version": 1, "threads": int(threads), "rounds": int(rounds)}
        result |= {"sparse": [70.0] * int(rounds), "dense": [100.0] * int(rounds)}
        Path(out).write_text(json.dumps(result))
        return 0
    resuming = arguments[0] == "--resume"
    directory = Path(arguments[1].removeprefix("out="))
    _log_event("resume" if resuming else "start", directory.name)
    mode = json.loads(os.environ.get("FAKE_MODES", "{}")).get(directory.name, "")
    source = directory / "run.json" if resuming else Path(arguments[0])
    run = json.loads(source.read_text())["run"]
    if mode in ("crash", "refuse"):
        print(f"the {mode} that the test asked for")
        return 2 if mode == "refuse" else 1
    if mode == "slow":
        signal.signal(signal.SIGTERM, lambda *_: (_log_event("terminated", directory.name), sys.exit(0)))
        _log_event("ready", directory.name)
        time.sleep(60)
    time.sleep(0.1)
    for name in ("metrics", "routing", "evals"):
        (directory / f"{name}.jsonl").unlink(missing_ok=True)
    write_run(directory, run, bits=fake_bits(run), rows=64, layers=run["model"]["num_layers"])
    if mode in ("interrupted", "stopped"):
        summary = json.loads((directory / "summary.json").read_text())
        (directory / "summary.json").write_text(json.dumps(summary | {"status": mode, "reason": "asked by the test"}))
    _log_event("end", directory.name)
    return 1 if mode == "stopped" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
