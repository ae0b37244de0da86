"""The architectures that kernels are compiled and tuned for, in plain Python: limits that a kernel must stay within."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One compilation target."""

    name: str
    """sm_90, gfx942: as in the chip table."""
    backend: str
    """Triton's name of the vendor's backend."""
    arch: int | str
    """Triton's name of the architecture."""
    warp: int
    """Threads in a warp."""
    shared: int
    """Bytes of shared memory that one block may use."""
    multiprocessors: int
    """Of the chip that the tuning table was made for."""
    matrix: str
    """Matrix instruction of tiles that are at least 64 rows high; below that, and on sm_80, it is `small_matrix`."""
    small_matrix: str
    """Matrix instruction of tiles less than 64 rows high."""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108, "mma.sync", "mma.sync"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132, "wgmma.mma_async", "mma.sync"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148, "tcgen05.mma", "mma.sync"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304, "v_mfma", "v_mfma"),
    )
}

# Neighbours that have no rows of their own in the tuning table take those of the nearest one that fits them. Consumer
# chips (sm_86, sm_89, sm_120) have no wgmma and 99 KB of shared memory: every row of sm_80 stays below that.
_NEAREST = {"sm_103": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}


def nearest(name: str) -> Target:
    """The target whose tuning rows suit an architecture such as "sm_89"; errors name the known ones."""
    name = _NEAREST.get(name, name)
    if name in TARGETS:
        return TARGETS[name]
    if name.startswith("sm_"):
        return TARGETS["sm_80"]
    raise ValueError(f"no kernel is tuned for {name!r}: the targets are {', '.join(TARGETS)}")
