"""Mixtral-8x7B (arXiv 2401.04088): 46.7B parameters, 12.9B active. Multi-GPU.

Architecture and context of 32,768 tokens as published. Mistral published neither data nor optimizer: those here are
ours, in the usual range for the size. The config.json's router_aux_loss_coef 0.02 is of a loss that is not divided by
K = 2, so it is 0.04 here.
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
        name="mixtral-8x7b",
        model=Model(
            vocab_size=32000,
            dim=4096,
            num_layers=32,
            ffn_hidden=14336,
            attention=GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128),
            rotary=Rotary(base=1_000_000.0),
            moe=MoE(
                num_experts=8,
                top_k=2,
                expert_hidden=14336,
                router=TopK(gate="selected", balance=Balance(weight=0.04, scope="global"), z_weight=0.0),
            ),
            norm_eps=1e-5,
        ),
        data=Data(
            sources=(HubSource(dataset="HuggingFaceFW/fineweb-edu", max_bytes=100_000_000_000),),
            tokenizer=PretrainedTokenizer(path="mistralai/Mixtral-8x7B-v0.1"),
            sequence_length=32768,
            validation_fraction=0.0005,
        ),
        train=Train(
            steps=238_419,
            batch_rows=128,
            micro_rows=1,
            optimizer=AdamW(lr=3e-4),
            schedule=Cosine(warmup_steps=2000),
            precision="bfloat16",
            activation_checkpointing=True,
        ),
        evaluation=Evaluation(every_steps=1000),
        checkpoint=Checkpoint(every_steps=2000),
    )
