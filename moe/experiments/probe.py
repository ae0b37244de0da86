"""`moe probe`: what the newest checkpoint loses when its routing or its experts are replaced, into probes.jsonl.

A counterfactual keeps every token's gate weights and changes only where they go, so that a difference is the choice's own.
The same validation rows are used throughout; intervals are over rows, paired.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe import checkpoint, parallel
from moe.analysis.paired import ratio_interval
from moe.config.load import load
from moe.data import Corpus, prepare
from moe.errors import CheckpointError, UserError
from moe.metrics import JsonLines
from moe.model import Transformer
from moe.routing import Routing, Tokens
from moe.train.step import build_state

ALTERNATIVES = 4
"""Random sets of experts tried for the route regret."""
SAMPLED = 8
"""One token in this many gets the alternative set; the others keep their own, and with them its context."""
KEPT = 0.75
"""Share of the experts left when the least used are dropped."""

Reroute = Callable[[Routing, Tokens], Routing]


def probe(folder: Path, *, rows: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Run every counterfactual on the newest checkpoint; append to and return the lines of probes.jsonl.

    Differences are counterfactual - own routing in nats per token, with a 95 % interval over `rows` validation rows.
    Raises UserError for a folder without a run or a sparse model, CheckpointError without a checkpoint.
    """
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no run.json: give the folder of a run")
    run = load(folder / "run.json")
    if run.model.moe is None:
        raise UserError(f"{folder} is a dense run, and a probe replaces routing: give the folder of a sparse run")
    saved = checkpoint.newest(folder)
    if saved is None:
        raise CheckpointError(f"{folder} has no checkpoint yet: let the run save one (checkpoint.every_steps)")
    ranks = parallel.start(run.train.device)
    corpus = prepare(run.data)
    state = build_state(run, ranks, corpus)
    checkpoint.load(saved, state.model, state.optimizer, ranks)
    bench = Bench(state.model.eval(), corpus, rows, run.train.micro_rows, ranks.device, seed)
    lines = [{"step": saved.step, "number": number, **fields} for number, fields in enumerate(bench.counterfactuals())]
    attempts = folder / "attempts.jsonl"
    log = JsonLines(folder / "probes.jsonl", attempts.read_bytes().count(b"\n") if attempts.is_file() else 1)
    for line in lines:
        log.write(**line)
    log.close()
    return lines


@dataclass
class Bench:
    """A model and the validation rows on which its counterfactuals are compared."""

    model: Transformer
    corpus: Corpus
    rows: int
    micro_rows: int
    device: torch.device
    seed: int

    def counterfactuals(self) -> Iterator[dict[str, Any]]:
        """Every counterfactual's fields, in a fixed order."""
        layers = [index for index, _ in self.model.moe_layers()]
        own, targets = self.losses()
        counts = self.usage()
        self.baseline = float(own.sum() / targets.sum())

        def line(kind: str, layer: int | None, changed: Tensor) -> dict[str, Any]:
            difference_R, number_R = (changed - own).sum(1).cpu().numpy(), targets.sum(1).cpu().numpy()
            mean, low, high = ratio_interval(difference_R, number_R)
            given = {"kind": kind, "layer": layer, "rows": len(number_R), "loss": self.baseline + mean}
            return given | {"mean": mean, "low": low, "high": high}

        yield line("random", None, self.losses(self._random(0))[0])
        if len(layers) > 1:
            for layer in layers:
                yield line("random", layer, self.losses(self._random(0), only=layer)[0])
        yield line("hash", None, self.losses(self._hash)[0])
        if all(len(set(module.experts.widths)) == 1 for _, module in self.model.moe_layers()):
            with self._merged():
                yield line("merged", None, self.losses()[0])
        yield line("dropped", None, self.losses(self._without(counts))[0])
        yield self._regret(own, targets)

    @torch.no_grad()
    def losses(
        self, reroute: "Reroute | dict[int, Reroute] | None" = None, *, only: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each target and whether there is one, [rows, S]; with the routing of all layers, or of one, replaced."""
        found, counted = [], []
        with _rerouted(self.model, reroute, only):
            for ids_BS, targets_BS, tokens in self._batches():
                losses_BS = self.model(ids_BS, targets_BS, tokens=tokens, each=True).losses_BS
                assert losses_BS is not None
                found.append(losses_BS.double())
                counted.append(targets_BS >= 0)
        return torch.cat(found), torch.cat(counted)

    @torch.no_grad()
    def usage(self) -> dict[int, Tensor]:
        """Rows per expert of each layer."""
        counts: dict[int, Tensor] = {}
        for ids_BS, _, tokens in self._batches():
            for report in self.model(ids_BS, tokens=tokens, head=False).routing:
                counts[report.layer] = counts.get(report.layer, 0) + report.statistics["counts_E"]
        return counts

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tokens]]:
        rows = min(self.rows, self.corpus.num_validation_rows)
        for start in range(0, rows, self.micro_rows):
            batch = self.corpus.validation_batch(range(start, min(start + self.micro_rows, rows))).to(self.device)
            tokens = Tokens.of(batch.ids_BS, valid_BS=batch.valid_BS, document_BS=batch.document_BS)
            yield (
                batch.ids_BS,
                batch.targets_BS,
                replace(tokens, row_T=batch.row_B.repeat_interleave(batch.ids_BS.shape[1])),
            )

    # ------------------------------------------------------------------------------------------ what is replaced

    def _random(self, draw: int, one_in: int = 1) -> Reroute:
        """Every token (or one in so many) gets experts at random; a function of (seed, draw, row, position)."""

        def reroute(routing: Routing, tokens: Tokens) -> Routing:
            E = routing.num_experts
            place_T = tokens.row_T * (tokens.position_T.max() + 1) + tokens.position_T
            order_TE = _orders(place_T, E, self.seed + 1000 * draw)
            return _send(routing, order_TE, self._sampled(tokens, one_in))

        return reroute

    def _sampled(self, tokens: Tokens, one_in: int) -> Tensor:
        return (tokens.position_T + tokens.row_T) % one_in == one_in - 1

    def _hash(self, routing: Routing, tokens: Tokens) -> Routing:
        """A token's experts are a function of its id."""
        assert tokens.ids_T is not None
        return _send(routing, _orders(tokens.ids_T, routing.num_experts, self.seed + 1), tokens.valid_T)

    def _without(self, counts: dict[int, Tensor]) -> dict[int, Reroute]:
        """The least used experts' rows go nowhere; a token's other weights grow to the same sum."""
        E = len(next(iter(counts.values())))
        fewest = E - math.ceil(E * KEPT)
        return {layer: _drop(usage_E.argsort()[:fewest]) for layer, usage_E in counts.items()}

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Every expert is the mean of its layer's, which experts of different widths have not."""
        kept = {layer: copy.deepcopy(module.experts.state_dict()) for layer, module in self.model.moe_layers()}
        try:
            with torch.no_grad():
                for _, module in self.model.moe_layers():
                    for weight in module.experts.parameters():
                        weight.copy_(weight.mean(0, keepdim=True).expand_as(weight).clone())
            yield
        finally:
            for layer, module in self.model.moe_layers():
                module.experts.load_state_dict(kept[layer])

    def _regret(self, own: Tensor, targets: Tensor) -> dict[str, Any]:
        """Route regret (arXiv 2605.07260): loss of the chosen set less that of the best of a few random ones, per sampled token."""
        tried = torch.stack([self.losses(self._random(1 + draw, SAMPLED))[0] for draw in range(ALTERNATIVES)])
        place_S, row_R = torch.arange(own.shape[1], device=own.device), torch.arange(own.shape[0], device=own.device)
        mask = ((place_S + row_R.unsqueeze(1)) % SAMPLED == SAMPLED - 1) & targets
        number_R = mask.sum(1).cpu().numpy()
        mean, low, high = ratio_interval(((tried.mean(0) - own) * mask).sum(1).cpu().numpy(), number_R)
        regret = ((own - tried.min(0).values).clamp(min=0) * mask).sum() / mask.sum().clamp(min=1)
        better = ((tried.min(0).values < own) & mask).sum() / mask.sum().clamp(min=1)
        fields = {
            "kind": "alternative",
            "layer": None,
            "rows": len(number_R),
            "loss": self.baseline + mean,
            "mean": mean,
        }
        return fields | {"low": low, "high": high, "regret": float(regret), "better_exists": float(better)}


@contextmanager
def _rerouted(model: Transformer, reroute: "Reroute | dict[int, Reroute] | None", only: int | None) -> Iterator[None]:
    """Replace what every expert layer's router gives, or one's; `reroute` may be one function or one per layer."""
    handles = []
    for layer, module in model.moe_layers():
        function = reroute.get(layer) if isinstance(reroute, dict) else reroute
        if function is not None and only in (None, layer):
            handles.append(module.router.register_forward_hook(_replacing(function)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacing(reroute: Reroute) -> Callable[[nn.Module, tuple, Routing], Routing]:
    return lambda module, args, routing: reroute(routing, args[1])


def _orders(key_T: Tensor, num_experts: int, seed: int) -> Tensor:
    """An order of the experts for each key [T, E]: equal keys, equal orders, whatever batch they are in."""
    unique, place_T = key_T.cpu().unique(return_inverse=True)
    orders = [np.random.default_rng((seed, int(key))).permutation(num_experts) for key in unique.tolist()]
    return torch.from_numpy(np.stack(orders)).to(key_T.device)[place_T.to(key_T.device)]


def _send(routing: Routing, order_TE: Tensor, which_T: Tensor) -> Routing:
    """The j-th row of each token that goes somewhere goes to the j-th expert of its order, with its weight."""
    E = routing.num_experts
    real_R = routing.expert_R < E
    before_R = real_R.long().cumsum(0) - real_R.long()
    starts_T = torch.nn.functional.pad(real_R.long().cumsum(0), (1, 0)).index_select(0, routing.token_offsets[:-1])
    rank_R = (before_R - starts_T.index_select(0, routing.token_R)).clamp(0, E - 1)
    sent_R = order_TE[routing.token_R, rank_R]
    use_R = real_R & which_T.index_select(0, routing.token_R)
    return replace(routing, expert_R=torch.where(use_R, sent_R, routing.expert_R))


def _drop(dropped: Tensor) -> Reroute:
    def reroute(routing: Routing, tokens: Tokens) -> Routing:
        gone_R = torch.isin(routing.expert_R, dropped)
        T = tokens.valid_T.shape[0]
        zeros = torch.zeros(T, dtype=routing.weight_R.dtype, device=routing.weight_R.device)
        before_T = zeros.index_add(0, routing.token_R, routing.weight_R)
        kept_R = torch.where(gone_R, 0.0, routing.weight_R)
        after_T = zeros.index_add(0, routing.token_R, kept_R)
        scale_T = torch.where(after_T > 0, before_T / after_T.clamp(min=1e-12), 1.0)
        weight_R = kept_R * scale_T.index_select(0, routing.token_R)
        return replace(routing, expert_R=torch.where(gone_R, routing.num_experts, routing.expert_R), weight_R=weight_R)

    return reroute


def describe(lines: list[dict[str, Any]]) -> str:
    """The counterfactuals in words."""
    words = {
        "random": "routing replaced by chance",
        "hash": "routing replaced by a hash of the token",
        "merged": "every expert replaced by the mean of its layer's",
        "dropped": f"the least used {1 - KEPT:.0%} of the experts dropped",
        "alternative": "a random set of equal K for one token in eight",
    }
    text = [
        f"checkpoint of step {lines[0]['step']}, {lines[0]['rows']} validation rows; change of the loss in nats per token:"
    ]
    for line in lines:
        place = "" if line["layer"] is None else f", layer {line['layer']} only"
        more = (
            f"; regret {line['regret']:.4f}, a better set exists for {line['better_exists']:.0%}"
            if "regret" in line
            else ""
        )
        text.append(
            f"  {line['mean']:+.4f} [{line['low']:+.4f}, {line['high']:+.4f}]  {words[line['kind']]}{place}{more}"
        )
    return "\n".join(text)
