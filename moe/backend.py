"""Whether the kernels compiled for this processor compute, where a setting says `auto`, `torch` or `cpu`."""

import torch

from moe.errors import BackendError
from moe_cpu.library import CannotCompile, library


def compiled(name: str) -> bool:
    """Whether `name` means moe_cpu's kernels on this machine.

    `auto` does where there is no GPU and a C compiler; `cpu` raises BackendError where there is none; any other name does not.
    """
    if name not in ("auto", "cpu") or (name == "auto" and torch.cuda.is_available()):
        return False
    try:
        library()
    except (CannotCompile, OSError) as error:
        if name == "auto":
            return False
        raise BackendError(
            f"backend 'cpu' compiles its kernels for this processor, and {error}: use 'torch'"
        ) from error
    return True
