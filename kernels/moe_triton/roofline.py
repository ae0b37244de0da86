"""What the expert FFN must cost on a chip, whoever computes it: counted, never timed.

Per kernel, time = max(FLOPs / rate, bytes / bandwidth), summed over the launches of a forward and backward: the useful
FLOPs, and every tensor moved once (a gathered row of x once, however many experts read it). `FLOWS` also holds two other
published dataflows, for comparison with equal matrix products. `prediction` has what our tiles make of it.

Left out: launch latency, tile waste, the difference between triton's main loop and the rate, clocks under power.
Plain Python: imports neither torch nor triton. Bytes are those of bfloat16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import NormalDist

from moe_triton.chips import CHIPS, Chip

BYTES = 2
"""Of one element."""


@dataclass(frozen=True)
class Shape:
    """One expert layer: T tokens, D wide, E experts of F hidden columns, K of them per token (on average)."""

    T: int
    D: int
    F: int
    E: int
    K: float

    @property
    def R(self) -> int:
        """Routed rows."""
        return round(self.T * self.K)


GRID: dict[str, Shape] = {
    "OLMoE": Shape(32768, 2048, 1024, 64, 8),
    "Qwen3-30B, 8k": Shape(8192, 2048, 768, 128, 8),
    "Qwen3-30B, 32k": Shape(32768, 2048, 768, 128, 8),
    "Qwen3-235B": Shape(32768, 4096, 1536, 128, 8),
    "SonicMoE's default": Shape(32768, 4096, 1024, 128, 8),
    "Qwen3-Next": Shape(32768, 2048, 512, 512, 10),
    "Mixtral-like": Shape(16384, 4096, 14336, 8, 2),
    "gpt-oss": Shape(32768, 2880, 2880, 32, 4),
    "small": Shape(8192, 1024, 512, 64, 4),
}
"""The layers that published measurements name, and a small one."""


# ------------------------------------------------------------------------------------------------------------ machines


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A chip with the rates that large products and copies reach on it, rather than the vendor's peaks."""

    name: str
    chip: Chip
    flops: float
    """FLOP/s of large bfloat16 products."""
    bandwidth: float
    """Bytes/s of large copies."""
    multiprocessors: int
    l2: int
    """Bytes of the last-level cache."""
    l2_bandwidth: float | None
    """Bytes/s from L2 to the multiprocessors; None where nobody has published a measured one."""
    basis: str
    """Where the two rates come from."""


# name | row of the chip table | TFLOP/s | TB/s | multiprocessors | MB of L2 | TB/s of L2 | basis of the two rates
_MACHINES = """
a100   | a100 sxm4 80gb | 260  | 1.7 | 108 | 40  | -   | assumed, 83 % of both peaks
h100   | h100 hbm3      | 798  | 3.0 | 132 | 50  | 7.0 | measured by others: 8192³ product, copy; L2 assumed
h200   | h200           | 788  | 4.3 | 132 | 50  | 7.0 | measured by others: 8192³ product, copy; L2 assumed
b200   | b200           | 1750 | 7.0 | 148 | 126 | -   | assumed, 78 % and 88 % of the peaks
mi300x | mi300x         | 650  | 4.3 | 304 | 256 | -   | assumed, 50 % and 81 % of the peaks
"""


def _machine(line: str) -> Machine:
    name, chip, tflops, bandwidth, multiprocessors, l2, l2_bandwidth, basis = map(str.strip, line.split("|"))
    return Machine(
        name=name,
        chip=next(row for row in CHIPS if row.name == chip.upper()),
        flops=float(tflops) * 1e12,
        bandwidth=float(bandwidth) * 1e12,
        multiprocessors=int(multiprocessors),
        l2=int(l2) * 10**6,
        l2_bandwidth=None if l2_bandwidth == "-" else float(l2_bandwidth) * 1e12,
        basis=basis,
    )


MACHINES: dict[str, Machine] = {machine.name: machine for machine in map(_machine, _MACHINES.strip().splitlines())}


# -------------------------------------------------------------------------------------------------------------- floors


@dataclass(frozen=True)
class Part:
    """One launch, or a group of elementwise launches, of a dataflow: coefficients of what it computes and moves."""

    name: str
    backward: bool
    flops: int
    """Times R·D·F."""
    token: int
    """Bytes, times T·D: tensors over tokens, and rows that are gathered from them."""
    row: int
    """Bytes, times R·D."""
    hidden: int
    """Bytes, times R·F."""
    weight: int
    """Bytes, times E·D·F."""

    def counts(self, shape: Shape) -> tuple[float, float]:
        """(FLOPs, bytes)."""
        T, D, F, E, R = shape.T, shape.D, shape.F, shape.E, shape.R
        moved = self.token * T * D + self.row * R * D + self.hidden * R * F + self.weight * E * D * F
        return self.flops * R * D * F, moved

    def seconds(self, shape: Shape, machine: Machine) -> float:
        """The larger of computing and moving."""
        flops, moved = self.counts(shape)
        return max(flops / machine.flops, moved / machine.bandwidth)


def _parts(table: str) -> tuple[Part, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(Part(name, way == "bwd", *map(int, numbers)) for name, way, *numbers in rows)


# flops·RDF, then bytes: ·TD ·RD ·RF ·EDF. Saved for backward: `saved_bytes`.
FLOWS: dict[str, tuple[Part, ...]] = {
    # These kernels, and SonicMoE's (arXiv 2512.14080): x and the pre-activations are kept, nothing else.
    "ours": _parts("""
up          fwd 4   2 0  6 4
down        fwd 2   0 2  2 2
combine     fwd 0   2 2  0 0
hidden_bwd  bwd 2   2 0 10 2
w_down_bwd  bwd 2   2 0  2 2
input_bwd   bwd 4   0 2  4 4
combine_bwd bwd 0   2 2  0 0
w_up_bwd    bwd 4   2 0  4 4
"""),
    # ScatterMoE's eager GLU layer: gate and up in one product, activation and combine in eager torch, copies of the
    # gathered rows in backward, and gradients of weights that are filled with zeros first.
    "scattermoe": _parts("""
up          fwd 4   2 0  4 4
down        fwd 2   0 2  2 2
elementwise fwd 0   2 2 10 0
down_dgrad  bwd 2   0 2  2 2
down_wgrad  bwd 2   0 2  2 4
up_dgrad    bwd 4   0 2  4 4
up_wgrad    bwd 4   0 2  4 8
elementwise bwd 0   8 8 24 0
"""),
    # torch's grouped_mm, three products forward and six backward, everything between them eager.
    "grouped_mm": _parts("""
gate        fwd 2   0  2  2 2
up          fwd 2   0  2  2 2
down        fwd 2   0  2  2 2
elementwise fwd 0   4 10 10 0
down_dgrad  bwd 2   0  2  2 2
down_wgrad  bwd 2   0  2  2 2
gate_dgrad  bwd 2   0  2  2 2
gate_wgrad  bwd 2   0  2  2 2
up_dgrad    bwd 2   0  2  2 2
up_wgrad    bwd 2   0  2  2 2
elementwise bwd 0   4 18 18 0
"""),
}
ROUTING_LAUNCHES = 4
"""Of the routing plan: count, scan, place, schedule."""
SMALL_LAUNCHES = 1
"""Of the backward: the sum of the row weights' partial gradients."""


def floor_seconds(shape: Shape, machine: Machine, flow: str = "ours") -> tuple[float, float]:
    """(forward, backward): the least time of a dataflow, with perfect tiles and caches."""
    forward = sum(part.seconds(shape, machine) for part in FLOWS[flow] if not part.backward)
    return forward, sum(part.seconds(shape, machine) for part in FLOWS[flow] if part.backward)


def useful_flops(shape: Shape) -> float:
    """Of one forward and backward, with nothing recomputed: 18·R·D·F."""
    return 18.0 * shape.R * shape.D * shape.F


def moved_bytes(shape: Shape, flow: str = "ours") -> tuple[float, float]:
    """(forward, backward): bytes to and from memory, every tensor once per kernel."""
    forward = sum(part.counts(shape)[1] for part in FLOWS[flow] if not part.backward)
    return forward, sum(part.counts(shape)[1] for part in FLOWS[flow] if part.backward)


def saved_bytes(shape: Shape, flow: str = "ours") -> int:
    """Activations kept for backward, without indices and router weights."""
    D, K, F = shape.D, shape.K, shape.F
    elements = {
        "ours": D + 2 * K * F,
        "recompute_hidden": D,
        "scattermoe": D + K * D + 4 * K * F,
        "grouped_mm": 2 * K * D + 4 * K * F,
    }
    return round(BYTES * shape.T * elements[flow])


# ------------------------------------------------------------------------------------------------------------- routing


def uniform_counts(shape: Shape) -> list[float]:
    """Rows per expert if every token draws K different experts at random: a binomial's quantiles, summing to R."""
    p = min(shape.K / shape.E, 1.0)
    spread = NormalDist(0, math.sqrt(shape.T * p * (1 - p)) or 1e-9)
    return _scaled([max(shape.T * p + spread.inv_cdf((e + 0.5) / shape.E), 0.0) for e in range(shape.E)], shape)


def zipf_counts(shape: Shape, exponent: float = 1.0) -> list[float]:
    """Rows per expert if experts are drawn with probabilities 1/rank^exponent, K different ones per token.

    Drawing without replacement is an exponential race: expert e is among the K with probability 1 - exp(-rate·p_e).
    """
    weights = [1 / rank**exponent for rank in range(1, shape.E + 1)]
    low, high = 0.0, 1.0
    while _race(weights, high) < shape.K - 1e-9 and high < 1e30:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _race(weights, middle) < shape.K else (low, middle)
    return _scaled([-math.expm1(-high * weight) for weight in weights], shape)


def _race(weights: Sequence[float], rate: float) -> float:
    return sum(-math.expm1(-rate * weight) for weight in weights)


def whole_rows(counts: Sequence[float], shape: Shape) -> list[int]:
    """Rows per expert in whole numbers that sum to R, in proportion to `counts`."""
    ends = [round(end) for end in accumulate(_scaled(counts, shape), initial=0.0)]
    return [end - start for start, end in pairwise(ends)]


def _scaled(counts: Sequence[float], shape: Shape) -> list[float]:
    total = sum(counts)
    return [count * shape.R / total for count in counts]
