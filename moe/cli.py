"""The command `moe`. Each command imports what it needs when it runs, so that `moe --help` answers at once."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.errors import ConfigError, fail, run_main

app = typer.Typer(
    name="moe",
    help="Train sparse Mixture-of-Experts transformers, and compare them with a dense model of equal compute.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="recipes/x.py, recipes/x.py:variant, or a run.json")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B.C=VALUE]...", help="settings to change, e.g. train.steps=100")
]
CurvesArgument = Annotated[Path, typer.Argument(metavar="CSV", help="loss curves, plain or gzip: docs/forecast.md")]
LossOption = Annotated[str, typer.Option(metavar="COLUMN", help="column with the loss, nats per token")]
TopKOption = Annotated[float, typer.Option(help="use the sparse runs with this k")]
FrequencyOption = Annotated[float, typer.Option(help="use the sparse runs with this share of sparse layers")]
ConfidenceOption = Annotated[float, typer.Option(min=0.5, max=0.99, help="of the intervals")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of words")]
forecast = typer.Typer(help="Predict a sparse run's final gain over dense from its first per cent.")
ladder = typer.Typer(help="Predict the gain over dense at a size that has not been trained, from smaller ones.")
app.add_typer(forecast, name="forecast")
app.add_typer(ladder, name="ladder")
store = typer.Typer(help="Keep many variants of one model, every number once.")
app.add_typer(store, name="store")
# Typer's usage errors all derive from this class, whichever module it keeps them in.
UsageError: Any = typer.BadParameter.__bases__[0]


def main(arguments: list[str] | None = None) -> int:
    """Run a command line to its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 1 for stopped training or a finding."""
    try:
        return run_main(lambda: app(args=arguments, prog_name="moe", standalone_mode=False))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "moe"
        return fail(f"{error.format_message().rstrip('.')}: see {command} --help", 2)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[int, typer.Option(min=0, help="processes; 0: the fewest that the parallel.* sizes need")] = 0,
) -> None:
    """Print the resolved settings, parameters, FLOPs, layout, memory per rank and layers of a run."""
    notices: list[str] = []
    run = _lazy("moe.config.load", "load")(recipe, overrides or [], notices=notices)
    _lazy("moe.show", "show")(run, notices, ranks)


@app.command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a recipe; out=DIR names the run's folder, by default runs/<name>-<time>."""
    notices: list[str] = []
    rest, out = _lazy("moe.config.command", "split_out")(overrides or [])
    run = _lazy("moe.config.load", "load")(recipe, rest, notices=notices)
    _lazy("moe.train", "train")(run, out, notices)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")], overrides: OverridesArgument = None
) -> None:
    """Continue a run from its newest checkpoint."""
    _lazy("moe.train", "resume")(folder, overrides or [])


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
    _lazy("moe.experiments.compare", "compare")(
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
        console=_lazy("rich.console", "Console")(),
    )


@app.command("promise")
def promise_command(
    recipe: RecipeArgument,
    gain: Annotated[float, typer.Option(help="expected gain over dense, bits per byte")],
    low: Annotated[float, typer.Option(help="low end of its interval: below this the promise is broken")],
    high: Annotated[float, typer.Option(help="high end")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="new file for the promise")],
    overrides: OverridesArgument = None,
    contract: Annotated[
        str, typer.Option(help="active_parameters, flops, total_parameters, memory, seconds, ...")
    ] = "flops",
    error_rate: Annotated[float, typer.Option(help="of the interval")] = 0.1,
    because: Annotated[str, typer.Option(help="where the numbers are from")] = "",
) -> None:
    """Write what a comparison is expected to show, dated and sealed; moe compare --promise FILE is held against it."""
    made = _lazy("moe.experiments.promise", "promise")(
        recipe,
        overrides or [],
        out,
        gain=gain,
        low=low,
        high=high,
        contract=contract,
        error_rate=error_rate,
        because=because,
    )
    typer.echo(f"{out}: sealed {made['sha256']} at {made['written']}; publish the seal where its date can be seen")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a comparison")]) -> None:
    """Rebuild the report of a comparison from its files."""
    typer.echo(_lazy("moe.analysis.report", "build_report")(folder))


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


@forecast.command("backtest")
def forecast_backtest(
    curves: CurvesArgument,
    hold_out: Annotated[str, typer.Option(metavar="SIZE|all", help="model_size_label to predict, or each in turn")],
    anchor: Annotated[float, typer.Option(help="share of training after which to predict")] = 0.08,
    fit_on: Annotated[str, typer.Option(metavar="others|smaller", help="sizes to learn from")] = "others",
    confidence: ConfidenceOption = 0.9,
    false_alarm_rate: Annotated[float, typer.Option(min=0.001, max=0.5, help="of the alarm, per whole run")] = 0.05,
    loss: LossOption = "loss_validation",
    top_k: TopKOption = 1,
    routing_frequency: FrequencyOption = 0.5,
    json: JsonOption = False,
) -> None:
    """Hold a model size out of a file of loss curves, forecast its runs' final gains from the others, and score that."""
    module, found = import_module("moe.analysis.forecast_backtest"), import_module("moe.analysis.curves")
    runs = found.gains(found.read_curves(curves, loss=loss, top_k=top_k, routing_frequency=routing_frequency), anchor)
    result = module.backtest(runs, hold_out, fit_on=fit_on, confidence=confidence, false_alarm_rate=false_alarm_rate)
    _print(result, module.describe, json)


@forecast.command("run")
def forecast_run(
    sparse: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a sparse run, finished or not")],
    dense: Annotated[Path, typer.Option(metavar="DIR", help="folder of its dense twin")],
    past: Annotated[Path, typer.Option(metavar="CSV", help="loss curves of finished runs to learn from")],
    anchor: Annotated[float, typer.Option(help="share of training after which to predict")] = 0.08,
    confidence: ConfidenceOption = 0.9,
    false_alarm_rate: Annotated[float, typer.Option(min=0.001, max=0.5, help="of the alarm, per whole run")] = 0.05,
    loss: LossOption = "loss_validation",
    top_k: TopKOption = 1,
    routing_frequency: FrequencyOption = 0.5,
    json: JsonOption = False,
) -> None:
    """Forecast a run's final gain over its dense twin, learnt from past runs; exit code 1 if it has fallen behind."""
    module, found = import_module("moe.analysis.forecast_run"), import_module("moe.analysis.curves")
    runs = found.gains(found.read_curves(past, loss=loss, top_k=top_k, routing_frequency=routing_frequency), anchor)
    result = module.forecast_run(sparse, dense, runs, confidence=confidence, false_alarm_rate=false_alarm_rate)
    _print(result, module.describe, json)
    if result["alarm"] is not None:
        raise typer.Exit(1)


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
    _print(module.backtest(runs, target, confidence=confidence), module.describe, json)


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
    _print(result, module.describe_laws, json)


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
    cost = _lazy("moe.config.schema", "Cost")(region=region or "WORLD", pue=pue, **rates) if changed else None
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
    elif against is not None:
        raise ConfigError(
            f"--against compares one run with a dense one, found {len(result['runs'])} runs: name one folder"
        )
    _print(result, lambda _: "\n".join(words), json)


@app.command()
def life(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="recipes/life.py, or a JSON file of such settings")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of results; what it holds already is reused")] = Path(
        "runs/life"
    ),
    page: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of life.md and its figure, by default --out")
    ] = None,
) -> None:
    """Run the Game of Life laboratory: how large a network must be to learn a rule, and how small the rule is."""
    notices: list[str] = []
    kind = _lazy("moe.config.life", "Life")
    settings = _lazy("moe.config.load", "load_as")(kind, recipe, overrides or [], notices=notices)
    for notice in notices:
        typer.echo(notice)
    results = _lazy("moe.experiments.life.laboratory", "run")(settings, out, typer.echo)
    typer.echo(_lazy("moe.analysis.life_page", "write_page")(results, page if page is not None else out))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the model")],
    family: Annotated[str, typer.Option(help="auto, or a model family: mixtral, olmoe, qwen3_moe, ...")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="type of the stored weights")] = "float32",
    shard_mib: Annotated[int, typer.Option(min=1, help="largest file, in MiB")] = 4096,
) -> None:
    """Write a run's newest checkpoint in a format that transformers and others load, with its tokenizer."""
    chosen, step = _lazy("moe.hf", "export_run")(
        folder, out, family=family, dtype=dtype, max_shard_bytes=shard_mib * 2**20
    )
    typer.echo(f"step {step} as {chosen}: {out}")


@app.command()
def quantise(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of an export: 'moe export' writes one")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the smaller model")],
    bits: Annotated[int, typer.Option(metavar="8|4", help="of a stored weight")] = 8,
) -> None:
    """Store an export's matrices as integers with scales (torchao); 'moe eval' and 'moe generate' read the result."""
    module = import_module("moe.hf.quantised")
    typer.echo(module.describe(module.quantise(folder, out, bits), out, bits))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a model in transformers' format")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
    overrides: OverridesArgument = None,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="data and training settings; small defaults without")
    ] = "",
) -> None:
    """Make a run that starts from a model of others, to resume, evaluate, prune or export."""
    notices: list[str] = []
    run = _lazy("moe.hf", "import_model")(folder, out, recipe=recipe, overrides=overrides or [], notices=notices)
    for notice in notices:
        typer.echo(notice)
    typer.echo(f"{run.name}: step 0 in {out}; 'moe resume {out}' trains it for {run.train.steps} steps")


@app.command()
def upcycle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run: dense, or sparse with fewer experts")],
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
    overrides: OverridesArgument = None,
    method: Annotated[str, typer.Option(metavar="copy|drop|noise", help="what becomes of the copies")] = "copy",
    ratio: Annotated[float, typer.Option(help="share of a copy's hidden units that starts anew (drop)")] = 0.5,
    noise: Annotated[float, typer.Option(help="deviation of the noise over the weights' (noise)")] = 0.05,
    rows: Annotated[int, typer.Option(min=1, help="validation rows of the receipt")] = 64,
) -> None:
    """Make a sparse run out of a dense one, or more experts out of fewer; 'moe resume' goes on from there."""
    module = import_module("moe.surgery.upcycle")
    change = module.Change(method=method, ratio=ratio, noise=noise)
    typer.echo(module.describe(module.upcycle(folder, recipe, out, change, overrides or [], rows=rows), out))
    typer.echo(f"'moe resume {out}' trains it")


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a sparse run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the pruned run")],
    overrides: OverridesArgument = None,
    keep: Annotated[float, typer.Option(help="share of each layer's experts that stays")] = 0.5,
    method: Annotated[str, typer.Option(metavar="drop|merge|cluster", help="drop by score, or merge groups")] = "drop",
    score: Annotated[
        str, typer.Option(metavar="reap|mean_norm|weighted_norm|frequency|random", help="what to drop by")
    ] = "reap",
    budget: Annotated[
        str, typer.Option(metavar="uniform|global", help="as many in each layer, or the best of all")
    ] = "uniform",
    rows: Annotated[int, typer.Option(min=1, help="rows of training text to look at")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="of that text, and of random scores")] = 0,
) -> None:
    """Make a run with fewer experts out of a trained one; 'moe resume' on it is the recovery training."""
    module = import_module("moe.surgery.prune")
    plan = module.Plan(keep=keep, budget=budget, method=method, score=score, rows=rows, seed=seed)
    typer.echo(module.describe(module.prune(folder, out, plan, overrides or []), out))
    typer.echo(f"'moe eval {out}' measures it, 'moe resume {out}' trains it on")


@app.command()
def esft(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a sparse run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the fine-tuned run")],
    overrides: OverridesArgument = None,
    score: Annotated[
        str, typer.Option(metavar="token|gate", help="share of routed rows, or of gate weights")
    ] = "token",
    threshold: Annotated[float, typer.Option(help="share that the trained experts of a layer reach together")] = 0.2,
) -> None:
    """Fine-tune only the experts that a task uses; the overrides name its data, train.steps and train.optimizer.lr."""
    module = import_module("moe.surgery.esft")
    receipt = module.fine_tune(folder, out, overrides or [], score=score, threshold=threshold)
    typer.echo(module.describe(receipt, out))


@app.command()
def ticket(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the pruned run")],
    overrides: OverridesArgument = None,
    keep: Annotated[float, typer.Option(help="share of the matrices' weights that stays")] = 0.2,
    rounds: Annotated[int, typer.Option(help="of training and removing")] = 3,
    rewind: Annotated[int, typer.Option(help="step whose weights the kept ones go back to")] = 0,
    block: Annotated[int, typer.Option(help="side of the blocks that go together; 1 for single weights")] = 1,
    control: Annotated[str, typer.Option(metavar="none|random|reinitialised", help="train this instead")] = "none",
) -> None:
    """Look for a lottery ticket: train, remove the smallest weights, rewind, repeat; then train what is left alone."""
    module = import_module("moe.surgery.ticket")
    search = module.Search(keep=keep, rounds=rounds, rewind=rewind, block=block, control=control)
    typer.echo(module.describe(module.find(recipe, out, search, overrides or []), out))


@store.command("put")
def store_put(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store, made if there is none")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the variant")],
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run")],
) -> None:
    """Add a run's newest checkpoint; what the store has already costs nothing."""
    module = import_module("moe.surgery.store")
    counts = module.put(folder, name, run)
    typer.echo(
        f"{name}: {counts['new_shards']} new of {counts['shards']} shards, {counts['new_bytes']:,} bytes; {folder} has "
        f"{len(module.names(folder))} variants in {module.size(folder):,} bytes"
    )


@store.command("get")
def store_get(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the variant")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
) -> None:
    """Write a variant as a run that starts from it."""
    typer.echo(str(import_module("moe.surgery.store").get(folder, name, out)))


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a run, or of a model in transformers' format")
    ],
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(min=2, help="validation rows to read")] = 256,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="take the text from here; needed for an export")] = "",
    tasks: Annotated[str, typer.Option(metavar="TASK,TASK", help="tasks of lm-evaluation-harness, or 'offline'")] = "",
    json: JsonOption = False,
) -> None:
    """Perplexity and bits per byte on validation text, whole and by source; or tasks of lm-evaluation-harness."""
    if tasks:
        module = import_module("moe.evaluation.harness")
        result = module.run_tasks(folder, tasks.split(","), limit=rows)
    else:
        module = import_module("moe.evaluation.perplexity")
        result = module.evaluate_folder(folder, rows=rows, recipe=recipe, overrides=overrides or [])
    _print(result, module.describe, json)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a run, or of a model in transformers' format")
    ],
    prompt: Annotated[list[str], typer.Option(help="text to continue; may be given several times")],
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to add")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the smallest set of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the draws")] = 0,
    show_routing: Annotated[
        bool, typer.Option(help="one line per piece of text, with its experts in every layer")
    ] = False,
) -> None:
    """Continue a text, as it is written."""
    module = import_module("moe.generate")
    sampling = module.Sampling(temperature=temperature, top_p=top_p)
    opened = _lazy("moe.opened", "open_model")(folder)
    several = len(prompt) > 1
    if not several and not show_routing:
        typer.echo(prompt[0], nl=False)

    def on_text(index: int, text: str, experts: dict[int, list[int]]) -> None:
        if show_routing:
            routes = "  ".join(f"{layer}: {chosen}" for layer, chosen in experts.items())
            typer.echo(f"prompt {index + 1}  {text!r:12}  experts of the token before, by layer: {routes}")
        elif not several:
            typer.echo(text, nl=False)

    texts = module.generate(opened, prompt, max_tokens, sampling=sampling, seed=seed, on_text=on_text)
    if several and not show_routing:
        for start, text in zip(prompt, texts, strict=True):
            typer.echo(f"{start}{text}\n")
    else:
        typer.echo()


@app.command()
def profile(
    target: Annotated[str, typer.Argument(metavar="RECIPE|T,D,F,E,K", help="a recipe, or an expert layer's shape")],
    overrides: OverridesArgument = None,
    chip: Annotated[str, typer.Option(help="accelerator to predict for")] = "h100",
    routing: Annotated[
        str, typer.Option(metavar="uniform|zipf|FILE", help="rows per expert, or a run's routing.jsonl")
    ] = "uniform",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="roofline plot, .png or .svg")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Chrome trace of the measured step (GPU)")] = None,
) -> None:
    """Count an expert layer's kernels: FLOPs, bytes, predicted time on a chip, what the compiler made of them."""
    _lazy("moe.profile", "profile")(
        target, overrides or [], chip=chip, routing=routing, out=plot, as_json=json, trace=trace
    )


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to train on")] = 8,
    gpu: Annotated[str, typer.Option(help="kind of GPU: a100, h100, h200, b200, mi300x")] = "h100",
    network: Annotated[
        float, typer.Option(min=0, metavar="GB/S", help="of each GPU to other nodes; 0: as the vendor builds it")
    ] = 0.0,
    imbalance: Annotated[float, typer.Option(min=1, help="rows of the fullest rank over the mean")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="layouts to print")] = 5,
    json: JsonOption = False,
) -> None:
    """Choose a layout for so many GPUs: memory, traffic, step time and what to type, predicted without any."""
    _lazy("moe.plan", "plan")(
        recipe, overrides or [], gpus=gpus, gpu=gpu, network=network, imbalance=imbalance, top=top, as_json=json
    )


@app.command()
def routers() -> None:
    """List the routers, whether they are causal, and what each does."""
    registry = import_module("moe.config.registry")
    names = registry.known_routers()
    width = max(map(len, names), default=0)
    for name in names:
        module = registry.resolve_router(name)
        causal = "causal" if module.Router.causal else "not causal"
        typer.echo(f"{name:<{width}}  {causal:<10}  {(module.__doc__ or '').splitlines()[0]}")


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


def _print(result: Any, describe: Any, json: bool) -> None:
    """A result as one JSON object, or in words."""
    if json:
        typer.echo(import_module("json").dumps(_lazy("moe.analysis.summaries", "finite")(result), indent=1))
    else:
        typer.echo(describe(result))


def _lazy(module: str, name: str) -> Any:
    return getattr(import_module(module), name)
