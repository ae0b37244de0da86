"""What the time of one expert layer grows with: forward and backward while one size changes, and a step on one and two ranks.

    python scripts/bench_scaling.py [--rounds 12] [--passes 6] [--cpu-time] [--json FILE] [--write docs/benchmarks.md]

One thread, float32. Around T 2048, D 256, F 512, E 8, K 2: T; K (of 16 experts); E at the same active FLOPs; D; F; and S, a whole
block with attention over 4,096 tokens in rows of S. A time is given as a multiple of that of one point of its line in the same
round; rounds go through all points of all lines, in `--passes` fresh processes. Ranks: recipes/smoke.py with 64 rows a step,
in all, on one process and on two (gloo), a thread each, in turns, as many times as there are passes. With --write the plot is
bench_scaling.png in the folder of the page's name beside it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_common import (
    Ratio,
    clock_of,
    in_passes,
    keep,
    machine,
    options,
    parse,
    ratios_of_passes,
    spread_of_passes,
)

from moe.config.schema import GroupedQueryAttention, Model, MoE
from moe.model import Transformer
from moe.moe_layer import MoELayer
from moe.routers.topk import Config as TopK
from moe.routing import Tokens

NAME = "bench_scaling"
ROOT = Path(__file__).resolve().parents[1]
BASE = {"T": 2048, "D": 256, "F": 512, "E": 8, "K": 2}
LINES: dict[str, list[int]] = {
    "T": [512, 1024, 2048, 4096, 8192],
    "K": [1, 2, 4, 8],
    "E": [4, 8, 16, 32, 64, 128],
    "D": [128, 256, 512, 1024],
    "F": [128, 256, 512, 1024, 2048],
    "S": [256, 512, 1024, 2048, 4096],
}
REFERENCE = {**BASE, "S": 256}
"""The point of each line that its times are multiples of."""
BLOCK_TOKENS = 4096


class Point(NamedTuple):
    """One size of one line."""

    milliseconds: float
    relative: Ratio
    """Time, as a multiple of the reference's in the same round."""


def layer_of(sizes: dict[str, int]) -> Callable[[], None]:
    """A function that does forward and backward of a layer of these sizes."""
    router = TopK(gate="full") if sizes["K"] == 1 else TopK()
    config = MoE(num_experts=sizes["E"], top_k=sizes["K"], expert_hidden=sizes["F"], router=router)
    layer = MoELayer(config, sizes["D"], layer=0)
    x_BSD = torch.randn(1, sizes["T"], sizes["D"])

    def run() -> None:
        y_BSD, _ = layer(x_BSD.requires_grad_())
        y_BSD.backward(x_BSD.detach())
        layer.zero_grad()
        x_BSD.grad = None

    return run


def block_of(S: int) -> Callable[[], None]:
    """The same of a block with attention, in rows of S."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=64)
    moe = MoE(num_experts=BASE["E"], top_k=BASE["K"], expert_hidden=BASE["F"], router=TopK())
    model = Model(vocab_size=257, dim=BASE["D"], num_layers=1, ffn_hidden=512, attention=attention, moe=moe)
    whole = Transformer(model)
    block, rotary = whole.layers[0], whole.rotary
    x_BSD = torch.randn(BLOCK_TOKENS // S, S, BASE["D"])
    tokens, angles = Tokens.of_hidden(x_BSD), rotary(torch.arange(S))

    def run() -> None:
        y_BSD, _ = block(x_BSD.requires_grad_(), angles, None, tokens, None)
        y_BSD.backward(x_BSD.detach())
        block.zero_grad()
        x_BSD.grad = None

    return run


def cases() -> dict[tuple[str, int], Callable[[], None]]:
    """Every point of every line."""
    made = {}
    for name, sizes in LINES.items():
        for size in sizes:
            wide = {"E": 16} if name == "K" else {}
            made[name, size] = block_of(size) if name == "S" else layer_of({**BASE, **wide, name: size})
    return made


def one_pass(rounds: range, clock: Callable[[], float]) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of each point in each round, after one that warms up."""
    torch.set_num_threads(1)
    functions = cases()
    milliseconds: dict[tuple[str, int], list[float]] = {point: [] for point in functions}
    for index in (-1, *rounds):
        for point, function in functions.items():
            start = clock()
            function()
            if index >= 0:
                milliseconds[point].append(1e3 * (clock() - start))
    return milliseconds


def points_of(passes: list[dict[tuple[str, int], list[float]]]) -> dict[tuple[str, int], Point]:
    """Each size of each line, of the rounds of all passes."""
    found = {}
    for name, size in passes[0]:
        taken = [one[name, size] for one in passes]
        reference = [one[name, REFERENCE[name]] for one in passes]
        median = statistics.median(value for one in taken for value in one)
        found[name, size] = Point(median, ratios_of_passes(taken, reference))
    return found


def tokens_per_second(ranks: int) -> float:
    """Of the trainer, on so many processes: the median of its steps after the first few."""
    with tempfile.TemporaryDirectory() as folder:
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        settings = ["train.batch_rows=64", f"train.micro_rows={64 // ranks}", "train.threads=1", "train.steps=30"]
        settings += ["evaluation.every_steps=0", f"out={folder}/run", "logging.console=off"]
        command = [sys.executable, *start, "-m", "moe.train", str(ROOT / "recipes/smoke.py"), *settings]
        subprocess.run(command, check=True, capture_output=True)
        rows = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(row)["tokens_per_second"] for row in rows[5:])


def time_ranks(rounds: int) -> tuple[float, float, Ratio]:
    """Tokens per second on one rank and on two, and their quotient; each is new processes."""
    one, two = zip(*((tokens_per_second(1), tokens_per_second(2)) for _ in range(rounds)), strict=True)
    quotient = spread_of_passes([[b / a] for a, b in zip(one, two, strict=True)])
    return statistics.median(one), statistics.median(two), quotient


def plot(points: dict[tuple[str, int], Point], path: Path) -> None:
    """A panel per line: time over size, relative to the reference, with its spread."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 6), constrained_layout=True)
    for axis, (name, sizes) in zip(axes.flat, LINES.items(), strict=True):
        values = [points[name, size].relative for size in sizes]
        middle = [value.middle for value in values]
        reach = [[v.middle - v.low for v in values], [v.high - v.middle for v in values]]
        axis.errorbar(sizes, middle, yerr=reach, marker="o", markersize=4, capsize=3)
        if name not in ("E", "S"):
            linear = [size / REFERENCE[name] for size in sizes]
            axis.plot(sizes, linear, linestyle=":", color="gray", label="proportional")
            axis.legend(frameon=False)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=name,
            ylabel=f"time, of that at {name} {REFERENCE[name]}",
            title=f"{'block' if name == 'S' else 'layer'} over {name}",
        )
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.set_yticks([step for step in (0.25, 0.5, 1, 1.5, 2, 3, 4) if 0.7 * middle[0] < step < 1.4 * max(middle)])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_ylim(0.7 * min(v.low for v in values), 1.4 * max([v.high for v in values]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(points: dict[tuple[str, int], Point], ranks: tuple[float, float, Ratio], facts: dict[str, str]) -> str:
    """The tables of docs/benchmarks.md."""
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [f"![forward and backward over each size](benchmarks/{NAME}.png)", ""]
    lines += ["| line | time, as a multiple of the one that is 1 | that one, ms |", "| --- | --- | --- |"]
    for name, sizes in LINES.items():
        multiples = (f"{size}: {'1' if size == REFERENCE[name] else points[name, size].relative}" for size in sizes)
        lines.append(f"| {name} | {' · '.join(multiples)} | {points[name, REFERENCE[name]].milliseconds:.0f} |")
    one, two, quotient = ranks
    lines += ["", "| 1 rank, tokens/s | 2 ranks, gloo, a thread each | 2 over 1, of runs made in turns |"]
    lines += ["| --- | --- | --- |"]
    return "\n".join([*lines, f"| {one:,.0f} | {two:,.0f} | {quotient} |"])


def main() -> None:
    """Time everything, print, and write what is asked for."""
    parser = options(__doc__, rounds=12, passes=6, cpu_time="of the layers, not of ranks")
    arguments = parse(parser, NAME)
    points = points_of(in_passes(arguments.rounds, arguments.passes, one_pass, clock_of(arguments)))
    ranks = time_ranks(max(2, arguments.passes))
    facts = {**machine(), "rounds": f"{arguments.rounds} in {arguments.passes} processes"}
    text = page(points, ranks, facts)
    print(text)
    if arguments.write:
        plot(points, arguments.write.with_suffix("") / f"{NAME}.png")
    lines = {
        f"{name} {size} over {name} {REFERENCE[name]}": point.relative
        for (name, size), point in points.items()
        if size != REFERENCE[name]
    }
    keep(arguments, NAME, text, {"facts": facts, "figures": {**lines, "2 ranks over 1": ranks[2]}})


if __name__ == "__main__":
    main()
