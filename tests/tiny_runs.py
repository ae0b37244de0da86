"""Runs small enough to train two steps in well under a second, on text that lies beside the test."""

from pathlib import Path
from typing import Any

from moe.config.load import load
from moe.config.schema import Run


def tiny_dict(folder: Path) -> dict[str, Any]:
    """A plain run of 2 layers and 4 experts, D=16, rows of 32 bytes, over a corpus that is written into `folder`."""
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 257,
            "dim": 16,
            "num_layers": 2,
            "ffn_hidden": 32,
            "attention": {"name": "grouped_query", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "moe": {"num_experts": 4, "top_k": 2, "expert_hidden": 8, "router": {"name": "topk"}},
        },
        "data": {
            "sources": [{"name": "files", "paths": [str(write_corpus(folder))]}],
            "sequence_length": 32,
            "validation_fraction": 0.3,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "steps": 2,
            "batch_rows": 4,
            "micro_rows": 4,
            "optimizer": {"lr": 0.01},
            "device": "cpu",
        },
        "evaluation": {"rows": 2, "final_rows": 4, "probe_rows": 2},
        "logging": {"console": "off"},
    }


def tiny_run(folder: Path, *overrides: str) -> Run:
    """The checked run of `tiny_dict`, with overrides."""
    return load(tiny_dict(folder), overrides)


def write_corpus(folder: Path) -> Path:
    """jsonl of 60 distinct passages with a prompt field; returns the file."""
    path = folder / "corpus.jsonl"
    if not path.exists():
        passages = [
            " ".join(f"{word}{i * k}" for k, word in enumerate(("one", "two", "red", "old"), 1)) for i in range(60)
        ]
        lines = [
            f'{{"text": "{text}", "other": "{text[::-1]}", "ask": "what {i}?"}}\n' for i, text in enumerate(passages)
        ]
        path.write_text("".join(lines))
    return path
