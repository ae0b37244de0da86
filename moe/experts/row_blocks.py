"""Blocks of experts for the `torch` backend: their rows, scratch memory that every block uses again, and products over it.

A product per expert is not to be avoided, but a gather, an activation and a sum per expert are: experts of one width that follow
each other share them, as many as fit into `BLOCK_ELEMENTS` (a megabyte of float32, what a core's own cache holds). Scratch
of that size also stays mapped: fresh memory of the size of all rows costs more in page faults than the passes over it.
Sums over tokens are torch's bag of embeddings, one pass with the weights in it, while all rows are few (`TokenSums`).

Types of 16 bits on a CPU multiply by kernels that oneDNN compiles for each shape, which takes about as long as a product of 128
rows, and the counts of a routing are new at every step (docs/benchmarks.md). So their products
are over a few rows more than the expert has, up to a multiple of 4 or of about 1/64 of the count. Nothing is padded in memory:
rows come from the next expert, whose own product then overwrites what they gave; where rows are summed over, they are those of
the expert before, by then zero.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18
"""Rows times columns of a block with more than one expert, at most."""
SUM_ELEMENTS = 2**22
"""Rows times columns that `TokenSums` holds at once, at most: more of them would cost more in page faults than they save."""


class Span(NamedTuple):
    """One expert's rows of a block, and as many `spare` ones as bring the count to a multiple that returns."""

    expert: int
    start: int
    end: int
    spare: int


class Block(NamedTuple):
    """Rows `start` to `end` of all, of experts of one width that follow each other; spans count from the block's first row."""

    start: int
    end: int
    width: int
    spans: list[Span]

    @property
    def rows(self) -> int:
        """How many rows the block has."""
        return self.end - self.start


def _spare(rows: int, like: Tensor) -> int:
    """Rows up to the next multiple of 4, or of 1/64 of the largest power of two below: at most 64 counts per octave."""
    if like.device.type != "cpu" or like.element_size() != 2:
        return 0
    return -rows % max(4, (1 << rows.bit_length() - 1) // 64)


def blocks_of(x_TD: Tensor, offsets_E1: Tensor, widths: Sequence[int]) -> list[Block]:
    """All experts that have rows, in order, in blocks; experts without rows are in none."""
    blocks: list[Block] = []
    bounds = offsets_E1.tolist()  # host sync: each expert's product needs its size
    for e, (start, end) in enumerate(pairwise(bounds)):
        if end == start:
            continue
        spare = _spare(end - start, x_TD)
        last = blocks[-1] if blocks else None
        columns = max(widths[e], x_TD.shape[1])
        if last and last.width == widths[e] and (end - last.start) * columns <= BLOCK_ELEMENTS:
            last.spans.append(Span(e, start - last.start, end - last.start, spare))
            blocks[-1] = last._replace(end=end)
        else:
            blocks.append(Block(start, end, widths[e], [Span(e, 0, end - start, spare)]))
    return blocks


class Scratch:
    """Buffers by name, of the size of the largest block, with room for spare rows before and after; all of x's type.

    The rows before are zero. `whole` has all rows, `body` starts at the block's first.
    """

    def __init__(self, x_TD: Tensor, blocks: list[Block]):
        self._x_TD: Tensor = x_TD
        self._buffers: dict[str, Tensor] = {}
        self._columns: dict[str, int] = {}
        self.lead = max((span.spare for block in blocks for span in block.spans), default=0)
        self._most = max((block.rows * max(block.width, x_TD.shape[1]) for block in blocks), default=0)
        self._widest = max((max(block.width, x_TD.shape[1]) for block in blocks), default=0)

    def whole(self, name: str, rows: int, columns: int) -> Tensor:
        """[lead + rows + lead, columns] of a buffer; what a block before left there is still there, except in the lead."""
        if name not in self._buffers:
            self._buffers[name] = self._x_TD.new_empty(self._most + 2 * self.lead * self._widest)
        whole = self._buffers[name][: (rows + 2 * self.lead) * columns].view(-1, columns)
        if self.lead and self._columns.get(name) != columns:
            whole[: self.lead].zero_()
            self._columns[name] = columns
        return whole

    def body(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows + lead, columns] of a buffer, from the block's first row."""
        return self.whole(name, rows, columns)[self.lead :]

    def gather(self, name: str, source_TD: Tensor, token: Tensor) -> Tensor:
        """Rows `token` of source_TD [T, D], in the whole of a buffer."""
        whole = self.whole(name, token.shape[0], source_TD.shape[1])
        torch.index_select(source_TD, 0, token, out=whole[self.lead : self.lead + token.shape[0]])
        return whole


def multiply(rows: Tensor, span: Span, matrix: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = rows @ matrix in a span's rows, and anything in the spare ones after them, where `out` has those.

    With `bias` [E, columns] the expert's row of it is added.
    """
    expert, start, end, spare = span
    if end + spare <= out.shape[0]:
        torch.mm(rows[start : end + spare], matrix, out=out[start : end + spare])
    else:
        out[start:end] = torch.mm(rows[start : end + spare], matrix)[: end - start]
    if bias is not None:
        out[start:end] += bias[expert]


def sum_over_rows(left: Tensor, right: Tensor, span: Span, lead: int, out: Tensor) -> None:
    """out = leftᵀ @ right over a span's rows of two whole buffers; spare rows before them must be zero."""
    window = slice(lead + span.start - span.spare, lead + span.end)
    torch.mm(left[window].t(), right[window], out=out)


def clear(buffers: Sequence[Tensor], span: Span, lead: int) -> None:
    """Make a span's last rows zero, because the next one's `sum_over_rows` may run over them."""
    for whole in buffers if lead else ():
        whole[span.end : span.end + lead].zero_()


class TokenSums:
    """Sums of rows per token: of all rows at once in one pass, on a CPU and up to SUM_ELEMENTS, otherwise a block at a time.

    Sums are in float32 or wider.
    """

    def __init__(self, x_TD: Tensor, token_P: Tensor, blocks: list[Block], scratch: Scratch):
        self._like_TD, self._scratch = x_TD, scratch
        (T, D), rows = x_TD.shape, blocks[-1].end if blocks else 0
        self._token_P = token_P[:rows]
        self._weights: list[Tensor] = []
        self._at_once = x_TD.device.type == "cpu" and 0 < rows * D <= SUM_ELEMENTS
        if self._at_once:
            self._rows_PD = x_TD.new_empty(rows + scratch.lead, D)
        else:
            self._sum_TD = x_TD.new_zeros(T, D, dtype=torch.promote_types(x_TD.dtype, torch.float32))

    def rows(self, block: Block) -> Tensor:
        """Where the rows of a block go, and some spare ones after them."""
        if self._at_once:
            return self._rows_PD[block.start :]
        return self._scratch.body("rows to sum", block.rows, self._like_TD.shape[1])

    def add(self, block: Block, scale: Tensor | None) -> None:
        """Count what stands in `rows(block)`, times `scale` [rows, 1]; with a scale in every block or in none."""
        if self._at_once:
            self._weights += [] if scale is None else [scale]
            return
        rows = self.rows(block)[: block.rows]
        rows = rows if scale is None else rows.mul_(scale)
        self._sum_TD.index_add_(0, self._token_P[block.start : block.end], rows.to(self._sum_TD.dtype))

    def total(self) -> Tensor:
        """[T, D] in x's type."""
        if not self._at_once:
            return self._sum_TD.to(self._like_TD.dtype)
        order = self._token_P.argsort(stable=True)
        counts_T = torch.bincount(self._token_P, minlength=self._like_TD.shape[0])
        bounds_T1 = torch.nn.functional.pad(counts_T.cumsum(0), (1, 0))
        weights = torch.cat(self._weights).flatten().index_select(0, order) if self._weights else None
        return torch.nn.functional.embedding_bag(
            order, self._rows_PD, bounds_T1, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
