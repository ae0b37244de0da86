"""TinyStories (arXiv 2305.07759) on one GPU: 61M parameters, 23M active, 262M tokens, 4.3e16 FLOPs.

The data set is downloaded from the Hugging Face hub on first use (about 2 GB of text), and a BPE of 8,192 entries is
learned on it. A GPU of 24 GB holds a micro-batch; with less, lower train.micro_rows, which changes the memory and not
the result.
"""

from moe.config.schema import (
    AdamW,
    Balance,
    BpeTokenizer,
    Checkpoint,
    Cosine,
    Data,
    Evaluation,
    GroupedQueryAttention,
    HubSource,
    Model,
    MoE,
    Run,
    Train,
)
from moe.routers.topk import Config as TopK


def run() -> Run:
    """Eight experts, two per token, on 262M tokens."""
    return Run(
        name="tiny-stories-gpu",
        model=Model(
            vocab_size=8192,
            dim=512,
            num_layers=8,
            ffn_hidden=1024,
            attention=GroupedQueryAttention(num_heads=8, num_kv_heads=4, head_dim=64, qk_norm="head"),
            moe=MoE(
                num_experts=8,
                top_k=2,
                expert_hidden=512,
                router=TopK(gate="selected", balance=Balance(weight=0.01, scope="global"), z_weight=0.001),
            ),
            tied_head=True,
        ),
        data=Data(
            sources=(HubSource(dataset="roneneldan/TinyStories", max_bytes=2_500_000_000),),
            tokenizer=BpeTokenizer(vocab_size=8192),
            sequence_length=512,
            validation_fraction=0.005,
        ),
        train=Train(
            steps=4000,
            batch_rows=128,
            micro_rows=64,
            optimizer=AdamW(lr=1e-3),
            schedule=Cosine(warmup_steps=200),
            precision="bfloat16",
        ),
        evaluation=Evaluation(every_steps=500, rows=256, final_rows=2048),
        checkpoint=Checkpoint(every_steps=1000),
    )
