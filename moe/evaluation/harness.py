"""A model here as lm-evaluation-harness sees one: log-likelihoods and greedy continuations. Needs the extra `harness`."""

import math
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe.errors import ConfigError, UserError
from moe.evaluation.offline_tasks import configs, items
from moe.generate import Sampling, stream
from moe.model import IGNORE, token_losses
from moe.opened import Opened, open_model

OFFLINE = "offline"
"""Stands for the tasks of offline_tasks.py."""


def adapter(opened: Opened, max_length: int) -> Any:
    """An lm_eval.api.model.LM over the model. `max_length`: the longest text it is meant for; longer contexts lose their front."""
    _require()
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    class Adapter(TemplateLM):
        """Scores one text at a time: what is batched together never changes a figure."""

        @property
        def eot_token_id(self) -> int:
            if opened.end is None:
                raise UserError("this tokenizer has no end-of-text token, which an empty context starts from")
            return opened.end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return opened.encode(string)

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return [self._score(context, continuation) for _, context, continuation in requests]

        @torch.no_grad()
        def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
            ids = torch.tensor([(context + continuation)[-(max_length + 1) :]])
            targets = ids[:, 1:].clone()
            targets[:, : -len(continuation)] = IGNORE
            logits_BSV = opened.model(ids[:, :-1]).logits_BSV
            right = logits_BSV.argmax(2) == targets
            return -float(token_losses(logits_BSV, targets).sum()), bool(right[targets != IGNORE].all())

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            """Windows side by side, each token scored once; the first window starts from the end-of-text token."""
            ids = [self.eot_token_id, *opened.encode(text)]
            total = 0.0
            for start in range(0, len(ids) - 1, max_length):
                window = ids[start : start + max_length + 1]
                total += self._score(window[:1], window[1:])[0]
            return total

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._continue(*request.args) for request in requests]

        def _continue(self, context: str, settings: dict[str, Any]) -> str:
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError("this adapter continues greedily: set do_sample to false")
            new = int(settings.get("max_gen_toks", 64))
            ids = (opened.encode(context) or [self.eot_token_id])[-max(1, max_length - new) :]
            written: list[int] = []
            for step in stream(
                opened.model, torch.tensor([ids]), new, sampling=Sampling(temperature=0), end=opened.end
            ):
                if int(step.token_B[0]) == opened.end:
                    break
                written.append(int(step.token_B[0]))
                if any(stop in opened.decode(written) for stop in stops if stop):
                    break
            text = opened.decode(written)
            return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)

    return Adapter()


def run_tasks(folder: Path, tasks: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """Run tasks of the harness on a run or an export; `offline` stands for ours. Returns JSON: figures by task.

    Raises UserError for an unknown task.
    """
    _require()
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    opened = open_model(folder)
    length = opened.run.data.sequence_length if opened.run is not None else 2048
    with tempfile.TemporaryDirectory() as temporary:
        own = configs(Path(temporary))
        chosen: list[Any] = [task for task in own if OFFLINE in tasks or task["task"] in tasks]
        others = [task for task in tasks if task != OFFLINE and task not in items()]
        manager = TaskManager()
        unknown = [task for task in others if task not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"lm-evaluation-harness has no task {', '.join(unknown)}: see lm_eval ls tasks, or use 'offline'"
            )
        found = simple_evaluate(
            adapter(opened, length), tasks=[*chosen, *others], limit=limit, bootstrap_iters=0, task_manager=manager
        )
    assert found is not None, "rank 0 of one process gets the results"
    return {
        "folder": str(folder),
        "step": opened.step,
        "tasks": {
            name: {**_figures(values), "items": found["n-samples"][name]["effective"]}
            for name, values in found["results"].items()
        },
    }


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """A task's metrics by name, without the harness's filter names; a figure without a value is left out."""
    kept = {key.split(",")[0]: value for key, value in values.items() if isinstance(value, (int, float))}
    return {
        key: float(value)
        for key, value in kept.items()
        if math.isfinite(value) and "stderr" not in key and key != "sample_len"
    }


def describe(result: dict[str, Any]) -> str:
    """One line per task."""
    lines = [f"{result['folder']}: lm-evaluation-harness"]
    for name, figures in result["tasks"].items():
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items() if key != "items")
        lines.append(f"{name:<16}  {figures['items']:>5} items  {shown}")
    return "\n".join(lines)


def _require() -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks need the package lm-eval: pip install 'moe-lab[harness]'")
