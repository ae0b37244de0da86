"""Parameter groups, the update rule, and clipping."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.config.schema import AdamW, Muon
from moe.init import is_bias
from moe.muon import Muon as MuonOptimizer
from moe.parallel import Ranks
from moe.parallel.parts import copies, part_here


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices; none for norms, biases, attention sinks and embeddings. Asserts that all that is trained is in one group.

    Parameters that are sharded over different ranks are in different groups, because one operator cannot update both.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        decays = parameter.ndim >= 2 and not is_bias(name) and id(parameter) not in embeddings
        groups.setdefault((mesh, decays), []).append(parameter)
    assert {id(p) for g in groups.values() for p in g} == {id(p) for p in model.parameters() if p.requires_grad}
    ordered = sorted(groups.items(), key=lambda item: not item[0][1])  # matrices first
    return [{"params": group, "weight_decay": weight_decay if key[1] else 0.0} for key, group in ordered]


def build_optimizer(model: nn.Module, config: AdamW | Muon) -> torch.optim.Optimizer:
    """The config's update rule over all parameters; the learning rate is set before every step."""
    if isinstance(config, Muon):
        return MuonOptimizer(model, config)
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def gradient_norm(model: nn.Module, ranks: Ranks) -> Tensor:
    """Euclidean norm over all gradients of the whole model, float32 scalar, the same on every rank.

    Each rank adds what it holds, and a part that several ranks hold counts once.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([part_here(gradient) for gradient in gradients]))
    if ranks.world_size == 1:
        return torch.linalg.vector_norm(norms)
    held = torch.tensor([copies(gradient, ranks) for gradient in gradients], dtype=torch.float64, device=norms.device)
    return ranks.sum_over_all((norms.double().square() / held).sum()).sqrt().to(norms.dtype)


def clip(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most max_norm; 0 leaves them alone."""
    if max_norm > 0:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([part_here(p.grad) for p in model.parameters() if p.grad is not None], scale)
