"""Where the time of a training step goes: torch's profile of one step, its operators' own time summed by kind."""

import re
import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

Profile = dict[str, float]
"""Milliseconds by kind."""

PRODUCTS, ATTENTION = "matrix products", "attention, from scores to values"
EXPERTS = "experts: products, rows gathered, activation, sums by token"
HEAD = "head and loss: products and softmax, in chunks"
OTHER, REST = "other operators", "Python, between operators"
_OPERATORS = {
    PRODUCTS: "mm addmm addmm_ bmm baddbmm linear linear_backward _grouped_mm mkldnn_linear _linear_pointwise",
    EXPERTS: "expert_ffn expert_ffn_backward",
    HEAD: "_ChunkedCrossEntropy product_into cross_entropy_",
    ATTENTION: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
    "causal_attention causal_attention_backward",
    "update and clipping": "_fused_adamw_ _foreach_mul_ _foreach_norm addcmul_ addcdiv_ lerp_ sqrt linalg_vector_norm",
    "rows moved, sorted, summed by token": "index_select index index_put_ _index_put_impl_ index_add_ gather scatter_add_ scatter_ "
    "scatter_add embedding embedding_dense_backward _embedding_bag _embedding_bag_dense_backward topk sort histc bincount cumsum "
    "nonzero one_hot",
    "softmax and logarithms": "_softmax _log_softmax _log_softmax_backward_data _softmax_backward_data logsumexp exp exp_ log "
    "nll_loss_forward nll_loss_backward",
    "element by element": "mul mul_ add add_ sub sub_ neg silu silu_ silu_backward pow rsqrt div div_ clamp masked_fill "
    "masked_fill_ where eq ne abs square logical_not sigmoid _fused_rms_norm _fused_rms_norm_backward",
    "sums, means and maxima": "sum mean amax max all any",
    "copies and zeros": "copy_ fill_ zero_ cat",
}
KINDS = {kind: tuple(operators.split()) for kind, operators in _OPERATORS.items()}


def profile_of(step: Callable[[int], object], first: int, times: int = 3) -> Profile:
    """Milliseconds by kind of operator of the fastest of `times` steps; what no operator accounts for is Python's."""
    return min((_profile(step, first + number) for number in range(times)), key=lambda one: sum(one.values()))


def _profile(step: Callable[[int], object], index: int) -> Profile:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        step(index)
        total = 1e3 * (time.perf_counter() - start)
    kinds = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    sums = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in found.key_averages():
        operator = _operator(event.key)
        if operator is not None:
            sums[kinds.get(operator, OTHER)] += event.self_cpu_time_total / 1e3
    return {**sums, REST: max(total - sum(sums.values()), 0.0)}


def _operator(key: str) -> str | None:
    """The operator's name without its library; None for what is no operator. Ours compute under their autograd function's name."""
    space, _, name = key.partition("::")
    if space in ("aten", "mkldnn", "moe_cpu", "moe_lab"):
        return name
    if found := re.fullmatch(r"GeneratedBackwardFor_moe_[a-z]+?_(\w+)_default", key):
        return found.group(1)
    return key if key in _OPERATORS[HEAD] else None


def kernels_share(one: Profile) -> float:
    """Share of the step's time in the operators that multiply, attention's among them."""
    return sum(one[kind] for kind in (PRODUCTS, EXPERTS, HEAD, ATTENTION)) / sum(one.values())


def profile_table(profiles: dict[str, Profile], products: float) -> list[str]:
    """A line per kind, a column per contender: milliseconds and share of the step.

    `products`: milliseconds that the step's matrix products take without anything else, attention's not among them.
    """
    lines = [f"| milliseconds of a step in | {' | '.join(profiles)} |", "| --- |" + " --- |" * len(profiles)]
    for kind in next(iter(profiles.values())):
        cells = [f"{one[kind]:,.0f} ({one[kind] / sum(one.values()):.0%})" for one in profiles.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    cells = [f"{kernels_share(one):.0%}" for one in profiles.values()]
    lines.append(f"| all that multiply, the first four | {' | '.join(cells)} |")
    cells = [f"{products:,.0f} ({products / sum(one.values()):.0%})" for one in profiles.values()]
    lines.append(f"| matrix products alone, at the speed of one | {' | '.join(cells)} |")
    return lines
