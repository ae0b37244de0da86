"""A model over the ranks of a layout: who holds which parameter, and which gradients are summed where.

| parameter                         | held by                                | gradient                                   |
|-----------------------------------|----------------------------------------|--------------------------------------------|
| matrices, embeddings              | all, or cut over shard · context       | summed by FSDP2, or in buckets afterwards  |
| routed experts                    | the ranks of `expert`, and cut there   | likewise, over the ranks that hold the     |
|                                   | over expert_shard                      | same experts                               |
| matrices of attention and dense   | besides, cut over tensor               | likewise                                   |
| layers                            |                                        |                                            |
| norms, biases, sinks, routers     | all, in float32                        | in buckets after the backward pass         |

The last row is a per mille of a model. Kept whole it needs no gathering, routers compute in float32 in every layout, and
their gradients can be measured.

Losses are divided by counts over the whole step before they are differentiated, so gradients are summed, never averaged:
FSDP2 is told to divide by one. Under `shard`, each micro-batch's gradients are reduced at once, so that no rank ever holds
a whole gradient; with several micro-batches that sends them as often.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe.attention import GroupedQuery, Latent
from moe.config.schema import Run
from moe.cost import stages_of
from moe.experts import Experts
from moe.init import is_bias, materialise
from moe.model import Transformer
from moe.moe_layer import SwiGLU
from moe.parallel import Ranks
from moe.parallel.exchange import Exchange
from moe.parallel.parts import part_here
from moe.parallel.ranks import sum_in_buckets
from moe.parallel.tensor import other_dim, share_heads, share_hidden
from moe.parallel.ulysses import Ulysses
from moe.routing import Router

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(run: Run, ranks: Ranks, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a run in its layout, on this rank's device, with its first values.

    `dtype` replaces the type of parameters and activations (tests compute in float64). A sharded model is built without
    memory, cut, and only then filled, so that no rank ever holds all of it.
    """
    train, layout = run.train, ranks.layout
    build = partial(
        Transformer,
        run.model,
        seed=run.seed,
        dtype=dtype or DTYPES[train.precision],
        recompute=train.activation_checkpointing,
        loss_chunk=train.loss_chunk,
        blocks=blocks_of(run, ranks),
    )
    if layout.shard == layout.expert == layout.tensor == 1:
        model = build()
        share_rows(model, ranks)
        return (model.to(dtype) if dtype is not None else model).to(ranks.device)
    with torch.device("meta"):
        model = build()
    if dtype is not None:
        model.to(dtype)
    spread(model, run, ranks)
    share_rows(model, ranks)
    materialise(model, ranks.device)
    model.initialise(run.seed)
    return model


def share_rows(model: Transformer, ranks: Ranks) -> None:
    """Tell a model which ranks hold the other parts of its rows."""
    if ranks.layout.context > 1 and ranks.mesh is not None:
        model.context = Ulysses(ranks.mesh.context)
        for module in model.modules():
            if isinstance(module, GroupedQuery | Latent):
                module.context = model.context


def blocks_of(run: Run, ranks: Ranks) -> range:
    """The blocks that this rank's stage holds."""
    return stages_of(run, ranks.layout)[ranks.layout.stage(ranks.rank)]


def spread(model: Transformer, run: Run, ranks: Ranks) -> None:
    """Cut a model that has no memory yet over the ranks of its layout."""
    layout, mesh = ranks.layout, ranks.mesh
    assert mesh is not None
    if layout.tensor > 1:
        _share_matrices(model, mesh.tensor)
    if layout.expert > 1:
        group = mesh.expert_axis.get_group()
        for _, layer in model.moe_layers():
            _take_experts(layer.experts, mesh.expert_axis)
            settings = run.parallel
            layer.experts.exchange = Exchange(
                group, len(layer.experts.widths), settings.dispatch, settings.dispatch_capacity_factor
            )
    if layout.shard > 1:
        _shard(model, run, ranks)


def _share_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Cut attention and dense feed-forward layers, shared experts among them, over the ranks of `tensor`."""
    for module in model.modules():
        if isinstance(module, GroupedQuery | Latent):
            share_heads(module, mesh, latent=isinstance(module, Latent))
        if isinstance(module, Latent):
            module.tensor = mesh
        if isinstance(module, SwiGLU):
            share_hidden(module, mesh)


def _take_experts(experts: Experts, axis) -> None:
    """Keep this rank's experts only: consecutive ones, in the order of the ranks."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        here = torch.empty(
            parameter.shape[0] // axis.size(), *parameter.shape[1:], dtype=parameter.dtype, device="meta"
        )
        setattr(experts, name, nn.Parameter(DTensor.from_local(here, axis, [Shard(0)], run_check=False)))


def _shard(model: Transformer, run: Run, ranks: Ranks) -> None:
    """FSDP2: the experts of each block, the rest of each block, and what is around the blocks, in this order."""
    layout, mesh = ranks.layout, ranks.mesh
    assert mesh is not None
    bfloat16 = run.train.precision == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        cast_forward_inputs=False,
    )
    whole = set(_whole(model))
    for _, layer in model.moe_layers():
        if layout.expert == 1:
            place = partial(_experts_dim, layer.experts, layout.dense_shards)
            fully_shard(
                layer.experts, mesh=mesh.dense, mp_policy=policy, ignored_params=whole, shard_placement_fn=place
            )
        elif layout.expert_shard > 1:
            fully_shard(
                layer.experts,
                mesh=mesh.expert_parts,
                mp_policy=policy,
                ignored_params=whole,
                shard_placement_fn=partial(_hidden_dim, layer.experts),
            )
        else:
            whole |= set(layer.experts.parameters())
    for block in model.layers:
        fully_shard(block, mesh=mesh.dense, mp_policy=policy, ignored_params=whole, shard_placement_fn=other_dim)
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, ignored_params=whole)
    blocks = [block for block in model.layers if isinstance(block, FSDPModule)]
    for block, after in pairwise(blocks):
        block.set_modules_to_forward_prefetch([after])
    if layout.pipeline > 1 and isinstance(model, FSDPModule):
        # several micro-batches are between forward and backward: what is around the blocks stays whole until the last is done
        model.set_reshard_after_backward(False, recurse=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _whole(model: Transformer) -> Iterator[nn.Parameter]:
    """Parameters that every rank holds whole: those of routers, and vectors, experts' biases of the experts here."""
    for module in model.modules():
        if isinstance(module, Router):
            yield from module.parameters()
    yield from (parameter for name, parameter in model.named_parameters() if parameter.ndim < 2 or is_bias(name))


def _hidden_dim(experts: Experts, parameter: nn.Parameter) -> Shard:
    """The dimension of hidden units: F of [E, D, F] and of [E, F, D]."""
    return Shard(1 if parameter is experts.w_down_EFD else 2)


def _experts_dim(experts: Experts, parts: int, parameter: nn.Parameter) -> Shard:
    """Whole experts on each rank where they come out even, or else a part of each expert's hidden units."""
    stacked = parameter.ndim == 3
    if not stacked or parameter.shape[0] % parts == 0 or experts.widths[0] % parts:
        return Shard(0)
    return _hidden_dim(experts, parameter)


def _norms_of_heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """Norms of which each head is given its own."""
    for module in model.modules():
        if isinstance(module, GroupedQuery):
            yield from (norm.weight for norm in (module.query_norm, module.key_norm) if norm is not None)


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum the gradients that FSDP2 does not: of parameters that are held whole, and of whole experts on a few ranks."""
    if ranks.world_size == 1:
        return
    whole, experts = [], []
    if ranks.layout.tensor > 1 and ranks.mesh is not None:
        # each rank has applied these norms to its own heads
        sum_in_buckets([p.grad for p in _norms_of_heads(model) if p.grad is not None], ranks.mesh.tensor.get_group())
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if not isinstance(parameter, DTensor) or parameter.device_mesh.mesh_dim_names == ("tensor",):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            whole.append(part_here(parameter.grad))
        elif parameter.device_mesh.mesh_dim_names == ("expert",):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            experts.append(part_here(parameter.grad))
    sum_in_buckets(whole, ranks.mesh.tokens if ranks.mesh is not None else None)
    if not experts or ranks.mesh is None:
        return
    for axis in ("expert_replicate", "expert_shard"):
        # where matrices are cut by FSDP2, biases alone are left to sum
        if getattr(ranks.layout, axis) > 1:
            sum_in_buckets(experts, ranks.mesh.experts.get_group(axis))
