"""Writes tests/golden/: the resolved config of every shipped recipe, so that a changed default shows in a diff."""

import ast
import json
from pathlib import Path
from typing import Any

from moe.config.life import Life
from moe.config.load import dump, load, load_as

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def _needs_nothing(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional == len(arguments.defaults) and None not in arguments.kw_defaults


def variants() -> dict[str, str]:
    """Golden name -> source (relative to the repository) of every public recipe function that needs no arguments."""
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _needs_nothing(node.args):
                name = path.stem if node.name == "run" else f"{path.stem}.{node.name}"
                found[name] = f"recipes/{path.name}:{node.name}"
    return found


def loaded(source: str | dict[str, Any], name: str) -> Any:
    """The config of one variant, from its recipe or from what `dump` made of it: a Run, or the laboratory's Life."""
    return load_as(Life, source, notices=None) if name.split(".")[0] == "life" else load(source)


def text_of(name: str) -> str:
    """The resolved config of one variant, as its golden file holds it."""
    config = loaded(str(ROOT / variants()[name]), name)
    return json.dumps(dump(config), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Rewrite the folder, and name each file that changed."""
    GOLDEN.mkdir(exist_ok=True)
    texts = {f"{name}.json": text_of(name) for name in variants()}
    for path in GOLDEN.glob("*.json"):
        if path.name not in texts:
            path.unlink()
            print(f"removed {path.name}")
    for file, text in texts.items():
        path = GOLDEN / file
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
