"""Floating-point operations of one piece of work, counted by torch while it runs.

`FlopCounterMode` sees every matrix product that is done, so also what recomputation and a first pass add. It cannot look into
operators that it does not know: the fused attention of CPUs gets its formula here, as those of GPUs have it (their backward
pass computes the scores again), and the experts' operators theirs, from the rows that each expert really received.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from moe.config.schema import Run
from moe.experts import resolve_backend

_EXPERTS = (
    ("moe_lab", "expert_ffn", 1),
    ("moe_lab", "expert_ffn_backward", 2),
    ("moe_triton", "expert_ffn", 1),
    ("moe_triton", "expert_ffn_backward", 2),
    ("moe_triton", "expert_ffn_backward_into", 2),
    ("moe_triton", "fp8_ffn", 1),
    ("moe_triton", "fp8_ffn_backward", 2),
)
"""Operators of the backends, and how many products they do with each matrix."""


def countable(run: Run) -> bool:
    """Whether all products of this run can be seen: not those of compiled code, nor of block-sparse matrices."""
    blocks = run.model.moe is not None and resolve_backend(run.model.moe.backend) == "block_sparse"
    return not run.train.compile and not blocks


def counter(run: Run) -> Any:
    """A context whose `get_total_flops()` is what was done inside, on this rank (a FlopCounterMode)."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # loads triton

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad_out, query, key, value)

    if run.model.moe is not None and resolve_backend(run.model.moe.backend) == "triton":
        import_module("moe_triton.ffn")  # its operators must be there before they are counted
    aten = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    cpu = torch.ops.moe_cpu
    mapping |= {
        aten.addmm_: lambda _out, a, b, **__: 2 * a[0] * a[1] * b[1],  # torch counts addmm alone
        cpu.product_into: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1],
        cpu.linear: lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[0],
        cpu.linear_backward: lambda dy, x, weight, of_x, of_weight, **__: (
            2 * x[0] * x[1] * weight[0] * (of_x + of_weight)
        ),
        cpu.causal_attention: attention,
        cpu.causal_attention_backward: attention_backward,
    }
    for space, name, products in _EXPERTS:
        operator = getattr(getattr(torch.ops, space), name, None)  # only what this process has imported
        if operator is not None:
            mapping[operator] = _experts(operator, products)
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _experts(operator: Any, products: int) -> Callable[..., int]:
    """FLOPs of an experts' operator: 2·D·F for each of an expert's rows, matrix and product."""
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        values = dict(zip(names, arguments, strict=False)) | named
        rows = values["offsets_E1"].diff().tolist()  # host sync: in the one step that is counted
        up = next(values[name] for name in ("w_up_EDF", "w_up") if name in values)
        widths = values.get("widths") or [up.shape[-1]] * len(rows)
        gated = any(values.get(name) is not None for name in ("w_gate_EDF", "w_gate"))
        matrices = 3 if gated else 2
        again = matrices - 1 if values.get("kept") is False else 0
        hidden = sum(n * width for n, width in zip(rows, widths, strict=True))
        return 2 * values["x_TD"].shape[-1] * hidden * (matrices * products + again)

    count._get_raw = True  # type: ignore[attr-defined]  # torch then hands over the arguments and not their shapes
    return count
