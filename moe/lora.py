"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): a frozen W, and a product A·B beside it that is trained.

| on | parameters, below the module's `lora` | what is computed |
| --- | --- | --- |
| a linear map, x to x W | `a_IJ` [in, J], `b_JO` [J, out] | x W + scale · (x A) B |
| stacked experts [E, in, out] | `<weight>.a_EIJ`, `<weight>.b_EJO` | the backend, with W + scale · A B |

J is the rank. A is drawn and B is 0 (moe/init.py), so that the first step starts from the base exactly. Experts are given the
sum, so every backend computes them as ever and the chain rule takes the gradient of the sum to A and B; the gradient of whole
matrices exists for as long as one layer's backward pass takes. Embedding, head, norms, biases and routers stay as they are, and
so does the state of routers.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from moe.config.lora import Lora, lora_scale
from moe.experts import Experts
from moe.init import initialise, is_bias
from moe.moe_layer import Linear

_MARK = ".lora."


class LowRank(nn.Module):
    """scale · A B beside a matrix from `inner` to `outer` dimensions, or beside each of a stack of `experts` matrices."""

    def __init__(self, inner: int, outer: int, lora: Lora, experts: int = 0):
        super().__init__()
        self.scale = lora_scale(lora)
        if experts:
            self.a_EIJ = nn.Parameter(torch.empty(experts, inner, lora.rank))
            self.b_EJO = nn.Parameter(torch.empty(experts, lora.rank, outer))
        else:
            self.a_IJ = nn.Parameter(torch.empty(inner, lora.rank))
            self.b_JO = nn.Parameter(torch.empty(lora.rank, outer))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to x W, in x's type."""
        return x @ self.a_IJ.to(x.dtype) * self.scale @ self.b_JO.to(x.dtype)

    def added_to(self, w_EIO: Tensor) -> Tensor:
        """The experts' weights with the product added, in their type."""
        return torch.baddbmm(w_EIO, self.a_EIJ, self.b_EJO, alpha=self.scale)


def adapt(model: nn.Module, lora: Lora, *, seed: int, std: float) -> None:
    """Freeze every parameter of a model and put adapters on its targets, with their first values."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if _target_of(name) not in lora.targets:
            continue
        if isinstance(module, Experts):
            stacks = {leaf: w for leaf, w in module.named_parameters(recurse=False) if not is_bias(leaf)}
            module.lora = nn.ModuleDict(
                {leaf: LowRank(w.shape[1], w.shape[2], lora, experts=len(w)) for leaf, w in stacks.items()}
            )
        elif isinstance(module, Linear):
            module.lora = LowRank(module.in_features, module.out_features, lora)
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            initialise(module, seed=seed, std=std, prefix=f"{name}.")


def _target_of(name: str) -> str:
    """The target that a module is part of: layers.<i>.<target>.*, layers.<i>.moe.<target>.*, or none."""
    parts = [part for part in name.split(".")[2:] if part != "moe"]
    return parts[0] if name.startswith("layers.") and parts else ""


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state is an adapter's."""
    return _MARK in name


def adapter_names(names: Iterable[str]) -> list[str]:
    """Those among a state's names that are adapters'."""
    return [name for name in names if is_adapter(name)]


def base_name(name: str) -> str:
    """The weight that an adapter's A or B belongs to; of any other tensor, its own name."""
    if not is_adapter(name):
        return name
    module, _, leaf = name.partition(_MARK)
    return f"{module}.{leaf.rpartition('.')[0] or 'weight'}"


@torch.no_grad()
def merged(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """A state, or part of one, without adapters: the products added to their weights, computed in float64 and rounded once."""
    result = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for base, (a, b) in _pairs(tensors):
        product = lora_scale(lora) * (a.double() @ b.double())
        weight = result[base]
        result[base] = (weight.double() + (product if product.ndim == 3 else product.t())).to(weight.dtype)
    return result


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each adapted weight's name, with its A and B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in adapter_names(tensors):
        found.setdefault(base_name(name), {})[name.rpartition(".")[2][0]] = tensors[name]
    yield from ((base, (pair["a"], pair["b"])) for base, pair in found.items())
