"""Routing health that is too dear for every step, measured at each evaluation; it changes no parameter and no state.

On the last step's whole batch (all ranks and micro-batches, no padding): gradients at the router, which experts go with
which tokens, sources and other experts. On a fixed probe set of validation rows: each token's experts, what all experts
make of the same tokens, and the router's choice against its choice in float64. Every part is a sum, so a layout changes
nothing; hooks are gone before any backward pass, so recomputation counts nothing twice.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.files import write_whole
from moe.init import is_bias
from moe.metrics import coactivation, mutual_information, overlap
from moe.model import Transformer, balancing_loss
from moe.moe_layer import MoELayer
from moe.parallel.parts import copies, part_here
from moe.routing import Routing, Selection, Tokens, fixed_offsets
from moe.train.evaluate import rounds
from moe.train.step import State, forward, step_inputs

ID_BUCKETS = 1024
"""Token ids are counted modulo this: exact for bytes, a lower bound of the information for larger vocabularies."""
SAMPLE_TOKENS = 256
"""Tokens of the probe set, about, that are sent through every expert."""
CHOICES = "probe_choices"
"""Folder of the probe set's choices: step_<step>.npz with packed bits layer_<i> [tokens, E/8]."""


@dataclass
class Seen:
    """What one expert layer did in a forward pass."""

    layer: int
    module: MoELayer
    x_TD: Tensor
    """The router's input."""
    tokens: Tokens
    routing: Routing
    expert_x_TD: Tensor
    """The experts' input."""


def router_weights(model: Transformer) -> dict[int, np.ndarray]:
    """The learned router matrix [E, D] of every expert layer that has one; host sync, for log steps only."""
    return {layer: weight.detach().float().cpu().numpy().copy() for layer, weight in _router_parameters(model).items()}


def measure(state: State, step: int, folder: Path) -> list[dict[str, Any]]:
    """The lines of health.jsonl after `step` steps, one per expert layer, the same on every rank.

    Rank 0 writes the probe set's choices into `folder`, where the next evaluation finds them.
    """
    training = state.model.training
    batch = _on_batch(state, step - 1)
    probe = _on_probe(state)
    state.model.train(training)
    choices = {layer: fields.pop("choices") for layer, fields in probe.items()}
    changes = _changes(choices, step, folder, last=step == state.run.train.steps)
    if state.ranks.first:
        packed = {f"layer_{layer}": np.packbits(choice, axis=1) for layer, choice in choices.items()}
        path = folder / CHOICES / f"step_{step:08d}.npz"
        write_whole(path, lambda stream: np.savez(stream, allow_pickle=False, **packed))
    state.ranks.wait_for_first()
    return [
        {"step": step, "layer": layer, **batch[layer], **probe[layer], **changes[layer]}
        for layer, _ in state.model.moe_layers()
    ]


# --------------------------------------------------------------------------------------------------- the last batch


def _on_batch(state: State, step: int) -> dict[int, dict[str, Any]]:
    """Gradients and tables of the batch of step `step` (from 0), with the parameters as they are now."""
    state = replace(state, forward=state.model, recorder=None)
    state.model.train()
    batches, inputs, targets, _ = step_inputs(state, step)
    weights = list(_router_parameters(state.model).values())
    sums = [torch.zeros(2, *weight.shape, dtype=torch.float64, device=weight.device) for weight in weights]
    layers = state.model.moe_layers()
    sources = len(state.corpus.data.sources)
    tables = [_Tables(_num_experts(layer), sources, state.ranks.device) for _, layer in layers]
    for batch, tokens in zip(batches, inputs, strict=True):
        given = {"targets_BS": batch.targets_BS.to(state.ranks.device), "step_targets": targets.float()}
        with watching(state.model) as seen:
            output = forward(state, batch, tokens, **given)
        _add_gradients(sums, 0, output.loss, weights, keep=not state.model.recompute)
        if state.model.recompute:
            # a recomputed block gives its activations back once only
            with watching(state.model) as seen:
                forward(state, batch, tokens, **given)
        _add_gradients(sums, 1, balancing_loss([one.routing for one in seen]), weights, keep=False)
        source_T = state.corpus.train_sources(step, batch.row_B.tolist(), batch_rows=state.run.train.batch_rows)
        source_T = source_T.repeat_interleave(batch.ids_BS.shape[1]).to(state.ranks.device)
        for table, one in zip(tables, seen, strict=True):
            table.add(chosen(one.routing.selection, one.tokens, one.routing.num_experts), one.tokens, source_T)
    norms = {
        layer: state.ranks.sum(total).flatten(1).norm(dim=1).tolist()
        for (layer, weight), total in zip(_router_parameters(state.model).items(), sums, strict=True)
        if weight.requires_grad or state.model.config.lora is None
    }
    return {
        layer: {**_gradient_fields(norms.get(layer)), **table.fields(state)}
        for (layer, _), table in zip(layers, tables, strict=True)
    }


def _add_gradients(
    sums: list[Tensor], kind: int, loss: Tensor | None, weights: Sequence[Tensor], *, keep: bool
) -> None:
    learned = [weight for weight in weights if weight.requires_grad]
    if loss is None or not loss.requires_grad or not learned:
        return
    grads = iter(torch.autograd.grad(loss, learned, retain_graph=keep, allow_unused=True))
    for total, weight in zip(sums, weights, strict=True):
        grad = next(grads) if weight.requires_grad else None
        if grad is not None:
            total[kind] += grad


def _gradient_fields(norms: list[float] | None) -> dict[str, float | None]:
    lm, balance = norms if norms is not None else (None, None)
    ratio = balance / lm if balance is not None and lm else None
    return {"lm_gradient": lm, "balance_gradient": balance, "gradient_ratio": ratio}


class _Tables:
    """Counts of one layer over a step's batch: pairs of experts, experts by token id, experts by source."""

    def __init__(self, num_experts: int, sources: int, device: torch.device):
        self.counts = [
            torch.zeros(rows, num_experts, dtype=torch.float64, device=device)
            for rows in (num_experts, ID_BUCKETS, sources)
        ]

    def add(self, chosen_TE: Tensor, tokens: Tokens, source_T: Tensor) -> None:
        choice_TE = chosen_TE.double()
        self.counts[0] += choice_TE.t() @ choice_TE
        if tokens.ids_T is not None:
            self.counts[1].index_add_(0, tokens.ids_T % ID_BUCKETS, choice_TE)
        self.counts[2].index_add_(0, source_T, choice_TE)

    def fields(self, state: State) -> dict[str, Any]:
        pairs_EE, by_id, by_source = (state.ranks.sum(count).cpu().numpy() for count in self.counts)
        share, chance, pair = coactivation(pairs_EE, np.diag(pairs_EE))
        token_information, token_floor = mutual_information(by_id)
        source_information, source_floor = mutual_information(by_source.T)
        several = by_source.shape[0] > 1
        return {
            "coactivation": share,
            "coactivation_floor": chance,
            "coactivation_pair": list(pair),
            "token_information": token_information,
            "token_information_floor": token_floor,
            "source_information": source_information if several else None,
            "source_information_floor": source_floor if several else None,
        }


# ---------------------------------------------------------------------------------------------------- the probe set


@torch.no_grad()
def _on_probe(state: State) -> dict[int, dict[str, Any]]:
    """Choices, expert outputs and rounding of the probe set, summed over ranks."""
    ranks, corpus, model = state.ranks, state.corpus, state.model
    model.eval()
    rows, S = min(state.run.evaluation.probe_rows, corpus.num_validation_rows), corpus.data.sequence_length
    stride = max(1, rows * S // SAMPLE_TOKENS)
    parts = {layer: _Probe(module, rows * S, ranks.device) for layer, module in model.moe_layers()}
    for span, batch, tokens in rounds(corpus, ranks, rows=rows, micro_rows=state.run.train.micro_rows):
        with watching(model) as seen:
            model(batch.ids_BS, tokens=tokens, head=False)
        # places in the probe set, of which this rank may see a part of each row
        row_T = torch.arange(span.start, span.stop, device=ranks.device).repeat_interleave(batch.ids_BS.shape[1])
        for one in seen:
            parts[one.layer].add(one, row_T * S + tokens.position_T if len(span) else None, stride)
    return {layer: part.fields(state) for layer, part in parts.items()}


class _Probe:
    """Sums of one layer over the probe set."""

    def __init__(self, module: MoELayer, tokens: int, device: torch.device):
        self.module, E = module, _num_experts(module)
        self.chosen_TE = torch.zeros(tokens, E, dtype=torch.int32, device=device)
        self.exact_TE = torch.zeros_like(self.chosen_TE)
        self.has_exact = True
        self.norm_E = torch.zeros(E, dtype=torch.float64, device=device)
        self.cosine_EE = torch.zeros(E, E, dtype=torch.float64, device=device)
        self.sampled = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, one: Seen, place_T: Tensor | None, stride: int) -> None:
        """Count tokens at these places of the probe set; None: no part of it, but other ranks have one."""
        E = one.routing.num_experts
        if place_T is None:
            every_output(self.module, one.expert_x_TD[:0])
            return
        self.chosen_TE[place_T] = chosen(one.routing.selection, one.tokens, E).int()
        exact = _choice_in_float64(one)
        self.has_exact &= exact is not None
        if exact is not None:
            self.exact_TE[place_T] = chosen(exact, one.tokens, E).int()
        x_ND = one.expert_x_TD[one.tokens.valid_T & (place_T % stride == 0)]
        y_END = every_output(self.module, x_ND).double()
        norm_EN = y_END.norm(dim=2)
        unit_END = y_END / norm_EN.clamp(min=1e-30).unsqueeze(2)
        self.norm_E += norm_EN.sum(1)
        self.cosine_EE += torch.einsum("end,fnd->ef", unit_END, unit_END)
        self.sampled += x_ND.shape[0]

    def fields(self, state: State) -> dict[str, Any]:
        sums = [state.ranks.sum(part) for part in (self.chosen_TE, self.exact_TE, self.norm_E, self.cosine_EE)]
        chosen_TE, exact_TE = (part.bool().cpu().numpy() for part in sums[:2])
        sampled = max(float(state.ranks.sum(self.sampled)), 1.0)
        norm_E, cosine_EE = (part.cpu().numpy() / sampled for part in sums[2:])
        E = len(norm_E)
        off_diagonal = np.where(np.triu(np.ones((E, E), dtype=bool), k=1), cosine_EE, -2.0)
        i, j = np.unravel_index(int(off_diagonal.argmax()), (E, E))
        squares = [
            _mean_square(weight.detach(), state)
            for name, weight in self.module.experts.named_parameters()
            if not is_bias(name)
        ]
        return {
            "choices": chosen_TE,
            "output_norms": norm_E.tolist(),
            "output_cosine": float((cosine_EE.sum() - np.trace(cosine_EE)) / max(E * (E - 1), 1)),
            "output_cosine_max": float(cosine_EE[i, j]) if E > 1 else 1.0,
            "output_cosine_pair": [int(i), int(j)],
            "expert_rms": float(np.sqrt(np.mean(squares))),
            "rounding_flips": 1 - overlap(chosen_TE, exact_TE) if self.has_exact else None,
        }


def _mean_square(weight: Tensor, state: State) -> float:
    """Mean square of a parameter of experts, of which ranks may hold parts; tensor ranks are not summed over and hold the same."""
    held = copies(weight, state.ranks) // state.ranks.layout.tensor
    total = state.ranks.sum(part_here(weight).double().square().sum() / held)
    return float(total) / weight.numel()


def chosen(selection: Selection, tokens: Tokens, num_experts: int) -> Tensor:
    """The choices of valid tokens as a table [T, E], bool."""
    T = tokens.valid_T.shape[0]
    counted_R = tokens.valid_T.index_select(0, selection.token_R) & (selection.expert_R < num_experts)
    place_R = selection.token_R * num_experts + selection.expert_R.clamp(max=num_experts - 1)
    table = torch.zeros(T * num_experts, dtype=torch.int64, device=place_R.device)
    return table.scatter_add_(0, place_R, counted_R.long()).view(T, num_experts) > 0


def every_output(layer: MoELayer, x_ND: Tensor) -> Tensor:
    """What each expert makes of each of N inputs, unweighted [E, N, D]."""
    E, N = _num_experts(layer), x_ND.shape[0]
    token_R = torch.arange(E * N, device=x_ND.device)
    expert_R = torch.arange(E, device=x_ND.device).repeat_interleave(N)
    ones_R = torch.ones(E * N, device=x_ND.device)
    offsets = fixed_offsets(E * N, 1, x_ND.device)
    routing = Routing(token_R, expert_R, ones_R, offsets, E, Selection(token_R, expert_R))
    return layer.experts(x_ND.repeat(E, 1), layer.experts.plan(routing)).view(E, N, -1)


def _choice_in_float64(one: Seen) -> Selection | None:
    """The choice that the router makes of the same hidden states in float64; None for one that cannot compute in it."""
    router = copy.deepcopy(one.module.router).double()
    try:
        return router(one.x_TD.double(), one.tokens).selection
    except RuntimeError:
        return None


def _changes(choices: dict[int, np.ndarray], step: int, folder: Path, *, last: bool) -> dict[int, dict[str, Any]]:
    """How the choices differ from those of the evaluation before and, at the last, from those of every one."""
    paths = sorted((folder / CHOICES).glob("step_*.npz")) if (folder / CHOICES).is_dir() else []
    earlier = {found: path for path in paths if (found := int(path.stem.removeprefix("step_"))) < step}
    changes: dict[int, dict[str, Any]] = {}
    before = max(earlier, default=None)
    for layer, now_TE in choices.items():
        E, k = now_TE.shape[1], now_TE.sum(1).mean()
        same = _overlap_with(earlier[before], layer, now_TE) if before is not None else None
        changes[layer] = {
            "churn": None if same is None else 1 - same,
            "churn_since": before,
            "churn_by_chance": float(1 - k / E),
        }
        if last:
            steps = [(at, _overlap_with(path, layer, now_TE)) for at, path in sorted(earlier.items())]
            changes[layer]["saturation"] = [[at, same] for at, same in steps if same is not None]
    return changes


def _overlap_with(path: Path, layer: int, now_TE: np.ndarray) -> float | None:
    with np.load(path) as arrays:
        bits = np.unpackbits(arrays[f"layer_{layer}"], axis=1, count=now_TE.shape[1]).astype(bool)
    # a resumed run may have another probe set
    return overlap(now_TE, bits) if bits.shape == now_TE.shape else None


# ------------------------------------------------------------------------------------------------------- what is seen


@contextmanager
def watching(model: Transformer) -> Iterator[list[Seen]]:
    """Collect what every expert layer gets and gives while the context lasts, in the order of the layers."""
    seen: list[Seen] = []
    inputs: dict[nn.Module, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple) -> None:
        inputs[module] = args[0]

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, result: tuple[Tensor, Routing]) -> None:
            assert isinstance(module, MoELayer)
            seen.append(Seen(layer, module, args[0].flatten(0, 1), args[1], result[1], inputs.pop(module.experts)))

        return hook

    handles = []
    for layer, module in model.moe_layers():
        handles.append(module.experts.register_forward_pre_hook(keep_input))
        handles.append(module.register_forward_hook(keep(layer)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _num_experts(layer: MoELayer) -> int:
    return len(layer.experts.widths)


def _router_parameters(model: Transformer) -> dict[int, nn.Parameter]:
    found = {layer: getattr(module.router, "weight_ED", None) for layer, module in model.moe_layers()}
    return {layer: weight for layer, weight in found.items() if isinstance(weight, nn.Parameter)}
