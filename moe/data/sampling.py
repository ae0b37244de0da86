"""Which window of which source a row is, as pure functions of numbers: any row of any step is found at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.errors import DataError

MASK64 = (1 << 64) - 1
FEISTEL_ROUNDS = 6
SCHEDULE_ROWS = 4096


def mix(*values: int) -> int:
    """64 well-mixed bits from integers (splitmix64's finaliser, Steele et al. 2014, folded over the values)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & MASK64)) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15 & MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK64
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size), chosen by key, sends index, without building it.

    A Feistel network over the next even number of bits, walked until it lands inside range(size) (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"): a bijection for every key, at an expected cost below four walks.
    """
    assert 0 <= index < size
    half_bits = ((size - 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ mix(key, round_number, right) & half_mask
        index = left << half_bits | right
        if index < size:
            return index


class Schedule(NamedTuple):
    """A period of rows: which source each belongs to, and how many rows of that source came before it in the period."""

    source_P: np.ndarray
    earlier_P: np.ndarray
    rows: tuple[int, ...]

    def locate(self, row: int) -> tuple[int, int]:
        """(source, number of earlier rows of that source) of a global row number."""
        period, position = divmod(row, len(self.source_P))
        source = int(self.source_P[position])
        return source, period * self.rows[source] + int(self.earlier_P[position])


def make_schedule(weights: Sequence[float]) -> Schedule:
    """Rows of every source in proportion to its weight, spread evenly: each prefix is within a row or two of its share.

    Shares are rounded to 1/4096. A source's j-th row is placed by the middle of its slot, (j + 0.5) / rows (the method
    of Webster). Raises DataError where a share is too small for one row in a period.
    """
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    rows = np.floor(shares * SCHEDULE_ROWS).astype(int)
    by_remainder = np.argsort(rows - shares * SCHEDULE_ROWS, kind="stable")
    rows[by_remainder[: SCHEDULE_ROWS - rows.sum()]] += 1
    if rows.min() == 0:
        worst = int(rows.argmin())
        raise DataError(
            f"data.sources[{worst}] has {shares[worst]:.2g} of the total weight, and the smallest share is "
            f"1/{SCHEDULE_ROWS}: raise its weight or remove the source"
        )
    source = np.repeat(np.arange(len(rows)), rows)
    earlier = np.concatenate([np.arange(count) for count in rows])
    order = np.argsort((earlier + 0.5) / rows[source], kind="stable")
    return Schedule(source[order], earlier[order], tuple(int(count) for count in rows))
