"""The tables of the page, each number of them a figure of report.json."""

from collections.abc import Sequence

from moe.analysis.ledger import AMOUNTS, UNITS
from moe.analysis.report.blocks import DASH, Cell, Form, Key, Markup, at, figure, figures, joined, quantity, table, text
from moe.analysis.report.words import signed
from moe.analysis.rows import Json

AMOUNT_NAMES = {
    "seconds": "Wall clock",
    "device_hours": "Device hours",
    "flops": "FLOPs",
    "joules": "Energy of the devices",
    "kwh": "Energy, buildings included",
    "gco2e": "Greenhouse gases",
    "dollars": "Money",
}
AMOUNT_FORMS: dict[str, Form] = {
    "kwh": lambda value: quantity("Wh", 4)(1000 * value),
    "device_hours": lambda value: f"{value:.4g} h",
    "dollars": lambda value: f"{value:,.4g} USD",
}
PLAIN = {
    "repeated_seconds": ("Work done again after a kill or a failure, counted above", quantity("s")),
    "checkpoint_bytes_written": ("Written to checkpoints", quantity("B")),
    "peak_memory_bytes": ("Peak memory of a process", quantity("B")),
}


def signed_figure(decimals: int) -> Form:
    """A form of numbers with their sign."""
    return lambda value: signed(value, decimals)


def arms_table(report: Json) -> str:
    """The arms side by side, one row per quantity."""
    places: list[tuple[Key, ...]] = [(key, i) for key in ("arms", "more_arms") for i in range(len(report.get(key, ())))]
    shared = " (runs side by side)" if (report.get("jobs") or 1) > 1 else ""

    def row(label: str, name: str, form: Form | str, *rest: Key, each: bool = False) -> list[Cell]:
        cells = [figures(report, form, *p, name) if each else figure(report, form, *p, name, *rest) for p in places]
        return [label, *cells]

    lines = [
        row("Parameters, total", "parameters_total", quantity()),
        row("Parameters, active per token", "parameters_active", quantity()),
        row("Training FLOPs per token, planned", "train_flops_per_token", quantity("FLOP", 4)),
        row("Training FLOPs per token, measured", "measured_flops_per_token", quantity("FLOP", 4)),
        row("Training tokens per run", "tokens", quantity(), 0),
        row("Final bits per byte, mean", "mean_bits_per_byte", ".4f"),
        row("Final bits per byte, by seed", "final_bits_per_byte", ".4f", each=True),
    ]
    if any(at(report, *place)["tokens_per_second"] for place in places):
        lines.append(row("Tokens per second, interleaved timing", "tokens_per_second", quantity()))
    lines += [
        row(f"Training seconds{shared}", "seconds", ".0f", each=True),
        row("Peak memory of each run", "peak_memory_bytes", quantity("B"), each=True),
    ]
    return table(["", *(at(report, *place)["name"] for place in places)], lines)


def gain_table(report: Json) -> str:
    """Final bits per byte and gain of each seed, with the noise of the evaluation."""
    rows: list[Sequence[Cell]] = []
    for i in range(len(report["arms"][0]["seeds"])):
        noise = report["evaluation_noise"]
        cells = [figure(report, ".4f", "arms", arm, "final_bits_per_byte", i) for arm in (1, 0)]
        error = figure(report, lambda half: f"± {half:.4f}", "evaluation_noise", i, "half_width") if noise else DASH
        rows.append(
            (
                figure(report, "d", "arms", 0, "seeds", i),
                *cells,
                figure(report, signed_figure(4), "gain", "values", i),
                error,
            )
        )
    means = [figure(report, ".4f", "arms", arm, "mean_bits_per_byte") for arm in (1, 0)]
    rows.append(("mean", *means, figure(report, signed_figure(4), "gain", "mean"), ""))
    if report["gain"]["low"] is not None:
        low, high = (figure(report, signed_figure(4), "gain", end) for end in ("low", "high"))
        ends = Markup(f"[{low.html},\u00a0{high.html}]")
        level = figure(report, lambda share: f"{100 * share:g} %", "gain", "confidence")
        rows.append((Markup(f"{level.html} interval"), "", "", ends, ""))
    header = ["Seed", "Dense (bits per byte)", "Sparse (bits per byte)", "Gain: dense − sparse", "Evaluation noise"]
    return table(header, rows)


def health_table(report: Json, *path: Key) -> str:
    """Routing health per expert layer: mean over seeds, with the range where there are several."""
    columns = (
        ("load_entropy", ".3f"),
        ("effective_experts", ".1f"),
        ("max_vio", ".2f"),
        ("max_vio_floor", ".2f"),
        ("dead_experts", ".1f"),
        ("drop_rate", ".1%"),
        ("router_entropy", ".2f"),
    )
    rows = []
    for i, line in enumerate(at(report, *path)):

        def cell(name: str, form: str, i: int = i, line: Json = line) -> Cell:
            if line.get(name) is None:
                return DASH
            mean, low, high = (figure(report, form, *path, i, name, part) for part in range(3))
            alike = len({format(value, form) for value in line[name]}) == 1
            shown = mean if alike else Markup(f"{mean.html} ({low.html}–{high.html})")
            if name != "effective_experts":
                return shown
            return joined(" of ", [shown, figure(report, "d", *path, i, "experts")])

        rows.append([figure(report, "d", *path, i, "layer"), *(cell(name, form) for name, form in columns)])
    header = ["Layer", "Load entropy", "Effective experts", "MaxVio", "Noise floor", "Dead experts", "Dropped rows"]
    caption = "Mean over the last tenth of the logged steps (in brackets: the lowest and the highest seed)."
    return table([*header, "Router entropy"], rows, caption=caption)


def ledger_table(report: Json) -> str:
    """What every arm used, all its runs together, each number with how well it is known; and all arms."""
    ledger = report["ledger"]
    columns: list[tuple[str, tuple[Key, ...]]] = [(name, ("ledger", "arms", name)) for name in ledger["arms"]]
    if len(columns) > 1:
        columns.append(("all", ("ledger", "total")))

    def graded(name: str, place: tuple[Key, ...]) -> Cell:
        entry = at(report, *place, name)
        if entry is None:
            return "unknown"
        shown = figure(report, AMOUNT_FORMS.get(name) or quantity(UNITS[name], 4), *place, name, "value")
        grade = entry["grade"]
        return Markup(
            f'{shown.html} <span class="grade {text(grade)}" title="{text(entry["source"])}">{text(grade)}</span>'
        )

    rows: list[list[Cell]] = [["Runs", *(figure(report, "d", *place, "runs") for _, place in columns)]]
    rows += [
        [label, *(graded(name, place) for _, place in columns)]
        for name, label in AMOUNT_NAMES.items()
        if any(at(report, *place, name) for _, place in columns) or name in AMOUNTS
    ]
    rows += [
        [label, *(figure(report, form, *place, name) for _, place in columns)] for name, (label, form) in PLAIN.items()
    ]
    return table(["", *(name for name, _ in columns)], rows, kind="ledger")


def sources(report: Json) -> list[str]:
    """How the amounts of a ledger are known, a sentence each."""
    total = report["ledger"]["total"]
    known = [(label, total[name]) for name, label in AMOUNT_NAMES.items() if total[name] is not None]
    return [f"{label}: {entry['grade']}, {entry['source']}." for label, entry in known]


def settings_table(report: Json) -> str:
    """What differs between the arms' settings."""
    rows = [
        [row["field"], *(DASH if value is None else _setting(report, i, j) for j, value in enumerate(row["values"]))]
        for i, row in enumerate(report["settings"])
    ]
    return table(["Setting", *(arm["name"] for arm in report["charts"]["arms"])], rows, kind="text")


def _setting(report: Json, row: int, column: int) -> Cell:
    value = at(report, "settings", row, "values", column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return figure(report, lambda number: f"{number!r}", "settings", row, "values", column)
