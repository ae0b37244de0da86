"""What the commands share: arguments, options, and how a command imports what it needs only when it runs."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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


class RunByDefault(TyperGroup):
    """A group whose first word may be what `run` is about: `moe ladder RECIPE` is `moe ladder run RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = bool(args) and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


def print_result(result: Any, describe: Any, json: bool) -> None:
    """A result as one JSON object, or in words."""
    if json:
        typer.echo(import_module("json").dumps(lazy("moe.analysis.summaries", "finite")(result), indent=1))
    else:
        typer.echo(describe(result))


def lazy(module: str, name: str) -> Any:
    """A name of a module that is imported now."""
    return getattr(import_module(module), name)
