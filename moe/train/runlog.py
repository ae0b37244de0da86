"""What a run in progress writes and shows: metrics, routing, evaluations, the summary, the console and the mirrors.

Only rank 0 has one that writes; on the others every call is silent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe.analysis.finding import Finding
from moe.config.schema import Run
from moe.cost import mfu, parameters, peak_flops, train_flops_per_token
from moe.files import write_json, write_whole
from moe.metrics import SCHEMA_VERSION, JsonLines, router_weight_row, routing_row
from moe.parallel import Ranks
from moe.train import memory, record
from moe.train.alarms import Alarms
from moe.train.console import Console
from moe.train.evaluate import EvaluationResult
from moe.train.mirrors import Mirrors
from moe.train.step import StepResult

NAMES = ("metrics", "routing", "evals", "health", "alarms")


class RunLog:
    """The logs of one attempt at a run."""

    def __init__(self, run: Run, out: Path, ranks: Ranks, console: Console, *, begin: int, overrides: list[str]):
        self.run, self.out, self.ranks, self.console = run, out, ranks, console
        self.flops_per_token = train_flops_per_token(run.model, run.data.sequence_length)
        self.peak_flops = self._peak_flops()
        self.files: dict[str, JsonLines] = {}
        self.attempt = 0
        """Number of this start of the run, from 1; known to rank 0."""
        if ranks.first:
            self.attempt = record.begin_attempt(out, begin, ranks, overrides)
            self.files = {name: JsonLines(out / f"{name}.jsonl", self.attempt) for name in NAMES}
            self.mirrors = Mirrors(run, out, console.say)
            self.alarms = Alarms(run, out, begin) if run.model.moe is not None else None

    def _peak_flops(self) -> float | None:
        if self.run.logging.peak_tflops:
            return self.run.logging.peak_tflops * 1e12
        device = self.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = peak_flops(name, self.run.train.precision)
        if found is None:
            self.console.say(f"no MFU: the peak of '{name}' is not known; logging.peak_tflops sets it")
        return found

    def step(self, step: int, result: StepResult, seconds: float, tokens: int) -> None:
        """Log optimizer step `step` (from 1), which took `seconds`; `tokens` have been seen so far."""
        if not self.ranks.first:
            return
        speed = result.tokens / seconds
        row: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "losses": result.losses,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "tokens": tokens,
            "memory_bytes": memory.memory_bytes(self.ranks.device),
            "skipped": result.skipped,
        }
        if self.peak_flops:
            row["mfu"] = mfu(self.flops_per_token, speed / self.ranks.world_size, self.peak_flops)
        self._write("metrics", "", step, row)
        if result.skipped:
            ranks = f" on rank {', '.join(map(str, result.culprits))}" if result.culprits else ""
            self.console.say(
                f"step {step}: loss {result.loss} or gradient norm {result.grad_norm} is not finite{ranks}; skipped"
            )
        self.console.step(step, result.loss, result.lr, result.grad_norm, speed)

    def routing(
        self, step: int, result: StepResult, weights: dict[int, np.ndarray], before: dict[int, np.ndarray]
    ) -> None:
        """Log every expert layer's routing in a step; `weights` are learned router matrices by layer, `before` those before it."""
        if not self.ranks.first:
            return
        for layer, statistics in result.statistics:
            # host sync: routing is logged every routing_every steps only
            fields = routing_row({name: value.cpu().numpy() for name, value in statistics.items()})
            if layer in weights:
                fields |= router_weight_row(weights[layer], before[layer])
            self._write("routing", f"routing/layer{layer}", step, {"step": step, "layer": layer, **fields})
        if self.alarms is not None and self.alarms.due(step):
            self.look(step)

    def health(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log what an evaluation measured of the routing, a line per expert layer."""
        if not self.ranks.first:
            return
        for row in rows:
            self._write("health", f"health/layer{row['layer']}", step, row)
        self.look(step)

    def look(self, step: int) -> None:
        """Raise an alarm for everything that the doctor finds for the first time."""
        if not self.ranks.first or self.alarms is None:
            return
        for finding in self.alarms.look(step):
            self.alarm(step, finding)

    def alarm(self, step: int, finding: Finding) -> None:
        """Log and say something that was found for the first time. For rank 0."""
        self._write("alarms", f"alarms/{finding.cause}", step, {"step": step, **finding.as_json()})
        self.console.say(
            f"ALARM at step {step}: {finding.cause}: {finding.what}, since step {finding.since} ({finding.sure}); "
            f"try {finding.change}"
        )

    def evaluation(self, step: int, result: EvaluationResult, *, final: bool) -> None:
        """Log an evaluation; the final one's losses per row are kept too."""
        if not self.ranks.first:
            return
        row = {
            "step": step,
            "final": final,
            "rows": len(result.nats_row),
            "tokens": int(result.tokens_row.sum()),
            "bytes": int(result.bytes_row.sum()),
            "loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
        }
        if final:
            write_whole(
                self.out / "final_rows.npz",
                lambda stream: np.savez(
                    stream, nats_row=result.nats_row, bytes_row=result.bytes_row, tokens_row=result.tokens_row
                ),
            )
        self._write("evals", "evaluation", step, row)
        self.console.say(
            f"step {step}: validation {result.bits_per_byte:.4f} bits/byte, {result.loss:.4f} nats/token "
            f"over {row['bytes']:,} bytes"
        )

    def _write(self, name: str, mirrored: str, step: int, row: dict[str, Any]) -> None:
        self.files[name].write(**row)
        if self.alarms is not None:
            self.alarms.add(name, row)
        self.mirrors.send({mirrored: row} if mirrored else row, step)

    def close(self, status: str, reason: str, step: int, *, tokens: int, seconds: float, skipped: int) -> None:
        """Write the summary and close everything."""
        if not self.ranks.first:
            return
        counted = parameters(self.run.model)
        write_json(
            self.out / "summary.json",
            {
                "schema_version": SCHEMA_VERSION,
                "status": status,
                "reason": reason,
                "step": step,
                "tokens": tokens,
                "seconds": seconds,
                "parameters_total": counted.total,
                "parameters_active": counted.active,
                "train_flops_per_token": self.flops_per_token,
                "peak_memory_bytes": memory.peak_memory_bytes(self.ranks.device),
                "skipped_steps": skipped,
                "promise": self.run.logging.promise,
            },
        )
        self.abandon()

    def abandon(self) -> None:
        """Close everything, without a summary."""
        if self.ranks.first:
            for file in self.files.values():
                file.close()
            self.mirrors.close()
