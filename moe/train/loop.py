"""From a configuration to a finished run folder: set up, train, evaluate, save, stop cleanly."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from moe import checkpoint, parallel
from moe.config.layout import resolve
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.cost import parameters
from moe.cost.charges import rates_of
from moe.cost.shares import needs_first_pass
from moe.data import Corpus, prepare
from moe.errors import CheckpointError, ConfigError, DataError, TrainingStopped
from moe.experts import resolve_backend
from moe.files import write_json
from moe.parallel import Ranks, watched
from moe.parallel.pipeline import gather_stages
from moe.train import record
from moe.train.console import Console
from moe.train.evaluate import EvaluationResult, evaluate
from moe.train.health import measure, router_weights
from moe.train.ledger import Ledger, Meters, device_name
from moe.train.memory import require_memory
from moe.train.mirrors import require_tensorboard
from moe.train.placing import place_by_load
from moe.train.replay import Recorder, Replayer
from moe.train.runlog import RunLog
from moe.train.stages import by_layer
from moe.train.step import State, StepResult, build_state, train_step
from moe.train.watch import GainWatch, require_forecast


def train(run: Run, out: Path | None = None, notices: Sequence[str] = ()) -> Path:
    """Train a run from its first step and return its folder.

    A worker that torchrun has restarted continues the run in `out` instead. Raises ConfigError for a folder that is not
    empty or settings that this machine or number of ranks cannot hold, DataError for the corpus, TrainingStopped after
    too many non-finite steps.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        if out is None:
            raise ConfigError(
                "torchrun restarted this run, which has no out=DIR to be found by: give one on the command line"
            )
        if (out / "run.json").is_file():
            return resume(out)
    if run.model.lora is not None:
        raise ConfigError(
            "model.lora trains adapters on weights that are trained already, and this run starts from none: "
            "use 'moe lora RUN --out DIR', or model.lora=null"
        )
    with _ranks(run) as ranks:
        folder = Path(ranks.broadcast(str(out if out is not None else record.default_out(run))))
        _check(run, ranks)
        ranks.first_then_others(lambda: record.require_free(folder) if ranks.first else None)
        running = Meters(run, ranks)
        console = _console(run, ranks, notices)
        state = _set_up(run, ranks, console)
        # the folder is claimed last, so that nothing is left behind when the settings or the data are refused
        held = ranks.first_then_others(lambda: _claim(folder, state))
        with held:
            return Loop(state, folder, console, running, begin=0, overrides=[], meta={}).run()


def resume(out: Path, overrides: Sequence[str] = ()) -> Path:
    """Continue a run from its newest checkpoint (from the start if it has none), with changed settings if any.

    Raises CheckpointError if there is no run in `out`, or if the model, the data or their order would change.
    """
    if not (out / "run.json").is_file():
        raise CheckpointError(f"{out} holds no run.json, so there is nothing to resume: give the folder of a run")
    before, notices = load(out / "run.json"), []
    run = load(out / "run.json", overrides, notices=notices)
    _refuse_changes(before, run, out)
    with _ranks(run) as ranks:
        _check(run, ranks)
        running = Meters(run, ranks)
        found, damaged = ranks.broadcast(
            ranks.first_then_others(lambda: checkpoint.find(out) if ranks.first else (None, []))
        )
        begin = found.step if found else 0
        meta = found.meta if found else {}
        if begin > run.train.steps:
            raise CheckpointError(
                f"{out} is at step {begin}, past train.steps={run.train.steps}: set train.steps to more"
            )
        console = _console(run, ranks, notices)
        state = _set_up(run, ranks, console)
        document = json.loads((out / "run.json").read_text(encoding="utf-8"))
        _refuse_other_text(document["meta"], state.corpus, out)
        if found:
            placed = place_by_load(state, out)
            if placed:
                console.say(placed)
            checkpoint.load(found, state.model, state.optimizer, ranks)
            _announce_layout(meta, ranks, console)
        with ranks.first_then_others(lambda: record.lock(out) if ranks.first else nullcontext()):
            if ranks.first:
                for one in damaged:
                    console.say(_fallen_back(one, checkpoint.set_aside(one), begin))
                record.forget_end(out)
                write_json(out / "run.json", {**document, "run": dump(run)})
            where = f"at step {begin}" if found else "from the start, as it has no checkpoint,"
            console.say(f"resuming {out} {where} of {run.train.steps}")
            return Loop(state, out, console, running, begin=begin, overrides=list(overrides), meta=meta).run()


def _fallen_back(damaged: checkpoint.Damaged, aside: Path, begin: int) -> str:
    return (
        f"WARNING: the checkpoint of step {damaged.step} is damaged ({damaged.reason}) and was set aside as {aside}: "
        f"going back to step {begin}, which loses {damaged.step - begin} steps"
    )


def _refuse_other_text(meta: dict[str, Any], corpus: Corpus, out: Path) -> None:
    """The text must be the one that the run began with."""
    before = meta.get("data_fingerprint", corpus.fingerprint)
    if before != corpus.fingerprint:
        raise CheckpointError(
            f"the text of this run has changed since it began (fingerprint {before}, now {corpus.fingerprint}): "
            f"restore it, or start a new run with 'moe train {out / 'run.json'}'"
        )


def _refuse_changes(before: Run, run: Run, out: Path) -> None:
    """The model, the corpus and which row is in which step stay."""
    fixed = {
        "model": (before.model, run.model),
        "data": (before.data, run.data),
        "seed": (before.seed, run.seed),
        "train.batch_rows": (before.train.batch_rows, run.train.batch_rows),
    }
    for name, (old, new) in fixed.items():
        if dump(old) != dump(new):
            raise CheckpointError(
                f"{name} cannot change when a run resumes: start a new run with 'moe train {out / 'run.json'}'"
            )


@contextmanager
def _ranks(run: Run) -> Iterator[Ranks]:
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    joined_before = parallel.joined()
    try:
        ranks = parallel.start(run.train.device, run.parallel.timeout_seconds)
        yield ranks.arranged(resolve(run, ranks.world_size))
    finally:
        if not joined_before:
            parallel.stop()


def _check(run: Run, ranks: Ranks) -> None:
    """Refuse what this machine or number of ranks cannot do, before anything is prepared or written."""
    _backend(run)
    rates_of(run.cost, device_name(ranks.device))
    require_memory(run, ranks)
    require_forecast(run)
    if run.logging.tensorboard:
        require_tensorboard()


def _backend(run: Run) -> str:
    return resolve_backend(run.model.moe.backend) if run.model.moe is not None else "none"


def _claim(folder: Path, state: State) -> AbstractContextManager:
    """Make the folder and hold it; rank 0 does, for all."""
    if not state.ranks.first:
        return nullcontext()
    record.claim_folder(folder)
    held = record.lock(folder)
    record.write_run(folder, state.run, state.ranks, _backend(state.run), state.corpus.fingerprint)
    return held


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
    check_corpus(run, corpus)
    replayer = Replayer(Path(run.logging.replay_routing), run) if run.logging.replay_routing else None
    state = build_state(run, ranks, corpus)
    state.replayer = replayer
    counted = parameters(run.model)
    adapters = f", {counted.components['lora']:,} trained in adapters" if run.model.lora is not None else ""
    layout = f" ({ranks.layout.describe()})" if ranks.world_size > 1 else ""
    console.say(
        f"{run.name}: {counted.total:,} parameters, {counted.active:,} active per token{adapters}; {ranks.world_size} rank(s) on "
        f"{ranks.device.type}{layout}, {torch.get_num_threads()} thread(s); expert backend {_backend(run)}"
    )
    if not all(gather_stages(ranks, all(layer.router.causal for _, layer in state.model.moe_layers()))):
        console.say(
            "WARNING: this router is not causal: a token's experts depend on later tokens of its row, so training and "
            "evaluation losses are flattered, and generation cannot route the same way"
        )
    if state.pipeline is not None:
        stages = ", ".join(f"{held.start}-{held.stop - 1}" for held in gather_stages(ranks, state.model.blocks))
        console.say(
            f"pipeline of {ranks.layout.pipeline} stages, schedule {run.parallel.pipeline_schedule}: blocks {stages}"
        )
        if run.model.moe is not None and run.evaluation.probe_rows:
            console.say("health.jsonl is left out: its gradients are not measured across the stages of a pipeline")
    if needs_first_pass(run, ranks.layout):
        console.say(
            "balance scope 'global' with this layout counts rows in a first forward pass without gradient: about a "
            "third more compute per step; scope 'sequence', or batch_rows = micro_rows, avoids it"
        )
    return state


def check_corpus(run: Run, corpus: Corpus) -> None:
    """Raise ConfigError where the corpus has more tokens than the model, or fewer validation rows than are evaluated."""
    if corpus.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({run.model.vocab_size}) must be at least the tokenizer's vocabulary "
            f"({corpus.vocab_size}): set model.vocab_size={corpus.vocab_size}"
        )
    for name in ("rows", "final_rows"):
        rows = getattr(run.evaluation, name)
        if rows > corpus.num_validation_rows:
            raise ConfigError(
                f"evaluation.{name} ({rows}) is more than the {corpus.num_validation_rows} validation rows of this corpus: "
                f"use at most that, or a larger data.validation_fraction (now {run.data.validation_fraction})"
            )


def _announce_layout(meta: dict[str, Any], ranks: Ranks, console: Console) -> None:
    layout = {"world_size": ranks.world_size, "threads": torch.get_num_threads()}
    changed = [f"{name} {meta[name]} -> {value}" for name, value in layout.items() if meta.get(name, value) != value]
    if changed:
        console.say(f"layout changed ({', '.join(changed)}): results agree to rounding, not bitwise")


SETTLE_SECONDS = 2.0
"""Signals this soon after the first ask for nothing new."""


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop after the current step; a later one ends at once.

    What follows within SETTLE_SECONDS is the same request: a scheduler signals every process of a job, and torchrun hands
    its own signal on to the same workers.
    """

    def __init__(self) -> None:
        self.asked = False
        self.asked_at = 0.0

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Own both signals in the main thread; elsewhere they are the caller's."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and time.monotonic() - self.asked_at > SETTLE_SECONDS:
                # whatever is being written is published whole or not at all, so the process can go at once
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if not self.asked:
                self.asked, self.asked_at = True, time.monotonic()

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Loop:
    """The state of a run in progress; `run` trains to the last step."""

    def __init__(
        self,
        state: State,
        out: Path,
        console: Console,
        running: Meters,
        *,
        begin: int,
        overrides: list[str],
        meta: dict[str, Any],
    ):
        self.state, self.out, self.console, self.begin = state, out, console, begin
        self.config, self.ranks = state.run, state.ranks
        self.tokens: int = meta.get("tokens", 0)
        self.skipped: int = meta.get("skipped_steps", 0)
        self.seconds: float = meta.get("seconds", 0.0)
        self.best: dict[str, Any] | None = meta.get("best")
        self.nonfinite_in_a_row: int = meta.get("nonfinite_in_a_row", 0)
        self.stop = StopRequest()
        if self.config.logging.record_routing:
            state.recorder = Recorder(out / "replay", self.config, first_rank=self.ranks.first)
        self.log = RunLog(self.config, out, self.ranks, console, begin=begin, overrides=overrides)
        rows = state.corpus.num_validation_rows
        self.watch = GainWatch(self.config, out, self.log, begin=begin, validation_rows=rows)
        self.saver = checkpoint.Saver(
            out, state.model, state.optimizer, self.ranks, self.config.checkpoint, console.say
        )
        attempt = self.ranks.broadcast(self.log.attempt)
        self.ledger = Ledger(self.config, self.ranks, out, attempt, begin, running, lambda: self.saver.bytes_written)

    def run(self) -> Path:
        """Train from `begin` to the last step; on a signal, save and stop."""
        self.console.begin(self.begin)
        try:
            with self.stop.listening(), self._watch():
                status, reason, step = self._steps()
                with self.ranks.progress.unlimited("saving"):
                    self.saver.finish()
        except BaseException as error:
            error.add_note(f"rank {self.ranks.rank} was in {self.ranks.progress.where()}")
            self.saver.abandon()
            self.ledger.close()
            self.log.abandon()
            raise
        finally:
            self.console.end()
        self.ledger.close()
        self.log.close(status, reason, step, tokens=self.tokens, seconds=self.seconds, skipped=self.skipped)
        if status == "stopped":
            raise TrainingStopped(f"{reason}; the run is in {self.out}")
        self.console.say(f"{status} at step {step}: {self.out}" + (f" ({reason})" if reason else ""))
        return self.out

    def _watch(self) -> AbstractContextManager:
        """Looks after collectives that a rank does not come to."""
        if self.ranks.world_size == 1:
            return nullcontext()
        if not self.config.train.compile:  # a compiled model is one graph, which hooks would break
            self.ranks.progress.follow(self.state.model.layers)
            self.state.finite.follow(self.state.model.layers)
        return watched(self.ranks, self.config.parallel.timeout_seconds)

    def _steps(self) -> tuple[str, str, int]:
        """(status, reason, finished steps)."""
        steps, every = self.config.train.steps, self.config.logging.routing_every
        for step in range(self.begin + 1, steps + 1):
            clock = time.perf_counter()
            routing_step = step % every == 0 or step == steps
            self.ranks.progress.at("router weights", step=step)
            before = self._router_weights() if routing_step else {}
            with self.ledger.work("step", step, formula=self.ledger.step_flops) as spent:
                result = train_step(self.state, step - 1, stop=self.stop, maxima=routing_step)
                spent["tokens"] = result.tokens
            self.ranks.progress.at("logging", limited=False)
            self._count(result, time.perf_counter() - clock)
            self.log.step(step, result, time.perf_counter() - clock, self.tokens)
            self.saver.look()
            if routing_step:
                self.ranks.progress.at("router weights")
                self.log.routing(step, result, self._router_weights(), before)
            if self.nonfinite_in_a_row >= self.config.train.max_nonfinite_steps:
                return "stopped", self._nonfinite_reason(), step
            improved = self._maybe_evaluate(step) if not result.stop or step == steps else False
            if self._save_due(step) or improved or result.stop:
                self._save(step)
            if result.stop and step < steps:
                return "interrupted", f"asked to stop; 'moe resume {self.out}' continues", step
        return "finished", "", steps

    def _router_weights(self) -> dict[int, np.ndarray]:
        """Learned router matrices of all layers, those of other stages included."""
        return by_layer(self.ranks, router_weights(self.state.model))

    def _count(self, result: StepResult, seconds: float) -> None:
        self.tokens += result.tokens
        self.seconds += seconds
        self.skipped += result.skipped
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if result.skipped else 0

    def _nonfinite_reason(self) -> str:
        limit = self.config.train.max_nonfinite_steps
        return (
            f"training stopped: loss or gradient was not finite in {limit} steps in a row "
            f"(train.max_nonfinite_steps={limit}): lower train.optimizer.lr, or look at the last lines of metrics.jsonl"
        )

    def _maybe_evaluate(self, step: int) -> bool:
        """Evaluate if it is time; returns whether the loss is the best so far and such a checkpoint is to be kept."""
        evaluation, final = self.config.evaluation, step == self.config.train.steps
        if not final and not (evaluation.every_steps and step % evaluation.every_steps == 0):
            return False
        result = self._evaluate(step, evaluation.rows)
        self.log.evaluation(step, result, final=False)
        self.watch.look(step, self._evaluate)
        if self.state.model.moe_layers() and evaluation.probe_rows and self.state.pipeline is None:
            with self.ledger.work("health", step):
                rows = measure(self.state, step, self.out)
            self.log.health(step, rows)
        if final:
            self.log.evaluation(step, self._evaluate(step, evaluation.final_rows), final=True)
        improved = math.isfinite(result.loss) and (self.best is None or result.loss < self.best["loss"])
        if improved:
            self.best = {"step": step, "loss": result.loss}
        return improved and self.config.checkpoint.keep_best

    def _evaluate(self, step: int, rows: int, begin: int = 0) -> EvaluationResult:
        micro_rows = self.config.train.micro_rows
        self.ranks.progress.at("evaluation")
        share = rows / self.ranks.world_size
        with self.ledger.work("evaluate", step, units=share, formula=self.ledger.row_flops):
            model, corpus = self.state.model, self.state.corpus
            return evaluate(model, corpus, self.ranks, rows=rows, micro_rows=micro_rows, begin=begin)

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
        best = self.best["step"] if self.best is not None and self.config.checkpoint.keep_best else None
        with self.ranks.progress.unlimited("saving"):
            self.saver.save(step, meta, best)
        self.ledger.done("save", step)
