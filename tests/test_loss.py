"""moe/loss.py against torch's cross_entropy of all logits, in float64 and in training types, and the memory of both."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe.config.schema import AdamW, Data, GroupedQueryAttention, Model, MoE, Run, Train
from moe.loss import IGNORE, chunked_cross_entropy, target_losses
from moe.model import Transformer, token_losses
from moe.routers.topk import Config as TopK
from moe.train import flops as train_flops

T, D, V = 37, 6, 23


def counter():
    """Counts the kernels' products too."""
    attention = GroupedQueryAttention(num_heads=1, num_kv_heads=1, head_dim=4)
    model = Model(vocab_size=V, dim=8, num_layers=1, ffn_hidden=8, attention=attention)
    train = Train(steps=1, batch_rows=1, micro_rows=1, optimizer=AdamW(lr=0.1))
    return train_flops.counter(Run(name="test", model=model, data=Data(), train=train))


def operands(dtype=torch.float64, weight_dtype=None):
    x_TD = torch.randn(T, D, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(V, D, dtype=weight_dtype or dtype).requires_grad_()
    targets_T = torch.randint(0, V, (T,))
    targets_T[torch.tensor([0, 5, 6, 7, 36])] = IGNORE
    return x_TD, weight_VD, targets_T


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_values_and_gradients_are_those_of_all_logits(chunk):
    x_TD, weight_VD, targets_T = operands()
    theirs = cross_entropy(x_TD @ weight_VD.t(), targets_T, ignore_index=IGNORE, reduction="sum")
    mine = chunked_cross_entropy(x_TD, weight_VD, targets_T, chunk)
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)
    expected = torch.autograd.grad(0.3 * theirs, [x_TD, weight_VD])
    found = torch.autograd.grad(0.3 * mine, [x_TD, weight_VD], retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    again = torch.autograd.grad(0.3 * mine, [x_TD, weight_VD])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "backward leaves what it needs as it was"


def test_gradients_match_finite_differences():
    x_TD, weight_VD, targets_T = operands()
    assert torch.autograd.gradcheck(lambda x, w: chunked_cross_entropy(x, w, targets_T, 8), (x_TD, weight_VD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_types_are_no_further_from_float64_than_all_logits(dtype):
    x_TD, weight_VD, targets_T = operands(dtype, torch.float32)
    exact = [x_TD.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()]
    truth = cross_entropy(exact[0] @ exact[1].t(), targets_T, ignore_index=IGNORE, reduction="sum")
    truths = torch.autograd.grad(truth, exact)
    logits_TV = (x_TD @ weight_VD.to(dtype).t()).float()
    whole = cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    mine = chunked_cross_entropy(x_TD, weight_VD, targets_T, 8)
    wholes = torch.autograd.grad(whole, [x_TD, weight_VD])
    mines = torch.autograd.grad(mine, [x_TD, weight_VD])
    for m, w, t in zip(mines, wholes, truths, strict=True):
        assert m.dtype == w.dtype
        floor = torch.finfo(dtype).eps * t.abs().max()
        assert (m.double() - t).abs().max() <= 2 * (w.double() - t).abs().max() + floor
    assert abs(mine.double() - truth) <= 2 * abs(whole.double() - truth) + torch.finfo(dtype).eps * truth


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_costs_no_product(frozen, compiled):
    """Of three products of a chunk two are left, and the gradient of the other operand is the same."""
    x_TD, weight_VD, targets_T = operands(torch.float32)
    both = torch.autograd.grad(
        chunked_cross_entropy(x_TD, weight_VD, targets_T, 8, compiled=compiled), [x_TD, weight_VD]
    )
    held, free = (x_TD, weight_VD) if frozen == "x" else (weight_VD, x_TD)
    held.requires_grad_(False)
    with counter() as flops:
        loss = chunked_cross_entropy(x_TD, weight_VD, targets_T, 8, compiled=compiled)
    (alone,) = torch.autograd.grad(loss, [free])
    assert torch.equal(alone, both[1] if frozen == "x" else both[0])
    assert flops.get_total_flops() == 2 * 2 * T * D * V


def test_sixteen_bit_weights_have_a_gradient_that_is_rounded_once():
    """As FSDP2 hands them over. Adding up chunks in bfloat16 would round at each: here 128 times."""
    x_TD, weight_VD = torch.randn(1024, D, dtype=torch.bfloat16), torch.randn(V, D, dtype=torch.bfloat16)
    targets_T = torch.randint(0, V, (1024,))
    errors = []
    exact = weight_VD.double().requires_grad_()
    truth = cross_entropy(x_TD.double() @ exact.t(), targets_T, reduction="sum")
    (truth,) = torch.autograd.grad(truth, [exact])
    for chunk in (8, 1024):
        weight = weight_VD.clone().requires_grad_()
        (found,) = torch.autograd.grad(chunked_cross_entropy(x_TD, weight, targets_T, chunk), [weight])
        assert found.dtype == torch.bfloat16
        errors.append((found.double() - truth).norm() / truth.norm())
    assert errors[0] < 1.2 * errors[1]


def test_no_targets_and_no_tokens_are_nothing():
    x_TD, weight_VD, targets_T = operands()
    for x, targets in ((x_TD, torch.full_like(targets_T, IGNORE)), (x_TD[:0], targets_T[:0])):
        loss = chunked_cross_entropy(x, weight_VD, targets, 8)
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [x_TD, weight_VD], materialize_grads=True))


def test_what_is_not_finite_is_seen_and_padding_hides_what_it_holds():
    x_TD, weight_VD, targets_T = operands()
    with torch.no_grad():
        x_TD[0] = torch.inf
    assert chunked_cross_entropy(x_TD, weight_VD, targets_T, 8).isfinite(), "token 0 has no target"
    with torch.no_grad():
        x_TD[1] = torch.nan
    assert chunked_cross_entropy(x_TD, weight_VD, targets_T, 8).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_each_targets_loss(chunk, dtype):
    x_TD, weight_VD, targets_T = operands(dtype, torch.float32)
    logits_TV = (x_TD @ weight_VD.to(dtype).t()).to(torch.promote_types(dtype, torch.float32))
    expected = cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")
    found = target_losses(x_TD, weight_VD, targets_T, chunk)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    assert (found[targets_T == IGNORE] == 0).all()
    assert target_losses(x_TD[:0], weight_VD, targets_T[:0], chunk).shape == (0,)


def test_a_model_gives_each_targets_loss_or_its_routing_alone():
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4)
    experts = MoE(num_experts=4, top_k=2, expert_hidden=8, router=TopK())
    config = Model(vocab_size=V, dim=8, num_layers=2, ffn_hidden=8, attention=attention, moe=experts)
    ids, targets = torch.randint(0, V, (2, 9)), torch.randint(0, V, (2, 9))
    targets[0, :3] = IGNORE
    for chunk in (0, 4):
        model = Transformer(config, seed=1, loss_chunk=chunk)
        whole = model(ids, targets)
        output = model(ids, targets, each=True)
        assert output.losses_BS.shape == (2, 9) and output.loss is None and output.objective is None
        torch.testing.assert_close(output.losses_BS.sum() / 15, whole.loss.detach())
        torch.testing.assert_close(output.losses_BS, token_losses(model(ids).logits_BSV, targets))
        bare = model(ids, head=False)
        assert bare.logits_BSV is None and bare.loss is None
        for one, other in zip(bare.routing, whole.routing, strict=True):
            assert torch.equal(one.selection.expert_R, other.selection.expert_R)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_the_same(tied):
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4)
    config = Model(vocab_size=V, dim=8, num_layers=1, ffn_hidden=8, attention=attention, tied_head=tied)
    ids, targets = torch.randint(0, V, (2, 9)), torch.randint(0, V, (2, 9))
    targets[0, :3] = IGNORE
    gradients = []
    for chunk in (0, 4):
        model = Transformer(config, seed=1, loss_chunk=chunk, dtype=torch.float64).double()
        output = model(ids, targets)
        assert output.logits_BSV is None
        output.objective.backward()
        gradients.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.full
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Peak resident memory of a process of its own: 4,096 tokens of 32,768 words are 512 MiB of logits."""
    code = """
import sys, torch
from torch.nn.functional import cross_entropy
from moe.loss import chunked_cross_entropy
from moe.train.memory import peak_memory_bytes
peak = lambda: peak_memory_bytes(torch.device("cpu"))
x, w = torch.randn(4096, 64).requires_grad_(), torch.randn(32768, 64).requires_grad_()
t = torch.randint(0, 32768, (4096,))
before = peak()
loss = cross_entropy(x @ w.t(), t, reduction="sum") if sys.argv[1] == "0" else chunked_cross_entropy(x, w, t, 256)
loss.backward()
print((peak() - before) / 2**20)
"""
    used = [float(subprocess.check_output([sys.executable, "-c", code, way])) for way in "01"]
    assert used[0] > 1000, "all logits, and their gradient"
    assert used[1] < 150
