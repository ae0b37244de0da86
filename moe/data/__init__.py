"""Text to batches: sources, tokenizers, prepared shards, and rows that depend on (seed, step) alone."""

from moe.data.batches import Batch, Corpus, prepare

__all__ = ["Batch", "Corpus", "prepare"]
