"""Train in this process and die by SIGKILL at a chosen moment: `crash_run.py MOMENT COUNT -- arguments of moe.train`.

`step`: before the COUNT-th optimizer step of this process. `write`: at the COUNT-th tensor written by a checkpoint.
`publish`: when the COUNT-th checkpoint is written and not yet renamed.
"""

import os
import signal
import sys

import torch

from moe.checkpoint import folder
from moe.train import __main__, loop


def die_at(count: int, function):
    """`function`, except that its count-th call kills the process."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


moment, count = sys.argv[1], int(sys.argv[2])
sys.argv = ["moe.train", *sys.argv[4:]]
if moment == "step":
    loop.train_step = die_at(count, loop.train_step)
elif moment == "write":
    torch.save = die_at(count, torch.save)
elif moment == "publish":
    folder.publish = die_at(count, folder.publish)
__main__.main()
