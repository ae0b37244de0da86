"""`python -m moe.train RECIPE [overrides] [out=DIR]`, also under torchrun; `--resume DIR [overrides]` continues a run."""

import sys
from pathlib import Path

from moe.config.command import parse
from moe.config.load import load
from moe.errors import run_main
from moe.train import resume, train


def main() -> None:
    """Parse the command line and train."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--resume"] and len(arguments) > 1:
        resume(Path(arguments[1]), arguments[2:])
        return
    recipe, overrides, out = parse(arguments)
    notices: list[str] = []
    train(load(recipe, overrides, notices=notices), out, notices)


if __name__ == "__main__":
    sys.exit(run_main(main))
