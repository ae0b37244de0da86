"""`moe eval`: perplexity and bits per byte of a run or an export, whole and by source, and tasks of lm-evaluation-harness."""
