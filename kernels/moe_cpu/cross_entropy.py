"""The loss of rows of logits and its gradient by the compiled kernel, as an operator without autograd."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moe_cpu.library import library


@cache
def _kernel():
    function = library().moe_cpu_cross_entropy
    pointer = ctypes.c_void_p
    function.argtypes, function.restype = [*[ctypes.c_long] * 2, *[pointer] * 3, *[ctypes.c_int] * 2], None
    return function


@torch.library.custom_op("moe_cpu::cross_entropy_", mutates_args={"logits_TV"})
def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, *, gradient: bool) -> Tensor:
    """Negative log-likelihood of each target [T], float32; 0 where the target is negative.

    logits_TV [T, V], contiguous float32 on the CPU, become their gradient softmax - one-hot (0 where the target is negative) if
    `gradient`. Raises ValueError for other tensors, and for targets of V or more.
    """
    T, V = logits_TV.shape
    if logits_TV.dtype != torch.float32 or logits_TV.device.type != "cpu" or not logits_TV.is_contiguous():
        raise ValueError(f"contiguous float32 logits on the CPU, not {logits_TV.dtype} on {logits_TV.device}")
    if targets_T.shape != (T,) or targets_T.dtype != torch.int64:
        raise ValueError(f"int64 targets [{T}], not {targets_T.dtype} {list(targets_T.shape)}")
    if T and int(targets_T.max()) >= V:
        raise ValueError(f"target {int(targets_T.max())} is none of {V} classes")
    losses_T, targets_T = logits_TV.new_empty(T), targets_T.contiguous()
    pointers = (logits_TV.data_ptr(), targets_T.data_ptr(), losses_T.data_ptr())
    _kernel()(T, V, *pointers, gradient, torch.get_num_threads())
    return losses_T


@cross_entropy_.register_fake
def _(logits_TV: Tensor, targets_T: Tensor, *, gradient: bool) -> Tensor:
    return logits_TV.new_empty(logits_TV.shape[0])
