"""Qwen3-30B-A3B (arXiv 2505.09388): 30.5B parameters, 3.35B active. Multi-GPU.

Architecture, rows of 4,096 tokens and global-batch balance loss as published; the rotary base is that of the first two
stages (10,000; the long-context stage raises it to 1,000,000). The report gives no optimizer settings: those here are
ours. The config.json's router_aux_loss_coef 0.001 is of a loss that is not divided by K = 8, so it is 0.008 here.
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
    """The published model; 1T tokens at a plausible schedule."""
    return Run(
        name="qwen3-30b-a3b",
        model=Model(
            vocab_size=151936,
            dim=2048,
            num_layers=48,
            ffn_hidden=6144,
            attention=GroupedQueryAttention(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"),
            rotary=Rotary(base=10_000.0),
            moe=MoE(
                num_experts=128,
                top_k=8,
                expert_hidden=768,
                router=TopK(gate="selected", balance=Balance(weight=0.008, scope="global"), z_weight=0.0),
            ),
            norm_eps=1e-6,
        ),
        data=Data(
            sources=(HubSource(dataset="HuggingFaceFW/fineweb-edu", max_bytes=100_000_000_000),),
            tokenizer=PretrainedTokenizer(path="Qwen/Qwen3-30B-A3B-Base"),
            sequence_length=4096,
            validation_fraction=0.0005,
        ),
        train=Train(
            steps=238_419,
            batch_rows=1024,
            micro_rows=1,
            optimizer=AdamW(lr=4e-4),
            schedule=Cosine(warmup_steps=2000),
            precision="bfloat16",
            activation_checkpointing=True,
        ),
        evaluation=Evaluation(every_steps=1000),
        checkpoint=Checkpoint(every_steps=2000),
    )
