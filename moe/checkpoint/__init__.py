"""Checkpoints through torch's distributed checkpoint: written aside, flushed, then published by one rename.

A folder `step_00000100` is therefore always whole: whatever moment a process dies at, the newest published checkpoint is a
complete one. It holds the model, the optimizer, router state, and `meta.json` with the step, the configuration and size
and checksum of every file. Names and shapes are those of the whole model (an expert's index is its global one), however
the ranks that wrote it had shared the model among them, so that any other number and arrangement of ranks can read it.
"""

from moe.checkpoint.folder import Damaged, Saved, checkpoint_root, find, newest, prune, published, set_aside
from moe.checkpoint.fresh import save_fresh
from moe.checkpoint.saver import Saver, save
from moe.checkpoint.state import load, read_tensors, stored_names

__all__ = [
    "Damaged",
    "Saved",
    "Saver",
    "checkpoint_root",
    "find",
    "load",
    "newest",
    "prune",
    "published",
    "read_tensors",
    "save",
    "save_fresh",
    "set_aside",
    "stored_names",
]
