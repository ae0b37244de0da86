"""What needs a C compiler, for tests: skipped, with the reason, where there is none."""

import pytest

from moe.backend import compiled
from moe_cpu.library import CannotCompile, library


def _why_not() -> str:
    try:
        library()
    except CannotCompile as error:
        return str(error)
    return "" if compiled("cpu") else "the kernels are not used"


WHY_NOT = _why_not()
NEEDS_COMPILER = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
CPU = pytest.param("cpu", marks=NEEDS_COMPILER)
"""The expert backend `cpu` as a parameter."""
