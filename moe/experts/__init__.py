"""Expert weights in one module, and the backends that compute with them.

A backend is a function over the weights, so a checkpoint never depends on it. There is no silent fallback: a backend
that cannot run raises and names one that can, and `auto` is resolved once (`resolve_backend`).

| experts | parameters | canonical names |
| --- | --- | --- |
| of one width F | [E, D, F], [E, D, F], [E, F, D] | `w_gate_EDF`, `w_up_EDF`, `w_down_EFD` |
| of different widths, F their sum | [F, D] each, expert after expert | `w_gate_FD`, `w_up_FD`, `w_down_FD` |

With `bias`, one for each product: `b_gate_EF` [E, F], `b_up_EF` [E, F], `b_down_ED` [E, D]; of experts of one width only.

Row f of the packed three is one hidden unit: its weights from x to gate and up, and from hidden to y. Expert e has the
rows from Σ widths[:e] to Σ widths[:e+1], so that a slice of rows is an expert, whatever its width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.backend import compiled
from moe.config.check import biased_experts, low_precision, unequal_widths
from moe.errors import BackendError
from moe.experts import block_sparse_backend, reference, torch_backend, triton_backend
from moe.experts.activation import Activation
from moe.init import BIASES, is_bias
from moe.parallel.exchange import Arrival, Exchange
from moe.routing import Dispatch, Routing, plan
from moe_triton.block_sizes import block_of
from moe_triton.block_sparse.topology import PackedExperts

_INDICES = ("first_block_E1", "expert_C", "column_bounds")
"""Buffers that hold a PackedExperts on the device of the weights; they follow from the widths, and no checkpoint has them."""
Backend = Callable[..., Tensor]
"""(x, gate, up, down, dispatch, packed) to y, and precision=, activation= or biases= where they are not native, SwiGLU or
none. packed: widths and blocks of packed weights; None where they are stacked, except for `block_sparse`, which always
needs blocks."""
BACKENDS: dict[str, Backend] = {
    "reference": reference.expert_ffn,
    "torch": torch_backend.expert_ffn,
    "cpu": partial(torch_backend.expert_ffn, compiled=True),
    "triton": triton_backend.expert_ffn,
    "block_sparse": block_sparse_backend.expert_ffn,
}


def resolve_backend(name: str) -> str:
    """The backend that `name` means on this machine; raises BackendError for one that cannot run."""
    if name == "auto":
        return "cpu" if compiled(name) else "torch"
    if name not in BACKENDS:
        known = ", ".join(f"'{known}'" for known in BACKENDS)
        raise BackendError(f"expert backend '{name}' is not available in this version: use one of {known}, or 'auto'")
    if name in ("triton", "block_sparse"):
        triton_backend.require(name)
    compiled(name)
    return name


class Experts(nn.Module):
    """E gated feed-forward networks, of width `hidden` or of `widths`; the module's docstring has the parameters.

    With an `exchange` (moe/train/sharding.py sets it) this rank holds its share of the experts, and tokens travel.
    `lora`: what is added to each weight (moe/lora.py sets it).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        backend: str = "auto",
        *,
        widths: Sequence[int] = (),
        precision: str = "native",
        activation: Activation | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths) or (hidden,) * num_experts
        self.activation = activation or Activation()
        refusal = (
            unequal_widths(backend, self.widths)
            or low_precision(backend, precision, self.widths)
            or biased_experts(backend, precision, self.widths, activation=self.activation.name, bias=bias)
        )
        if refusal:
            raise BackendError(refusal)
        self.backend, self.precision = resolve_backend(backend), precision
        self.exchange: Exchange | None = None
        self.lora: nn.ModuleDict | None = None
        if self.backend == "triton":
            triton_backend.require_precision(precision)
        if len(set(self.widths)) > 1:
            F = sum(self.widths)
            self.w_gate_FD = nn.Parameter(torch.empty(F, dim))
            self.w_up_FD = nn.Parameter(torch.empty(F, dim))
            self.w_down_FD = nn.Parameter(torch.empty(F, dim))
        else:
            F = self.widths[0]
            self.w_gate_EDF = nn.Parameter(torch.empty(num_experts, dim, F))
            self.w_up_EDF = nn.Parameter(torch.empty(num_experts, dim, F))
            self.w_down_EFD = nn.Parameter(torch.empty(num_experts, F, dim))
        if bias:
            self.b_gate_EF = nn.Parameter(torch.empty(num_experts, F))
            self.b_up_EF = nn.Parameter(torch.empty(num_experts, F))
            self.b_down_ED = nn.Parameter(torch.empty(num_experts, dim))
        if len(set(self.widths)) > 1 or self.backend == "block_sparse":
            # on the CPU, even where the default device is meta: buffers hold values
            packed = PackedExperts.of(self.widths, block_of(self.widths))
            for name in _INDICES:
                self.register_buffer(name, getattr(packed, name), persistent=False)

    @property
    def packed(self) -> PackedExperts | None:
        """Widths and blocks of the experts; None where they are of one width and no backend asks for blocks."""
        if not hasattr(self, _INDICES[0]):
            return None
        indices = {name: getattr(self, name) for name in _INDICES}
        return PackedExperts(widths=self.widths, block=block_of(self.widths), **indices)

    def plan(self, routing: Routing) -> Dispatch:
        """Order a routing's rows as this module's `forward` takes them: by expert, or by where experts are."""
        return plan(routing) if self.exchange is None else self.exchange.plan(routing)

    def start(self, x_TD: Tensor, dispatch: Dispatch, *, exact: bool = False) -> Arrival | None:
        """Send tokens on their way to the ranks that hold their experts; None where all experts are here.

        `exact`: drop nothing, even in training with fixed sizes.
        """
        if self.exchange is None:
            return None
        return self.exchange.start(x_TD, dispatch, training=self.training and not exact)

    def forward(self, x_TD: Tensor, dispatch: Dispatch, arrival: Arrival | None = None) -> Tensor:
        """Gather, compute, weigh and sum: x_TD [T, D] to y_TD [T, D] in the same type.

        `arrival` is what `start` returned for the same arguments, where other work was done meanwhile.
        """
        if self.exchange is None:
            return self._compute(x_TD, dispatch)
        arrival = arrival if arrival is not None else self.start(x_TD, dispatch)
        assert arrival is not None
        y_UD = self._compute(arrival.units_UD, self.exchange.local(arrival, dispatch))
        return self.exchange.finish(y_UD, arrival, x_TD.shape[0])

    def _compute(self, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        """The backend over this rank's experts."""
        # parts of a cut model, told by their methods (moe/parallel/parts.py)
        held: dict[str, Any] = dict(self.named_parameters(recurse=False))
        here = {name: w.to_local() if hasattr(w, "to_local") else w for name, w in held.items()}
        if self.lora is not None:
            adapters: Any = self.lora
            here = {name: w if is_bias(name) else adapters[name].added_to(w) for name, w in here.items()}
        gate, up, down = (w.to(x_TD.dtype) for name, w in here.items() if not is_bias(name))
        options: dict[str, Any] = {}
        if self.precision != "native":
            options["precision"] = self.precision
        if self.activation.name != "swiglu":
            options["activation"] = self.activation
        if BIASES[0] in here:
            options["biases"] = tuple(here[name].to(x_TD.dtype) for name in BIASES)
        return BACKENDS[self.backend](x_TD, gate, up, down, dispatch, self.packed, **options)
