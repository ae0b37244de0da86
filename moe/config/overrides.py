"""Overrides, `a.b.c=value` from the command line, applied to a run's plain dict by the shape of the config classes.

`model.moe.router=expert_choice` and `model.moe.router.name=expert_choice` are one thing. Shorter paths are applied
first, so names and whole objects settle which fields exist before any field is set, whatever the order of typing.
"""

import json
from typing import Any

from moe.config.schema import Run
from moe.config.tree import Path, Slot, class_of, complete, described, example, fields_of
from moe.config.words import dotted, shown, suggestion, typed
from moe.errors import ConfigError


def apply(data: Any, overrides: list[str], notices: list[str], kind: type = Run) -> Any:
    """A completed plain config of class `kind` with the overrides applied; what a changed name drops is told in `notices`.

    Raises ConfigError for an override that is no assignment, is given twice, or reaches a field that is not there.
    """
    parsed = [_split(text) for text in overrides]
    _refuse_doubles([path for path, _ in parsed], overrides)
    root = Slot(base=kind, config=kind)
    for path, value in sorted(parsed, key=lambda item: len(_target(item[0]))):
        data = _assign(root, data, path, (), value, notices)
    return data


def unknown_field(path: Path, cls: type, root: Any = None) -> str:
    """What to say of a field that its class does not have; `root` is the plain run, to look for it elsewhere."""
    *parent, name = path
    where = f"{dotted(parent)} ({cls.__name__})" if parent else "a run"
    elsewhere = [] if root is None else _paths_to(str(name), Slot(base=Run, config=Run), root, ())
    hint = f"; there is {', '.join(elsewhere)}" if elsewhere else ""
    if dotted(path) == "out":
        hint = "; out=DIR, the folder of a run, is taken by moe train alone"
    return f"{dotted(path)} is no setting: {where} has no field {name!r}: {suggestion(str(name), fields_of(cls))}{hint}"


def _split(text: str) -> tuple[Path, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r} must be path=value: write e.g. train.steps=100")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return tuple(key.split(".")), parsed


def _target(path: Path) -> Path:
    """The path of what an override decides: a name decides the node that has it."""
    return path[:-1] if len(path) > 1 and path[-1] == "name" else path


def _refuse_doubles(paths: list[Path], texts: list[str]) -> None:
    first: dict[Path, str] = {}
    for path, text in zip(paths, texts, strict=True):
        if _target(path) in first:
            raise ConfigError(f"{dotted(_target(path))} is given twice ({first[_target(path)]} and {text}): keep one")
        first[_target(path)] = text


def _assign(slot: Slot, value: Any, path: Path, done: Path, new: Any, notices: list[str]) -> Any:
    """The plain `value` of the place `done`, with `new` at the remaining `path` below it."""
    if not path:
        return _replace(slot, value, done, new, notices)
    step, *rest = path
    here = (*done, step)
    if slot.is_family and step == "name" and not rest:
        return _rename(slot, value, done, new, notices)
    if value is None:
        instead = f"{dotted(done)}={typed(example(slot, str(done[-1])))}"
        state = "null" if slot.optional else "not set"
        raise ConfigError(f"{dotted((*here, *rest))} has no place, {dotted(done)} is {state}: set that, e.g. {instead}")
    if slot.items is not None and isinstance(value, list):
        index = _index(slot, value, done, step, rest)
        old = value[index] if index < len(value) else None
        return [*value[:index], _assign(slot.items, old, tuple(rest), here, new, notices), *value[index + 1 :]]
    cls = _class_here(slot, value, done)
    if cls is None or not isinstance(value, dict):
        raise ConfigError(
            f"{dotted((*here, *rest))} has no place: {dotted(done)} must be {described(slot)}, and is {shown(value)}"
        )
    child = fields_of(cls).get(str(step))
    if child is None:
        raise ConfigError(unknown_field(here, cls, value if not done else None))
    empty = complete(child, {}) if child.config else None
    return {**value, step: _assign(child, value.get(step, empty), tuple(rest), here, new, notices)}


def _replace(slot: Slot, value: Any, done: Path, new: Any, notices: list[str]) -> Any:
    return _rename(slot, value, done, new, notices) if slot.is_family and isinstance(new, str) else complete(slot, new)


def _rename(slot: Slot, value: Any, done: Path, name: Any, notices: list[str]) -> Any:
    """Another member of a family with its defaults; the old one's fields go, and `notices` says which."""
    cls = _class_here(slot, {"name": name}, done)
    if cls is None:
        raise ConfigError(f"{dotted(done)} must be {described(slot)}, not {shown(name)}: {_members(slot, str(name))}")
    old = value if isinstance(value, dict) else {}
    if "name" in old and _class_here(slot, old, done) is cls:
        return value
    dropped = [f"{key}={shown(item)}" for key, item in old.items() if key != "name"]
    if dropped:
        change = f"{dotted(done)}: {old.get('name')} -> {name}"
        notices.append(f"{change} drops {', '.join(dropped)}; {name} starts from its defaults")
    return complete(slot, {"name": name})


def _class_here(slot: Slot, value: Any, done: Path) -> type | None:
    try:
        return class_of(slot, value)
    except ConfigError as error:
        raise ConfigError(f"{dotted(done)}: {error}") from error


def _members(slot: Slot, name: str) -> str:
    return suggestion(name, slot.members) if slot.members else "name one as text"


def _index(slot: Slot, value: list[Any], done: Path, step: Any, rest: list[Any]) -> int:
    """The index that a step means; one past the end appends, if it names the new element."""
    appends = slot.items is not None and slot.items.is_family and rest in ([], ["name"])
    last = len(value) - (not appends)
    if not str(step).isdecimal() or int(step) > last:
        raise ConfigError(
            f"{dotted(done)} is a list of {len(value)}: {step!r} must be an index from 0 to {last}; "
            f"or give the whole list, e.g. {dotted(done)}={shown(example(slot))}"
        )
    return int(step)


def _paths_to(name: str, slot: Slot, value: Any, done: Path) -> list[str]:
    """Paths in a plain run that end in a field of this name."""
    if slot.items is not None and isinstance(value, list):
        return [path for i, item in enumerate(value) for path in _paths_to(name, slot.items, item, (*done, i))]
    cls = class_of(slot, value) if isinstance(value, dict) else None
    if cls is None:
        return []
    found = [dotted((*done, name))] if name in fields_of(cls) and done else []
    return found + [
        path for key, child in fields_of(cls).items() for path in _paths_to(name, child, value.get(key), (*done, key))
    ]
