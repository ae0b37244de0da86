"""Block-sparse kernels against masked dense float64 and loops in plain torch, under the interpreter.

The CPU path runs the same cases in ../test_block_sparse.py. Out-of-bounds access and unwritten memory fail (conftest).
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from block_sparse_cases import (
    BLOCKS,
    FAR,
    FFNS,
    NAMES,
    PRODUCTS,
    check_builder,
    check_ffn,
    check_product,
    dense_of,
    ffn_inputs,
    mask_of,
    random_case,
    routing_of,
)
from torch import nn

from moe_triton.block_sparse import BlockSparseLinear, PackedExperts, dds, dsd, from_mask, sdd, variable_width_ffn

SPARSITY = 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PRODUCTS, ids=PRODUCTS.values())
@pytest.mark.parametrize("name", NAMES)
def test_product_equals_masked_dense(name, case, dtype):
    check_product(name, case, dtype, "triton")


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_product_of_random_topologies_equals_masked_dense(name, block, dtype):
    for trial in range(2):
        check_product(name, random_case(block, trial, limit=3), dtype, "triton")


@pytest.mark.parametrize(
    ("builder", "block"),
    [
        pytest.param(builder, block, marks=() if (builder, block) == ("routing", 16) else pytest.mark.full)
        for builder, block in itertools.product(("mask", "pruning", "widths", "routing"), BLOCKS)
    ],
)
def test_products_at_the_topology_of_each_builder(builder, block):
    check_builder(builder, block, "triton")


def test_bfloat16_operands_are_made_wide_for_the_interpreter():
    topology = from_mask(torch.eye(2, dtype=torch.bool), 16)
    values, x = torch.randn(2, 16, 16).bfloat16(), torch.randn(32, 20).bfloat16()
    wanted = dense_of(values, torch.eye(2, dtype=torch.bool), 16, (32, 32)).float() @ x.float()
    torch.testing.assert_close(dsd(values, topology, x, backend="triton"), wanted.bfloat16())


def test_gradients_in_float64():
    topology = from_mask(torch.tensor([[True, False], [True, True]]), 16, (32, 21))
    values, x, y = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 16, 16), (21, 1), (1, 32)))
    options = {"backend": "triton"}
    assert torch.autograd.gradcheck(lambda v, x: dsd(v, topology, x, **options), (values, x), fast_mode=True)
    assert torch.autograd.gradcheck(lambda v, y: dds(y, v, topology, **options), (values, y), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, y: sdd(y.t(), x.t(), topology, **options), (x, y), fast_mode=True)


def test_entries_outside_the_matrix_are_ignored():
    mask_RC = torch.ones(2, 2, dtype=torch.bool)
    topology = from_mask(mask_RC, 16, (20, 27))
    values, x, y = torch.randn(4, 16, 16), torch.randn(27, 3), torch.randn(20, 3)
    s = dense_of(values, mask_RC, 16, (20, 27))
    values[2:, 4:] = values[1::2, :, 11:] = float("nan")
    torch.testing.assert_close(dsd(values, topology, x, backend="triton"), s @ x)
    torch.testing.assert_close(dsd(values, topology, y, transpose=True, backend="triton"), s.t() @ y)


def test_expanded_gradient():
    mask_RC = mask_of(3, 3)
    topology = from_mask(mask_RC, 16, (48, 40))
    inputs = [torch.randn(48, 5), torch.randn(5, 40)]
    gradients = []
    for backend in ("triton", "torch"):
        a, b = (t.clone().requires_grad_() for t in inputs)
        dsd(sdd(a, b, topology, backend=backend), topology, b.t(), backend=backend).sum().backward()
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(*gradients)


def test_block_column_beyond_sixteen_bits():
    """And the gradients that read far columns. Those that write them have a program per column, whose index is no data."""
    mask = torch.zeros(1, 40_000, dtype=torch.bool)
    mask[0, list(FAR)] = True
    topology = from_mask(mask, 16)
    far = (torch.tensor(FAR).unsqueeze(1) * 16 + torch.arange(16)).flatten()
    a, b, x = torch.randn(16, 2, requires_grad=True), torch.randn(2, 640_000), torch.randn(640_000, 1)
    values = sdd(a, b, topology, backend="triton")
    out = dsd(values, topology, x, backend="triton")
    wanted = a @ b[:, far]
    torch.testing.assert_close(values.transpose(0, 1).flatten(1), wanted)
    torch.testing.assert_close(out, wanted @ x[far])
    # d values is a product at the far columns, da one that reads them
    gradient = torch.randn(16, 1)
    (got,), (exact,) = (torch.autograd.grad(y, a, gradient) for y in (out, wanted @ x[far]))
    torch.testing.assert_close(got, exact)


def test_block_row_beyond_sixteen_bits():
    mask = torch.zeros(40_000, 1, dtype=torch.bool)
    mask[list(FAR)] = True
    topology = from_mask(mask, 16)
    far = (torch.tensor(FAR).unsqueeze(1) * 16 + torch.arange(16)).flatten()
    a, b, x = torch.randn(640_000, 2), torch.randn(2, 16, requires_grad=True), torch.randn(640_000, 1)
    values = sdd(a, b, topology, backend="triton")
    out = dsd(values, topology, x, transpose=True, backend="triton")
    wanted = a[far] @ b
    torch.testing.assert_close(values.flatten(0, 1), wanted)
    torch.testing.assert_close(out, wanted.t() @ x[far])
    gradient = torch.randn(16, 1)
    (got,), (exact,) = (torch.autograd.grad(y, b, gradient) for y in (out, wanted.t() @ x[far]))
    torch.testing.assert_close(got, exact)


def test_place_of_a_block_beyond_sixteen_bits():
    num_blocks, last = 66_000, 3
    values, x = torch.randn(num_blocks, 16, 16), torch.randn(16 * num_blocks, 1)
    row = from_mask(torch.ones(1, num_blocks, dtype=torch.bool), 16)
    # a row, then a column, that has only the last few of so many blocks: the kernel need not walk through the others
    offsets = torch.tensor([num_blocks - last, num_blocks], dtype=torch.int32)
    wanted = sum(values[i] @ x[16 * i : 16 * i + 16] for i in range(num_blocks - last, num_blocks))
    torch.testing.assert_close(dsd(values, replace(row, row_offsets=offsets), x, backend="triton"), wanted)
    column = replace(from_mask(torch.ones(num_blocks, 1, dtype=torch.bool), 16), column_offsets=offsets)
    wanted = sum(values[i].t() @ x[16 * i : 16 * i + 16] for i in range(num_blocks - last, num_blocks))
    torch.testing.assert_close(dsd(values, column, x, transpose=True, backend="triton"), wanted)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("case", FFNS, ids=FFNS.values())
def test_experts_of_any_width_equal_the_loop(case, weight_on):
    check_ffn(case, torch.float32, "triton", weight_on)


def test_experts_of_any_width_in_float16():
    check_ffn(((47, 16, 0, 33, 5), 16, 33, 3, "uniform"), torch.float16, "triton", "output")


def ffn_run(widths, block, routing, dense):
    """y and every gradient of one run of the kernels, for a fixed gradient of y."""
    inputs = [t.clone().requires_grad_() for t in (*dense, routing[1])]
    y = variable_width_ffn(
        *inputs[:4], routing[0], inputs[4], routing[2], PackedExperts.of(widths, block), backend="triton"
    )
    gradient = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, gradient)]


def test_two_runs_are_bitwise_equal():
    widths = (20, 33, 16)
    routing = routing_of(widths, 25, 3, "nowhere")
    dense = [t.float() for t in ffn_inputs(widths, 25, 20)]
    for first, second in zip(*(ffn_run(widths, 16, routing, dense) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_launches_of_the_experts(launches):
    widths = (20, 33)
    routing, dense = routing_of(widths, 10, 2, "uniform"), [t.float() for t in ffn_inputs(widths, 10, 20)]
    ffn_run(widths, 16, routing, dense)
    products = [name for name in launches if name in ("sdd_kernel", "dsd_kernel")]
    assert products == ["sdd_kernel", "sdd_kernel", "dsd_kernel", "sdd_kernel"] + ["dsd_kernel"] * 5
    assert len(launches) == len(products) + 4, "the activation and the segmented sum, forward and backward"


def test_ten_training_steps_at_ninety_percent_sparsity_equal_the_cpu_path():
    """Two pruned layers of 160 and their head on a fixed batch: the losses of both paths to 1e-5."""
    x, target = torch.randn(24, 160), torch.randint(10, (24,))
    linears, head = [nn.Linear(160, 160) for _ in range(2)], nn.Linear(160, 10)
    losses = {}
    for backend in ("torch", "triton"):
        first, second = (
            BlockSparseLinear.from_dense(m.weight, 16, SPARSITY, bias=m.bias.detach(), backend=backend) for m in linears
        )
        assert first.values.shape[0] == second.values.shape[0] == 10, "a tenth of 10×10 blocks"
        model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), copy.deepcopy(head))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses[backend] = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    print(f"\ntorch  {losses['torch']}\ntriton {losses['triton']}")
    assert losses["torch"][-1] < 0.8 * losses["torch"][0]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=0, abs=1e-5)
