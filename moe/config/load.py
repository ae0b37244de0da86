"""The one way to a checked `Run`: from a recipe, a run.json, a dict or a Run, with overrides.

Any source becomes a plain dict, takes the overrides, is validated by pydantic, and then by the rules between fields.
Instances are plain dicts first, too: a config built in Python has not been checked by anyone.
"""

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from moe.config import schema
from moe.config.check import check
from moe.config.overrides import apply
from moe.config.registry import file_error, known_routers, load_file, resolve_router, router_name
from moe.config.schema import RouterConfig, Run
from moe.config.tree import Slot, complete, fields_of, is_config, plain
from moe.config.validate import validate
from moe.config.words import shown, suggestion
from moe.errors import ConfigError

__all__ = ["dump", "known_routers", "load", "load_as", "resolve_router", "router_config", "router_name"]

SCHEMA_VERSION = 1
T = TypeVar("T")


def load(
    source: str | Path | dict[str, Any] | Run, overrides: Iterable[str] = (), *, notices: list[str] | None = None
) -> Run:
    """A checked Run from recipes/x.py, recipes/x.py:variant, a run.json, a dict or a Run, and overrides `a.b.c=value`.

    What an override dropped by changing a name is appended to `notices`. Raises ConfigError: rule, numbers, way out.
    """
    run = load_as(Run, source, overrides, notices=notices)
    check(run)
    return run


def load_as(
    kind: type[T], source: str | Path | dict[str, Any] | T, overrides: Iterable[str] = (), *, notices: list[str] | None
) -> T:
    """A config class of another kind than Run from the same sources; rules between its fields are the caller's to check."""
    slot = Slot(base=kind, config=kind)
    data = complete(slot, _plain_source(kind, source))
    return validate(apply(data, list(overrides), [] if notices is None else notices, kind), kind)


def dump(config: Any) -> Any:
    """A config as what JSON can hold; a router gains its `name`. `load(dump(run)) == run`."""
    return plain(config)


def router_config(name: str, **fields: Any) -> RouterConfig:
    """The config of a router by its name; types and ranges are checked when the Run that it is in is loaded."""
    cls = resolve_router(name).Config
    for field in fields.keys() - fields_of(cls).keys():
        raise ConfigError(f"router {name} has no field {field!r}: {suggestion(field, fields_of(cls))}")
    return cls(**fields)


def _plain_source(kind: type, source: Any) -> Any:
    if isinstance(source, kind):
        return dump(source)
    if isinstance(source, dict):
        return _from_document(plain(source), "the given dict")
    text = str(source)
    if text.endswith(".json"):
        return _from_document(_read_json(Path(text)), text)
    path, colon, variant = text.rpartition(".py:")
    if colon or text.endswith(".py"):
        return dump(_from_recipe(kind, Path(f"{path}.py" if colon else text), variant if colon else "run"))
    folder = f"; for the run in that folder: {text}/run.json" if (Path(text) / "run.json").is_file() else ""
    raise ConfigError(f"{text!r} must be a recipe (x.py or x.py:variant) or a run.json: e.g. recipes/smoke.py{folder}")


# --------------------------------------------------------------------------------------------------------- run.json


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read ({error.strerror}): name a run.json or a recipe") from error
    except ValueError as error:
        raise ConfigError(f"run file {path} is not valid JSON: {error}: restore it, or start from a recipe") from error


def _from_document(data: Any, where: str) -> Any:
    """The plain run in a bare dict, or in a run.json with its version and its record of the machine."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold a run as an object, not {shown(data)}: see `moe show recipes/smoke.py`")
    if "run" not in data:
        return data
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{where} has schema_version {shown(version)}, and this version of moe reads {SCHEMA_VERSION}: "
            "use the version that wrote it, or give the run alone"
        )
    return data["run"]


# ---------------------------------------------------------------------------------------------------------- recipes


def _from_recipe(kind: type, path: Path, variant: str) -> Any:
    module = load_file(path, "recipe")
    functions = {name: item for name, item in vars(module).items() if _is_variant(item, module.__name__)}
    if variant not in functions:
        raise ConfigError(
            f"recipe {path} has no function {variant!r} that takes no arguments and returns a {kind.__name__}: "
            f"{suggestion(variant, functions)}: name one with {path}:FUNCTION"
        )
    function = functions[variant]
    try:
        run = function()
    except (Exception, SystemExit) as error:
        raise file_error(error, path.resolve(), "recipe", _advice(error)) from error
    if not isinstance(run, kind):
        line = function.__code__.co_firstlineno
        command = {"Life": "moe life", "Run": "moe train"}.get(type(run).__name__)
        raise ConfigError(
            f"recipe {path}, line {line}: {variant}() must return a {kind.__module__}.{kind.__name__}, and returned "
            f"{type(run).__name__}: {f'{command} takes it' if command else f'end it with `return {kind.__name__}(...)`'}"
        )
    return run


def _is_variant(item: Any, module: str) -> bool:
    """A public function of the recipe itself that can be called without arguments."""
    if not inspect.isfunction(item) or item.__module__ != module or item.__name__.startswith("_"):
        return False
    parameters = inspect.signature(item).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _advice(error: BaseException) -> str:
    """For a wrong keyword of a config class, its fields."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = getattr(schema, found[1], None) if found else None
    if found is None or cls is None or not is_config(cls):
        return ""
    return suggestion(found[2], fields_of(cls))
