"""The page docs/kernel_roofline.md: floors of nine layers, and what the tiles that the table gives make of them on an H100.

    PYTHONPATH=kernels python -m moe_triton.roofline_page > docs/kernel_roofline.md

Plain Python: imports neither torch nor triton.
"""

from collections.abc import Sequence

from moe_triton.prediction import Kernel, predict
from moe_triton.roofline import (
    GRID,
    MACHINES,
    Shape,
    floor_seconds,
    moved_bytes,
    saved_bytes,
    useful_flops,
    zipf_counts,
)

LEFT_OUT = (
    "launch latency (about 13 launches of a forward and backward with the plan)",
    "prologue and epilogue of a tile, which a persistent program hides partly and others do not",
    "how far Triton's main loop stays below the rate of an 8192³ product: others have measured plain Triton at 0.77 to "
    "0.82 of `torch._grouped_mm`, and Triton with TMA at 0.94 to 1.05 of it",
    "bandwidth from L2, which no vendor states; with 7 TB/s assumed it would bind where the last column says so",
    "loads that do not hide, address arithmetic, clocks under power, the routing plan itself",
)


def markdown() -> str:
    """The whole page."""
    return "\n".join([*_introduction(), *_floors(), "", *_predictions(), "", *_settings()]) + "\n"


def _introduction() -> list[str]:
    h100 = MACHINES["h100"]
    return [
        "# The expert layer's kernels against the roofline",
        "",
        "Counted, not timed: nothing on this page has run on a GPU. Written by",
        "`PYTHONPATH=kernels python -m moe_triton.roofline_page > docs/kernel_roofline.md`; a test compares the two.",
        f"H100: {h100.flops / 1e12:.0f} TFLOP/s of large bfloat16 products and {h100.bandwidth / 1e12:.1f} TB/s of copies"
        f" ({h100.basis}).",
        "",
    ]


def _floors() -> list[str]:
    rows = []
    for name, shape in GRID.items():
        times = [
            _both(floor_seconds(shape, MACHINES[chip], flow))
            for chip, flow in (
                ("h100", "ours"),
                ("h100", "scattermoe"),
                ("h100", "grouped_mm"),
                ("h200", "ours"),
                ("a100", "ours"),
            )
        ]
        saved = [f"{saved_bytes(shape, flow) / 2**30:.2f}" for flow in ("ours", "scattermoe", "grouped_mm")]
        moved = " / ".join(f"{value / 1e9:.1f}" for value in moved_bytes(shape))
        rows.append([name, _sizes(shape), *times, " / ".join(saved), moved])
    flows = "H100, ours | H100, ScatterMoE's flow | H100, eager grouped_mm | H200, ours | A100, ours"
    return [
        "## Floors",
        "",
        "The least time of a forward + backward in ms, over the launches of each dataflow: the larger of FLOPs at the rate",
        "of large products and bytes at that of copies, every tensor moved once, no tile waste.",
        "",
        *_table(f"layer | T, D, F, E, K | {flows} | GiB saved by the three | GB moved by ours", rows),
    ]


def _predictions() -> list[str]:
    rows = []
    for name, shape in GRID.items():
        kernels = predict(shape, MACHINES["h100"])
        floor, seconds = sum(floor_seconds(shape, MACHINES["h100"])), _seconds(kernels)
        zipf = _seconds(predict(shape, MACHINES["h100"], zipf_counts(shape)))
        tiles = sum(k.flops for k in kernels) / sum(k.tile_flops for k in kernels)
        waves = sum(k.compute_seconds * k.wave_share for k in kernels) / sum(k.compute_seconds for k in kernels)
        again = sum(k.bytes for k in kernels) / sum(k.floor_bytes for k in kernels)
        l2 = sum(max(k.seconds, k.l2_seconds or 0.0) for k in kernels)
        rates = [f"{useful_flops(shape) / seconds / 1e12:.0f}", f"{tiles:.1%}", f"{waves:.1%}", f"{again:.2f}"]
        shares = [f"{floor / seconds:.0%}", f"{floor / zipf:.0%}", f"{floor / l2:.0%}"]
        rows.append([name, f"{floor * 1e3:.2f}", f"{seconds * 1e3:.2f}", *rates, *shares])
    headers = (
        "layer | floor ms | predicted ms | TFLOP/s | useful of multiplied FLOPs | busy in waves | bytes over the floor's | "
        "of the floor | of it under Zipf's routing | of it if 7 TB/s from L2 bind"
    )
    return [
        "## What tiles and waves leave of it on an H100",
        "",
        "The chosen settings, whole tiles, the last wave, weights and rows that do not stay in L2 and are read again; uniform",
        "routing (a binomial's spread), and experts drawn with probability 1/rank.",
        "",
        *_table(headers, rows),
        "",
        "Left out:",
        "",
        *(f"* {item};" for item in LEFT_OUT[:-1]),
        f"* {LEFT_OUT[-1]}.",
    ]


def _settings() -> list[str]:
    rows = []
    for name, shape in GRID.items():
        chosen = {kernel.name: kernel.config for kernel in predict(shape, MACHINES["h100"]) if kernel.config}
        rows.append([name, *map(_setting, chosen.values())])
    names = [kernel.name for kernel in predict(next(iter(GRID.values())), MACHINES["h100"]) if kernel.config]
    return [
        "## The settings behind it",
        "",
        "Rows × columns × depth of a tile, warps, stages; P: persistent, with TMA descriptors.",
        "",
        *_table(" | ".join(["layer", *names]), rows),
    ]


def _setting(config: dict[str, int]) -> str:
    tile = "×".join(str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return f"{tile}, {config['num_warps']}, {config['num_stages']}{', P' if config.get('TMA') else ''}"


def _seconds(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.seconds for kernel in kernels)


def _both(seconds: tuple[float, float]) -> str:
    return " + ".join(f"{value * 1e3:.{2 if value < 0.01 else 1}f}" for value in seconds)


def _sizes(shape: Shape) -> str:
    return f"{shape.T}, {shape.D}, {shape.F}, {shape.E}, {shape.K:g}"


def _table(headers: str, rows: list[list[str]]) -> list[str]:
    count = headers.count("|") + 1
    return [f"| {headers} |", "| --- " * count + "|", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    print(markdown(), end="")
