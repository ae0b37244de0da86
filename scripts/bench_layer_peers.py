"""Other projects' expert layers for bench_layer.py --peers, at equal active FLOPs: st-moe-pytorch and torchtitan, where installed.

    pip install st-moe-pytorch
    pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser typeguard

(torchtitan by itself, because it asks for an older `datasets` than ours; its layer needs none.) What each does differently:

* **st-moe** (https://github.com/lucidrains/st-moe-pytorch, 0.1.8): experts are GEGLU with biases, so three products of D·F a row,
  as many as SwiGLU's. Every expert computes a fixed number of rows for a group of tokens: a row beyond it is dropped, a place
  without one is computed as zeros. The capacity is set to K·tokens/experts, so that as many rows are computed as ours
  computes; the share of rows that is dropped is reported. Rows go to experts and back by products with tensors [tokens, E,
  capacity], which grow with the square of a group: groups are of 256 tokens. It computes its losses, too, which are not
  differentiated. Its gate mixes types in bfloat16 and fails: a contender in float32 only.
* **torchtitan** (https://github.com/pytorch/torchtitan, 0.3.0): the same function as ours, dropless, by `torch._grouped_mm` on
  operands that it casts to bfloat16 whatever their type: a contender in bfloat16 only.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.moe_layer import MoELayer

GROUP = 256
"""Tokens of one of st-moe's groups."""


class Peer(NamedTuple):
    """A project whose layer can be timed."""

    module: str
    """That must be importable."""
    install: str
    """What pip is to be told."""
    dtypes: tuple[torch.dtype, ...]
    same: bool
    """Whether it computes the same function as ours."""
    build: Callable[[MoELayer, tuple[int, ...]], nn.Module]
    """A layer of shape (T, D, F, E, K) with the router of ours."""


class StMoE(nn.Module):
    """st-moe-pytorch's layer on [1, T, D], in groups; `dropped` is the share of routed rows that found no place last time."""

    def __init__(self, ours: MoELayer, shape: tuple[int, ...]):
        super().__init__()
        from st_moe_pytorch import MoE  # pyright: ignore[reportMissingImports]

        _, D, F, E, K = shape
        # its hidden size is 2/3 of the multiple; each expert of a group has int(tokens·factor / experts) places
        self.layer = MoE(
            dim=D,
            num_experts=E,
            gating_top_n=K,
            expert_hidden_mult=1.5 * F / D,
            threshold_train=0.0,
            capacity_factor_train=float(K),
        )
        found = self.layer.experts.experts[0].net[-1].in_features
        assert found == F, f"st-moe's experts have {found} hidden units, not {F}"
        self.layer.gate.to_gates.load_state_dict({"weight": ours.router.get_parameter("weight_ED")})
        self.top_k = K
        self.layer.gate.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        self.taken, self.wanted = out[1].detach(), given[0][..., 0].numel() * self.top_k

    @property
    def dropped(self) -> float:
        """Share of the routed rows of the last forward pass that were dropped."""
        return 1 - int(self.taken.count_nonzero()) / self.wanted

    def forward(self, x_BSD: Tensor) -> Tensor:
        """The outputs; its losses are left."""
        _, T, D = x_BSD.shape
        return self.layer(x_BSD.view(-1, min(GROUP, T), D)).outputs.view(x_BSD.shape)


def torchtitan(ours: MoELayer, shape: tuple[int, ...]) -> nn.Module:
    """torchtitan's layer with our weights: softmax, top-k, renormalised."""
    from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.moe import (  # pyright: ignore[reportMissingImports]
        GroupedExperts,
        MoE,
        RoutedExperts,
        TokenChoiceTopKRouter,
    )
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # pyright: ignore[reportMissingImports]

    warnings.filterwarnings("ignore", message=".*CPU autocast.*")
    _, D, F, E, K = shape
    inner = GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E)
    experts = RoutedExperts.Config(
        inner_experts=inner, token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K)
    )
    gate: Any = Linear.Config(in_features=D, out_features=E)
    router = TokenChoiceTopKRouter.Config(num_experts=E, gate=gate, top_k=K, score_func="softmax", route_norm=True)
    layer = MoE.Config(num_experts=E, routed_experts=experts, router=router, load_balance_coeff=None).build()
    held, own = layer.routed_experts.inner_experts, ours.experts
    with torch.no_grad():
        for theirs, weight in (
            (held.w1_EFD, own.w_gate_EDF),
            (held.w3_EFD, own.w_up_EDF),
            (held.w2_EDF, own.w_down_EFD),
        ):
            theirs.copy_(weight.transpose(1, 2))
        layer.router.gate.weight.copy_(ours.router.get_parameter("weight_ED"))
        layer.tokens_per_expert_E.zero_()
    return layer


PEERS = {
    "st-moe": Peer("st_moe_pytorch", "st-moe-pytorch", (torch.float32,), False, StMoE),
    "torchtitan": Peer(
        "torchtitan",
        "--no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser typeguard",
        (torch.bfloat16,),
        True,
        torchtitan,
    ),
}


def missing(names: list[str]) -> str:
    """Why not all of these peers can be timed; empty if they can."""
    return "; ".join(
        f"--peers {name} needs a package that is not installed: pip install {PEERS[name].install}"
        for name in names
        if find_spec(PEERS[name].module) is None
    )


def installed() -> list[str]:
    """The peers that can be timed here."""
    return [name for name in PEERS if not missing([name])]


def build_peers(names: list[str], ours: MoELayer, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers of these peers that have this type."""
    return {name: PEERS[name].build(ours, shape).to(dtype) for name in names if dtype in PEERS[name].dtypes}
