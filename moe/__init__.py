"""Train sparse Mixture-of-Experts transformers, and know whether they beat a dense model of equal compute.

One letter per logical dimension, for the whole project. A tensor of rank 2 or more, or an index tensor, ends in its
letters: `x_TD`, `experts_TK`, `w_up_EDF`. Letters name logical dimensions, never how a tensor is sharded.

    B  batch rows              E  experts
    S  sequence                G  experts on this rank
    T  tokens, B·S             K  experts chosen per token
    D  model width             C  capacity, rows an expert accepts
    V  vocabulary              R  routed rows, before dispatch
    N  query heads             P  rows held here, after dispatch
    M  key/value heads         F  hidden size of a feed-forward network or expert
    H  head size               L  expert layers
    I  what goes into a map    J  rank of an adapter
    O  what comes out of it

Names below are imported at first use, so that `import moe` needs neither torch nor anything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.config.load import dump, load, router_config
    from moe.config.schema import Model, MoE, Run
    from moe.errors import UserError
    from moe.model import Transformer
    from moe.moe_layer import MoELayer, auxiliary_loss
    from moe.routing import Tokens

__all__ = [
    "MoE",
    "MoELayer",
    "Model",
    "Run",
    "Tokens",
    "Transformer",
    "UserError",
    "auxiliary_loss",
    "dump",
    "load",
    "router_config",
]

_HOMES = {
    "MoE": "moe.config.schema",
    "MoELayer": "moe.moe_layer",
    "Model": "moe.config.schema",
    "Run": "moe.config.schema",
    "Tokens": "moe.routing",
    "Transformer": "moe.model",
    "UserError": "moe.errors",
    "auxiliary_loss": "moe.moe_layer",
    "dump": "moe.config.load",
    "load": "moe.config.load",
    "router_config": "moe.config.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
