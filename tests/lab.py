"""Tiny runs, each trained once, and what can be seen of them: losses, rates, files, calls, a corpus, a parameter count.

`Lab` trains and keeps; every function below it takes the lab and a run, and returns a value that `==` compares.
"""

import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_runs import tiny_dict
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe import moe_layer, parallel
from moe.config.layout import Layout, resolve
from moe.config.load import load
from moe.config.schema import Run
from moe.data import prepare
from moe.errors import ConfigError, TrainingStopped, UserError
from moe.experts import BACKENDS
from moe.model import Transformer
from moe.parallel import Ranks
from moe.parallel.exchange import Exchange
from moe.parallel.mesh import build
from moe.parallel.pipeline import Pipeline
from moe.routing import Routing, Selection, fixed_offsets, plan
from moe.train import train
from moe.train.placing import place_by_load
from moe.train.record import default_out
from moe.train.sharding import blocks_of, spread
from moe.train.step import micro_ranges


@dataclass(frozen=True)
class Trained:
    """A finished (or stopped) run: its folder, what it printed, what it called how often, what autograd kept."""

    folder: Path
    printed: str
    calls: Counter[str]
    saved_bytes: int

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of the run's logs."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files."""
        return json.loads((self.folder / f"{name}.json").read_text())


class Lab:
    """Tiny runs over a corpus in `folder`, each trained once however many fields are seen on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = tiny_dict(folder)
        self.trained: dict[Run, Trained] = {}

    def run(self, *overrides: str) -> Run:
        """The tiny run with overrides."""
        return load(self.base, overrides)

    def train(self, run: Run) -> Trained:
        """Train a run, or give back what came of it before."""
        if run not in self.trained:
            folder = self.folder / "runs" / str(len(list((self.folder / "runs").glob("*"))))
            calls: Counter[str] = Counter()
            kept: list[int] = []
            printed = io.StringIO()
            with watching(calls, kept), redirect_stdout(printed):
                try:
                    train(run, folder)
                except TrainingStopped:
                    calls["stopped"] += 1
            self.trained[run] = Trained(folder, printed.getvalue(), calls, sum(kept))
        return self.trained[run]

    def write(self, name: str, text: str) -> str:
        """A file for a run to read; returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text)
        return str(path)


@contextmanager
def watching(calls: Counter[str], kept: list[int]) -> Iterator[None]:
    """Count forward passes, backends, compilations, mirrors and copies to save, and the bytes that autograd keeps."""

    def counted(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return wrapper

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def wandb_init(*, mode: str, **_: Any) -> SimpleNamespace:
        calls[f"wandb {mode}"] += 1
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(patch.object(Transformer, "forward", counted("forward", Transformer.forward)))
        backends = {name: counted(f"backend {name}", function) for name, function in BACKENDS.items()}
        stack.enter_context(patch.dict(BACKENDS, backends))
        stack.enter_context(patch("moe.moe_layer.linear", counted("compiled product", moe_layer.linear)))
        stack.enter_context(patch.object(DefaultStager, "stage", counted("copy to save", DefaultStager.stage)))
        stack.enter_context(patch("torch.compile", counted("compile", lambda model, **_: model)))
        stack.enter_context(patch.dict(sys.modules, {"wandb": SimpleNamespace(init=wandb_init)}))  # type: ignore[dict-item]
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------- what to see


def parameters(lab: Lab, run: Run) -> Any:
    """Parameters of the model that is built."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(run.model).parameters())


def losses(lab: Lab, run: Run) -> Any:
    """Every loss and gradient norm of the training steps, and the evaluation after them."""
    trained = lab.train(run)
    steps = [(row["loss"], row["losses"], row["grad_norm"]) for row in trained.rows("metrics")]
    return steps, [row["loss"] for row in trained.rows("evals")]


def rates(lab: Lab, run: Run) -> Any:
    """Learning rate of each step."""
    return [row["lr"] for row in lab.train(run).rows("metrics")]


def steps(lab: Lab, run: Run) -> Any:
    """Steps in metrics.jsonl."""
    return [row["step"] for row in lab.train(run).rows("metrics")]


def evaluations(lab: Lab, run: Run) -> Any:
    """Step and number of rows of each evaluation."""
    return [(row["step"], row["rows"], row["final"]) for row in lab.train(run).rows("evals")]


def checkpoints(lab: Lab, run: Run) -> Any:
    """Checkpoints that are left."""
    return sorted(path.name for path in (lab.train(run).folder / "checkpoints").glob("step_*"))


def files(lab: Lab, run: Run) -> Any:
    """First-level names in the run's folder."""
    return sorted(path.name for path in lab.train(run).folder.iterdir())


def routing_steps(lab: Lab, run: Run) -> Any:
    """Steps in routing.jsonl."""
    return sorted({row["step"] for row in lab.train(run).rows("routing")})


def drops(lab: Lab, run: Run) -> Any:
    """Drop rates in routing.jsonl."""
    return [row["drop_rate"] for row in lab.train(run).rows("routing")]


def has_mfu(lab: Lab, run: Run) -> Any:
    """Whether metrics.jsonl has the model FLOPs utilisation."""
    return ["mfu" in row for row in lab.train(run).rows("metrics")]


def printed(lab: Lab, run: Run) -> Any:
    """Whether the run said anything."""
    return bool(lab.train(run).printed.strip())


def calls(lab: Lab, run: Run) -> Any:
    """Forward passes, expert backends, compilations, mirrors."""
    return lab.train(run).calls


def kept_bytes(lab: Lab, run: Run) -> Any:
    """Bytes that autograd keeps for the backward pass."""
    return lab.train(run).saved_bytes


def threads(lab: Lab, run: Run) -> Any:
    """Threads that run.json records."""
    return lab.train(run).json("run")["meta"]["threads"]


def stopped_at(lab: Lab, run: Run) -> Any:
    """Step and status of the summary."""
    summary = lab.train(run).json("summary")
    return summary["step"], summary["status"]


def place(lab: Lab, run: Run) -> Any:
    """Where the run would train, or why it cannot."""
    try:
        return parallel.start(run.train.device).device.type
    except UserError as error:
        return str(error)


def folder_name(lab: Lab, run: Run) -> Any:
    """Default folder of the run, without the time."""
    return str(default_out(run))[:-15]


def corpus(lab: Lab, run: Run) -> Any:
    """Size and first batch of the prepared corpus."""
    found = prepare(run.data)
    batch = found.train_batch(0, range(8), batch_rows=8, seed=0)
    sizes = found.num_train_rows, found.num_validation_rows, found.vocab_size
    return sizes, batch.ids_BS.tolist(), (batch.targets_BS == -100).tolist()


def is_readable(lab: Lab, run: Run) -> Any:
    """Whether the corpus can be prepared."""
    try:
        prepare(run.data)
    except UserError:
        return False
    return True


def corpus_folder(lab: Lab, run: Run) -> Any:
    """Where the prepared corpus is."""
    return prepare(run.data).folder


def streams(lab: Lab, run: Run) -> Any:
    """How `datasets` was asked to load."""
    import datasets

    fresh = load(run, [f"data.cache_dir={tempfile.mkdtemp(dir=lab.folder)}"])
    with patch("datasets.load_dataset", wraps=datasets.load_dataset) as spy:
        prepare(fresh.data)
    return [call.kwargs["streaming"] for call in spy.call_args_list]


def spread_over_eight(lab: Lab, run: Run) -> Any:
    """What rank 5 of eight holds of every parameter, and its rows, or why not; nobody stands in for the others."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    try:
        try:
            layout = resolve(run, 8)
        except ConfigError as error:
            return str(error)
        ranks = Ranks(5, 8, torch.device("cpu")).arranged(layout)
        with torch.device("meta"):
            model = Transformer(run.model, blocks=blocks_of(run, ranks))
        spread(model, run, ranks)
        held = {name: _held(parameter).numel() for name, parameter in model.named_parameters()}
        return held, micro_ranges(run, ranks)
    finally:
        dist.destroy_process_group()


def _held(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def passes(lab: Lab, run: Run) -> str:
    """The forward (F) and backward (B) passes of the last stage over four micro-batches, in their order; it is the only one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        ranks = Ranks(0, 1, device, mesh=build(Layout(), device))
        weight, order = torch.ones((), requires_grad=True), []

        def call() -> torch.Tensor:
            order.append("F")
            objective = weight * 2
            objective.register_hook(lambda grad: order.append("B"))
            return objective

        Pipeline(run.parallel.pipeline_schedule, ranks).step([call] * 4, torch.empty(3))
        return "".join(order)
    finally:
        dist.destroy_process_group()


def travellers(lab: Lab, run: Run) -> Any:
    """Vectors that travel for 8 tokens of two experts each, in a group of one rank."""
    assert run.model.moe is not None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings, E = run.parallel, run.model.moe.num_experts
        exchange = Exchange(dist.group.WORLD, E, settings.dispatch, settings.dispatch_capacity_factor)
        token_R = torch.arange(8).repeat_interleave(2)
        expert_R = torch.arange(16) % E
        selection = Selection(token_R, expert_R)
        routing = Routing(token_R, expert_R, torch.ones(16), fixed_offsets(8, 2, token_R.device), E, selection)
        return exchange.start(torch.ones(8, 4), plan(routing), training=True).units_UD.clone().shape
    finally:
        dist.destroy_process_group()


def placed(lab: Lab, run: Run) -> Any:
    """The expert in each slot of two ranks, where the first half of the experts has been busy; or why there are no two."""
    try:
        layout = resolve(run, 2)
    except ConfigError as error:
        return str(error)
    folder = Path(lab.write("placed/routing.jsonl", '{"layer": 0, "step": 1, "counts": [9, 9, 1, 1]}\n')).parent
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        ranks = Ranks(0, 2, torch.device("cpu")).arranged(layout)
        with torch.device("meta"):
            model = Transformer(run.model)
        spread(model, run, ranks)
        with patch.object(Ranks, "broadcast", lambda self, value: value):
            place_by_load(cast("Any", SimpleNamespace(run=run, ranks=ranks, model=model)), folder)
        return [layer.experts.exchange.order for _, layer in model.moe_layers() if layer.experts.exchange]
    finally:
        dist.destroy_process_group()


def waits(lab: Lab, run: Run) -> Any:
    """How long a process group waits for a rank."""
    seen: list[Any] = []
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    store = iter([(dist.HashStore(), 0, 2)])
    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", environment))
        stack.enter_context(patch("torch.distributed.rendezvous", lambda _: store))
        stack.enter_context(
            patch("torch.distributed.init_process_group", lambda *_, timeout, **__: seen.append(timeout))
        )
        stack.enter_context(patch("torch.distributed.new_group", lambda **_: dist.ProcessGroup(0, 2)))
        stack.enter_context(patch("torch.distributed.get_rank", lambda: 0))
        stack.enter_context(patch("torch.distributed.get_world_size", lambda: 2))
        parallel.start("cpu", run.parallel.timeout_seconds)
    return seen
