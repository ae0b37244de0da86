"""Which blocks each stage of a pipeline holds."""

from functools import lru_cache
from itertools import accumulate, pairwise

from moe.config.layout import Layout
from moe.config.schema import Model, Run
from moe.cost.counting import flops_by_component, flops_by_layer


def stages_of(run: Run, layout: Layout) -> tuple[range, ...]:
    """The blocks of each stage of a run in a layout; `parallel.pipeline_blocks` holds for as many stages as it names."""
    given = run.parallel.pipeline_blocks if len(run.parallel.pipeline_blocks) == layout.pipeline else ()
    return stage_blocks(run.model, layout.pipeline, run.data.sequence_length, given)


@lru_cache(maxsize=1024)
def stage_blocks(model: Model, stages: int, sequence_length: int, given: tuple[int, ...] = ()) -> tuple[range, ...]:
    """Consecutive blocks of each stage: as many as `given`, or so that the dearest stage costs the fewest FLOPs.

    The last stage has the head too; each has at least one block, so `stages` is at most model.num_layers.
    """
    if given:
        return tuple(range(first, end) for first, end in pairwise(accumulate(given, initial=0)))
    blocks = [sum(layer.values()) for layer in flops_by_layer(model, sequence_length)]
    head = flops_by_component(model, sequence_length)["head"]
    until = list(accumulate(blocks, initial=0.0))
    L = len(blocks)
    # dearest[n]: (cost of the dearest stage, starts of the stages) for the last blocks, from n on, over the stages so far
    dearest = {n: (until[L] - until[n] + head, (n,)) for n in range(L)}
    for stage in range(2, stages + 1):
        dearest = {
            n: min((max(until[m] - until[n], dearest[m][0]), (n, *dearest[m][1])) for m in range(n + 1, L - stage + 2))
            for n in range(L - stage + 1)
        }
    return tuple(range(first, end) for first, end in pairwise((*dearest[0][1], L)))
