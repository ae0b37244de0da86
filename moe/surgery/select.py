"""Tensors of fewer experts: some dropped, or groups of them merged into one. Config and router are renumbered alike.

Works on a model's state, `layers.<i>.moe.*`: every tensor whose name ends in letters with E has experts along that dimension.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe import init
from moe.surgery.scores import LayerUse

MATRICES = ("experts.w_gate_EDF", "experts.w_up_EDF", "experts.w_down_EFD")
BIASES = tuple(f"experts.{name}" for name in init.BIASES)


def expert_dimension(name: str) -> int | None:
    """The dimension along which a tensor has experts, from the letters at the end of its name; None if it has none."""
    letters = name.rsplit(".", 1)[-1].rsplit("_", 1)
    return letters[1].index("E") if len(letters) == 2 and "E" in letters[1] and letters[1].isupper() else None


def keep_experts(tensors: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
    """The state with only these experts, old numbers by block, in that order; other tensors unchanged."""
    result = dict(tensors)
    for layer, order in kept.items():
        index = torch.tensor(list(order))
        prefix = f"layers.{layer}.moe."
        for name, tensor in tensors.items():
            dimension = expert_dimension(name) if name.startswith(prefix) else None
            if dimension is not None:
                result[name] = tensor.index_select(dimension, index)
    return result


def best(score_E: Tensor, count: int, groups: int = 1) -> list[int]:
    """The `count` experts of highest score, in their old order; of equal scores the lower number.

    With groups of consecutive experts, as many of each, so that every expert stays in its group.
    """
    size = len(score_E) // groups
    order_GE = score_E.view(groups, size).argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return sorted((order_GE + size * torch.arange(groups).unsqueeze(1)).flatten().tolist())


def merge_experts(
    tensors: Mapping[str, Tensor], groups: Mapping[int, Sequence[Sequence[int]]], uses: Mapping[int, LayerUse]
) -> dict[str, Tensor]:
    """The state with each group of experts merged into one, which takes the router row of the group's first.

    Members' hidden units are permuted to match the first's before averaging, weighted by how often each is used (M-SMoE,
    arXiv 2310.01334: permutation alignment, then Σ f·W / Σ f).
    """
    result = keep_experts(tensors, {layer: [group[0] for group in of_layer] for layer, of_layer in groups.items()})
    for layer, of_layer in groups.items():
        prefix = f"layers.{layer}.moe."
        names = [prefix + name for name in (*MATRICES, *BIASES) if prefix + name in tensors]
        merged = [_merged([tensors[name] for name in names], group, uses[layer].rows_E) for group in of_layer]
        for name, experts in zip(names, zip(*merged, strict=True), strict=True):
            result[name] = torch.stack(experts)
    return result


def _merged(parts: Sequence[Tensor], group: Sequence[int], frequency_E: Tensor) -> list[Tensor]:
    """parts: W_gate [E, D, F], W_up [E, D, F], W_down [E, F, D] and, if there are any, the biases [E, F], [E, F], [E, D]."""
    first, total = group[0], float(frequency_E[list(group)].sum())
    weights = [float(frequency_E[e]) / total if total else 1 / len(group) for e in group]
    sums = [torch.zeros_like(t[first], dtype=torch.float64) for t in parts]
    gate_EDF, up_EDF, down_EFD = parts[:3]
    hidden = (1, 1, 0, 0, 0, None)
    for e, weight in zip(group, weights, strict=True):
        order_F = aligned((gate_EDF[first], up_EDF[first], down_EFD[first]), (gate_EDF[e], up_EDF[e], down_EFD[e]))
        for sum_, part, dimension in zip(sums, parts, hidden, strict=False):
            own = part[e] if dimension is None else part[e].index_select(dimension, order_F)
            sum_ += weight * own.double()
    return [sum_.to(gate_EDF.dtype) for sum_ in sums]


def aligned(anchor: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Order of `other`'s hidden units [F] in which they match `anchor`'s best: the largest sum of inner products of their weights.

    Each is (W_gate [D, F], W_up [D, F], W_down [F, D]); a permutation of hidden units leaves an expert's function alone.
    """
    similarity_FF = sum(a.t() @ b for a, b in zip(anchor[:2], other[:2], strict=True)) + anchor[2] @ other[2].t()
    assert isinstance(similarity_FF, Tensor)
    return torch.from_numpy(linear_sum_assignment(similarity_FF.double().numpy(), maximize=True)[1])


def groups_by_router(use: LayerUse, count: int) -> list[list[int]]:
    """M-SMoE's groups: the `count` most used experts, each with those whose router logits go with its own most."""
    heads = best(use.rows_E, count)
    logits_TE = torch.cat(use.logits).double()
    likeness_EE = torch.corrcoef(logits_TE.t()).nan_to_num(-2.0)
    groups = {head: [head] for head in heads}
    for e in range(len(use.rows_E)):
        if e not in groups:
            groups[heads[int(likeness_EE[e, heads].argmax())]].append(e)
    return list(groups.values())


def groups_by_output(use: LayerUse, count: int) -> list[list[int]]:
    """HC-SMoE's groups (arXiv 2410.08589): average-linkage clusters of the experts' mean outputs; the most used comes first."""
    mean_ED = torch.cat(use.outputs, dim=1).double().mean(1).numpy()
    if len(mean_ED) == 1:
        return [[0]]
    label_E = _exactly(linkage(mean_ED, method="average"), count)
    groups = [[e for e in range(len(label_E)) if label_E[e] == label] for label in dict.fromkeys(label_E)]
    return [sorted(group, key=lambda e: (-float(use.rows_E[e]), e)) for group in groups]


def _exactly(tree: np.ndarray, count: int) -> list[int]:
    """Labels of exactly `count` clusters: the last joins undone, which equal distances do not confuse."""
    labels = fcluster(tree, count, criterion="maxclust").tolist()
    if len(set(labels)) == count:
        return labels
    E = len(tree) + 1
    members = {e: [e] for e in range(E)}
    for number, (left, right) in enumerate(tree[: E - count, :2].astype(int)):
        members[E + number] = members.pop(left) + members.pop(right)
    return [next(label for label, group in enumerate(members.values()) if e in group) for e in range(E)]
