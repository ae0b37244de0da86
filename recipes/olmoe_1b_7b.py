"""OLMoE-1B-7B-0924 (arXiv 2409.02060; github.com/allenai/OLMoE): 6.92B parameters, 1.28B active. Multi-GPU.

Architecture, optimizer, batch and loss weights as published: 1,024 rows of 4,096 tokens, 5.13T tokens, peak rate 4e-4
after 2,500 steps of warm-up, cosine to a tenth (theirs ends in a linear decay of 100B tokens, and also decays
embeddings and norms). Its code divides the z-loss by K as well, so 0.001 there is 0.001 / 8 here; its balance loss is
over K, as ours, and counted in each device's micro-batch. max_bytes is a starting point: the published mix has more
than 10 TB of text.
"""

from moe.config.schema import (
    AdamW,
    Balance,
    Checkpoint,
    Cosine,
    Data,
    Evaluation,
    GroupedQueryAttention,
    HubSource,
    Model,
    MoE,
    PretrainedTokenizer,
    Rotary,
    Run,
    Train,
)
from moe.routers.topk import Config as TopK


def run() -> Run:
    """The published model and schedule."""
    return Run(
        name="olmoe-1b-7b",
        model=Model(
            vocab_size=50304,
            dim=2048,
            num_layers=16,
            ffn_hidden=1024,
            attention=GroupedQueryAttention(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full"),
            rotary=Rotary(base=10_000.0),
            moe=MoE(
                num_experts=64,
                top_k=8,
                expert_hidden=1024,
                router=TopK(gate="full", balance=Balance(weight=0.01, scope="micro_batch"), z_weight=0.001 / 8),
            ),
            norm_eps=1e-5,
            init_std=0.02,
            init_depth_scaling=False,
        ),
        data=Data(
            sources=(HubSource(dataset="allenai/OLMoE-mix-0924", max_bytes=100_000_000_000),),
            tokenizer=PretrainedTokenizer(path="allenai/OLMoE-1B-7B-0924"),
            sequence_length=4096,
            validation_fraction=0.0005,
        ),
        train=Train(
            steps=1_223_842,
            batch_rows=1024,
            micro_rows=4,
            optimizer=AdamW(lr=4e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
            schedule=Cosine(warmup_steps=2500, final_fraction=0.1),
            clip_norm=1.0,
            precision="bfloat16",
            activation_checkpointing=True,
        ),
        evaluation=Evaluation(every_steps=1000),
        checkpoint=Checkpoint(every_steps=5000),
    )
