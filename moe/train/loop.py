"""From a configuration to a finished run folder: set up, train, log, evaluate, save, stop cleanly."""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from moe import checkpoint, parallel
from moe.config.check import check_world
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.cost import mfu, parameters, peak_flops, train_flops_per_token
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError, DataError, TrainingStopped
from moe.experts import resolve_backend
from moe.metrics import SCHEMA_VERSION, JsonLines, routing_row, write_json
from moe.parallel import Ranks
from moe.train import record
from moe.train.console import Console
from moe.train.evaluate import EvaluationResult, evaluate
from moe.train.mirrors import Mirrors, require_tensorboard
from moe.train.replay import Recorder, Replayer
from moe.train.step import State, StepResult, build_state, needs_first_pass, train_step


def train(run: Run, out: Path | None = None, notices: Sequence[str] = ()) -> Path:
    """Train a run from its first step and return its folder.

    Raises ConfigError for a folder that is not empty or settings that this machine or number of ranks cannot hold, DataError
    for the corpus, TrainingStopped after too many non-finite steps.
    """
    with _ranks(run) as ranks:
        folder = Path(ranks.broadcast(str(out if out is not None else record.default_out(run))))
        _check(run, ranks)
        record.require_free(folder)
        console = _console(run, ranks, notices)
        state = _set_up(run, ranks, console)
        # the folder is claimed last, so that nothing is left behind when the settings or the data are refused
        ranks.first_then_others(lambda: _claim(folder, run, ranks))
        return Loop(state, folder, console, begin=0, overrides=[]).run()


def resume(out: Path, overrides: Sequence[str] = ()) -> Path:
    """Continue a run from its newest checkpoint (from the start if it has none), with changed settings if any.

    Raises CheckpointError if there is no run in `out`, or if the model, the data or the seed would change.
    """
    if not (out / "run.json").is_file():
        raise CheckpointError(f"{out} holds no run.json, so there is nothing to resume: give the folder of a run")
    before = load(out / "run.json")
    run = load(out / "run.json", overrides)
    for name in ("model", "data", "seed"):
        if dump(getattr(run, name)) != dump(getattr(before, name)):
            raise CheckpointError(
                f"{name} cannot change when a run resumes: start a new run with 'moe train {out / 'run.json'}'"
            )
    with _ranks(run) as ranks:
        _check(run, ranks)
        console = _console(run, ranks, [])
        found = checkpoint.published(out)
        state = _set_up(run, ranks, console)
        begin = found[-1].step if found else 0
        if begin > run.train.steps:
            raise CheckpointError(
                f"{out} is at step {begin}, past train.steps={run.train.steps}: set train.steps to more"
            )
        if found:
            checkpoint.load(found[-1], state.model, state.optimizer, ranks)
            _announce_layout(found[-1].meta, ranks, console)
        if ranks.first and overrides:
            document = json.loads((out / "run.json").read_text(encoding="utf-8"))
            write_json(out / "run.json", {**document, "run": dump(run)})
        console.say(f"resuming {out} at step {begin} of {run.train.steps}")
        return Loop(
            state, out, console, begin=begin, overrides=list(overrides), meta=found[-1].meta if found else {}
        ).run()


@contextmanager
def _ranks(run: Run) -> Iterator[Ranks]:
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    joined_before = parallel.joined()
    try:
        yield parallel.start(run.train.device)
    finally:
        if not joined_before:
            parallel.stop()


def _check(run: Run, ranks: Ranks) -> None:
    """Refuse what this machine or number of ranks cannot do, before anything is prepared or written."""
    check_world(run, ranks.world_size)
    if run.model.moe is not None:
        resolve_backend(run.model.moe.backend)
    if run.logging.tensorboard:
        require_tensorboard()


def _claim(folder: Path, run: Run, ranks: Ranks) -> None:
    if ranks.first:
        record.claim_folder(folder)
        record.write_run(folder, run, ranks, _backend(run))


def _backend(run: Run) -> str:
    return resolve_backend(run.model.moe.backend) if run.model.moe is not None else "none"


def _console(run: Run, ranks: Ranks, notices: Sequence[str]) -> Console:
    console = Console(run.logging.console, run.train.steps, first_rank=ranks.first)
    for notice in notices:
        console.say(notice)
    return console


def _set_up(run: Run, ranks: Ranks, console: Console) -> State:
    """Corpus, model and optimizer, with what the user should know said once."""
    corpus = ranks.first_then_others(lambda: prepare(run.data))
    if ranks.broadcast(corpus.fingerprint) != corpus.fingerprint:
        raise DataError("the corpus changed while the ranks were opening it: start again")
    console.say(corpus.describe())
    if corpus.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({run.model.vocab_size}) must be at least the tokenizer's vocabulary ({corpus.vocab_size}): "
            f"set model.vocab_size={corpus.vocab_size}"
        )
    if run.evaluation.final_rows > corpus.num_validation_rows:
        raise ConfigError(
            f"evaluation.final_rows ({run.evaluation.final_rows}) is more than the {corpus.num_validation_rows} validation rows "
            f"of this corpus: use at most that, or a larger data.validation_fraction (now {run.data.validation_fraction})"
        )
    state = build_state(run, ranks, corpus)
    if run.logging.replay_routing:
        state.replayer = Replayer(Path(run.logging.replay_routing), len(state.model.moe_layers()))
    counted = parameters(run.model)
    console.say(
        f"{run.name}: {counted.total:,} parameters, {counted.active:,} active per token; "
        f"{ranks.world_size} rank(s) on {ranks.device.type}, {torch.get_num_threads()} thread(s); expert backend {_backend(run)}"
    )
    if run.model.moe is not None and not state.model.moe_layers()[0][1].router.causal:
        console.say(
            "WARNING: this router is not causal: a token's experts depend on later tokens of its row, so training and "
            "evaluation losses are flattered, and generation cannot route the same way"
        )
    if needs_first_pass(run, ranks.world_size):
        console.say(
            "balance scope 'global' with this layout counts rows in a first forward pass without gradient: about a third "
            "more compute per step; scope 'sequence', or batch_rows = micro_rows, avoids it"
        )
    return state


def _announce_layout(meta: dict[str, Any], ranks: Ranks, console: Console) -> None:
    layout = {"world_size": ranks.world_size, "threads": torch.get_num_threads()}
    changed = [f"{name} {meta[name]} -> {value}" for name, value in layout.items() if meta.get(name, value) != value]
    if changed:
        console.say(f"layout changed ({', '.join(changed)}): results agree to rounding, not bitwise")


class Loop:
    """The state of a run in progress; `run` trains to the last step."""

    def __init__(
        self,
        state: State,
        out: Path,
        console: Console,
        *,
        begin: int,
        overrides: list[str],
        meta: dict[str, Any] | None = None,
    ):
        self.state, self.out, self.console, self.begin = state, out, console, begin
        self.config, self.ranks = state.run, state.ranks
        meta = meta or {}
        self.tokens: int = meta.get("tokens", 0)
        self.skipped: int = meta.get("skipped_steps", 0)
        self.seconds: float = meta.get("seconds", 0.0)
        self.best: dict[str, Any] | None = meta.get("best")
        self.nonfinite_in_a_row: int = meta.get("nonfinite_in_a_row", 0)
        self.interrupted = False
        self.flops_per_token = train_flops_per_token(self.config.model, self.config.data.sequence_length)
        self.peak_flops = self._peak_flops()
        if self.config.logging.record_routing:
            state.recorder = Recorder(out / "replay")
        self.logs: dict[str, JsonLines] = {}
        if self.ranks.first:
            attempt = record.begin_attempt(out, begin, self.ranks, overrides)
            self.logs = {name: JsonLines(out / f"{name}.jsonl", attempt) for name in ("metrics", "routing", "evals")}
            self.mirrors = Mirrors(self.config, out, console.say)

    def run(self) -> Path:
        """Train from `begin` to the last step; on a signal, save and stop."""
        self.console.begin(self.begin)
        try:
            with self._signals():
                status, reason, step = self._steps()
        finally:
            self.console.end()
        self._summarise(status, reason, step)
        for log in self.logs.values():
            log.close()
        if self.ranks.first:
            self.mirrors.close()
        if status == "stopped":
            raise TrainingStopped(f"{reason}; the run is in {self.out}")
        self.console.say(f"{status} at step {step}: {self.out}" + (f" ({reason})" if reason else ""))
        return self.out

    def _steps(self) -> tuple[str, str, int]:
        """(status, reason, finished steps)."""
        steps, every = self.config.train.steps, self.config.logging.routing_every
        for step in range(self.begin, steps):
            clock = time.perf_counter()
            routing_step = (step + 1) % every == 0 or step + 1 == steps
            result = train_step(self.state, step, stop=self.interrupted, maxima=routing_step)
            seconds = time.perf_counter() - clock
            self._log_step(step + 1, result, seconds, routing_step)
            if self.nonfinite_in_a_row >= self.config.train.max_nonfinite_steps:
                return "stopped", self._nonfinite_reason(), step + 1
            improved = self._maybe_evaluate(step + 1)
            if self._save_due(step + 1) or improved or result.stop:
                self._save(step + 1)
            if result.stop and step + 1 < steps:
                return "interrupted", f"asked to stop; 'moe resume {self.out}' continues", step + 1
        return "finished", "", steps

    def _log_step(self, step: int, result: StepResult, seconds: float, routing_step: bool) -> None:
        self.tokens += result.tokens
        self.seconds += seconds
        self.skipped += result.skipped
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if result.skipped else 0
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
            "tokens": self.tokens,
            "memory_bytes": record.memory_bytes(self.ranks.device),
            "skipped": result.skipped,
        }
        if self.peak_flops:
            row["mfu"] = mfu(self.flops_per_token, speed / self.ranks.world_size, self.peak_flops)
        self.logs["metrics"].write(**row)
        self.mirrors.send(row, step)
        if routing_step:
            for layer, statistics in result.statistics:
                fields = routing_row({name: value.cpu().numpy() for name, value in statistics.items()})
                self.logs["routing"].write(step=step, layer=layer, **fields)
                self.mirrors.send({f"routing/layer{layer}": fields}, step)
        if result.skipped:
            self.console.say(
                f"step {step}: loss {result.loss} or gradient norm {result.grad_norm} is not finite; skipped"
            )
        self.console.step(step, result.loss, result.lr, result.grad_norm, speed)

    def _nonfinite_reason(self) -> str:
        limit = self.config.train.max_nonfinite_steps
        return (
            f"training stopped: loss or gradient was not finite in {limit} steps in a row (train.max_nonfinite_steps={limit}): "
            "lower train.optimizer.lr, or look at the last lines of metrics.jsonl"
        )

    def _maybe_evaluate(self, step: int) -> bool:
        """Evaluate if it is time; returns whether the loss is the best so far and such a checkpoint is to be kept."""
        evaluation, final = self.config.evaluation, step == self.config.train.steps
        if not final and not (evaluation.every_steps and step % evaluation.every_steps == 0):
            return False
        rows = evaluation.rows
        result = self._evaluate(rows)
        self._log_evaluation(step, result, final=False)
        if final:
            result = self._evaluate(evaluation.final_rows)
            self._log_evaluation(step, result, final=True)
            if self.ranks.first:
                self._write_rows(result)
            return False
        improved = self.best is None or result.loss < self.best["loss"]
        if improved:
            self.best = {"step": step, "loss": result.loss}
        return improved and self.config.checkpoint.keep_best

    def _evaluate(self, rows: int) -> EvaluationResult:
        micro_rows = self.config.train.micro_rows
        return evaluate(self.state.model, self.state.corpus, self.ranks, rows=rows, micro_rows=micro_rows)

    def _log_evaluation(self, step: int, result: EvaluationResult, *, final: bool) -> None:
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
        self.logs["evals"].write(**row)
        self.mirrors.send({"evaluation": row}, step)
        self.console.say(
            f"step {step}: validation {result.bits_per_byte:.4f} bits/byte, {result.loss:.4f} nats/token "
            f"over {row['bytes']:,} bytes"
        )

    def _write_rows(self, result: EvaluationResult) -> None:
        temporary = self.out / ".final_rows.tmp"
        with temporary.open("wb") as file:
            np.savez(file, nats_row=result.nats_row, bytes_row=result.bytes_row, tokens_row=result.tokens_row)
        os.replace(temporary, self.out / "final_rows.npz")

    def _save_due(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return step == self.config.train.steps or bool(every and step % every == 0)

    def _save(self, step: int) -> None:
        meta = {
            "run": dump(self.config),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped_steps": self.skipped,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "best": self.best,
            "world_size": self.ranks.world_size,
            "threads": torch.get_num_threads(),
        }
        checkpoint.save(self.out, step, self.state.model, self.state.optimizer, meta, self.ranks)
        if self.ranks.first:
            keep_best = self.config.checkpoint.keep_best and self.best is not None
            checkpoint.prune(
                self.out, self.config.checkpoint.keep_last, self.best["step"] if keep_best and self.best else None
            )

    def _summarise(self, status: str, reason: str, step: int) -> None:
        if not self.ranks.first:
            return
        counted = parameters(self.config.model)
        write_json(
            self.out / "summary.json",
            {
                "schema_version": SCHEMA_VERSION,
                "status": status,
                "reason": reason,
                "step": step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "parameters_total": counted.total,
                "parameters_active": counted.active,
                "train_flops_per_token": self.flops_per_token,
                "peak_memory_bytes": record.peak_memory_bytes(self.ranks.device),
                "skipped_steps": self.skipped,
            },
        )

    def _peak_flops(self) -> float | None:
        if self.config.logging.peak_tflops:
            return self.config.logging.peak_tflops * 1e12
        device = self.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = peak_flops(name, self.config.train.precision)
        if found is None:
            self.console.say(f"no MFU: the peak of '{name}' is not known; logging.peak_tflops sets it")
        return found

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C asks for a checkpoint and an end after the current step; a second one ends at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # signals belong to the main thread; elsewhere the caller owns them
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
