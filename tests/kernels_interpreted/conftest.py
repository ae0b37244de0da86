"""Kernels under triton's interpreter: what these tests rely on beside ../conftest.py (seeds, one thread, NaN in fresh memory).

Collected only where TRITON_INTERPRET=1; tests/test_kernels_interpreted.py starts such a process. In it, every launch is
checked: each lane of a load or store whose mask is true must lie inside a tensor that the kernel was given, and tl.dot must
not meet bfloat16, whose bits the interpreter multiplies as integers, silently. Casts to bfloat16 round to nearest, as on
every GPU; the interpreter would truncate, an error twice as large. A test can ask for `launches`.
"""

import os

import numpy as np
import pytest
import torch
import triton.language as tl

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]

if not collect_ignore_glob:
    import triton.runtime.interpreter as interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    _patched: set[int] = set()
    _patch_lang = interpreter._patch_lang

    def _patch_once(fn):
        """Redirect triton.language to the interpreter once per function and for good, not at every call of a helper."""
        if id(fn.__globals__) not in _patched:
            _patched.add(id(fn.__globals__))
            _patch_lang(fn)
        return interpreter._LangPatchScope()

    _np_dtypes: dict[str, np.dtype] = {}
    _get_np_dtype = interpreter._get_np_dtype

    def _np_dtype(kind):
        """The interpreter's own answer, which it looks up in a table that it builds anew each time."""
        if kind.name not in _np_dtypes:
            _np_dtypes[kind.name] = _get_np_dtype(kind)
        return _np_dtypes[kind.name]

    interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _np_dtype

    _patch_core = interpreter._patch_lang_core

    def _patch_core_with_fnuz(lang, scope):
        """The interpreter knows e4m3fnuz, the 8-bit type of gfx942, but not its name."""
        _patch_core(lang, scope)
        known = lang.dtype.to_ir

        def to_ir(kind, builder):
            return builder.get_fp8e4b8_ty() if kind.name == "fp8e4b8" else known(kind, builder)

        scope.set_attr(lang.dtype, "to_ir", to_ir)

    interpreter._patch_lang_core = _patch_core_with_fnuz

    _ranges: list[tuple[int, int]] = []
    _names: list[str] = []
    _call = interpreter.GridExecutor.__call__

    def _range(tensor: torch.Tensor) -> tuple[int, int]:
        if tensor.numel() == 0:
            return tensor.data_ptr(), tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()

    def _recorded_call(executor, *arguments, **options):
        _names.append(executor.fn.__name__)
        given = [a.base if isinstance(a, TensorDescriptor) else a for a in (*arguments, *options.values())]
        _ranges[:] = [_range(a) for a in given if isinstance(a, torch.Tensor)]
        return _call(executor, *arguments, **options)

    def _check(kind: str, ptrs, mask) -> None:
        where = ptrs.data if mask is None else ptrs.data[mask.data.astype(bool)]
        if where.size == 0:
            return
        where, size = where.astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8
        low, high = where.min(), where.max() + size
        if any(start <= low and high <= end for start, end in _ranges):
            return
        inside = np.zeros(where.shape, bool)
        for start, end in _ranges:
            inside |= (where >= start) & (where + size <= end)
        if not inside.all():
            raise IndexError(f"{kind} in {_names[-1]}: {(~inside).sum()} of {where.size} lanes outside of every tensor")

    _builder = interpreter.InterpreterBuilder
    _load, _store, _dot = _builder.create_masked_load, _builder.create_masked_store, _builder.create_dot

    def _checked_load(builder, ptrs, mask, *rest, **named):
        # a descriptor brings its mask as an array
        _check("load", ptrs, interpreter.TensorHandle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask)
        return _load(builder, ptrs, mask, *rest, **named)

    def _checked_store(builder, ptrs, value, mask, *rest):
        _check("store", ptrs, mask)
        return _store(builder, ptrs, value, mask, *rest)

    def _checked_dot(builder, a, b, *rest):
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar), "the interpreter multiplies the bits of bfloat16"
        return _dot(builder, a, b, *rest)

    _cast = _builder.cast_impl

    def _rounding_cast(builder, src, dst_type):
        """As the hardware casts between float32 and bfloat16, to nearest even; the interpreter cuts bits off."""
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = src.data.view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
        return _cast(builder, src, dst_type)

    interpreter.GridExecutor.__call__ = _recorded_call
    # tensors on the CPU are used where they are, and copying them back onto themselves would touch all their memory
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    _builder.cast_impl = _rounding_cast
    _builder.create_masked_load, _builder.create_masked_store = _checked_load, _checked_store
    _builder.create_dot = _checked_dot


@pytest.fixture
def launches() -> list[str]:
    """Names of the kernels launched since the test began, in order; clear it to count from a later point."""
    _names.clear()
    return _names
