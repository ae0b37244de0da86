"""Context parallelism: the ranks of a row hold its tokens in parts, and for attention trade them for heads.

Between two all-to-alls each rank has the whole row, for its share of the heads; before and after, its part of the row with
all heads (DeepSpeed-Ulysses, arXiv 2309.14509). Per token and layer a rank sends (c - 1)/c of its queries, keys, values and
outputs, N·H + 2·M·H + N·H elements for c ranks, and as much in the backward pass.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ulysses:
    """The exchange of one row's tokens for heads over a group of ranks, which hold consecutive parts of equal length."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.ranks, self.me = group, dist.get_world_size(group), dist.get_rank(group)

    def first(self, length: int) -> int:
        """Position of this rank's first token, where every rank has `length` of them."""
        return self.me * length

    def whole(self, part_BS: Tensor) -> Tensor:
        """What all ranks have of a row's tokens [B, S], given one part of it each [B, S / ranks]; without gradient."""
        parts = [torch.empty_like(part_BS) for _ in range(self.ranks)]
        dist.all_gather(parts, part_BS.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Heads of part of the row, [B, N or M, S / ranks, H], to a part of the heads of the whole row, in one all-to-all.

        Where M key heads are no multiple of the ranks, each is repeated until the heads are: query head h of the N / ranks
        here then belongs to key head h // (query heads / key heads), as before.
        """
        repeats = math.lcm(key.shape[1], self.ranks) // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        # to each rank [B, s, its heads · H] of every tensor side by side
        split = [t.unflatten(1, (self.ranks, -1)).permute(1, 0, 3, 2, 4) for t in (query, key, value)]
        came = _AllToAll.apply(torch.cat([t.flatten(3) for t in split], 3), self.group)
        whole = came.transpose(0, 1).flatten(1, 2)
        parts = whole.split([t.shape[3] * t.shape[4] for t in split], 2)
        return tuple(part.unflatten(2, (-1, t.shape[4])).transpose(1, 2) for part, t in zip(parts, split, strict=True))

    def to_tokens(self, out: Tensor) -> Tensor:
        """A part of the heads of the whole row, [B, N / ranks, S, H], to all heads of part of the row, likewise."""
        came = _AllToAll.apply(out.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4), self.group)
        return came.transpose(0, 1).flatten(1, 2)

    def heads_here(self, x_N: Tensor) -> Tensor:
        """The part of a per-head parameter that belongs to the heads of `to_heads`."""
        return x_N.chunk(self.ranks)[self.me]


class _AllToAll(torch.autograd.Function):
    """Part i of dimension 0 goes to rank i; the gradient travels back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        came = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(came, parts.contiguous(), group=group)
        return came

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.group), None
