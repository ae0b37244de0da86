"""Experts to ranks by measured load, when a run resumes: reads what the run has logged, and says what it did."""

import json
from pathlib import Path

from moe.parallel.placement import imbalance, pack
from moe.train.step import State

LOOK_BACK = 20
"""Logged steps whose loads count."""


def place_by_load(state: State, out: Path) -> str:
    """Order each layer's experts so that the ranks of a group get as many rows; returns a sentence for the user, or "".

    Before the checkpoint is loaded, which brings the experts to their places. Without a log of the routing nothing is moved.
    """
    ranks = state.ranks.layout.expert
    if state.run.parallel.placement == "index" or ranks == 1:
        return ""
    loads = state.ranks.broadcast(logged_loads(out / "routing.jsonl", LOOK_BACK) if state.ranks.first else {})
    before, after = [], []
    for layer, module in state.model.moe_layers():
        load_E = loads.get(layer)
        exchange = module.experts.exchange
        if load_E is None or exchange is None:
            continue
        exchange.order = pack(load_E, ranks)
        before.append(imbalance(load_E, range(len(load_E)), ranks))
        after.append(imbalance(load_E, exchange.order, ranks))
    if not before:
        return f"parallel.placement=load: {out} has no logged loads yet, so experts stay in their order"
    return (
        f"experts placed by their load in the last {LOOK_BACK} logged steps: the fullest of {ranks} ranks had up to "
        f"{max(before):.2f} of the mean, and would have had {max(after):.2f}"
    )


def logged_loads(path: Path, steps: int) -> dict[int, list[float]]:
    """Rows per expert of each layer, summed over the last `steps` logged steps."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    newest = {(line["layer"], line["step"]): line["counts"] for line in lines}  # a repeated step counts as last done
    wanted = sorted({step for _, step in newest})[-steps:]
    loads: dict[int, list[float]] = {}
    for (layer, step), counts in newest.items():
        if step in wanted:
            loads[layer] = [a + b for a, b in zip(loads.get(layer, [0.0] * len(counts)), counts, strict=True)]
    return loads
