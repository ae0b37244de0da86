"""A dense model that learns from a sparse one, and the same model without its teacher to compare with.

moe train recipes/distil.py:teacher out=runs/teacher
moe train recipes/distil.py:plain out=runs/plain
moe train recipes/distil.py out=runs/student
moe retained runs/student --plain runs/plain
"""

from dataclasses import replace

from moe.config.schema import AdamW, Cosine, Data, Distil, Evaluation, GroupedQueryAttention, Model, MoE, Run, Train
from moe.routers.topk import Config as TopK


def plain() -> Run:
    """Two layers of width 64 with an FFN of 256, on the text alone."""
    return Run(
        name="distil-plain",
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


def teacher() -> Run:
    """Eight experts in place of each FFN, two a token."""
    base = plain()
    sparse = MoE(num_experts=8, top_k=2, expert_hidden=256, router=TopK())
    return replace(base, name="distil-teacher", model=replace(base.model, moe=sparse))


def run() -> Run:
    """The dense model on the same text; half of its loss is the divergence from the teacher in runs/teacher."""
    base = plain()
    return replace(base, name="distil-student", train=replace(base.train, distil=Distil(teacher="runs/teacher")))
