"""A billion parameters on a laptop's CPU: 64 experts in each of eight layers, 4 per token, for a machine with 24 GiB.

To see that such a model can be trained, debugged, sharded and saved before a GPU is paid for; it is not worth training for long
there. Parameters, gradients and AdamW's two moments take 16 bytes a parameter; the rest is small, since checkpoints are
written from the state itself and not from a copy.
"""

from moe.config.schema import (
    AdamW,
    Checkpoint,
    Cosine,
    Data,
    Evaluation,
    GroupedQueryAttention,
    Model,
    MoE,
    Run,
    Train,
)
from moe.routers.topk import Config as TopK


def run() -> Run:
    """1.03 billion parameters, 0.09 active; twenty steps of 1,024 tokens."""
    return Run(
        name="billion",
        model=Model(
            vocab_size=257,
            dim=1024,
            num_layers=8,
            ffn_hidden=2560,
            attention=GroupedQueryAttention(num_heads=16, num_kv_heads=8, head_dim=64),
            moe=MoE(num_experts=64, top_k=4, expert_hidden=640, router=TopK()),
        ),
        data=Data(sequence_length=256),
        train=Train(
            steps=20,
            batch_rows=4,
            micro_rows=4,
            optimizer=AdamW(lr=1e-4),
            schedule=Cosine(warmup_steps=10),
        ),
        evaluation=Evaluation(rows=4, final_rows=4, probe_rows=0),
        checkpoint=Checkpoint(asynchronous=False),
    )
