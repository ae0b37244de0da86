"""Which blocks of a matrix are there: block compressed rows, with a transposed index that moves no data.

A block-sparse matrix is `values` [num_blocks, block, block], in row-major order of its blocks, beside a `Topology`. Block
row r covers the matrix rows row_bounds[r] : row_bounds[r+1], at most `block` of them: a ragged edge is a short last block
row, and the rows of an expert end in one too, so that rows of experts are cut into tiles without padding them in memory.
Likewise columns, so that experts of any width lie side by side. What a block holds outside its bounds is ignored.

All indices are int32: with 16 bits, column 32768 and beyond are silently wrong. Nothing here needs triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moe_triton import block_sizes
from moe_triton.block_sizes import BLOCK_SIZES


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The blocks of one matrix. Built by `from_mask`, `from_pruning`, `from_widths` or `from_routing`.

    num_blocks is known on the host; a topology from routing has room for every routing of that many rows, and the blocks
    past the last used one carry row num_block_rows: products write zeros there and never read them.
    """

    shape: tuple[int, int]
    """Rows and columns of the matrix."""
    block: int
    """Rows and columns of a block."""
    row_offsets: Tensor
    """Blocks of block row r are row_offsets[r] : row_offsets[r+1]."""
    row_index: Tensor
    """Block row of each block."""
    column_index: Tensor
    """Block column of each block, ascending within a block row."""
    column_offsets: Tensor
    """Blocks of block column c are entries column_offsets[c] : column_offsets[c+1] of the two indices below."""
    row_index_t: Tensor
    """Block row of each block, in column-major order."""
    block_index_t: Tensor
    """Place in `values` of each block, in column-major order."""
    row_bounds: Tensor
    """Matrix rows of block row r are row_bounds[r] : row_bounds[r+1]."""
    column_bounds: Tensor
    """Matrix columns of block column c are column_bounds[c] : column_bounds[c+1]."""
    uniform_rows: bool
    """Whether block row r starts at row r · block, so that kernels need not look it up."""
    uniform_columns: bool
    """Whether block column c starts at column c · block."""

    @property
    def num_blocks(self) -> int:
        """Length of `values`."""
        return self.row_index.shape[0]

    @property
    def num_block_rows(self) -> int:
        return self.row_offsets.shape[0] - 1

    @property
    def num_block_columns(self) -> int:
        return self.column_offsets.shape[0] - 1

    def flat(self) -> tuple[list[Tensor], list[int]]:
        """Tensors and integers, as operators take them; `Topology.of_flat` puts them together again."""
        sizes = [*self.shape, self.block, int(self.uniform_rows), int(self.uniform_columns)]
        return [getattr(self, name) for name in _TENSORS], sizes

    @staticmethod
    def of_flat(tensors: Sequence[Tensor], sizes: Sequence[int]) -> "Topology":
        """The inverse of `flat`."""
        rows, columns, block, uniform_rows, uniform_columns = sizes
        return Topology(
            shape=(rows, columns),
            block=block,
            uniform_rows=bool(uniform_rows),
            uniform_columns=bool(uniform_columns),
            **dict(zip(_TENSORS, tensors, strict=True)),
        )

    def to(self, device: torch.device | str) -> "Topology":
        """The same topology with its indices on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


_TENSORS = tuple(field.name for field in fields(Topology) if field.type is Tensor)


def from_mask(mask_RC: Tensor, block: int, shape: tuple[int, int] | None = None) -> Topology:
    """The blocks where mask_RC [block rows, block columns] is True.

    shape: of the matrix, if its last block row or column is short; by default all blocks are whole. Reads the number of
    blocks from the device. Raises ValueError if block or shape do not fit.
    """
    block_rows, block_columns = mask_RC.shape
    shape = (block_rows * block, block_columns * block) if shape is None else shape
    row_index, column_index = mask_RC.nonzero(as_tuple=True)  # host sync: the number of blocks
    topology = from_pairs(row_index, column_index, block, shape)
    if (topology.num_block_rows, topology.num_block_columns) != (block_rows, block_columns):
        raise ValueError(
            f"a {shape[0]}×{shape[1]} matrix has {topology.num_block_rows}×{topology.num_block_columns} blocks of {block}, "
            f"the mask has {block_rows}×{block_columns}: give the mask one entry per block, or the matrix's own shape"
        )
    return topology


def from_pruning(mask_MN: Tensor, block: int) -> Topology:
    """The blocks that hold at least one True of mask_MN [rows, columns], a pruning mask over the elements of a matrix."""
    return from_mask(blocks_of(mask_MN, block).flatten(2).any(2), block, (mask_MN.shape[0], mask_MN.shape[1]))


def from_pairs(row_index: Tensor, column_index: Tensor, block: int, shape: tuple[int, int]) -> Topology:
    """The blocks (row_index[i], column_index[i]), in that order: pairs must ascend, by row and then by column."""
    _check_block(block)
    device = row_index.device
    block_rows, block_columns = (-(-size // block) for size in shape)
    row_index, column_index = row_index.int(), column_index.int()
    block_index_t = column_index.argsort(stable=True)
    sorted_columns = column_index.index_select(0, block_index_t)
    return Topology(
        shape=shape,
        block=block,
        row_offsets=torch.searchsorted(row_index, _count(block_rows + 1, device), out_int32=True),
        row_index=row_index,
        column_index=column_index,
        column_offsets=torch.searchsorted(sorted_columns, _count(block_columns + 1, device), out_int32=True),
        row_index_t=row_index.index_select(0, block_index_t),
        block_index_t=block_index_t.int(),
        row_bounds=(_count(block_rows + 1, device) * block).clamp(max=shape[0]),
        column_bounds=(_count(block_columns + 1, device) * block).clamp(max=shape[1]),
        uniform_rows=True,
        uniform_columns=True,
    )


@dataclass(frozen=True, kw_only=True)
class PackedExperts:
    """How the hidden columns of experts of different widths, packed side by side, are cut into blocks. Made once."""

    widths: tuple[int, ...]
    """Hidden columns of each expert; 0 is allowed."""
    block: int
    first_block_E1: Tensor
    """Block columns of expert e are first_block_E1[e] : first_block_E1[e+1]."""
    expert_C: Tensor
    """Expert of each block column."""
    column_bounds: Tensor
    """Matrix columns of block column c are column_bounds[c] : column_bounds[c+1]."""

    @staticmethod
    def of(widths: Sequence[int], block: int, device: torch.device | str = "cpu") -> "PackedExperts":
        """Cut each expert's columns into blocks of `block`, its last one short if its width is no multiple of it."""
        _check_block(block)
        bounds, firsts, experts = [0], [0], []
        for expert, width in enumerate(widths):
            start = bounds[-1]
            bounds += [min(start + done + block, start + width) for done in range(0, width, block)]
            firsts.append(len(bounds) - 1)
            experts += [expert] * (firsts[-1] - firsts[-2])
        first_block_E1, expert_C, column_bounds = (
            torch.tensor(values, dtype=torch.int32, device=device) for values in (firsts, experts, bounds)
        )
        return PackedExperts(
            widths=tuple(widths),
            block=block,
            first_block_E1=first_block_E1,
            expert_C=expert_C,
            column_bounds=column_bounds,
        )

    @property
    def blocks(self) -> list[int]:
        """Block columns of each expert."""
        return block_sizes.columns_of(self.widths, self.block)

    @property
    def uniform(self) -> bool:
        """Whether block column c starts at column c · block: only the last expert that has columns may end in a short one."""
        wide = [width for width in self.widths if width]
        return all(width % self.block == 0 for width in wide[:-1])

    def max_tiles(self, num_rows: int) -> int:
        """The most row tiles that `num_rows` rows can need, wherever they go."""
        return block_sizes.max_tiles(len(self.widths), num_rows, self.block)

    def max_blocks(self, num_rows: int) -> int:
        """The most blocks that `num_rows` rows can need, wherever they go."""
        return block_sizes.max_blocks(self.widths, num_rows, self.block)


def from_routing(offsets_E1: Tensor, num_rows: int, packed: PackedExperts) -> Topology:
    """The hidden activations [num_rows, sum of widths] of rows in expert order: expert e's rows × expert e's columns.

    offsets_E1 [E+1] int: rows of expert e are offsets_E1[e] : offsets_E1[e+1]; those past the last go nowhere, and have tiles
    without blocks. No host synchronisation: num_blocks is `packed.max_blocks(num_rows)`. Closed forms, nothing is sorted.
    """
    E = len(packed.widths)
    if offsets_E1.shape != (E + 1,):
        raise ValueError(
            f"offsets_E1 has {tuple(offsets_E1.shape)} entries for {E} widths: it needs one more than experts"
        )
    return _block_diagonal(offsets_E1, num_rows, packed, packed.max_tiles(num_rows), packed.max_blocks(num_rows))


def from_widths(rows: Sequence[int], packed: PackedExperts) -> Topology:
    """The same with the number of rows of each expert known on the host: exactly as many blocks as there are."""
    tiles = [-(-count // packed.block) for count in rows]
    num_blocks = sum(tile * columns for tile, columns in zip(tiles, packed.blocks, strict=True))
    offsets = torch.tensor([0, *rows], dtype=torch.int32, device=packed.expert_C.device).cumsum(0)
    return _block_diagonal(offsets, sum(rows), packed, sum(tiles), num_blocks)


def _block_diagonal(
    offsets_E1: Tensor, num_rows: int, packed: PackedExperts, num_tiles: int, num_blocks: int
) -> Topology:
    """Rows of each expert × its columns. Experts are E+1 here: the last has the rows that go nowhere, and no columns."""
    E, block, device = len(packed.widths), packed.block, offsets_E1.device
    num_columns = packed.expert_C.shape[0]
    first_row = offsets_E1.int()  # of each of the E+1
    next_row = torch.cat([first_row[1:], first_row.new_full((1,), num_rows)])
    tiles = (next_row - first_row + block - 1) // block
    tiles_end = tiles.cumsum(0, dtype=torch.int32)
    first_tile = tiles_end - tiles
    columns = torch.cat([packed.first_block_E1.diff(), first_row.new_zeros(1)])
    first_block = (tiles * columns).cumsum(0, dtype=torch.int32) - tiles * columns

    tile = _count(num_tiles, device)
    expert = _owner(tiles_end, tile, E)
    start = _at(first_row, expert) + (tile - _at(first_tile, expert)) * block
    # past the last tile start is past the last row: such tiles are empty
    row_bounds = torch.cat([start.clamp(max=num_rows), start.new_full((1,), num_rows)])
    row_offsets = _offsets(_at(columns, expert))

    place = _count(num_blocks, device)
    row_index = torch.searchsorted(row_offsets[1:], place, right=True, out_int32=True)
    row = row_index.clamp(max=max(num_tiles - 1, 0))
    column_index = place - _at(row_offsets, row) + _at(packed.first_block_E1, _at(expert, row).clamp(max=E - 1))
    column_index = torch.where(row_index < num_tiles, column_index, 0)

    column_offsets = _offsets(_at(tiles, packed.expert_C))
    column = torch.searchsorted(column_offsets[1:], place, right=True, out_int32=True)
    valid = column < num_columns
    column = column.clamp(max=max(num_columns - 1, 0))
    expert_of_place = _at(packed.expert_C, column)
    down = place - _at(column_offsets, column)  # how many tiles below the expert's first
    across = column - _at(packed.first_block_E1, expert_of_place)
    block_index_t = _at(first_block, expert_of_place) + down * _at(columns, expert_of_place) + across
    return Topology(
        shape=(num_rows, sum(packed.widths)),
        block=block,
        row_offsets=row_offsets,
        row_index=row_index,
        column_index=column_index,
        column_offsets=column_offsets,
        row_index_t=torch.where(valid, _at(first_tile, expert_of_place) + down, num_tiles),
        block_index_t=torch.where(valid, block_index_t, 0),
        row_bounds=row_bounds,
        column_bounds=packed.column_bounds,
        uniform_rows=False,
        uniform_columns=packed.uniform,
    )


def blocks_of(matrix_MN: Tensor, block: int) -> Tensor:
    """A matrix cut into blocks [block rows, block columns, block, block], zeros (False) past its edges."""
    M, N = matrix_MN.shape
    padded = torch.nn.functional.pad(matrix_MN, (0, -N % block, 0, -M % block))
    return padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)


def _check_block(block: int) -> None:
    if block not in BLOCK_SIZES:
        raise ValueError(f"block ({block}) must be one of {', '.join(map(str, BLOCK_SIZES))}")


def _count(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=device)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


def _offsets(counts: Tensor) -> Tensor:
    """Offsets of counts: one entry more, from 0, int32."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _owner(ends: Tensor, position: Tensor, last: int) -> Tensor:
    """Which group each position falls into, groups ending at `ends`; `last` for positions past all of them."""
    return torch.searchsorted(ends, position, right=True, out_int32=True).clamp(max=last)
