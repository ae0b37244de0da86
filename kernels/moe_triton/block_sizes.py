"""How many blocks experts of any width need, counted on the host from widths and rows alone; plain Python, without torch.

The hidden activations of rows in expert order are a block-sparse matrix: expert e's rows × expert e's columns. Which rows an
expert gets is known on the device only, so room is made for the fullest of all routings.
"""

from collections.abc import Sequence

BLOCK_SIZES = (16, 32, 64, 128)
"""Rows and columns that a block may have."""
WASTE = 0.125
"""Largest share of columns, over the real ones, that short blocks may add where a block is chosen."""


def block_of(widths: Sequence[int]) -> int:
    """The largest block whose padding adds at most an eighth to the experts' columns; the smallest if none does."""
    total = sum(widths)
    for block in reversed(BLOCK_SIZES):
        if sum(columns_of(widths, block)) * block <= (1 + WASTE) * total:
            return block
    return BLOCK_SIZES[0]


def columns_of(widths: Sequence[int], block: int) -> list[int]:
    """Block columns of each expert; its last one is short if its width is no multiple of the block."""
    return [-(-width // block) for width in widths]


def max_tiles(num_experts: int, num_rows: int, block: int) -> int:
    """The most row tiles that `num_rows` rows can need, wherever they go; rows that go nowhere are one more group."""
    groups = min(num_experts + 1, num_rows)
    return groups + (num_rows - groups) // block if num_rows else 0


def max_blocks(widths: Sequence[int], num_rows: int, block: int) -> int:
    """The most blocks that `num_rows` rows can need: the widest experts each with a short tile, the rest to the widest.

    With equal widths that is rows / block + experts tiles of one expert's columns; with others the fullest routing is the
    one that sends everything to the widest expert.
    """
    widest = sorted(columns_of(widths, block), reverse=True)
    most, first = 0, 0
    for busy in range(1, min(len(widest), num_rows) + 1):
        first += widest[busy - 1]
        most = max(most, first + (num_rows - busy) // block * widest[0])
    return most
