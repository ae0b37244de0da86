"""Files whose experts are MXFP4, as gpt-oss is published: read as the bfloat16 numbers that they stand for, which is exact.

A tensor `<name>` [E, K, N] is two: `<name>_blocks` [E, N, K/32, 16] uint8 and `<name>_scales` [E, N, K/32] uint8. By the OCP
Microscaling specification 1.0 (sections 5.3 and 5.4) a block is 32 numbers along K of type E2M1, two a byte, the first one
low, times one scale of type E8M0:

    E2M1, bits s·ee·m      (-1)^s · 2^(ee - 1) · (1 + m/2), or (-1)^s · m/2 where ee = 0
    E8M0, a byte b         2^(b - 127); 255 is not a number

so that every product is one of bfloat16, which has E8M0's exponents and a mantissa of seven bits.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe.errors import CheckpointError
from moe.hf.shards import Files

BLOCK = 32
"""Numbers that share a scale."""
_ENDS = ("_blocks", "_scales")


def e2m1_values() -> Tensor:
    """The 16 numbers of type E2M1, by their bits [16] float32."""
    bits = torch.arange(16)
    sign, exponent, mantissa = 1.0 - 2.0 * (bits >> 3), bits >> 1 & 3, (bits & 1) / 2
    return sign * torch.where(exponent > 0, torch.exp2(exponent - 1.0) * (1 + mantissa), mantissa)


def widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, K, N] bfloat16 from blocks [E, N, K/32, 16] and scales [E, N, K/32], one expert at a time."""
    E, N, groups, _ = blocks.shape
    values = e2m1_values().to(torch.bfloat16)
    result = torch.empty(E, groups * BLOCK, N, dtype=torch.bfloat16)
    for e in range(E):
        pairs = torch.stack((blocks[e] & 15, blocks[e] >> 4), dim=-1).flatten(1).int()
        powers = torch.exp2(scales[e].float() - 127).to(torch.bfloat16).repeat_interleave(BLOCK, dim=1)
        result[e] = (values[pairs] * powers).t()
    return result


class Unpacked(Files):
    """A folder's tensors, those in MXFP4 under their own names and widened when asked for; others as they are stored."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        names = super().names()
        self._packed = {
            own for name in names if (own := name.removesuffix("_blocks")) != name and f"{own}_scales" in names
        }
        wrong = sorted(self._packed & names)
        if wrong:
            self.__exit__()
            raise CheckpointError(f"{folder} holds {wrong[0]} in MXFP4 and as it is: remove one of them.")

    def names(self) -> set[str]:
        """Every tensor's name."""
        parts = {own + end for own in self._packed for end in _ENDS}
        return super().names() - parts | self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. Raises CheckpointError for blocks and scales that do not belong together."""
        if name not in self._packed:
            return super().shape(name)
        blocks, scales = (super(Unpacked, self).shape(name + end) for end in _ENDS)
        if len(blocks) != 4 or blocks[3] != BLOCK // 2 or blocks[:3] != scales:
            raise CheckpointError(
                f"{name}_blocks is {blocks} and {name}_scales {scales}: they must be [E, N, K/32, 16] and [E, N, K/32]."
            )
        return blocks[0], blocks[2] * BLOCK, blocks[1]

    def dtype(self, name: str) -> str:
        """A tensor's type, without reading it. Raises CheckpointError for another type than bytes."""
        if name not in self._packed:
            return super().dtype(name)
        for end in _ENDS:
            if super().dtype(name + end) != "U8":
                raise CheckpointError(f"{name}{end} is {super().dtype(name + end)}: MXFP4 is stored in U8.")
        return "BF16"

    def tensor(self, name: str) -> Tensor:
        """A tensor's content. Raises CheckpointError for a scale that is not a number."""
        if name not in self._packed:
            return super().tensor(name)
        assert self.dtype(name) == "BF16"
        blocks, scales = (super(Unpacked, self).tensor(name + end) for end in _ENDS)
        if bool((scales == 255).any()):
            raise CheckpointError(f"{name}_scales holds 255, which stands for no number: fetch the file again.")
        return widened(blocks, scales)
