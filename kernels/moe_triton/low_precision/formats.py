"""Number formats of the low-precision products: which elements share a scale, and which 8-bit type a machine multiplies.

The one place that a new format is added to. mxfp8 would be a row here: 32 elements of a row to a scale, and scales that are
powers of two (e8m0); its product would call tl.dot_scaled instead of scaling the accumulator.
"""

from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 128
"""Elements that share a scale in a blocked format; quantised rows are padded with zeros to a multiple of it in any format."""


@dataclass(frozen=True)
class ScaleFormat:
    """How scales lie over an operand whose rows are multiplied, [rows, K]."""

    name: str
    blocked: bool
    """One scale for BLOCK elements of a row of activations and for BLOCK × BLOCK of a weight (DeepSeek-V3); otherwise one
    for a whole row of either."""

    def scales(self, columns: int) -> int:
        """Scales along a padded row."""
        return columns // BLOCK if self.blocked else 1

    def weight_rows(self, rows: int) -> int:
        """Scales along the rows of a weight."""
        return -(-rows // BLOCK) if self.blocked else rows


FORMATS: dict[str, ScaleFormat] = {
    entry.name: entry for entry in (ScaleFormat("fp8_row", blocked=False), ScaleFormat("fp8_block", blocked=True))
}


def format_of(name: str) -> ScaleFormat:
    """The format of this name. Raises ValueError naming the known ones."""
    if name not in FORMATS:
        raise ValueError(f"precision {name!r} is unknown: use 'native' or one of {', '.join(FORMATS)}")
    return FORMATS[name]


def fp8_dtype(target: str) -> torch.dtype:
    """The e4m3 type that a target's matrix unit multiplies; target as runtime.target() names it.

    gfx942 has the variant without negative zero and infinity, whose largest value is 240 instead of 448. Raises ValueError
    for a target without 8-bit matrix instructions.
    """
    if target == "interpret" or (target.startswith("sm_") and int(target[3:]) >= 89) or target == "gfx950":
        return torch.float8_e4m3fn
    if target == "gfx942":
        return torch.float8_e4m3fnuz
    raise ValueError(
        f"precision fp8 needs e4m3 matrix instructions, and {target} has none: use precision='native', or a GPU of sm_89, "
        "sm_90, sm_100, gfx942 or later"
    )


def padded(columns: int) -> int:
    """Length of a quantised row."""
    return -(-columns // BLOCK) * BLOCK


def constants(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time values of an 8-bit type: its largest and its least positive value."""
    info = torch.finfo(dtype)
    return {"LIMIT": info.max, "LEAST": info.smallest_normal / 8}
