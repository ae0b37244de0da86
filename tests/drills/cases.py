"""What is done to a run in each drill: twelve faults with the cause that the doctor must name first, and ten healthy runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe.data import Batch
from moe.data.batches import NO_LOSS, Corpus
from moe.model import Transformer
from moe.routers import topk
from moe.routing import Selection
from moe.train import loop
from moe.train import step as step_module

from .sizes import STEPS

Change = Callable[[Transformer, int], None]
"""Acts on the model before the first step (step 0) and after each step."""


@dataclass(frozen=True)
class Case:
    """One drill: settings, what is injected, and what the doctor should say."""

    cause: str | None
    """The finding that must be first; None for a healthy run."""
    overrides: tuple[str, ...] = ()
    """Settings; HALF stands for half the rows of a batch."""
    change: Change | None = None
    patches: Callable[[], list[Any]] = list
    """Patches that hold during the run."""
    since: int = 0
    """The step from which the fault acts."""
    size: str = "small"
    """Size at which a healthy configuration is run."""

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Everything that the case changes in the trainer, for as long as the context lasts."""
        build, one_step = loop.build_state, loop.train_step

        def build_state(*args: Any) -> Any:
            state = build(*args)
            if self.change is not None:
                self.change(state.model, 0)
            return state

        def train_step(state: Any, step: int, **options: Any) -> Any:
            result = one_step(state, step, **options)
            if self.change is not None:
                self.change(state.model, step + 1)
            return result

        with ExitStack() as stack:
            stack.enter_context(patch.object(loop, "build_state", build_state))
            stack.enter_context(patch.object(loop, "train_step", train_step))
            for each in self.patches():
                stack.enter_context(each)
            yield


# ------------------------------------------------------------------------------------------------- what is injected


def frozen() -> Change:
    """The router's weights are put back after every step."""
    first: dict[int, Tensor] = {}

    def change(model: Transformer, step: int) -> None:
        for index, layer in model.moe_layers():
            weight = layer.router.weight_ED.data
            if step == 0:
                first[index] = weight.clone()
            weight.copy_(first[index])

    return change


def aligned(model: Transformer, step: int) -> None:
    """The router's rows keep a twentieth of their distance from their mean, which is given a length."""
    for _, layer in model.moe_layers():
        weight = layer.router.weight_ED.data
        mean = weight.mean(0)
        if step == 0:
            mean = mean * (0.1 * len(mean) ** 0.5 / mean.norm())
        weight.copy_(mean + 0.05 * (weight - weight.mean(0)))


def zeroed(model: Transformer, step: int) -> None:
    """The second expert of the last layer always puts out zero."""
    _, layer = model.moe_layers()[-1]
    layer.experts.w_down_EFD.data[1] = 0


def large_router(model: Transformer, step: int) -> None:
    """The router starts with forty times its size."""
    if step == 0:
        for _, layer in model.moe_layers():
            layer.router.weight_ED.data *= 40


def tied(model: Transformer, step: int) -> None:
    """All experts of a layer are kept at their mean."""
    for _, layer in model.moe_layers():
        for weight in layer.experts.parameters():
            weight.data.copy_(weight.data.mean(0, keepdim=True).expand_as(weight))


def bfloat16_logits() -> list[Any]:
    """Logits from operands rounded to bfloat16, as a router does that follows its input's type (float64 stays)."""

    def logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.bfloat16
        return torch.nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype)).to(
            torch.promote_types(dtype, torch.float32)
        )

    return [patch.object(topk, "linear_logits", logits)]


class HalfDropped:
    """From the middle of the run on, no token chooses an expert of the upper half."""

    def __init__(self) -> None:
        self.on = False

    def change(self, model: Transformer, step: int) -> None:
        self.on = step >= STEPS // 2

    def patches(self) -> list[Any]:
        choose = topk.choose

        def without_half(score: str, logits_TE: Tensor, k: int, replay: Selection | None, **options: Any) -> Any:
            if self.on:
                T, E = logits_TE.shape
                expert_TK = logits_TE[:, : E // 2].topk(k, dim=1).indices
                replay = Selection(torch.arange(T).repeat_interleave(k), expert_TK.flatten())
            return choose(score, logits_TE, k, replay, **options)

        return [patch.object(topk, "choose", without_half)]


def padded_corpus() -> Any:
    """Rows whose last third is padding."""
    whole = Corpus.train_batch

    def train_batch(self: Corpus, *args: Any, **options: Any) -> Batch:
        batch = whole(self, *args, **options)
        keep = batch.ids_BS.shape[1] * 2 // 3
        ids, targets, valid = batch.ids_BS.clone(), batch.targets_BS.clone(), batch.valid_BS.clone()
        ids[:, keep:], targets[:, keep:], valid[:, keep:] = 256, NO_LOSS, False
        return replace(batch, ids_BS=ids, targets_BS=targets, valid_BS=valid)

    return patch.object(Corpus, "train_batch", train_batch)


def padding_counted() -> list[Any]:
    """Padding that the routers are not told of."""
    inputs = step_module._inputs

    def blind(*args: Any) -> Any:
        tokens = inputs(*args)
        return replace(tokens, valid_T=torch.ones_like(tokens.valid_T))

    return [padded_corpus(), patch.object(step_module, "_inputs", blind)]


# ---------------------------------------------------------------------------------------------------------- the cases

ROUTER = "model.moe.router"


def faults() -> dict[str, Case]:
    """Every fault, fresh (some carry state)."""
    half = HalfDropped()
    return {
        "frozen router": Case("router_frozen", change=frozen()),
        "router rows aligned": Case("rows_aligned", change=aligned),
        "an expert's output zeroed": Case("utility_dead", change=zeroed),
        "tiny capacity": Case("drops", (f"{ROUTER}.capacity_factor=0.4",)),
        "bf16 router, large logits": Case(
            "precision", (f"{ROUTER}.z_weight=0",), change=large_router, patches=bfloat16_logits
        ),
        "balance weight 0": Case(
            "collapse",
            (f"{ROUTER}.balance.weight=0", f"{ROUTER}.z_weight=0", f"{ROUTER}.gate=full", "model.moe.top_k=1"),
        ),
        "balance weight ×1000": Case("balance_dominates", (f"{ROUTER}.balance.weight=10",)),
        "learning rate ×30": Case("learning_rate", ("train.optimizer.lr=0.12",)),
        "batch too small": Case("starvation", ("train.batch_rows=1", "train.micro_rows=1")),
        "experts tied": Case("redundancy", change=tied),
        "half the experts dropped midway": Case("dead", change=half.change, patches=half.patches, since=STEPS // 2),
        "padding counted as load": Case("padding_counted", patches=padding_counted),
    }


def healthy() -> dict[str, Case]:
    """Ten configurations that are in order, over routers and sizes."""
    return {
        "topk": Case(None),
        "topk, 16 experts": Case(None, size="wide"),
        "loss_free": Case(None, (f"{ROUTER}=loss_free", f"{ROUTER}.bias_rate=0.01")),
        "switch, one expert per token": Case(
            None, (f"{ROUTER}=switch", "model.moe.top_k=1", f"{ROUTER}.capacity_factor=2")
        ),
        "hash, a control": Case(None, (f"{ROUTER}=hash",), size="wide"),
        "expert_choice": Case(None, (f"{ROUTER}=expert_choice",)),
        "quantile": Case(None, (f"{ROUTER}=quantile",), size="wide"),
        "gpt_oss with a shared expert": Case(None, (f"{ROUTER}=gpt_oss", "model.moe.shared_hidden=32")),
        "st_moe in bfloat16, recomputed": Case(
            None,
            (
                f"{ROUTER}=st_moe",
                f"{ROUTER}.capacity_factor=2",
                "train.precision=bfloat16",
                "train.activation_checkpointing=true",
            ),
        ),
        "topk with padded rows, accumulated": Case(
            None, ("train.micro_rows=HALF",), patches=lambda: [padded_corpus()], size="wide"
        ),
    }
