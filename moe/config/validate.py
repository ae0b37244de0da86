"""A plain dict into a `Run` by pydantic, and pydantic's findings into sentences: place, rule, value, way out."""

import json
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from moe.config.overrides import unknown_field
from moe.config.registry import known_routers, resolve_router
from moe.config.schema import RouterConfig
from moe.config.tree import Path, Slot, class_of, defaults_of, described, example, fields_of
from moe.config.words import dotted, joined, shown, suggestion, typed
from moe.errors import ConfigError

T = TypeVar("T")


def validate(data: Any, kind: type[T]) -> T:
    """A config of class `kind` from a plain dict, every type, range and field checked. Raises ConfigError for every mistake."""
    try:
        return _adapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(joined(_sentences(error, data, kind))) from error


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _router_schema(cls: type, source: Any, handler: Any) -> core_schema.CoreSchema:
    """A field that holds some router is validated by the Config of the router it names."""
    return core_schema.no_info_plain_validator_function(_router) if cls is RouterConfig else handler(source)


def _router(value: Any) -> RouterConfig:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{shown(value)} must be the name of a router, or an object with its name and fields: "
            f"{suggestion('', known_routers())}"
        )
    config = resolve_router(value["name"]).Config
    return _adapter(config).validate_json(json.dumps({key: item for key, item in value.items() if key != "name"}))


# The schema knows nothing of the folder of routers, so this is where pydantic learns what a router is.
RouterConfig.__get_pydantic_core_schema__ = classmethod(_router_schema)  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------- in words


def _sentences(error: ValidationError, data: Any, kind: type) -> list[str]:
    sentences = []
    for item in error.errors(include_url=False):
        path, slot, owner = _locate(data, item["loc"], kind)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            sentences.append(f"{dotted(path)}: {cause}")
        elif item["type"] != "too_short" or not item["input"]:  # pydantic counts broken elements of a list as absent
            sentences.append(_sentence(item, path, slot, owner, data))
    return sentences


def _locate(data: Any, loc: tuple[str | int, ...], kind: type) -> tuple[Path, Slot | None, type | None]:
    """Pydantic's location as a path without union tags, the Slot there (None: unknown), and the class that owns it."""
    path: Path = ()
    owner: type | None = None
    slot: Slot | None = Slot(base=kind, config=kind)
    for step in loc:
        if slot is None:
            break
        if slot.members and step in slot.members:
            slot = Slot(base=slot.base, config=slot.members[str(step)])
            continue
        path = (*path, step)
        if slot.items is not None:
            owner, slot = None, slot.items
        else:
            owner = class_of(slot, data)
            slot = fields_of(owner).get(str(step)) if owner is not None else slot
        data = _child(data, step)
    return path, slot, owner


def _child(data: Any, step: str | int) -> Any:
    if isinstance(data, list) and isinstance(step, int) and step < len(data):
        return data[step]
    return data.get(step) if isinstance(data, dict) else None


def _sentence(item: Any, path: Path, slot: Slot | None, owner: type | None, root: Any) -> str:
    """One finding: place, rule, value, way out."""
    place = dotted(path) or "a run"
    if slot is None:
        assert owner is not None
        return unknown_field(path, owner, root)
    for_example = _for_example(path, slot, owner)
    if item["type"] == "missing":
        return f"{place} is required, and not set: it must be {described(slot)}: {for_example}"
    if item["type"] == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        return f"{place} has the unknown name {tag!r}: {suggestion(tag, slot.members)}: {for_example}"
    if item["type"] == "union_tag_not_found":
        return f"{place} ({shown(item['input'])}) has no name: it must be {described(slot)}: {for_example}"
    return f"{place} must be {described(slot)}, not {shown(item['input'])}: {for_example}"


def _for_example(path: Path, slot: Slot, owner: type | None) -> str:
    """An assignment that would be accepted: the default, or a typical value; of a large object one field."""
    key = str(path[-1]) if path else ""
    default = defaults_of(owner).get(key) if owner is not None else None
    value = example(slot, key) if default in (None, "") or slot.base is bool else default
    if isinstance(value, dict) and len(json.dumps(value)) > 80:
        field, inner = next(iter(value.items()))
        return f"for example {dotted((*path, field))}={inner}"
    return f"for example {dotted(path)}={typed(value)}"
