"""Routers by name: `moe/routers/<name>.py`, a dotted module, or path/to/file.py. The folder is the registry."""

import hashlib
import importlib
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from moe.config.schema import RouterConfig
from moe.config.words import suggestion
from moe.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "routers"
_FILE_PREFIX = "moe_file_"


def known_routers() -> list[str]:
    """Names of the routers in this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


def resolve_router(name: str) -> ModuleType:
    """The module of a router: it defines `Config` and `Router`. Raises ConfigError, listing the known names."""
    if name.endswith(".py") or "/" in name:
        module = load_file(Path(name), "router")
    elif "." in name:
        module = _import(name)
    elif name in known_routers():
        module = _import(f"moe.routers.{name}")
    else:
        from_outside = "a router from elsewhere is a dotted module or path/to/file.py"
        raise ConfigError(f"there is no router {name!r}: {suggestion(name, known_routers())}; {from_outside}")
    _check_module(module, name)
    return module


def router_name(config: RouterConfig) -> str:
    """The name that `resolve_router` finds this config's module by; a file's is its absolute path."""
    module = type(config).__module__
    if module.startswith(_FILE_PREFIX):
        return str(sys.modules[module].__file__)
    return module.removeprefix("moe.routers.")


_loading = threading.RLock()
"""Of a thread that runs a file: another one that wants a file waits until all of it is there."""


def load_file(path: Path, kind: str) -> ModuleType:
    """Run a Python file as a module, without touching sys.path and without leaving bytecode.

    The same unchanged file gives the same module, whole, so that its classes stay the same. Errors name the file and line.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{kind} {path} cannot be read ({error.strerror}): {_neighbours(path)}") from error
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"{_FILE_PREFIX}{digest}"
    with _loading:
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module
        try:
            exec(compile(source, str(path), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise file_error(error, path, kind) from error
        return module


def file_error(error: BaseException, path: Path, kind: str, advice: str = "") -> ConfigError:
    """An exception out of a user's file as one paragraph: the file, the line that was being run, what went wrong."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (lines or [None])[-1]
    if not advice and isinstance(error, ModuleNotFoundError):
        advice = f"a {kind} can import what is installed, and not its neighbours: sys.path is left alone"
    said = error.msg if isinstance(error, SyntaxError) else error
    what = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {said}"
    place = f"{kind} {path}" + (f", line {line}" if line else "")
    return ConfigError(f"{place}: {what}: {advice or f'correct the {kind} there'}")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"router module {name} needs a missing package: {error}: install it") from error
        raise ConfigError(
            f"router module {name} cannot be imported ({error}): install the package that holds it, "
            f"or name a file, path/to/file.py; {suggestion(name, known_routers())}"
        ) from error


def _check_module(module: ModuleType, name: str) -> None:
    for attribute in ("Config", "Router"):
        if not isinstance(getattr(module, attribute, None), type):
            raise ConfigError(
                f"router {name} has no class {attribute}: a router's module defines Config and Router, "
                "see moe/routers/topk.py"
            )
    config: Any = module.Config
    if not issubclass(config, RouterConfig) or "__pydantic_config__" not in vars(config):
        raise ConfigError(
            f"router {name}: Config must be a subclass of moe.config.schema.RouterConfig under the decorator "
            "@moe.config.schema.config: see moe/routers/topk.py"
        )
    if "name" in vars(config)["__dataclass_fields__"]:
        raise ConfigError(f"router {name}: Config must not have a field `name`, which is the router's own: rename it")


def _neighbours(path: Path) -> str:
    files = sorted(file.name for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
    return f"in {path.parent}: {suggestion(path.name, files)}"
