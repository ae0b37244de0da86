"""Parity of the operators beside the expert FFN, for scripts/gpu_check: values against float64 references, at full tiles."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_run import Check, Item, Json
from torch import Tensor

from moe_triton import block_sparse, measure, reference, roofline
from moe_triton.block_sparse import reference as block_sparse_reference
from moe_triton.ffn import expert_ffn
from moe_triton.grouped import grouped_mm
from moe_triton.roofline import Shape
from moe_triton.runtime import target


def operators(check: Check) -> Iterator[Item]:
    """An item for each operator."""
    yield "block-sparse products", lambda: _block_sparse(check)
    yield "experts of different widths", lambda: _different_widths(check)
    yield "score and top-k", lambda: _topk(check)
    yield "grouped products", lambda: _grouped(check)
    for precision in ("fp8_row",) if check.rehearse else ("fp8_row", "fp8_block"):
        yield f"8-bit products, {precision}", lambda precision=precision: _low_precision(check, precision)


def _relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _block_sparse(check: Check) -> Json:
    worst = 0.0
    for block in (128,) if check.rehearse else (16, 32, 64, 128):
        with torch.device(check.device):
            topology = block_sparse.from_mask(torch.rand(6, 5) < 0.5, block, (6 * block - 3, 5 * block - 5))
            M, N = topology.shape
            a, b = torch.randn(M, 512).bfloat16(), torch.randn(512, N).bfloat16()
            values = block_sparse.sdd(a, b, topology, backend="triton")
            wanted = block_sparse_reference.sdd(a.double(), b.double(), topology)
            out = block_sparse.dsd(wanted.bfloat16(), topology, b.t().contiguous(), backend="triton")
            wanted_out = block_sparse_reference.dsd(wanted.bfloat16().double(), topology, b.t().double())
        for got, exact in ((values, wanted), (out, wanted_out)):
            worst = max(worst, ((got - exact).norm() / exact.norm()).item())
    assert check.rehearse or worst < 1e-2, f"relative error {worst:.2g}"
    return {"relative_error": worst}


def _different_widths(check: Check) -> Json:
    """y and every gradient of the block-sparse experts in bfloat16 against the float64 loop."""
    widths, D, rows = (128, 72, 256), 256, (100, 37, 200) if not check.rehearse else (10, 7, 15)
    with torch.device(check.device):
        packed = block_sparse.PackedExperts.of(widths, 64, check.device)
        P, F = sum(rows) + 5, sum(widths)  # five rows go nowhere
        token, offsets = torch.arange(P) // 2, torch.tensor([0, *rows]).cumsum(0)
        x, gate, up = torch.randn(P // 2 + 1, D), torch.randn(F, D) / 16, torch.randn(F, D) / 16
        down, weight, dy = torch.randn(F, D) / 16, torch.rand(P), torch.randn(P // 2 + 1, D)

    def results(
        layer: Callable[..., torch.Tensor], dtype: torch.dtype, *which: Any, **options: Any
    ) -> list[torch.Tensor]:
        leaves = [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in (x, gate, up, down)]
        leaves.append(weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        a, *matrices, w = leaves
        y = layer(a, matrices[0].t(), matrices[1].t(), matrices[2], token, w, offsets, *which, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    got = results(block_sparse.variable_width_ffn, torch.bfloat16, packed, backend="triton")
    if check.rehearse:
        return {}
    wanted = results(block_sparse_reference.variable_width_ffn, torch.float64, widths)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True)]
    assert max(errors) < 2e-2, f"relative errors of y, dx, dw_gate, dw_up, dw_down, dweight: {errors}"
    return {"relative_error": max(errors)}


def _topk(check: Check) -> Json:
    """The interpreter's criterion with eight rounding units more: the hardware's exponential is less exact than numpy's."""
    cases = importlib.import_module("topk_cases")
    biased = {"score": "sigmoid", "normalize": True, "biased": True, "scaling_factor": 2.5}
    choices = [
        cases.Choice(T=4096, E=128, K=8, normalize=True),
        cases.Choice(T=256, E=256, K=8, dtype=torch.bfloat16, **biased),
        cases.Choice(T=1000, E=60, K=60, logits="tied"),
        cases.Choice(T=64, E=4096, K=32, score="sqrt_softplus"),
    ]
    for choice in choices[:1] if check.rehearse else choices:
        with torch.device(check.device):
            cases.check(choice, units=8)
    return {}


def _grouped(check: Check) -> Json:
    """The four forms with an empty group and rows past the last, values and gradients."""
    G, rows, N = (5, 600, 256) if not check.rehearse else (3, 64, 64)
    options = {"device": check.device, "dtype": torch.bfloat16}
    offs = torch.tensor([rows // 2, rows // 2, *[rows - 3] * (G - 2)], device=check.device, dtype=torch.int32)

    def results(product: Callable[..., Tensor], a: Tensor, b: Tensor, ends: Tensor | None) -> list[Tensor]:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = product(a, b, offs=ends)
        return [out.detach(), *torch.autograd.grad(out, (a, b), torch.ones_like(out))]

    forms = {
        "2d×3d": ((rows, 192), (G, 192, N), offs),
        "3d×2d": ((G, 96, 192), (192, rows), offs),
        "2d×2d": ((96, rows), (rows, N), offs),
        "3d×3d": ((G, 96, 192), (G, 192, N), None),
    }
    errors = {}
    for form, (left, right, ends) in list(forms.items())[: 1 if check.rehearse else None]:
        a, b = torch.randn(*left, **options), torch.randn(*right, **options) / 16
        got = results(grouped_mm, a, b, ends)
        if not check.rehearse:
            wanted = results(reference.grouped_mm, a.double(), b.double(), ends)
            errors[form] = max(map(_relative, got, wanted))
    assert all(error < 1e-2 for error in errors.values()), f"relative errors: {errors}"
    return errors


def _low_precision(check: Check, precision: str) -> Json:
    """y and the gradients of x and W_up: at most twice as far from exact products as a float64 reference that rounds likewise."""
    if target() == "sm_80":
        return {"skipped": "sm_80 multiplies no 8-bit floats"}
    shape = check.shape(Shape(1024, 512, 256, 8, 2))
    inputs = measure.arguments(shape, roofline.uniform_counts(shape), check.device)
    dy_TD = torch.randn_like(inputs["x_TD"])
    leaves = [inputs[name] for name in ("x_TD", "w_up_EDF")]
    y_TD = expert_ffn(**inputs, precision=precision)  # pyright: ignore[reportArgumentType]
    got = [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD)]
    if check.rehearse:
        return {}
    order = torch.argsort(inputs["expert_R"], stable=True)
    token_P, ends_E = inputs["token_R"][order], torch.bincount(inputs["expert_R"], minlength=shape.E).cumsum(0)
    offsets_E1 = torch.cat([ends_E.new_zeros(1), ends_E])

    def wanted(precision: str) -> list[Tensor]:
        exact = {name: inputs[name].detach().double().requires_grad_() for name in inputs if name[:2] in ("x_", "w_")}
        tensors = exact["x_TD"], exact["w_gate_EDF"], exact["w_up_EDF"], exact["w_down_EFD"], token_P
        weight_P = inputs["weight_R"].detach().double()[order]
        y = reference.expert_ffn(*tensors, weight_P, offsets_E1, precision=precision)
        return [y.detach(), *torch.autograd.grad(y, (exact["x_TD"], exact["w_up_EDF"]), dy_TD.double())]

    true, rounded = wanted("native"), wanted(precision)
    found = {}
    for name, ours, like, exact in zip(("y", "dx", "dw_up"), got, rounded, true, strict=True):
        found[name] = (_relative(ours, exact), _relative(like, exact))
    assert all(ours <= 2 * like + 1e-2 for ours, like in found.values()), f"errors of ours and of rounding: {found}"
    return {name: ours for name, (ours, _) in found.items()}
