"""What the benchmarks share: their options, ratios over rounds, facts of the machine, and what they leave in pages and files."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.backend import compiled
from moe_cpu.product import peak_gigaflops as peak_of_tiles


class Ratio(NamedTuple):
    """Median, and between what values it lies: `spread`, or `spread_of_passes`."""

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


def spread_of_passes(passes: Sequence[Sequence[float]]) -> Ratio:
    """Median of what was measured in the rounds of several processes, and how far it lies apart.

    That is the quartiles over all rounds or, where it is further out, the lowest and the highest median of a process. Of two
    runs of N processes each that differ by nothing but chance, the medians of one are all below or all above the other's in
    one of (2N)! / (2 N!^2), whatever their distribution: 1 of 462 for N = 6.
    """
    low, middle, high = spread([value for one in passes for value in one])
    medians = [statistics.median(one) for one in passes]
    return Ratio(min(low, *medians), middle, max(high, *medians))


def ratios_of_passes(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> Ratio:
    """The same of quotients of what was measured in one round."""
    return spread_of_passes(
        [[a / b for a, b in zip(*one, strict=True)] for one in zip(numerator, denominator, strict=True)]
    )


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed benchmark must not slow the next one down."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_passes(rounds: int, passes: int, measure: Callable[..., Any], *given: Any) -> list[Any]:
    """What a function of a module returns in each of some fresh processes, one after another.

    It is called with the rounds that are its own (a range; together they are all), and then with what is given. What it
    raises is raised here, sys.exit's message included; BrokenProcessPool if it is killed.
    """
    found = []
    for number in range(passes):
        print(f"pass {number + 1} of {passes}", file=sys.stderr, flush=True)
        own = range(*(rounds * part // passes for part in (number, number + 1)))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as fresh:
            found.append(fresh.submit(measure, own, *given).result())
    return found


def peak_gigaflops(dtype: torch.dtype) -> float:
    """Speed of the best of 15 large square products, 10^9 floating-point operations a second."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds) / 1e9


def roof() -> dict[str, str]:
    """The roof of a float32 product on this machine with torch's number of threads, as a fact; nothing without a C compiler."""
    if not compiled("auto"):
        return {}
    return {f"GFLOP/s of float32 tiles in the first cache, {torch.get_num_threads()} threads": f"{peak_of_tiles():.0f}"}


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


def options(doc: str | None, *, rounds: int = 0, passes: int = 0, cpu_time: str = "") -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, for each to add its own.

    `doc` is the script's docstring, shown by --help. `rounds`, `passes`: defaults of --rounds and --passes, and whether there
    are such options; `cpu_time`: whose time --cpu-time counts, and whether there is one.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument(
            "--rounds",
            type=int,
            default=rounds,
            metavar="N",
            help="that are counted, at least 2 (default: %(default)s)",
        )
    parser.set_defaults(usual_passes=passes)
    if passes:
        parser.add_argument(
            "--passes",
            type=int,
            metavar="N",
            help=f"processes that share the rounds (default: {passes}, or as many as there are rounds)",
        )
    if cpu_time:
        parser.add_argument(
            "--cpu-time", action="store_true", help=f"processor time {cpu_time}: for a machine that others use"
        )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the figures of a page, between its markers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures for programs")
    return parser


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The arguments, refused before anything is measured where rounds are too few or there is no place to write to."""
    arguments = parser.parse_args()
    if getattr(arguments, "rounds", 2) < 2:
        parser.error("--rounds must be at least 2: quartiles need two values")
    if arguments.usual_passes and arguments.passes is None:
        arguments.passes = min(arguments.usual_passes, arguments.rounds)
    if not 1 <= getattr(arguments, "passes", 1) <= getattr(arguments, "rounds", 1):
        parser.error(f"--passes {arguments.passes}: at least 1, and a round for each (--rounds {arguments.rounds})")
    if arguments.write and not has_markers(arguments.write, name):
        parser.error(f"--write {arguments.write} must be a page with the lines {' and '.join(markers(name))}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    return arguments


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    """Seconds of this process's work with --cpu-time, of the wall clock without."""
    return time.process_time if arguments.cpu_time else time.perf_counter


def keep(arguments: argparse.Namespace, name: str, text: str, content: dict[str, Any]) -> None:
    """Write the page's part and the file of figures that were asked for."""
    if arguments.write:
        write_between(arguments.write, name, text)
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
