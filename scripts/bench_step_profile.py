"""Where the time of a training step goes: torch's profile of one step, its operators' own time summed by kind."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

Profile = dict[str, float]
"""Milliseconds by kind."""

PRODUCTS, ATTENTION = "matrix products", "attention, from scores to values"
OTHER, REST = "other operators", "Python, between operators"
_OPERATORS = {
    PRODUCTS: "mm addmm addmm_ bmm baddbmm linear _grouped_mm mkldnn_linear _linear_pointwise",
    ATTENTION: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward",
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
        space, _, operator = event.key.partition("::")
        if space in ("aten", "mkldnn"):
            sums[kinds.get(operator, OTHER)] += event.self_cpu_time_total / 1e3
    return {**sums, REST: max(total - sum(sums.values()), 0.0)}


def products_share(one: Profile) -> float:
    """Share of the step's time in matrix products, attention's among them."""
    return (one[PRODUCTS] + one[ATTENTION]) / sum(one.values())


def profile_table(profiles: dict[str, Profile]) -> list[str]:
    """A line per kind, a column per contender: milliseconds and share of the step."""
    lines = [f"| milliseconds of a step in | {' | '.join(profiles)} |", "| --- |" + " --- |" * len(profiles)]
    for kind in next(iter(profiles.values())):
        cells = [f"{one[kind]:,.0f} ({one[kind] / sum(one.values()):.0%})" for one in profiles.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    cells = [f"{products_share(one):.0%}" for one in profiles.values()]
    lines.append(f"| products and attention together | {' | '.join(cells)} |")
    return lines
