"""The first comparison: a byte-level model of Python source code, sparse against a dense twin of equal active FLOPs."""

from moe.config.schema import (
    AdamW,
    Balance,
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
    """Three layers of width 96, two of 8 experts per token, 1.6 MB of text."""
    return Run(
        name="quickstart",
        seed=100,
        model=Model(
            vocab_size=257,
            dim=96,
            num_layers=3,
            ffn_hidden=256,
            attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=24),
            moe=MoE(
                num_experts=8,
                top_k=2,
                expert_hidden=128,
                router=TopK(balance=Balance(weight=0.001), z_weight=0.001),
            ),
            document_mask=False,
            init_std=0.08,
        ),
        data=Data(sequence_length=128),
        train=Train(
            steps=800,
            batch_rows=16,
            micro_rows=16,
            optimizer=AdamW(lr=4e-3),
            schedule=Cosine(warmup_steps=40),
        ),
        evaluation=Evaluation(every_steps=200, rows=256, final_rows=4224),
        logging=Logging(routing_every=10),
    )
