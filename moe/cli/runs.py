"""Commands that make and describe runs: show, train, resume, plan, profile, routers, life."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from moe.cli.common import JsonOption, OverridesArgument, RecipeArgument, lazy

app = typer.Typer()


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[int, typer.Option(min=0, help="processes; 0: the fewest that the parallel.* sizes need")] = 0,
) -> None:
    """Print the resolved settings, parameters, FLOPs, layout, memory per rank and layers of a run."""
    notices: list[str] = []
    run = lazy("moe.config.load", "load")(recipe, overrides or [], notices=notices)
    lazy("moe.show", "show")(run, notices, ranks)


@app.command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a recipe; out=DIR names the run's folder, by default runs/<name>-<time>."""
    notices: list[str] = []
    rest, out = lazy("moe.config.command", "split_out")(overrides or [])
    run = lazy("moe.config.load", "load")(recipe, rest, notices=notices)
    lazy("moe.train", "train")(run, out, notices)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")], overrides: OverridesArgument = None
) -> None:
    """Continue a run from its newest checkpoint."""
    lazy("moe.train", "resume")(folder, overrides or [])


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
    lazy("moe.plan", "plan")(
        recipe, overrides or [], gpus=gpus, gpu=gpu, network=network, imbalance=imbalance, top=top, as_json=json
    )


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
    lazy("moe.profile", "profile")(
        target, overrides or [], chip=chip, routing=routing, out=plot, as_json=json, trace=trace
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
    kind = lazy("moe.config.life", "Life")
    settings = lazy("moe.config.load", "load_as")(kind, recipe, overrides or [], notices=notices)
    for notice in notices:
        typer.echo(notice)
    results = lazy("moe.experiments.life.laboratory", "run")(settings, out, typer.echo)
    typer.echo(lazy("moe.analysis.life_page", "write_page")(results, page if page is not None else out))
