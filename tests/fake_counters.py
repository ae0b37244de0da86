"""Energy counters that a test turns by hand: a powercap tree as Linux shows it, and an NVML library."""

from pathlib import Path
from typing import Any

ZONES = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 500_000),
    "intel-rapl:0:1": ("dram", 100_000),
    "intel-rapl:1": ("package-1", 2_000_000),
    "intel-rapl:2": ("psys", 9_000_000),
}
RANGE = 262_143_328_850
"""Microjoules after which a real package counter starts again."""
NOT_SUPPORTED = 3


def powercap(root: Path, zones: dict[str, tuple[str, int]] = ZONES, most: int = RANGE) -> Path:
    """Write a tree of zones {folder: (name, microjoules)}; returns its root."""
    for zone, (name, microjoules) in zones.items():
        (root / zone).mkdir(parents=True, exist_ok=True)
        (root / zone / "name").write_text(f"{name}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{most}\n")
        turn(root, zone, microjoules)
    return root


def turn(root: Path, zone: str, microjoules: int) -> None:
    """Set a zone's counter."""
    (root / zone / "energy_uj").write_text(f"{microjoules}\n")


class FakeNvml:
    """One GPU. `millijoules` None: a board from before Volta; `milliwatts` None: no sensor at all."""

    def __init__(self, millijoules: int | None = 0, milliwatts: int | None = 0, uuid: bytes = b"GPU-1"):
        self.millijoules, self.milliwatts, self.uuid = millijoules, milliwatts, uuid

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 7
        return 0 if uuid == self.uuid else NOT_SUPPORTED

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        return self._give(handle, value, self.millijoules)

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:
        return self._give(handle, value, self.milliwatts)

    def _give(self, handle: Any, value: Any, what: int | None) -> int:
        assert handle.value == 7
        if what is None:
            return NOT_SUPPORTED
        value._obj.value = what
        return 0
