"""DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): 15.7B parameters, 2.7B active with embedding and head. Multi-GPU.

Architecture, optimizer, batch and loss weight as published: 4,608 rows of 4,096 tokens, 5.7T tokens, peak rate 4.2e-4
after 2,000 steps of warm-up, initial deviation 0.006. Its rate steps down by 0.316 at 80 % and at 90 % of the tokens;
here a cosine ends at the same tenth. Pre-training has no YaRN; `extended` is the model as released, for contexts of
163,840. The balance loss is per sequence and over K, as ours.
"""

from dataclasses import replace

from moe.config.schema import (
    AdamW,
    Balance,
    Checkpoint,
    Cosine,
    Data,
    Evaluation,
    HubSource,
    LatentAttention,
    Model,
    MoE,
    PretrainedTokenizer,
    Rotary,
    Run,
    Train,
    Yarn,
)
from moe.routers.topk import Config as TopK


def run() -> Run:
    """The published model and pre-training."""
    return Run(
        name="deepseek-v2-lite",
        model=Model(
            vocab_size=102400,
            dim=2048,
            num_layers=27,
            ffn_hidden=10944,
            attention=LatentAttention(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
            rotary=Rotary(base=10_000.0),
            moe=MoE(
                num_experts=64,
                top_k=6,
                expert_hidden=1408,
                shared_hidden=2 * 1408,
                first_dense=1,
                router=TopK(gate="full", balance=Balance(weight=0.001, scope="sequence"), z_weight=0.0),
            ),
            norm_eps=1e-6,
            init_std=0.006,
            init_depth_scaling=False,
        ),
        data=Data(
            sources=(HubSource(dataset="HuggingFaceFW/fineweb-edu", max_bytes=100_000_000_000),),
            tokenizer=PretrainedTokenizer(path="deepseek-ai/DeepSeek-V2-Lite"),
            sequence_length=4096,
            validation_fraction=0.0005,
        ),
        train=Train(
            steps=301_990,
            batch_rows=4608,
            micro_rows=1,
            optimizer=AdamW(lr=4.2e-4, beta1=0.9, beta2=0.95, weight_decay=0.1),
            schedule=Cosine(warmup_steps=2000, final_fraction=0.1),
            clip_norm=1.0,
            precision="bfloat16",
            activation_checkpointing=True,
        ),
        evaluation=Evaluation(every_steps=1000),
        checkpoint=Checkpoint(every_steps=2000),
    )


def extended() -> Run:
    """The released model's rotary embedding: YaRN from 4,096 to 163,840 tokens."""
    base = run()
    yarn = Yarn(factor=40.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
    return replace(
        base, name="deepseek-v2-lite-extended", model=replace(base.model, rotary=Rotary(base=10_000.0, yarn=yarn))
    )
