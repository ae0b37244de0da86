"""The command `moe`. Each command imports what it needs when it runs, so that `moe --help` answers at once.

runs        show, train, resume, plan, profile, routers, life
judgements  compare, promise, report, doctor, probe, ledger, ladder
forecasts   forecast
models      export, import, eval, generate, upcycle, prune, and what else makes one model of another
common      arguments and options that several commands have
"""

from typing import Any

import typer

from moe.cli import forecasts, judgements, models, runs
from moe.errors import fail, run_main

app = typer.Typer(
    name="moe",
    help="Train sparse Mixture-of-Experts transformers, and compare them with a dense model of equal compute.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (runs, judgements, forecasts, models):
    app.add_typer(part.app)
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
