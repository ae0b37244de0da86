"""What the benchmarks share: ratios over rounds, facts of the machine, and the part of a page between two markers."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median and quartiles over rounds."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: list[float]) -> Ratio:
    """Median and quartiles of what was measured in each round."""
    low, middle, high = statistics.quantiles(values, n=4)
    return Ratio(low, middle, high)


def ratios(numerator: list[float], denominator: list[float]) -> Ratio:
    """Quotients of what was measured in the same round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def peak_gigaflops(dtype: torch.dtype) -> float:
    """Speed of the best of 15 large square products, 10^9 floating-point operations a second."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds) / 1e9


def machine() -> dict[str, str]:
    """What the figures depend on, of the machine and of torch."""
    flags = Path("/proc/cpuinfo")
    model = (
        next((line.split(":")[1].strip() for line in flags.open() if line.startswith("model name")), "")
        if flags.exists()
        else ""
    )
    return {
        "cpu": model or platform.processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markers(name: str) -> tuple[str, str]:
    """The lines of a page between which a benchmark writes."""
    return f"<!-- {name} begin -->", f"<!-- {name} end -->"


def has_markers(page: Path, name: str) -> bool:
    """Whether there is a place to write to."""
    return page.is_file() and all(marker in page.read_text(encoding="utf-8") for marker in markers(name))


def write_between(page: Path, name: str, text: str) -> None:
    """Renew what stands between the markers of a page that has them."""
    begin, end = markers(name)
    before, rest = page.read_text(encoding="utf-8").split(begin, 1)
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
