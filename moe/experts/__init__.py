"""Expert weights in one module, and the backends that compute with them.

A backend is a function over the weights, so a checkpoint never depends on it. There is no silent fallback: a backend
that cannot run raises and names one that can, and `auto` is resolved once (`resolve_backend`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.errors import BackendError
from moe.experts import reference, torch_backend, triton_backend
from moe.routing import Dispatch

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Dispatch], Tensor]
BACKENDS: dict[str, Backend] = {
    "reference": reference.expert_ffn,
    "torch": torch_backend.expert_ffn,
    "triton": triton_backend.expert_ffn,
}


def resolve_backend(name: str) -> str:
    """The backend that `name` means on this machine; raises BackendError for one that cannot run."""
    if name == "auto":
        return "torch"
    if name not in BACKENDS:
        known = ", ".join(f"'{known}'" for known in BACKENDS)
        raise BackendError(f"expert backend '{name}' is not available in this version: use one of {known}, or 'auto'")
    if name == "triton":
        triton_backend.require()
    return name


class Experts(nn.Module):
    """E SwiGLU feed-forward networks of width F. Parameters are contiguous: [E, D, F], [E, D, F], [E, F, D]."""

    def __init__(self, num_experts: int, dim: int, hidden: int, backend: str = "auto"):
        super().__init__()
        self.backend = resolve_backend(backend)
        self.w_gate_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_up_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_down_EFD = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def forward(self, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        """Gather, compute, weigh and sum: x_TD [T, D] to y_TD [T, D] in the same type."""
        gate, up, down = (w.to(x_TD.dtype) for w in (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD))
        return BACKENDS[self.backend](x_TD, gate, up, down, dispatch)
