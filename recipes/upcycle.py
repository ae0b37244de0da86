"""A dense model, and the sparse ones that continue it: train, upcycle, resume.

moe train recipes/upcycle.py:dense out=runs/dense
moe upcycle runs/dense recipes/upcycle.py --out runs/sparse
moe resume runs/sparse
"""

from dataclasses import replace

from moe.config.schema import AdamW, Cosine, Data, Evaluation, GroupedQueryAttention, Logging, Model, MoE, Run, Train
from moe.routers.topk import Config as TopK


def dense() -> Run:
    """Two layers of width 64 with an FFN of 256: the model to start from."""
    return Run(
        name="upcycle-dense",
        model=Model(
            vocab_size=257,
            dim=64,
            num_layers=2,
            ffn_hidden=256,
            attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16),
            init_std=0.1,
        ),
        data=Data(sequence_length=128),
        train=Train(
            steps=400, batch_rows=16, micro_rows=16, optimizer=AdamW(lr=3e-3), schedule=Cosine(warmup_steps=20)
        ),
        evaluation=Evaluation(every_steps=200, rows=64, final_rows=256),
    )


def run() -> Run:
    """Eight copies of each FFN, two per token."""
    return _sparse("upcycle", MoE(num_experts=8, top_k=2, expert_hidden=256, router=TopK()))


def fine_grained() -> Run:
    """Eight copies cut in two: 16 experts of half the width, two per token, as many FLOPs as the dense model."""
    return _sparse("upcycle-fine", MoE(num_experts=16, top_k=2, expert_hidden=128, router=TopK()))


def grown() -> Run:
    """Twice the experts of `run`, and twice as many per token, so that growing changes nothing at first."""
    return _sparse("upcycle-grown", MoE(num_experts=16, top_k=4, expert_hidden=256, router=TopK()))


def _sparse(name: str, moe: MoE) -> Run:
    """The dense run's settings with experts, and a second, lower learning rate."""
    base = dense()
    train = replace(base.train, optimizer=AdamW(lr=1e-3), schedule=Cosine(warmup_steps=10))
    return replace(base, name=name, model=replace(base.model, moe=moe), train=train, logging=Logging(routing_every=10))
