"""`grouped_mm`: torch's grouped product in its four forms, at any size and stride, with gradients of every order.

    2d×3d   a [M, K], b [G, K, N] -> [M, N]      rows of group g times b[g]             (an expert layer's forward)
    3d×2d   a [G, M, K], b [K, N] -> [M, N]      a[g] times columns of group g
    2d×2d   a [M, K], b [K, N]    -> [G, M, N]   columns of a times rows of b, of group g (its weights' gradient)
    3d×3d   a [G, M, K], b [G, K, N] -> [G, M, N]  without offsets

offs[g] is the end of group g along the ragged dimension. torch.nn.functional.grouped_mm asks for strides and sizes of 16
bytes; here nothing is padded or copied. With dC the result's gradient, dA = grouped_mm(dC, bᵀ) and dB = grouped_mm(aᵀ, dC)
with the same offsets, each of another form: so backward is this operator again, and so is its backward. Kept: a and b.
"""

import torch
from torch import Tensor

from moe_triton.compile_case import CompileCase
from moe_triton.grouped.kernels import grouped_inner, grouped_rows
from moe_triton.runtime import INTERPRETING, compiling_only


@torch.library.custom_op("moe_triton::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if a.device.type == "cpu" and not INTERPRETING and not compiling_only():
        raise ValueError(
            "grouped_mm needs a GPU, and these tensors are on the CPU: use moe_triton.reference.grouped_mm, or set "
            "TRITON_INTERPRET=1 before triton is imported to run the kernels slowly in its interpreter"
        )
    out = a.new_empty(_shape(a, b, offs), dtype=out_dtype)
    ends = None if offs is None else offs.contiguous()
    if a.dim() == b.dim():
        grouped_inner(a, b, ends, out)
    elif a.dim() == 2:
        grouped_rows(a, b, ends, out)  # pyright: ignore[reportArgumentType]
    else:
        grouped_rows(b.t(), a.transpose(1, 2), ends, out.t())  # pyright: ignore[reportArgumentType]
    return out


@_grouped_mm.register_fake
def _(a, b, offs, out_dtype):
    return a.new_empty(_shape(a, b, offs), dtype=out_dtype)


def _shape(a: Tensor, b: Tensor, offs: Tensor | None) -> tuple[int, ...]:
    rows_columns = (a.shape[-2], b.shape[-1])
    if a.dim() != b.dim():
        return rows_columns
    return (a.shape[0] if offs is None else offs.shape[0], *rows_columns)


def _setup_context(ctx, inputs, output) -> None:
    a, b, offs, _ = inputs
    ctx.save_for_backward(a, b, offs)


def _autograd(ctx, dout):
    a, b, offs = ctx.saved_tensors
    dout = dout.to(a.dtype)
    if 1 not in dout.stride()[-2:]:
        dout = dout.contiguous()  # an expanded gradient would be read an element at a time
    da = _grouped_mm(dout, b.mT, offs, a.dtype) if ctx.needs_input_grad[0] else None
    db = _grouped_mm(a.mT, dout, offs, b.dtype) if ctx.needs_input_grad[1] else None
    return da, db, None, None


_grouped_mm.register_autograd(_autograd, setup_context=_setup_context)


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """One matrix product per group, of the form that the numbers of dimensions say; see the module's docstring.

    a, b of one dtype (float16, bfloat16, float32), any strides; offs [G] int32 or int64, non-decreasing, at most the ragged
    dimension's size; none for 3d×3d. out_dtype: a's unless given; sums are float32. The result is contiguous. What lies past
    the last offset takes no part: rows (2d×3d) or columns (3d×2d) of the result there are zero, and so are gradients; torch
    leaves them unwritten. An empty group of a 2d×2d product is zero. Raises ValueError for operands that do not fit.
    """
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise ValueError(f"grouped_mm: a has {a.dim()} dimensions and b {b.dim()}: each must have 2 or 3")
    if a.dtype != b.dtype or a.device != b.device or not a.dtype.is_floating_point:
        raise ValueError(
            f"grouped_mm: a is {a.dtype} on {a.device} and b {b.dtype} on {b.device}: both must be of one float type and on "
            "one device"
        )
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"grouped_mm: a {list(a.shape)} has {a.shape[-1]} columns and b {list(b.shape)} {b.shape[-2]} rows"
        )
    if (offs is None) != (a.dim() == b.dim() == 3):
        raise ValueError(
            f"grouped_mm: a {a.dim()}d×{b.dim()}d product {'takes no' if a.dim() == b.dim() == 3 else 'needs'} offs: they cut "
            "the ragged dimension of 2d operands"
        )
    if offs is not None and (offs.dim() != 1 or offs.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"grouped_mm: offs is {list(offs.shape)} of {offs.dtype}: it must be [G] of int32 or int64")
    groups = {tensor.shape[0] for tensor in (a, b) if tensor.dim() == 3} | (
        {offs.shape[0]} if offs is not None else set()
    )
    if len(groups) != 1:
        raise ValueError(
            f"grouped_mm: a {list(a.shape)}, b {list(b.shape)}, offs of {groups}: one number of groups for all"
        )
    return _grouped_mm(a, b, offs, out_dtype or a.dtype)


def compile_cases() -> list[CompileCase]:
    """Every form, forward and backward; between them every layout in which an operand can come."""

    def case(name: str, form: str, transposed: bool = False, **options) -> CompileCase:
        return CompileCase(name, True, lambda dtype, D, F: _trial(dtype, D, F, form, transposed, **options))

    return [
        case("rows", "2d×3d"),
        case("rows_of_transposed_weights", "2d×3d", transposed=True),
        case("few_rows_float32_output", "2d×3d", rows=256, out_dtype=torch.float32),
        case("columns", "3d×2d"),
        case("sums", "2d×2d"),
        case("whole", "3d×3d"),
    ]


def _trial(
    dtype: torch.dtype,
    D: int,
    F: int,
    form: str,
    transposed: bool,
    rows: int = 2048,
    out_dtype: torch.dtype | None = None,
) -> None:
    """One forward and backward of 8 groups on CPU tensors."""
    G = 8

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    a, b = {
        "2d×3d": (tensor(rows, D), tensor(G, F, D).mT if transposed else tensor(G, D, F)),
        "3d×2d": (tensor(G, D, F), tensor(F, rows)),
        "2d×2d": (tensor(rows, D).t(), tensor(rows, F)),
        "3d×3d": (tensor(G, 256, D), tensor(G, D, F)),
    }[form]
    offs = None if form == "3d×3d" else torch.arange(1, G + 1, dtype=torch.int32) * (rows // G)
    out = grouped_mm(a.requires_grad_(), b.requires_grad_(), offs=offs, out_dtype=out_dtype)
    out.backward(torch.zeros_like(out))
