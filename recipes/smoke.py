"""A few seconds on any machine: a tiny sparse model on the standard library's source code, in bytes."""

from dataclasses import replace

from moe.config.schema import (
    AdamW,
    Cosine,
    Data,
    Evaluation,
    GroupedQueryAttention,
    Logging,
    Model,
    MoE,
    Run,
    Train,
)
from moe.routers.topk import Config as TopK


def run() -> Run:
    """Two layers of width 64, 8 experts, 40 steps."""
    return Run(
        name="smoke",
        model=Model(
            vocab_size=257,
            dim=64,
            num_layers=2,
            ffn_hidden=128,
            attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16),
            moe=MoE(num_experts=8, top_k=2, expert_hidden=64, router=TopK()),
            init_std=0.1,
        ),
        data=Data(sequence_length=128),
        train=Train(
            steps=40,
            batch_rows=16,
            micro_rows=16,
            optimizer=AdamW(lr=3e-3),
            schedule=Cosine(warmup_steps=4),
        ),
        evaluation=Evaluation(every_steps=20, rows=32, final_rows=64),
        logging=Logging(routing_every=5),
    )


def mixed_widths() -> Run:
    """The same with experts from a quarter to seven quarters as wide; on average as wide, so of the same cost."""
    base = run()
    assert base.model.moe is not None
    experts = replace(base.model.moe, expert_widths=(16, 32, 48, 64, 64, 80, 96, 112))
    return replace(base, name="smoke-mixed-widths", model=replace(base.model, moe=experts))
