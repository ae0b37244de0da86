"""The ranks of a run, their groups, and what travels between experts.

ranks      this process's place; sums, messages, start and stop
mesh       the process groups of a layout
parts      what a rank holds of a parameter
exchange   tokens to the ranks that hold their experts, and back
"""

from moe.parallel.ranks import Ranks, joined, start, stop

__all__ = ["Ranks", "joined", "start", "stop"]
