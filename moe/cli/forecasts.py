"""The commands of `moe forecast`: collect past runs, forecast a run or a comparison, and score forecasts of known runs."""

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
    RunByDefault,
    TopKOption,
    lazy,
    print_result,
)

app = typer.Typer()
forecast = typer.Typer(cls=RunByDefault, help="Predict a sparse run's final gain over dense from its first per cent.")
app.add_typer(forecast, name="forecast")
AnchorOption = Annotated[float, typer.Option(help="share of training after which to predict")]
AlarmOption = Annotated[float, typer.Option(min=0.001, max=0.5, help="of the alarm, per whole run")]


@forecast.command()
def collect(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="folders of runs and comparisons, at any depth")
    ],
    out: Annotated[Path, typer.Option(metavar="CSV", help="file of past runs to write")],
    json: JsonOption = False,
) -> None:
    """Turn finished runs into a file of past runs: each sparse run with its dense twin, for forecasts and ladders."""
    module = import_module("moe.analysis.past_runs")
    print_result(module.collect(folders, out), module.describe, json)


@forecast.command()
def backtest(
    curves: CurvesArgument,
    hold_out: Annotated[str, typer.Option(metavar="SIZE|all", help="model_size_label to predict, or each in turn")],
    anchor: AnchorOption = 0.08,
    fit_on: Annotated[str, typer.Option(metavar="others|smaller", help="sizes to learn from")] = "others",
    confidence: ConfidenceOption = 0.9,
    false_alarm_rate: AlarmOption = 0.05,
    loss: LossOption = "loss_validation",
    top_k: TopKOption = 1,
    routing_frequency: FrequencyOption = 0.5,
    json: JsonOption = False,
) -> None:
    """Hold a model size out of a file of loss curves, forecast its runs' final gains from the others, and score that."""
    module, found = import_module("moe.analysis.forecast_backtest"), import_module("moe.analysis.curves")
    runs = found.gains(found.read_curves(curves, loss=loss, top_k=top_k, routing_frequency=routing_frequency), anchor)
    result = module.backtest(runs, hold_out, fit_on=fit_on, confidence=confidence, false_alarm_rate=false_alarm_rate)
    print_result(result, module.describe, json)


@forecast.command("run")
def run_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a sparse run, finished or not, or of a comparison")
    ],
    dense: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of the run's dense twin")] = None,
    past: Annotated[Path | None, typer.Option(metavar="CSV", help="loss curves of finished runs to learn from")] = None,
    promise: Annotated[
        float, typer.Option(min=0, help="test this gain in nats per token on the fresh rows; 0 for none")
    ] = 0.0,
    bound: Annotated[float, typer.Option(help="how far above the promise one fresh row may gain")] = 1.0,
    anchor: AnchorOption = 0.08,
    confidence: ConfidenceOption = 0.9,
    false_alarm_rate: AlarmOption = 0.05,
    loss: LossOption = "loss_validation",
    top_k: Annotated[float | None, typer.Option(help="use the past runs with this k; else the run's own")] = None,
    routing_frequency: Annotated[
        float | None, typer.Option(help="use the past runs with this share of sparse layers; else the run's own")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Forecast a run's final gain over its dense twin, learnt from past runs; exit code 1 if it has fallen behind."""
    module = import_module("moe.analysis.gain_watch")
    given = lazy("moe.config.schema", "Forecast")(
        past=str(past or ""),
        promise=promise,
        bound=bound,
        anchor=anchor,
        confidence=confidence,
        false_alarm_rate=false_alarm_rate,
    )
    result = module.forecast_folder(folder, dense, given, loss=loss, kind=(top_k, routing_frequency))
    print_result(result, module.describe_folder, json)
    if any(run["alarm"] is not None or run["promise_alarm"] is not None for run in result.get("runs", [result])):
        raise typer.Exit(1)
