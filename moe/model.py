"""The decoder-only transformer: pre-norm blocks of attention and a dense or expert feed-forward layer."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.attention import GroupedQuery, KeyValue, Latent, Mask, RMSNorm, RotaryEmbedding, attention_mask
from moe.backend import compiled
from moe.config.schema import GroupedQueryAttention, Model, ffn_hidden, is_moe_layer, layer_experts
from moe.init import initialise, off_meta
from moe.lora import adapt
from moe.loss import IGNORE, Soft, chunked_cross_entropy, target_losses
from moe.moe_layer import Linear, MoELayer, SwiGLU, fits, multiply
from moe.parallel.exchange import EXCHANGE_COUNTS
from moe.parallel.ulysses import Ulysses
from moe.routing import Counts, Routing, Selection, Tokens


@dataclass(frozen=True)
class LayerRouting:
    """What one expert layer reports: its block's index, additive statistics, and its choice."""

    layer: int
    statistics: Counts
    selection: Selection


@dataclass(frozen=True)
class Output:
    """What a forward pass returns; nothing of it is stored anywhere else."""

    logits_BSV: Tensor | None
    """Logits, float32; None when targets were given, or no head was asked for."""
    loss: Tensor | None
    """This micro-batch's additive part of the step's language-model loss in nats per token; None without targets."""
    losses: dict[str, Tensor]
    """Auxiliary losses by name, means over the expert layers, unweighted."""
    objective: Tensor | None
    """What to differentiate: loss plus the weighted auxiliary losses; of a stage that is not the last, the float32 sum of the
    auxiliary losses so far."""
    routing: tuple[LayerRouting, ...]
    """One entry per expert layer, in order."""
    hidden_BSD: Tensor | None = None
    """What goes to the next stage of a pipeline; None at the last."""
    losses_BS: Tensor | None = None
    """Each target's loss in nats, 0 where there is none, float32 without gradient, where `each` was asked for."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: Model, layer: int, seed: int, residual_scale: float):
        super().__init__()
        attention = config.attention
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = (
            GroupedQuery(attention, config)
            if isinstance(attention, GroupedQueryAttention)
            else Latent(attention, config)
        )
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = self.moe = None
        if is_moe_layer(config, layer):
            self.moe = MoELayer(
                layer_experts(config, layer),
                config.dim,
                layer=layer,
                seed=seed,
                init_std=config.init_std,
                residual_scale=residual_scale,
            )
        else:
            self.ffn = SwiGLU(config.dim, ffn_hidden(config, layer))

    def forward(
        self,
        x_BSD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask | None,
        tokens: Tokens,
        replay: Selection | None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_sin, mask, past)
        h_BSD = self.ffn_norm(x_BSD)
        if self.moe is not None:
            y_BSD, routing = self.moe(h_BSD, tokens, replay)
            return x_BSD + y_BSD, routing
        assert self.ffn is not None
        return x_BSD + self.ffn(h_BSD), None


class Transformer(nn.Module):
    """Token ids to logits or loss. Parameters are float32; `dtype` is the type of activations and matrix products.

    `recompute` keeps only block inputs and the routing decision for backward (activation checkpointing). With a `context`
    (moe/train/sharding.py sets it) each rank gets its part of every row. `loss_chunk` is the number of tokens whose logits
    exist at once when losses are asked for; 0: all. `blocks` makes it a stage of a pipeline, which holds these blocks only,
    under the names that they have in the whole model; the first stage holds the embedding too, the last the norm and the head.
    """

    def __init__(
        self,
        config: Model,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        loss_chunk: int = 0,
        blocks: range | None = None,
    ):
        super().__init__()
        self.config, self.dtype, self.recompute, self.loss_chunk = config, dtype, recompute, loss_chunk
        self.context: Ulysses | None = None
        self.blocks = blocks if blocks is not None else range(config.num_layers)
        self.num_moe_layers = sum(is_moe_layer(config, layer) for layer in range(config.num_layers))
        first, last = self.blocks.start == 0, self.blocks.stop == config.num_layers
        attention = config.attention
        grouped = isinstance(attention, GroupedQueryAttention)
        rotated_dim = round(attention.head_dim * config.rotary.fraction) if grouped else attention.rope_dim
        self.windows = attention.windows if grouped else (0,)
        residual_scale = self._residual_scale()
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if first else None
        with off_meta():
            self.rotary = RotaryEmbedding(config.rotary, rotated_dim)
        self.layers = nn.ModuleList()
        for layer in self.blocks:
            self.layers.add_module(str(layer), Block(config, layer, seed, residual_scale))
        self.norm = RMSNorm(config.dim, config.norm_eps) if last else None
        self.head = Linear(config.dim, config.vocab_size, bias=False) if last and not config.tied_head else None
        self.compiled = compiled(config.backend)
        for module in self.modules():
            if isinstance(module, Linear | GroupedQuery | Latent | RMSNorm):
                module.compiled = self.compiled
        initialise(self, seed=seed, std=config.init_std, residual_scale=residual_scale, skip=".moe.")
        if config.lora is not None:
            adapt(self, config.lora, seed=seed, std=config.init_std)

    def forward(
        self,
        ids_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        tokens: Tokens | None = None,
        step_targets: Tensor | None = None,
        replay: tuple[Selection, ...] | None = None,
        cache: tuple[KeyValue, ...] | None = None,
        hidden_BSD: Tensor | None = None,
        auxiliary: Tensor | None = None,
        soft: Soft | None = None,
        each: bool = False,
        head: bool = True,
    ) -> Output:
        """Run the model on ids_BS [B, S] int64.

        targets_BS [B, S] (IGNORE for none) asks for the loss: the sum over targets divided by `step_targets`, the number of
        targets of the whole optimizer step (default: of this batch). `replay` has one selection per expert layer. `cache`, one
        entry per layer, holds the tokens before ids_BS and is extended by it; no router drops a token then. A stage of a
        pipeline goes on from the hidden states [B, S, D] and the auxiliary losses of the stage before. `soft` are a teacher's
        logits: its divergence enters the objective and is reported among the losses, `loss` stays the cross-entropy. `each` asks
        for every target's loss apart, and for no sum and no gradient; without `head` the pass ends after the blocks, for who asks
        for the routing alone.
        """
        past = cache[0].length if cache is not None else 0
        first = past if self.context is None else self.context.first(ids_BS.shape[1])
        position_S = torch.arange(first, first + ids_BS.shape[1], device=ids_BS.device)
        tokens = tokens if tokens is not None else Tokens.of(ids_BS, first_position=first)
        tokens = replace(tokens, unfinished=True) if cache is not None else tokens
        cos_sin = self.rotary(position_S)
        x_BSD = self.embedding(ids_BS).to(self.dtype) if self.embedding is not None else hidden_BSD
        assert x_BSD is not None, "a stage that is not the first goes on from hidden states"
        masks = self._masks(x_BSD, position_S, tokens, past if cache is not None else None)
        routings: list[tuple[int, Routing]] = []
        for layer, block in zip(self.blocks, self.layers, strict=True):
            forced = replay[len(routings)] if replay is not None and block.moe is not None else None
            run = partial(_recomputed, block) if self.recompute and torch.is_grad_enabled() else block
            mask = masks[self.windows[layer % len(self.windows)]]
            x_BSD, routing = run(x_BSD, cos_sin, mask, tokens, forced, cache[layer] if cache is not None else None)
            if routing is not None:
                routings.append((layer, routing))
        losses, here = self._mean_losses([routing for _, routing in routings])
        weighted = here if auxiliary is None else auxiliary + here
        reports = tuple(LayerRouting(layer, routing.statistics, routing.selection) for layer, routing in routings)
        if self.norm is None:
            so_far = torch.as_tensor(weighted, dtype=torch.float32, device=x_BSD.device)
            return Output(None, None, losses, so_far, reports, x_BSD)
        if not head:
            return Output(None, None, losses, None, reports)
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return Output(self._logits(x_BSD), None, losses, None, reports)
        if each:
            losses_BS = self._target_losses(x_BSD.flatten(0, 1), targets_BS.flatten()).view_as(targets_BS)
            return Output(None, None, losses, None, reports, losses_BS=losses_BS)
        count = step_targets if step_targets is not None else (targets_BS != IGNORE).sum()
        loss, more = self._step_loss(x_BSD, targets_BS, count.clamp(min=1), soft)
        objective = loss if soft is None else (1 - soft.share) * loss + soft.share * more["distil"]
        more = {name: value.detach() for name, value in more.items()}
        return Output(None, loss, losses | more, objective + weighted, reports)

    def _masks(self, x_BSD: Tensor, position_S: Tensor, tokens: Tokens, past: int | None) -> dict[int, Mask | None]:
        """The mask of each window, over whole rows. `past`: tokens in a cache, whose rows are one document; None without one."""
        document_BS = None
        if self.config.document_mask and past is None:
            document_BS = tokens.document_T.view(x_BSD.shape[:2])
        if self.context is not None:
            position_S = torch.arange(len(position_S) * self.context.ranks, device=position_S.device)
            document_BS = self.context.whole(document_BS) if document_BS is not None else None
        past = past or 0
        bools = past > 0 or not (self.compiled and fits(x_BSD))
        return {w: attention_mask(position_S, document_BS, w, past, bools=bools) for w in set(self.windows)}

    def _step_loss(
        self, x_BSD: Tensor, targets_BS: Tensor, count: Tensor, soft: Soft | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over `count` targets and, with a teacher, its divergence, which needs all logits at once."""
        if soft is None:
            return self._sum_of_losses(x_BSD.flatten(0, 1), targets_BS.flatten()) / count, {}
        logits_BSV = self._logits(x_BSD)
        loss = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss / count, {"distil": soft.divergence(logits_BSV, targets_BS) / count}

    def _mean_losses(self, routings: list[Routing]) -> tuple[dict[str, Tensor], Tensor | float]:
        """Each auxiliary loss's mean over the model's expert layers, and their weighted sum; a stage's part of both."""
        means, auxiliary = _mean_losses(routings)
        if len(routings) == self.num_moe_layers:
            return means, auxiliary
        share = len(routings) / self.num_moe_layers
        return {name: mean * share for name, mean in means.items()}, auxiliary * share

    @property
    def _head_weight(self) -> Tensor:
        owner = self.embedding if self.head is None else self.head
        assert owner is not None
        return owner.weight

    def _sum_of_losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        if self.loss_chunk:
            weight = self._head_weight
            return chunked_cross_entropy(x_TD, weight, targets_T, self.loss_chunk, compiled=self.compiled)
        return cross_entropy(self._logits(x_TD), targets_T, ignore_index=IGNORE, reduction="sum")

    def _target_losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        chunk = self.loss_chunk or max(1, len(x_TD))
        return target_losses(x_TD, self._head_weight, targets_T, chunk, compiled=self.compiled)

    def _logits(self, x_BSD: Tensor) -> Tensor:
        logits = multiply(x_BSD, self._head_weight.to(x_BSD.dtype), compiled=self.compiled)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _residual_scale(self) -> float:
        return 1 / math.sqrt(2 * self.config.num_layers) if self.config.init_depth_scaling else 1.0

    def initialise(self, seed: int) -> None:
        """Give every parameter its first value, where the model was built without memory (moe/init.py)."""
        initialise(self, seed=seed, std=self.config.init_std, residual_scale=self._residual_scale())

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """(block index, layer) of every expert layer, in order."""
        pairs = zip(self.blocks, self.layers, strict=True)
        return [(i, block.moe) for i, block in pairs if isinstance(block.moe, MoELayer)]


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats [B, S], float32; 0 where there is none."""
    flat = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(targets_BS)


def _mean_losses(routings: list[Routing]) -> tuple[dict[str, Tensor], Tensor | float]:
    """Each auxiliary loss's mean over the layers, and their weighted sum."""
    names = {name: None for routing in routings for name in routing.losses}
    means: dict[str, Tensor] = {}
    auxiliary: Tensor | float = 0.0
    for name in names:
        layers = [routing.losses[name] for routing in routings if name in routing.losses]
        means[name] = torch.stack([loss.value for loss in layers]).mean()
        if any(loss.weight for loss in layers):
            auxiliary = auxiliary + torch.stack([loss.value * loss.weight for loss in layers]).mean()
    return {name: mean.detach() for name, mean in means.items()}, auxiliary


def balancing_loss(routings: list[Routing]) -> Tensor | None:
    """The weighted auxiliary losses other than the z-loss, as they enter the objective; None if there are none."""
    kept = [replace(r, losses={name: loss for name, loss in r.losses.items() if name != "z"}) for r in routings]
    auxiliary = _mean_losses(kept)[1]
    return auxiliary if isinstance(auxiliary, Tensor) else None


# Operators whose results are the routing decision: kept, so that recomputation replays the choice instead of making it again.
_DECISIONS = {
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.argsort.stable,
    EXCHANGE_COUNTS,
}


def _keep_decisions(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _DECISIONS else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(block: nn.Module, *args):
    """Run a block keeping only its inputs and its routing decision for backward."""
    context = partial(create_selective_checkpoint_contexts, _keep_decisions)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context)
