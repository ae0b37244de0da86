"""The Game of Life laboratory, `moe life recipes/life.py`: minutes on one core of a CPU. Findings: docs/experiments/life.md."""

from moe.config.life import Densities, ExpertArm, Flips, Growing, Life, Pruning
from moe.config.schema import Balance, MoE, RouterConfig
from moe.routers.frozen_random import Config as FrozenRandom
from moe.routers.hash import Config as Hash
from moe.routers.loss_free import Config as LossFree
from moe.routers.topk import Config as TopK


def run() -> Life:
    """Every part of the study that fits: widths, pruning, flipped signs, densities, and expert layers."""
    weak = TopK(gate="full", balance=Balance(weight=0.01, scope="micro_batch"))
    return Life(
        growing=(
            Growing(steps=1, networks=64, updates=2000, lr=0.01),
            Growing(steps=2, networks=32, updates=2400, lr=0.008),
        ),
        pruning=(Pruning(width=8), Pruning(width=16)),
        flips=(Flips(),),
        densities=(Densities(),),
        experts=(
            _arm("dense, 1 hidden", 1, 1, 1, weak),
            _arm("dense, 2 hidden", 1, 1, 2, weak),
            _arm("dense, 8 hidden", 1, 1, 8, weak),
            _arm("top-1 of 4", 4, 1, 1, weak),
            _arm("top-1 of 8", 8, 1, 1, weak),
            _arm("top-2 of 8", 8, 2, 1, weak),
            _arm("loss-free, 1 of 8", 8, 1, 1, LossFree(normalize=False)),
            _arm("frozen random, 1 of 8", 8, 1, 1, FrozenRandom()),
            _arm("hash of the count, 1 of 8", 8, 1, 1, Hash()),
        ),
    )


def _arm(label: str, num_experts: int, top_k: int, hidden: int, router: RouterConfig) -> ExpertArm:
    moe = MoE(num_experts=num_experts, top_k=top_k, expert_hidden=hidden, router=router)
    return ExpertArm(label=label, moe=moe)
