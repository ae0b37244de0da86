"""Commands that judge runs: compare, promise, report, doctor, probe, ledger, ladder."""

from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from moe.cli.common import (
    ConfidenceOption,
    CurvesArgument,
    FrequencyOption,
    JsonOption,
    LossOption,
    OverridesArgument,
    RecipeArgument,
    RunByDefault,
    TopKOption,
    lazy,
    print_result,
)
from moe.errors import ConfigError

app = typer.Typer()
ladder = typer.Typer(
    cls=RunByDefault, help="Predict the gain over dense at a size that has not been trained, from smaller ones."
)
app.add_typer(ladder, name="ladder")


@app.command()
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each arm, from the recipe's seed on")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of runs and report, by default runs/<recipe>-compare")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at the same time")] = 1,
    lr_grid: Annotated[str, typer.Option(metavar="LR,LR,...", help="learning rates to try on the dense arm")] = "",
    timing_rounds: Annotated[int, typer.Option(min=0, help="timed steps of each arm, interleaved; 0 for none")] = 20,
    contracts: Annotated[
        bool,
        typer.Option("--contracts", help="train the dense twin of equal total parameters too, judge every contract"),
    ] = False,
    decompose: Annotated[
        bool,
        typer.Option("--decompose", help="train twins with a hash and a frozen random router: capacity or routing?"),
    ] = False,
    tune_each: Annotated[
        bool, typer.Option("--tune-each", help="--lr-grid for every arm, not for the dense one")
    ] = False,
    promise: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what moe promise wrote about this recipe")
    ] = None,
) -> None:
    """Train a recipe and its dense twin of equal FLOPs per token on the same batches, and report which is better."""
    rates = learning_rates(lr_grid)
    folder = out if out is not None else Path("runs") / f"{Path(recipe.replace('.py:', '-')).stem}-compare"
    lazy("moe.experiments.compare", "compare")(
        recipe,
        overrides=overrides or [],
        seeds=seeds,
        out=folder,
        jobs=jobs,
        lr_grid=rates,
        timing_rounds=timing_rounds,
        contracts=contracts,
        decompose=decompose,
        tune_each=tune_each,
        promise=promise,
        console=lazy("rich.console", "Console")(),
    )


@app.command("promise")
def promise_command(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="new file for the promise")],
    overrides: OverridesArgument = None,
    from_ladder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of moe ladder run: all numbers and their reason")
    ] = None,
    gain: Annotated[float | None, typer.Option(help="else: expected gain over dense, bits per byte")] = None,
    low: Annotated[float | None, typer.Option(help="low end of its interval: below this the promise is broken")] = None,
    high: Annotated[float | None, typer.Option(help="high end")] = None,
    contract: Annotated[
        str | None, typer.Option(help="flops (default), active_parameters, total_parameters, memory, seconds, ...")
    ] = None,
    error_rate: Annotated[float | None, typer.Option(help="of the interval, 0.1 by default")] = None,
    because: Annotated[str | None, typer.Option(help="where the numbers are from")] = None,
) -> None:
    """Write what a comparison is expected to show, dated and sealed; moe compare --promise FILE is held against it."""
    module = import_module("moe.experiments.promise")
    stated = (gain, low, high, contract, error_rate, because)
    if from_ladder is not None:
        if any(value is not None for value in stated):
            raise ConfigError(
                "--from-ladder takes every number from the ladder: leave out --gain, --low, --high and the rest"
            )
        made = module.promise_from_ladder(recipe, overrides or [], out, from_ladder)
    elif gain is None or low is None or high is None:
        raise ConfigError("a promise needs --gain, --low and --high, or --from-ladder with the folder of a ladder")
    else:
        made = module.promise(
            recipe,
            overrides or [],
            out,
            gain=gain,
            low=low,
            high=high,
            contract=contract or "flops",
            error_rate=0.1 if error_rate is None else error_rate,
            because=because or "",
        )
    typer.echo(f"{out}: sealed {made['sha256']} at {made['written']}; publish the seal where its date can be seen")


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="folder of a comparison or a run, or of several")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="where to write; by default the folder itself, of several: report/ beside the first"
        ),
    ] = None,
    past: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="past runs (moe forecast collect), for forecasts that no run logged"),
    ] = None,
) -> None:
    """Write the report of a comparison, of a run, or of any runs side by side, from their files alone; runs may be unfinished."""
    typer.echo(lazy("moe.analysis.report", "build_report")(folders, out, past))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a sparse run, finished or not")],
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of words")] = False,
) -> None:
    """Say what is wrong with a run's routing, in which layers, since when, and what to change; exit code 1 if anything is."""
    analysis = import_module("moe.analysis.doctor")
    history, findings = analysis.examine(folder)
    if json:
        typer.echo(import_module("json").dumps(analysis.as_json(history, findings), indent=2))
    else:
        typer.echo(analysis.report(history, findings))
    if findings:
        raise typer.Exit(1)


@app.command()
def probe(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a sparse run with a checkpoint")],
    rows: Annotated[int, typer.Option(min=2, help="validation rows to compare on")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="seed of the random choices")] = 0,
) -> None:
    """Replace the routing or the experts of the newest checkpoint, and write what that costs to probes.jsonl."""
    module = import_module("moe.experiments.probe")
    typer.echo(module.describe(module.probe(folder, rows=rows, seed=seed)))
    typer.echo(f"written to {folder / 'probes.jsonl'}; 'moe doctor {folder}' reads it")


@app.command()
def ledger(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="folders of runs, or of many at any depth")],
    next_nats: Annotated[float, typer.Option(min=0, help="also the price of so many nats more; 0 for none")] = 0.01,
    against: Annotated[Path | None, typer.Option(metavar="DIR", help="a dense run: its cost at equal loss")] = None,
    region: Annotated[str, typer.Option(help="country of the electricity, or WORLD; else as in each run")] = "",
    grid: Annotated[float, typer.Option(min=0, help="gCO2e per kWh, instead of a region's")] = 0.0,
    pue: Annotated[float, typer.Option(min=1, help="power usage effectiveness")] = 1.0,
    price_per_hour: Annotated[float, typer.Option(min=0, help="USD per device and hour")] = 0.0,
    price_per_kwh: Annotated[float, typer.Option(min=0, help="USD per kWh")] = 0.0,
    json: JsonOption = False,
) -> None:
    """Sum what runs have used: time, FLOPs, energy, carbon, money, bytes; rates given here replace the runs' own, all of them."""
    module, prices = import_module("moe.analysis.ledger"), import_module("moe.analysis.ledger_prices")
    rates = {"grid_gco2e_per_kwh": grid, "price_per_hour": price_per_hour, "price_per_kwh": price_per_kwh}
    changed = bool(region) or pue != 1 or any(rates.values())
    cost = lazy("moe.config.schema", "Cost")(region=region or "WORLD", pue=pue, **rates) if changed else None
    result = module.project(folders, cost)
    words = [module.describe(result)]
    if len(result["runs"]) == 1:
        run = Path(result["runs"][0]["run"])
        if next_nats and prices.has_tail(run):
            result["next"] = prices.next_nats(run, next_nats, cost)
            words.append(prices.describe_next(result["next"]))
        if against is not None:
            result["against"] = prices.equal_loss(run, against, cost)
            words.append(prices.describe_equal(result["against"]))
    elif against is None and len(folders) == 1 and (folders[0] / "compare.json").is_file():
        result["comparison"] = prices.of_comparison(folders[0], next_nats, cost)
        words.append(prices.describe_comparison(result["comparison"]))
    elif against is not None:
        raise ConfigError(
            f"--against compares one run with a dense one, found {len(result['runs'])} runs: name one folder"
        )
    print_result(result, lambda _: "\n".join(words), json)


@ladder.command("run")
def ladder_run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    widths: Annotated[
        str, typer.Option(metavar="W,W,W", help="sizes of the ladder as shares of the recipe's width")
    ] = "1/6,1/4,2/5",
    experts: Annotated[
        str, typer.Option(metavar="E,E,E", help="numbers of experts; else the recipe's own and two beside it")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="paired runs of each arm")] = 1,
    tokens_per_parameter: Annotated[
        float, typer.Option(min=0, help="tokens per active parameter of each run; 0: the recipe's own ratio")
    ] = 0.0,
    tokens: Annotated[float, typer.Option(min=0, help="tokens of every run alike, instead")] = 0.0,
    lr_grid: Annotated[
        str, typer.Option(metavar="LR,LR,...", help="learning rates that each size's dense run tries")
    ] = "",
    break_even: Annotated[float, typer.Option(help="nats per token at equal time from which it pays")] = 0.0,
    tax: Annotated[float, typer.Option(min=0, help="step time over the dense twin's; 0 measures it")] = 0.0,
    timing_rounds: Annotated[int, typer.Option(min=0, help="timed turns for that, interleaved")] = 10,
    max_share: Annotated[float, typer.Option(min=0, help="largest share of the target run's FLOPs")] = 0.1,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.95, help="of the interval")] = 0.9,
    jobs: Annotated[int, typer.Option(min=1, help="runs at the same time")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the runs, by default runs/<recipe>-ladder")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, train nothing")] = False,
) -> None:
    """Train small sparse models and their dense twins, and say whether the recipe's own size will pay: go or no-go."""
    module = import_module("moe.experiments.ladder")
    options = lazy("moe.experiments.ladder_plan", "Options")(
        widths=tuple(shares(widths)),
        experts=tuple(whole_numbers(experts)),
        seeds=seeds,
        tokens=tokens,
        tokens_per_parameter=tokens_per_parameter,
        lr_grid=tuple(learning_rates(lr_grid)),
        max_share=max_share,
        break_even=break_even,
        tax=tax,
        timing_rounds=timing_rounds,
        confidence=confidence,
    )
    folder = out if out is not None else Path("runs") / f"{Path(recipe.replace('.py:', '-')).stem}-ladder"
    console = lazy("rich.console", "Console")()
    module.climb(recipe, overrides or [], folder, options, jobs=jobs, dry_run=dry_run, console=console)


@ladder.command("backtest")
def ladder_backtest(
    curves: CurvesArgument,
    target: Annotated[str, typer.Option(metavar="SIZE", help="model_size_label to predict from all smaller ones")],
    confidence: ConfidenceOption = 0.9,
    loss: LossOption = "loss_validation",
    top_k: TopKOption = 1,
    routing_frequency: FrequencyOption = 0.5,
    json: JsonOption = False,
) -> None:
    """Predict a size's final gains from the smaller sizes in a file of loss curves, with and without their optimism."""
    module, found = import_module("moe.analysis.ladder"), import_module("moe.analysis.curves")
    runs = found.final_gains(found.read_curves(curves, loss=loss, top_k=top_k, routing_frequency=routing_frequency))
    print_result(module.backtest(runs, target, confidence=confidence), module.describe, json)


@ladder.command("fit")
def ladder_fit(
    curves: CurvesArgument,
    loss: LossOption = "loss_validation",
    top_k: TopKOption = 1,
    routing_frequency: FrequencyOption = 0.5,
    json: JsonOption = False,
) -> None:
    """Fit the routed scaling law to each router in a file of loss curves, and the power law to its dense runs."""
    module, found = import_module("moe.analysis.ladder"), import_module("moe.analysis.curves")
    result = module.fit_laws(found.read_curves(curves, loss=loss, top_k=top_k, routing_frequency=routing_frequency))
    print_result(result, module.describe_laws, json)


def learning_rates(text: str) -> list[float]:
    """Learning rates from "1e-3,3e-3"; empty for none. Raises ConfigError."""
    try:
        rates = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(
            f"--lr-grid ({text!r}) must be positive numbers with commas between: e.g. --lr-grid 1e-3,3e-3"
        )
    return rates


def shares(text: str) -> list[float]:
    """Fractions or decimals from "1/4,0.5". Raises ConfigError."""
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--widths ({text!r}) must be shares with commas between: e.g. --widths 1/4,1/3,1/2"
        ) from None


def whole_numbers(text: str) -> list[int]:
    """Whole numbers from "4,8,16"; empty for none. Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"--experts ({text!r}) must be whole numbers with commas between: e.g. --experts 4,8,16"
        ) from None
