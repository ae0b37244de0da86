"""The ranks of a run, their groups, and what travels between experts.

ranks      this process's place; sums, messages, start and stop
mesh       the process groups of a layout
parts      what a rank holds of a parameter
placement  which rank holds which experts, by load
pipeline   micro-batches through the stages of a model
exchange   tokens to the ranks that hold their experts, and back
ulysses    tokens for heads, between the ranks that share a row
tensor     matrices of attention and dense layers, over the ranks that share them
watch      what every rank is doing, and the end of a run in which one does not come
"""

from moe.parallel.ranks import Ranks, joined, start, stop, watched

__all__ = ["Ranks", "joined", "start", "stop", "watched"]
