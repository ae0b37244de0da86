"""`moe upcycle`: a sparse run out of a dense one, or one with more experts out of a sparse one.

    copy    every expert is the dense layer, or one of g shards of it (virtual groups), and nothing changes at step 0
            (Komatsuzaki et al. 2022, arXiv 2212.05055; He et al. 2024, arXiv 2410.07524)
    drop    of every copy, a share of the hidden units starts anew from the mean and deviation of what they replace
            (drop-upcycling, arXiv 2502.19261)
    noise   every copy plus noise of a share of its weights' deviation

Expert r·g + s is shard s of replica r, and the g experts of a replica share one router row, so that top-k with K = g·k takes
k whole replicas. Weights that sum to c give Σ w·E(x) = c/g of the dense output: W_down is multiplied by g/c.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe import parallel
from moe.config.load import dump, load, router_name
from moe.config.schema import Model, Run, ffn_hidden, is_moe_layer
from moe.cost import parameters
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError
from moe.init import is_bias
from moe.model import Transformer
from moe.random import stable_seed
from moe.routing import Router, Tokens
from moe.surgery.select import expert_dimension
from moe.surgery.start import begin_run, model_of, read_run
from moe.train.evaluate import evaluate
from moe.train.record import require_free

Method = Literal["copy", "drop", "noise"]
METHODS: tuple[Method, ...] = get_args(Method)
TOLERANCE = 1e-6
"""Nats per token that `copy` may change the loss by: rounding."""
_FREE = {"moe", "ffn_hidden", "ffn_hidden_per_layer", "init_std", "init_depth_scaling", "document_mask"}
"""Fields of a model that may differ between the two."""


@dataclass(frozen=True)
class Change:
    """What becomes of the copies."""

    method: Method = "copy"
    ratio: float = 0.5
    """Share of a copy's hidden units that starts anew (drop)."""
    noise: float = 0.05
    """Deviation of the noise over that of the weights (noise)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} is unknown: choose {', '.join(METHODS)}")
        if not 0 < self.ratio <= 1 or not 0 < self.noise < math.inf:
            raise ConfigError(f"ratio ({self.ratio}) must be above 0 and at most 1, and noise ({self.noise}) above 0")


def upcycle(
    folder: Path, recipe: str, out: Path, change: Change | None = None, overrides: Sequence[str] = (), *, rows: int = 64
) -> dict[str, Any]:
    """Write `out`, a run of the recipe that starts from the newest checkpoint of `folder`; returns the receipt.

    The receipt has the loss of both models on the recipe's validation text. Raises ConfigError where the recipe's model
    cannot be made of the other, CheckpointError if `copy` changed the function; nothing is left then.
    """
    require_free(out)
    change = change or Change()
    source, run = read_run(folder), load(recipe, overrides)
    _check_same(source.run.model, run.model, folder)
    fresh = Transformer(run.model, seed=run.seed).eval()
    make = from_dense if source.run.model.moe is None else grown
    tensors = make(source.run.model, run, source.tensors, fresh, change)
    corpus, ranks = prepare(run.data), parallel.start("cpu")
    before = source.model()
    before.config = replace(before.config, document_mask=run.model.document_mask)
    losses = [
        evaluate(model, corpus, ranks, rows=rows, micro_rows=8).loss for model in (before, model_of(run, tensors))
    ]
    receipt = {
        "made_by": "upcycle",
        "source": str(folder),
        "source_step": source.step,
        "method": change.method,
        "loss_before": losses[0],
        "loss_after": losses[1],
        "difference": losses[1] - losses[0],
        "parameters_before": parameters(source.run.model).total,
        "parameters_after": parameters(run.model).total,
        "active_after": parameters(run.model).active,
    }
    if change.method == "copy" and not abs(receipt["difference"]) <= TOLERANCE:
        raise CheckpointError(
            f"copying changed the loss by {receipt['difference']:.2e} nats per token, more than rounding ({TOLERANCE}): the "
            "recipe's router does not compute a mean of whole copies (with more experts, top_k must grow alike); use "
            "method noise or drop to start from a changed function"
        )
    begin_run(out, run, tensors, receipt)
    return receipt


def _check_same(before: Model, after: Model, folder: Path) -> None:
    """Everything but the feed-forward layers must agree."""
    old, new = dump(before), dump(after)
    other = [
        f"{key}: {old[key]} there, {new[key]} in the recipe" for key in old if key not in _FREE and old[key] != new[key]
    ]
    if other:
        raise ConfigError(
            f"the model of {folder} and the recipe's differ in {'; '.join(other)}: only the layers' FFN may"
        )
    if after.moe is None:
        raise ConfigError("the recipe's model is dense, and upcycling makes a sparse one: give it model.moe")


def from_dense(
    before: Model, run: Run, dense: Mapping[str, Tensor], new: Transformer, change: Change
) -> dict[str, Tensor]:
    """The sparse model's state out of a dense one's; `new` is what it starts from otherwise: its routers stay."""
    after = run.model
    moe = after.moe
    assert moe is not None
    for what, value in (
        ("latent_dim", moe.latent_dim),
        ("shared_gate", moe.shared_gate),
        ("expert_widths", moe.expert_widths),
        ("activation", moe.activation if moe.activation != "swiglu" else ""),
    ):
        if value:
            raise ConfigError(f"model.moe.{what}={value} has no counterpart in a dense layer: leave it out to upcycle")
    fresh = new.state_dict()
    routers = {layer: experts.router for layer, experts in new.moe_layers()}
    result = {name: dense.get(name, tensor).clone() for name, tensor in fresh.items()}
    for layer in range(after.num_layers):
        F, name = ffn_hidden(before, layer), f"layers.{layer}"
        if not is_moe_layer(after, layer):
            if ffn_hidden(after, layer) != F:
                raise ConfigError(
                    f"layer {layer} stays dense with ffn_hidden {ffn_hidden(after, layer)} and has {F}: use {F}"
                )
            continue
        g = _shards(F, moe.shared_hidden, moe.expert_hidden, moe.num_experts, moe.top_k, layer)
        gate_FD, up_FD, down_DF = (dense[f"{name}.ffn.{part}.weight"] for part in ("gate", "up", "down"))
        S, W = moe.shared_hidden, moe.expert_hidden
        router = f"{name}.moe.router"
        scale = g / _weight_sum(routers[layer], after.dim, router_name(moe.router))
        shards = [slice(S + (e % g) * W, S + (e % g + 1) * W) for e in range(moe.num_experts)]
        parts = {
            "w_gate_EDF": torch.stack([gate_FD[part].t() for part in shards]),
            "w_up_EDF": torch.stack([up_FD[part].t() for part in shards]),
            "w_down_EFD": torch.stack([down_DF[:, part].t() * scale for part in shards]),
        }
        changed = _changed(parts, change, run.seed, layer)
        result |= {f"{name}.moe.experts.{key}": value for key, value in changed.items()}
        for key in fresh:
            if key.startswith(router) and expert_dimension(key) == 0:
                result[key] = fresh[key][torch.arange(moe.num_experts) // g]
        if S:
            result[f"{name}.moe.shared.gate.weight"] = gate_FD[:S].clone()
            result[f"{name}.moe.shared.up.weight"] = up_FD[:S].clone()
            result[f"{name}.moe.shared.down.weight"] = down_DF[:, :S].clone()
    return result


def _shards(F: int, shared: int, width: int, experts: int, top_k: int, layer: int) -> int:
    """How many experts make up one copy of a dense layer's routed part. Raises ConfigError."""
    g, rest = divmod(F - shared, width)
    if g < 1 or rest:
        raise ConfigError(
            f"layer {layer}'s ffn_hidden ({F}) without shared_hidden ({shared}) must be a multiple of expert_hidden ({width}): "
            f"use expert_hidden={F - shared} or a divisor of it"
        )
    for what, value in (("num_experts", experts), ("top_k", top_k)):
        if value % g:
            raise ConfigError(
                f"model.moe.{what} ({value}) must be a multiple of the {g} experts of width {width} that make up one copy of layer "
                f"{layer} (ffn_hidden {F}): use {what}={-(-value // g) * g}"
            )
    return g


def _weight_sum(router: Router, dim: int, name: str) -> float:
    """What the gate weights of a token sum to; measured on random inputs. Raises ConfigError where it varies."""
    x_TD = torch.randn(64, dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routing = router(x_TD, Tokens.of(torch.zeros(1, 64, dtype=torch.int64)))
    sum_T = torch.zeros(64).index_add_(0, routing.token_R, routing.weight_R.float())
    if float(sum_T.max() - sum_T.min()) > 1e-4 * float(sum_T.max()) or routing.bypass_TD is not None:
        raise ConfigError(
            f"the weights of router '{name}' sum to {float(sum_T.min()):.3g} for one token and {float(sum_T.max()):.3g} for "
            "another, so copies of a layer do not add up to it: choose a router that renormalises, topk with gate=selected say"
        )
    return float(sum_T.mean())


def grown(before: Model, run: Run, sparse: Mapping[str, Tensor], new: Transformer, change: Change) -> dict[str, Tensor]:
    """The state with m times as many experts: expert c·E + e is copy c of expert e, router rows and state alike."""
    old, wanted = before.moe, new.config.moe
    assert old is not None and wanted is not None
    m, rest = divmod(wanted.num_experts, old.num_experts)
    same = {"num_experts", "top_k", "backend", "precision", "router"}
    other = [key for key, value in dump(old).items() if key not in same and dump(wanted)[key] != value]
    if rest or m < 2 or other or router_name(old.router) != router_name(wanted.router):
        raise ConfigError(
            f"growing copies {old.num_experts} experts m times, with the same router and widths: use "
            f"num_experts={2 * old.num_experts}" + (f" and the same {', '.join(other)}" if other else "")
        )
    result = {}
    for name, tensor in sparse.items():
        dimension = expert_dimension(name) if ".moe." in name else None
        result[name] = tensor if dimension is None else torch.cat([tensor] * m, dim=dimension)
    if change.method == "copy":
        return result
    for layer in range(run.model.num_layers):
        prefix = f"layers.{layer}.moe.experts."
        parts = {name.removeprefix(prefix): tensor for name, tensor in result.items() if name.startswith(prefix)}
        changed = _changed(parts, change, run.seed, layer, first=old.num_experts) if parts else {}
        result |= {prefix + name: tensor for name, tensor in changed.items()}
    return result


def _changed(
    parts: Mapping[str, Tensor], change: Change, seed: int, layer: int, *, first: int = 0
) -> dict[str, Tensor]:
    """Stacked expert weights with the change made to experts from `first` on; each expert draws its own.

    Units that are drawn anew have no biases; other biases stay.
    """
    if change.method == "copy":
        return dict(parts)
    result = {name: tensor.clone() for name, tensor in parts.items()}
    E, _, F = parts["w_gate_EDF"].shape
    for e in range(first, E):
        generator = torch.Generator().manual_seed(stable_seed(seed, f"upcycle layer {layer}", e))
        anew_F = torch.randperm(F, generator=generator)[: round(change.ratio * F)]
        for name, tensor in result.items():
            if is_bias(name):
                if change.method == "drop" and name.endswith("F"):
                    tensor[e][anew_F] = 0
                continue
            if change.method == "noise":
                tensor[e] += change.noise * tensor[e].std() * torch.randn(tensor[e].shape, generator=generator)
                continue
            units_F = tensor[e] if name.endswith("FD") else tensor[e].t()
            replaced = units_F[anew_F]
            draw = torch.randn(replaced.shape, generator=generator)
            units_F[anew_F] = replaced.mean() + replaced.std() * draw
    return result


def describe(receipt: Mapping[str, Any], out: Path) -> str:
    """The receipt in words."""
    return (
        f"{out}: {receipt['parameters_before']:,} parameters of {receipt['source']} (step {receipt['source_step']}) became "
        f"{receipt['parameters_after']:,}, {receipt['active_after']:,} active per token, method {receipt['method']}\n"
        f"loss on validation text: {receipt['loss_before']:.7f} before, {receipt['loss_after']:.7f} after, difference "
        f"{receipt['difference']:+.1e} nats per token"
    )
