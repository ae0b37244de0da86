"""What the block-sparse tests of the CPU path and of the kernels share: cases, and masked dense products in float64.

The dense matrices are built here from the mask alone, so that a mistake in the topology's indices cannot hide.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from moe_triton.block_sparse import (
    PackedExperts,
    Topology,
    dds,
    dsd,
    from_mask,
    from_pruning,
    from_routing,
    from_widths,
    sdd,
    variable_width_ffn,
)

# block, block rows, block columns, how far the matrix falls short of whole blocks, dense size: the reason
PRODUCTS = {
    (16, 5, 4, (0, 0), 24): "whole blocks",
    (16, 4, 6, (9, 13), 17): "both edges ragged, odd dense size",
    (32, 3, 4, (31, 1), 33): "a last block row of one row",
    (64, 2, 3, (5, 0), 40): "dense size is no multiple of a step",
    (128, 2, 2, (0, 37), 70): "several steps a block",
    (128, 1, 2, (60, 0), 1): "a dense vector",
}
FAR = (0, 255, 256, 2048, 32767, 32768, 39999)
"""Block rows or columns on both sides of where 16-bit indices, alone or times a block, overflow."""
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4}
"""Relative to the result: plain torch may be exact by luck, so twice its error is not always fair."""


def mask_of(block_rows: int, block_columns: int) -> Tensor:
    """A random block mask with an empty row and an empty column where there is room, and at least one block."""
    mask_RC = torch.rand(block_rows, block_columns) < 0.6
    mask_RC[0, 0] = True
    if block_rows > 2:
        mask_RC[1] = False
    if block_columns > 2:
        mask_RC[:, 2] = False
    return mask_RC


def dense_of(values_NBB: Tensor, mask_RC: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """The dense matrix, blocks placed one by one in the order of mask_RC.nonzero(); differentiable."""
    M, N = shape
    rows = []
    place = 0
    for row in mask_RC.tolist():
        line = []
        for there in row:
            line.append(values_NBB[place] if there else values_NBB.new_zeros(block, block))
            place += there
        rows.append(torch.cat(line, 1))
    return torch.cat(rows)[:M, :N]


def values_of(dense_MN: Tensor, mask_RC: Tensor, block: int) -> Tensor:
    """The blocks of a dense matrix, zeros past its edges, in the order of mask_RC.nonzero(); differentiable."""
    M, N = dense_MN.shape
    padded = torch.nn.functional.pad(dense_MN, (0, -N % block, 0, -M % block))
    places = mask_RC.nonzero().tolist()
    return torch.stack([padded[r * block : (r + 1) * block, c * block : (c + 1) * block] for r, c in places])


def product(name: str, mask_RC: Tensor, topology: Topology, backend: str) -> tuple[Callable, Callable]:
    """(ours, the masked dense formula): functions of the two operands."""
    B, shape = topology.block, topology.shape
    options = {"transpose": name.endswith("_t"), "backend": backend}

    def matrix(values: Tensor) -> Tensor:
        s = dense_of(values, mask_RC, B, shape)
        return s.t() if options["transpose"] else s

    return {
        "sdd": (lambda a, b: sdd(a, b, topology, backend=backend), lambda a, b: values_of(a @ b, mask_RC, B)),
        "dsd": (lambda v, x: dsd(v, topology, x, **options), lambda v, x: matrix(v) @ x),
        "dds": (lambda v, x: dds(x, v, topology, **options), lambda v, x: x @ matrix(v)),
    }[name.removesuffix("_t")]


NAMES = ("sdd", "dsd", "dsd_t", "dds", "dds_t")
BLOCKS = (16, 32, 64, 128)


def random_case(block: int, trial: int, limit: int = 5) -> tuple[int, int, int, tuple[int, int], int]:
    """A case like those of PRODUCTS, drawn: up to `limit` block rows and columns, any ragged edge, a dense size to 70."""
    draw = random.Random(1000 * block + trial)
    rows, columns = draw.randint(1, limit), draw.randint(1, limit)
    short = (draw.randrange(block), draw.randrange(block))
    return block, rows, columns, short, draw.randint(1, 70)


def operands(name: str, topology: Topology, size: int) -> tuple[Tensor, Tensor]:
    """Two operands in float64, scaled so that results are about 1; the dense ones are transposed views half the time."""
    M, N = topology.shape
    if name == "sdd":
        return torch.randn(size, M, dtype=torch.float64).t() / size**0.5, torch.randn(size, N, dtype=torch.float64)
    B = topology.block
    # a block row holds about half of its blocks
    values = torch.randn(topology.num_blocks, B, B, dtype=torch.float64) / (max(N, M) / 2) ** 0.5
    rows = M if name in ("dsd_t", "dds") else N
    x = torch.randn(rows, size, dtype=torch.float64)
    return values, x.t() if name.startswith("dds") else x


def check_product(name: str, case: tuple, dtype: torch.dtype, backend: str) -> None:
    """Value and both gradients against float64: error at most twice that of the masked dense formula at `dtype`."""
    block, block_rows, block_columns, (short_rows, short_columns), size = case
    shape = (block_rows * block - short_rows, block_columns * block - short_columns)
    mask_RC = mask_of(block_rows, block_columns)
    topology = from_mask(mask_RC, block, shape)
    ours, dense = product(name, mask_RC, topology, backend)
    inputs = [t.to(dtype) for t in operands(name, topology, size)]
    gradient = torch.randn(dense(*inputs).shape, dtype=torch.float64).to(dtype)
    exact, plain, got = (
        results_and_gradients(function, [t.to(kind) for t in inputs], gradient.to(kind))
        for function, kind in ((dense, torch.float64), (dense, dtype), (ours, dtype))
    )
    for what, *tensors in zip(("out", "d left", "d right"), got, plain, exact, strict=True):
        check_close(f"{name} {what}", *tensors)
    if name != "sdd":
        outside = values_of(torch.ones(shape), mask_RC, block) == 0
        assert (got[1][outside] == 0).all(), "entries outside the matrix get no gradient"


def results_and_gradients(function: Callable, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """[result, gradient of each input], without touching the inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def largest(error: Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


def root_mean_square(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def check_close(what: str, result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """In both norms: error at most twice that of `plain`, the same formula in plain torch, plus a floor.

    The exact result is at least 100 times that limit, or it is zero and the result exactly so.
    """
    assert result.shape == exact.shape, what
    if not exact.any():
        assert not result.any(), f"{what} must be exactly zero"
        return
    for norm in (largest, root_mean_square):
        scale = norm(exact)
        limit = 2 * norm(plain.double() - exact) + FLOOR[result.dtype] * scale
        error = norm(result.double() - exact)
        assert error <= limit, f"{what}: {norm.__name__} error {error:.2e} above {limit:.2e}"
        assert scale >= 100 * limit, f"{what}: {scale:.2e} is too small to say anything with {limit:.2e}"


def built(builder: str, block: int) -> tuple[Topology, Tensor]:
    """(topology, the elements [M, N] that are in it), each way of building one; nothing here asks the topology."""
    if builder in ("mask", "pruning"):
        blocks_RC = mask_of(4, 3)
        elements_MN = blocks_RC.repeat_interleave(block, 0).repeat_interleave(block, 1)[
            : 4 * block - 5, : 3 * block - 3
        ]
        if builder == "mask":
            return from_mask(blocks_RC, block, (4 * block - 5, 3 * block - 3)), elements_MN
        # one element of each block is left by the pruning, at another place in each
        kept_MN = torch.zeros_like(elements_MN)
        for i, (row, column) in enumerate(blocks_RC.nonzero().tolist()):
            kept_MN[row * block + 3 * i % (block - 5), column * block + 5 * i % (block - 3)] = True
        return from_pruning(kept_MN, block), elements_MN
    widths, rows, nowhere = (block + 3, 5, 2 * block), (block - 1, 0, block + 2), 4 * (builder == "routing")
    elements_MN = torch.block_diag(*(torch.ones(r, w) for r, w in zip(rows, widths, strict=True))).bool()
    elements_MN = torch.nn.functional.pad(elements_MN, (0, 0, 0, nowhere))
    packed = PackedExperts.of(widths, block)
    if builder == "widths":
        return from_widths(rows, packed), elements_MN
    offsets_E1 = torch.tensor([0, *rows]).cumsum(0)
    return from_routing(offsets_E1, sum(rows) + nowhere, packed), elements_MN


def check_builder(builder: str, block: int, backend: str) -> None:
    """Chained products at a built topology against masked dense ones in float64, values and every gradient."""
    topology, elements_MN = built(builder, block)
    M, N = elements_MN.shape
    assert topology.shape == (M, N)
    options = {"backend": backend}

    def ours(a, b, c, d):
        values = sdd(a, b, topology, **options)
        return torch.cat(
            [
                dsd(values, topology, c, **options).flatten(),
                dds(d, values, topology, **options).flatten(),
                dsd(values, topology, d.t(), transpose=True, **options).flatten(),
                dds(c.t(), values, topology, transpose=True, **options).flatten(),
            ]
        )

    def dense(a, b, c, d):
        s = (a @ b) * elements_MN
        return torch.cat([t.flatten() for t in (s @ c, d @ s, s.t() @ d.t(), c.t() @ s.t())])

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((M, 3), (3, N), (N, 2), (2, M))]
    gradient = torch.randn(4 * (M + N), dtype=torch.float64)
    got, exact = (results_and_gradients(function, inputs, gradient) for function in (ours, dense))
    for what, result, wanted in zip(("out", "da", "db", "dc", "dd"), got, exact, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-11, msg=lambda text, w=what: f"{w}: {text}")


# widths, block, tokens, rows per token, where rows go: the reason
FFNS = {
    ((32, 32, 32), 16, 30, 2, "uniform"): "equal widths",
    ((47, 16, 0, 33, 5), 16, 33, 3, "uniform"): "odd widths, one expert without columns, prime E",
    ((64, 20), 32, 9, 2, "nowhere"): "fewer rows than a tile, rows that go nowhere",
    ((16, 48, 16, 16), 16, 40, 1, "one"): "all rows to one expert",
    ((10, 16, 30), 16, 20, 2, "empty"): "an expert without rows",
    ((16, 40, 8, 16, 16, 24), 16, 3, 1, "uniform"): "fewer rows than experts",
    ((16, 8), 16, 0, 2, "uniform"): "no tokens",
}


def routing_of(widths: tuple[int, ...], T: int, K: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(token_P, weight_P in float32, offsets_E1) of a routing with rows in expert order."""
    E = len(widths)
    expert_R = torch.randint(E, (T * K,))
    if kind == "one":
        expert_R[:] = E // 2
    elif kind == "empty":
        expert_R[expert_R == E // 2] = 0
    elif kind == "nowhere":
        expert_R[::3] = E
    order_P = expert_R.argsort(stable=True)
    weight_P = torch.rand(T * K).index_select(0, order_P).where(expert_R.index_select(0, order_P) < E, 0)
    counts_E = torch.bincount(expert_R, minlength=E + 1)[:E]
    token_P = torch.arange(T).repeat_interleave(K).index_select(0, order_P)
    return token_P, weight_P + 0.2 * (weight_P > 0), torch.nn.functional.pad(counts_E.cumsum(0), (1, 0))


def ffn_inputs(widths: tuple[int, ...], T: int, D: int) -> list[Tensor]:
    """x and the three packed weights, float64, scaled so that results are about 1."""
    F = sum(widths)
    shapes = ((T, D, 1.0), (D, F, D**-0.5), (D, F, D**-0.5), (F, D, 3 * (F / len(widths)) ** -0.5))
    return [torch.randn(rows, columns, dtype=torch.float64) * scale for rows, columns, scale in shapes]


def loop_ffn(x, w_gate, w_up, w_down, weight_P, token_P, offsets_E1, widths, weight_on):
    """The formula, one row at a time where the reference file takes an expert at a time."""
    # without rows nothing else would depend on the inputs, and every gradient is zero
    y = torch.zeros_like(x) + 0 * sum(t.sum() for t in (x, w_gate, w_up, w_down, weight_P))
    starts = [sum(widths[:e]) for e in range(len(widths) + 1)]
    for e in range(len(widths)):
        columns = slice(starts[e], starts[e + 1])
        for p in range(int(offsets_E1[e]), int(offsets_E1[e + 1])):
            t = int(token_P[p])
            scale = weight_P[p].to(x.dtype)
            row = x[t] * scale if weight_on == "input" else x[t]
            gate = row @ w_gate[:, columns]
            out = (gate * gate.sigmoid() * (row @ w_up[:, columns])) @ w_down[columns]
            y = y.index_add(0, torch.tensor([t]), (out if weight_on == "input" else out * scale)[None])
    return y


def check_ffn(case: tuple, dtype: torch.dtype, backend: str, weight_on: str) -> None:
    """Value and every gradient against the loop in float64, error at most twice that of the loop at `dtype`."""
    widths, block, T, K, kind = case
    token_P, weight_P, offsets_E1 = routing_of(widths, T, K, kind)
    packed = PackedExperts.of(widths, block)
    inputs = [*(t.to(dtype) for t in ffn_inputs(widths, T, 24)), weight_P]

    def ours(*tensors):
        *dense, weight = tensors
        return variable_width_ffn(*dense, token_P, weight, offsets_E1, packed, weight_on=weight_on, backend=backend)

    def loop(*tensors):
        return loop_ffn(*tensors, token_P, offsets_E1, widths, weight_on)

    gradient = torch.randn(T, 24, dtype=torch.float64).to(dtype)
    exact = results_and_gradients(loop, [t.double() for t in inputs], gradient.double())
    plain = results_and_gradients(loop, inputs, gradient)
    got = results_and_gradients(ours, inputs, gradient)
    names = ("y", "dx", "dw_gate", "dw_up", "dw_down", "dweight")
    for name, *tensors in zip(names, got, plain, exact, strict=True):
        assert tensors[0].dtype == (torch.float32 if name == "dweight" else dtype)
        check_close(name, *tensors)
