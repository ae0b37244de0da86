"""Block-sparse products, layers and expert networks on the CPU path, against masked dense float64 and loops in plain torch.

The kernels run the same cases in kernels_interpreted/test_block_sparse_kernels.py.
"""

import copy
import itertools
import math
import re
from pathlib import Path

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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_triton.block_sparse import (
    BlockSparseLinear,
    PackedExperts,
    Topology,
    dds,
    dsd,
    from_mask,
    from_pruning,
    from_routing,
    from_widths,
    reference,
    sdd,
    variable_width_ffn,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", PRODUCTS, ids=PRODUCTS.values())
@pytest.mark.parametrize("name", NAMES)
def test_product_equals_masked_dense(name, case, dtype):
    check_product(name, case, dtype, "torch")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_product_of_random_topologies_equals_masked_dense(name, block):
    for trial in range(8):
        check_product(name, random_case(block, trial), torch.float32, "torch")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("builder", ["mask", "pruning", "widths", "routing"])
def test_products_at_the_topology_of_each_builder(builder, block):
    check_builder(builder, block, "torch")


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_masked_dense(name):
    mask_RC = mask_of(4, 3)
    topology = from_mask(mask_RC, 16, (60, 41))
    a, b, values, x, y = (torch.randn(*s) for s in ((60, 7), (7, 41), (topology.num_blocks, 16, 16), (41, 5), (60, 5)))
    s = dense_of(values, mask_RC, 16, (60, 41))
    got, wanted = {
        "sdd": (
            dense_of(reference.sdd(a, b, topology), mask_RC, 16, (60, 41)),
            (a @ b) * (dense_of(torch.ones_like(values), mask_RC, 16, (60, 41))),
        ),
        "dsd": (reference.dsd(values, topology, x), s @ x),
        "dsd_t": (reference.dsd(values, topology, y, transpose=True), s.t() @ y),
        "dds": (reference.dds(y.t(), values, topology), y.t() @ s),
        "dds_t": (reference.dds(x.t(), values, topology, transpose=True), x.t() @ s.t()),
    }[name]
    torch.testing.assert_close(got, wanted)


def test_second_derivatives():
    topology = from_mask(torch.eye(2, dtype=torch.bool), 16, (32, 30))
    values, x = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 16, 16), (30, 1)))
    for function in (lambda v, x: dsd(v, topology, x), lambda v, x: sdd(dsd(v, topology, x), x.t(), topology)):
        assert torch.autograd.gradcheck(function, (values, x), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (values, x), fast_mode=True)


def test_hand_worked_product():
    topology = from_mask(torch.tensor([[False, True]]), 16, (16, 32))
    values = torch.zeros(1, 16, 16)
    values[0, 3, 5] = 2.0  # row 3, column 16 + 5
    x = torch.arange(32.0).unsqueeze(1)
    out = torch.zeros(16, 1)
    out[3] = 2.0 * 21
    assert torch.equal(dsd(values, topology, x), out)


def test_entries_outside_the_matrix_are_ignored():
    mask_RC = torch.ones(2, 2, dtype=torch.bool)
    topology = from_mask(mask_RC, 16, (20, 27))
    values, x = torch.randn(4, 16, 16), torch.randn(27, 3)
    wanted = dense_of(values, mask_RC, 16, (20, 27)) @ x
    values[2:, 4:] = values[1::2, :, 11:] = math.nan
    torch.testing.assert_close(dsd(values, topology, x), wanted)
    assert (dds(x.t(), values, topology, transpose=True) == dsd(values, topology, x).t()).all()


def test_expanded_gradient():
    topology = from_mask(mask_of(3, 3), 16, (48, 40))
    a, b = torch.randn(48, 5, requires_grad=True), torch.randn(5, 40, requires_grad=True)
    values = sdd(a, b, topology)
    dsd(values, topology, b.t()).sum().backward()
    mask = dense_of(torch.ones_like(values), mask_of_topology(topology), 16, (48, 40))
    a2, b2 = (t.detach().clone().requires_grad_() for t in (a, b))
    (((a2 @ b2) * mask) @ b2.t()).sum().backward()
    torch.testing.assert_close(a.grad, a2.grad)
    torch.testing.assert_close(b.grad, b2.grad)


def mask_of_topology(topology: Topology) -> Tensor:
    mask_RC = torch.zeros(topology.num_block_rows, topology.num_block_columns, dtype=torch.bool)
    mask_RC[topology.row_index.long(), topology.column_index.long()] = True
    return mask_RC


def test_no_blocks_give_zeros():
    topology = from_mask(torch.zeros(2, 3, dtype=torch.bool), 32, (64, 70))
    assert topology.num_blocks == 0
    values = sdd(torch.randn(64, 4), torch.randn(4, 70), topology)
    assert values.shape == (0, 32, 32)
    assert not dsd(values, topology, torch.randn(70, 5)).any()


def test_block_column_beyond_sixteen_bits():
    """Products and gradients at far columns against the same columns side by side, in a matrix of their own."""
    mask = torch.zeros(1, 40_000, dtype=torch.bool)
    mask[0, list(FAR)] = True
    topology = from_mask(mask, 16)
    assert topology.column_index.tolist() == list(FAR)
    assert all(t.dtype == torch.int32 for t in topology.flat()[0])
    far = (torch.tensor(FAR).unsqueeze(1) * 16 + torch.arange(16)).flatten()
    a, b, x = (t.requires_grad_() for t in (torch.randn(16, 2), torch.randn(2, 640_000), torch.randn(640_000, 1)))
    values = sdd(a, b, topology)
    out = dsd(values, topology, x)
    wanted = a @ b[:, far]
    torch.testing.assert_close(values.transpose(0, 1).flatten(1), wanted)
    torch.testing.assert_close(out, wanted @ x[far])
    gradient = torch.randn(16, 1)
    got = torch.autograd.grad(out, (a, b, x), gradient)
    torch.testing.assert_close(got, torch.autograd.grad(wanted @ x[far], (a, b, x), gradient))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_indices_name_the_blocks_of_the_mask(block):
    mask_RC = mask_of(7, 9)
    check_indices(from_mask(mask_RC, block), mask_RC)


def places(where: Topology | BlockSparseLinear) -> list[tuple[int, int]]:
    """Block row and block column of each block."""
    return list(zip(where.row_index.tolist(), where.column_index.tolist(), strict=True))


def check_indices(topology: Topology, mask_RC: Tensor) -> None:
    """Both orders list exactly the blocks of the mask, each under its own row and column."""
    t = topology
    rows = [(r, c) for r, row in enumerate(mask_RC.tolist()) for c, there in enumerate(row) if there]
    row_offsets, column_offsets = t.row_offsets.tolist(), t.column_offsets.tolist()
    assert row_offsets[-1] == column_offsets[-1] == len(rows)
    assert places(t)[: len(rows)] == rows
    assert set(t.row_index.tolist()[len(rows) :]) <= {t.num_block_rows}
    for r in range(t.num_block_rows):
        assert [rows[i][0] for i in range(row_offsets[r], row_offsets[r + 1])] == [r] * int(mask_RC[r].sum())
    for c in range(t.num_block_columns):
        span = slice(column_offsets[c], column_offsets[c + 1])
        assert [rows[i] for i in t.block_index_t[span].tolist()] == [(r, c) for r in t.row_index_t[span].tolist()]
        assert t.row_index_t[span].tolist() == mask_RC[:, c].nonzero().flatten().tolist()


def test_pruning_mask_keeps_every_block_with_a_true():
    mask_MN = torch.zeros(50, 70, dtype=torch.bool)
    mask_MN[0, 31] = mask_MN[40, 5] = mask_MN[49, 69] = True
    topology = from_pruning(mask_MN, 32)
    assert topology.shape == (50, 70)
    assert places(topology) == [(0, 0), (1, 0), (1, 2)]


def test_topology_of_random_routings_is_that_of_the_counts():
    for trial in range(200):
        generator = torch.Generator().manual_seed(trial)
        E = int(torch.randint(1, 7, (), generator=generator))
        widths = tuple(torch.randint(0, 70, (E,), generator=generator).tolist())
        counts = torch.randint(0, 50, (E,), generator=generator) * (torch.rand(E, generator=generator) < 0.7)
        nowhere = int(torch.randint(0, 40, (), generator=generator)) * (trial % 2)
        num_rows = int(counts.sum()) + nowhere
        packed = PackedExperts.of(widths, 16)
        topology = from_routing(nn.functional.pad(counts.cumsum(0), (1, 0)), num_rows, packed)

        tiles = [-(-c // 16) for c in counts.tolist()]
        columns = [-(-w // 16) for w in widths]
        mask_RC = torch.block_diag(*(torch.ones(t, c) for t, c in zip(tiles, columns, strict=True))).bool()
        mask_RC = nn.functional.pad(mask_RC, (0, 0, 0, topology.num_block_rows - mask_RC.shape[0]))
        check_indices(topology, mask_RC)
        bounds = topology.row_bounds.tolist()
        assert bounds[0] == 0 and bounds[-1] == num_rows, "block rows cover every row, those that go nowhere too"
        assert all(0 <= b - a <= 16 for a, b in itertools.pairwise(bounds))
        ends = set(nn.functional.pad(counts.cumsum(0), (1, 0)).tolist())
        assert ends <= set(bounds), "no tile crosses an expert's end"

        exact = from_widths(counts.tolist(), packed)
        assert exact.num_blocks == sum(t * c for t, c in zip(tiles, columns, strict=True)) <= topology.num_blocks
        check_indices(exact, mask_RC[: sum(tiles)])


def test_bound_on_blocks_is_reached():
    widths, num_rows = (64, 16, 48), 40
    packed = PackedExperts.of(widths, 16)
    most = 0
    for first, second in itertools.product(range(num_rows + 1), repeat=2):
        third = num_rows - first - second
        if third >= 0:
            most = max(most, sum(-(-c // 16) * b for c, b in zip((first, second, third), packed.blocks, strict=True)))
    assert packed.max_blocks(num_rows) == most


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", FFNS, ids=FFNS.values())
def test_experts_of_any_width_equal_the_loop(case, dtype, weight_on):
    check_ffn(case, dtype, "torch", weight_on)


def test_reference_experts_equal_the_uniform_reference():
    from moe_triton.reference import expert_ffn

    widths = (24, 24, 24)
    token_P, weight_P, offsets_E1 = routing_of(widths, 20, 2, "nowhere")
    x, w_gate, w_up, w_down = ffn_inputs(widths, 20, 16)
    got = reference.variable_width_ffn(x, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, widths)
    stacked = [w.unflatten(1, (3, 24)).transpose(0, 1).contiguous() for w in (w_gate, w_up)]
    w_down = w_down.unflatten(0, (3, 24))
    torch.testing.assert_close(got, expert_ffn(x, *stacked, w_down, token_P, weight_P, offsets_E1))


def ffn_case(requires_grad: bool = True):
    """Arguments of variable_width_ffn for experts of 40 and 23 columns, float32."""
    widths = (40, 23)
    routing = routing_of(widths, 50, 2, "nowhere")
    dense = [t.float().requires_grad_(requires_grad) for t in ffn_inputs(widths, 50, 24)]
    return (*dense, *routing), PackedExperts.of(widths, 16)


def test_experts_save_x_and_the_pre_activations_only():
    arguments, packed = ffn_case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        variable_width_ffn(*arguments, packed)
    parameters = {id(t) for t in arguments[1:4]}
    floats = [t for t in saved if t.is_floating_point() and id(t) not in parameters]
    blocks = packed.max_blocks(100) * 16 * 16
    assert sorted(t.numel() for t in floats) == sorted([50 * 24, blocks, blocks, 100])


def test_experts_trace_without_data():
    # a fake tensor has no values: whoever asks for one (.item, .tolist, a shape from data) fails
    with FakeTensorMode(allow_non_fake_inputs=False):
        arguments, packed = ffn_case_fake()
        y = variable_width_ffn(*arguments, packed, backend="torch")
        y.sum().backward()
    assert y.shape == (50, 24)
    assert [t.grad.shape for t in arguments[:4]] == [t.shape for t in arguments[:4]]


def ffn_case_fake():
    shapes = ((50, 24), (24, 63), (24, 63), (63, 24))
    dense = [torch.empty(*shape, requires_grad=True) for shape in shapes]
    rows = (torch.empty(100, dtype=torch.int64), torch.empty(100), torch.empty(3, dtype=torch.int64))
    return (*dense, *rows), PackedExperts.of((40, 23), 16)


def test_each_gradient_alone_is_that_of_all():
    arguments, packed = ffn_case()
    differentiable = [*arguments[:4], arguments[5].requires_grad_()]
    gradient = torch.randn(50, 24)
    every = torch.autograd.grad(variable_width_ffn(*arguments, packed), differentiable, gradient)
    for index, wanted in enumerate(every):
        for t in differentiable:
            t.requires_grad_(t is differentiable[index])
        (alone,) = torch.autograd.grad(variable_width_ffn(*arguments, packed), [differentiable[index]], gradient)
        assert torch.equal(alone, wanted)


def test_whole_graph_compiles():
    arguments, packed = ffn_case()
    layer = BlockSparseLinear.from_dense(torch.randn(40, 24), 16, 0.5, bias=torch.randn(40))

    def function(*arguments):
        return layer(variable_width_ffn(*arguments, packed))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradient = torch.randn(50, 40)
    for f in (function, compiled):
        results = [f(*arguments), *torch.autograd.grad(f(*arguments), (*arguments[:4], layer.values), gradient)]
        if f is function:
            wanted = results
    torch.testing.assert_close(results, wanted)


@pytest.mark.parametrize("name", ["sdd", "dsd"])
def test_operator_registration(name):
    topology = from_mask(mask_of(2, 2), 16, (32, 30))
    indices, sizes = topology.flat()
    if name == "sdd":
        a, b = torch.randn(32, 4, requires_grad=True), torch.randn(4, 30, requires_grad=True)
        torch.library.opcheck(torch.ops.moe_triton.block_sparse_sdd.default, (a, b, indices, sizes, "torch"))
    else:
        values = torch.randn(topology.num_blocks, 16, 16, requires_grad=True)
        x = torch.randn(32, 3, requires_grad=True)
        arguments = (values, x, indices, sizes, True, True, "torch")
        torch.library.opcheck(torch.ops.moe_triton.block_sparse_dsd.default, arguments)


@pytest.mark.parametrize("block, shape", [(16, (48, 64)), (32, (70, 90)), (128, (300, 200))])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_pruned_linear_is_the_masked_dense_one(block, shape, score):
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(3, 5, shape[1], requires_grad=True)
    layer = BlockSparseLinear.from_dense(weight, block, 0.6, score, bias=bias)
    mask = layer.to_dense() != 0
    blocks = math.ceil(shape[0] / block) * math.ceil(shape[1] / block)
    assert layer.values.shape[0] == max(round(0.4 * blocks), 1)
    masked = (weight * mask).requires_grad_()
    wanted = nn.functional.linear(x, masked, bias)
    torch.testing.assert_close(layer(x), wanted)
    gradient = torch.randn_like(wanted)
    got = torch.autograd.grad(layer(x), (x, layer.values, layer.bias), gradient)
    dx, dw = torch.autograd.grad(wanted, (x, masked), gradient)
    torch.testing.assert_close(got[0], dx)
    layer.values.data.copy_(got[1])
    torch.testing.assert_close(layer.to_dense(), dw * mask)
    torch.testing.assert_close(got[2], gradient.sum((0, 1)))


def test_magnitude_keeps_the_largest_blocks():
    weight = torch.ones(32, 48)
    weight[16:, :16] = 3.0
    weight[:16, 32:] = -2.0
    layer = BlockSparseLinear.from_dense(weight, 16, 2 / 3)
    assert places(layer) == [(0, 2), (1, 0)]
    assert torch.equal(layer.to_dense(), weight * (weight.abs() > 1))


def test_state_dict_moves_blocks_to_another_layer():
    weight = torch.randn(70, 50)
    source = BlockSparseLinear.from_dense(weight, 16, 0.5, bias=torch.randn(70))
    target = BlockSparseLinear.from_dense(torch.randn(70, 50), 16, 0.5, "random", bias=torch.zeros(70))
    assert set(source.state_dict()) == {"values", "bias", "row_index", "column_index"}
    assert not torch.equal(source.row_index, target.row_index)
    x = torch.randn(4, 50, requires_grad=True)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    gradients = [torch.autograd.grad(layer(x).square().sum(), (x, layer.values)) for layer in (source, target)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        target.load_state_dict(BlockSparseLinear.from_dense(weight, 16, 0.7, bias=torch.zeros(70)).state_dict())


def test_state_dict_of_another_shape_is_refused():
    target = BlockSparseLinear(from_mask(torch.tensor([[True, True]]), 16))
    tall = BlockSparseLinear(from_mask(torch.tensor([[True], [True]]), 16, (16 + 16, 16)), bias=False)
    with pytest.raises(ValueError, match=r"16×32 with 1×2 blocks of 16"):
        target.load_state_dict(tall.state_dict() | {"bias": torch.zeros(16)})


def test_fresh_layer_starts_as_a_linear_layer_of_its_fan_in():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = mask[2, 3] = True
    layer = BlockSparseLinear(from_mask(mask, 32, (128, 250)))
    dense = layer.to_dense()
    for row, inputs in enumerate((64, 64, 96, 64)):
        part = dense[32 * row : 32 * row + 32]
        assert part.abs().max().item() <= inputs**-0.5
        assert part[part != 0].std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)


def test_layer_moves_and_casts():
    layer = BlockSparseLinear.from_dense(torch.randn(32, 48), 16, 0.5).to(torch.float64)
    assert layer.values.dtype == torch.float64 and layer.row_index.dtype == torch.int32
    assert layer(torch.randn(2, 48, dtype=torch.float64)).dtype == torch.float64
    assert layer.to("meta").topology.row_offsets.device.type == "meta"


MISTAKES = {
    "block (48) must be one of 16, 32, 64, 128": lambda t, v: from_mask(torch.ones(1, 1, dtype=torch.bool), 48),
    "has 3×2 blocks of 16, the mask has 2×2": lambda t, v: from_mask(torch.ones(2, 2, dtype=torch.bool), 16, (40, 32)),
    "shapes must be [M, K], [K, N] and (M, N)": lambda t, v: sdd(torch.ones(32, 3), torch.ones(4, 48), t),
    "the dense operand needs as many rows as s has columns": lambda t, v: dsd(v, t, torch.ones(32, 2)),
    "the dense operand needs as many columns as s has rows": lambda t, v: dds(torch.ones(2, 48), v, t),
    "values have shape (1, 16, 16), the topology has (6, 16, 16)": lambda t, v: dsd(v[:1], t, torch.ones(48, 2)),
    "cast or move one, both must agree": lambda t, v: dsd(v, t, torch.ones(48, 2, dtype=torch.float64)),
    "or set TRITON_INTERPRET=1": lambda t, v: dsd(v, t, torch.ones(48, 2), backend="triton"),
    "use 'auto', 'torch' or 'triton'": lambda t, v: dsd(v, t, torch.ones(48, 2), backend="cuda"),
    "must be at least 0 and less than 1": lambda t, v: BlockSparseLinear.from_dense(torch.ones(32, 32), 16, 90),
    "weight's blocks must be uniform": lambda t, v: BlockSparseLinear(from_widths((20,), PackedExperts.of((8,), 16))),
    "needs one more than experts": lambda t, v: from_routing(torch.zeros(2), 0, PackedExperts.of((8, 8), 16)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistake_says_the_rule(message):
    topology = from_mask(torch.ones(2, 3, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match=re.escape(message)):
        MISTAKES[message](topology, torch.ones(6, 16, 16))


class MaskedLinear(nn.Module):
    """A dense layer under a fixed mask of single weights: unstructured sparsity at a dense layer's cost."""

    def __init__(self, linear: nn.Linear, sparsity: float) -> None:
        super().__init__()
        scores = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(1))
        self.mask = scores > sparsity
        self.weight, self.bias = (nn.Parameter(t.detach().clone()) for t in (linear.weight, linear.bias))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def layer_of(arm: str, linear: nn.Linear, sparsity: float = 0.9) -> nn.Module:
    """What stands for a dense layer in an arm of the experiment, with its weights."""
    if arm == "dense":
        return linear
    if arm == "random mask":
        return MaskedLinear(linear, sparsity)
    score = {"blocks, magnitude": "magnitude", "blocks, random": "random"}[arm]
    generator = torch.Generator().manual_seed(1)
    return BlockSparseLinear.from_dense(
        linear.weight, 16, sparsity, score, bias=linear.bias.detach(), generator=generator
    )


def license_bytes(context: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(every stretch of `context` bytes of the licence's text, the byte that follows), to train on and held out.

    Held out is every tenth run of 100 bytes: the text changes its subject towards the end.
    """
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()))
    windows = text.unfold(0, context + 1, 1)
    held_out = torch.arange(len(windows)) // 100 % 10 == 9
    train, test = windows[~held_out], windows[held_out]
    return (train[:, :-1], train[:, -1]), (test[:, :-1], test[:, -1])


def test_training_at_ninety_percent_sparsity_beside_dense_and_random_mask():
    """Next byte of the licence's text: 100 dense steps, then 100 of each arm from there, equal batches."""
    (inputs, targets), (test_inputs, test_targets) = license_bytes(8)
    embedding, first, second, head = dense = (
        nn.Embedding(128, 32),
        nn.Linear(256, 512),
        nn.Linear(512, 512),
        nn.Linear(512, 128),
    )

    def train(model: nn.Module) -> tuple[float, float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        losses = []
        for _ in range(100):
            rows = torch.randint(len(targets), (128,), generator=generator)
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            held_out = nn.functional.cross_entropy(model(test_inputs), test_targets).item()
        return sum(losses[-10:]) / 10, held_out

    def model_of(arm: str) -> nn.Module:
        layers = [layer_of(arm, linear) for linear in (first, second)]
        return nn.Sequential(embedding, nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), head)

    warm = train(model_of("dense"))
    state = copy.deepcopy([part.state_dict() for part in dense])
    counts = targets.bincount().double() / len(targets)
    unigram = -torch.special.xlogy(counts, counts).sum().item()
    print(f"\nunigram entropy {unigram:.3f} nats; after 100 dense steps: {warm[0]:.3f}, held out {warm[1]:.3f}")
    results = {}
    for arm in ("blocks, magnitude", "blocks, random", "random mask", "dense"):
        for part, values in zip(dense, state, strict=True):
            part.load_state_dict(values)
        results[arm] = train(model_of(arm))
        print(f"{arm:18s} after 100 more steps: {results[arm][0]:.3f} nats, held out {results[arm][1]:.3f}")
    assert results["dense"][0] < min(loss for arm, (loss, _) in results.items() if arm != "dense")
    assert results["blocks, magnitude"][0] < results["blocks, random"][0]
    assert all(max(losses) < 0.9 * unigram for losses in results.values())


def examples_of_the_page() -> list[str]:
    text = (ROOT / "docs/block_sparse.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_example(marker: str) -> dict:
    """The names that the page's example with `marker` in it leaves behind."""
    (example,) = (text for text in examples_of_the_page() if marker in text)
    names: dict = {}
    exec(compile(example, "docs/block_sparse.md", "exec"), names)
    return names


def test_the_pages_pruned_network_recovers(capsys):
    names = run_example("BlockSparseLinear.from_dense")
    before, after = names["before"], names["after"]
    assert after[0] > 1.5 * before[-1] and after[-1] < 0.5 * after[0]
    # what the comment shows is what is printed
    (shown,) = re.findall(r"print\(first\)  # (.*)", "".join(examples_of_the_page()))
    assert shown in capsys.readouterr().out
    assert (names["dense"][0].weight == 0).float().mean().item() == pytest.approx(0.9, abs=0.001)


def test_the_pages_windowed_product_is_the_masked_dense_one():
    names = run_example("triu(-1)")
    query, key, value = (names[name].detach() for name in ("query", "key", "value"))
    mask = names["window"].repeat_interleave(32, 0).repeat_interleave(32, 1)[:250, :250]
    torch.testing.assert_close(names["out"], ((query @ key.t()) * mask) @ value, rtol=1e-4, atol=1e-4)
    assert names["scores"].shape == (15, 32, 32) and all(names[n].grad is not None for n in ("query", "key", "value"))


def test_the_pages_layer_has_packed_parameters():
    names = run_example("expert_widths=")
    shapes = {tuple(p.shape) for p in names["layer"].experts.parameters()}
    assert shapes == {(256, 48)} and all(p.grad.any() for p in names["layer"].experts.parameters())
