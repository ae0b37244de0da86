"""The shape of the config classes, read from their type hints: what each field may hold, said in words.

Slot          what one place of a run's plain dict may hold
slot_of       a type hint's Slot
fields_of     a config class's fields and their Slots
class_of      the config class that a plain dict in a Slot describes
complete      a plain dict with every default filled in
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from moe.config.registry import resolve_router, router_name
from moe.config.schema import RouterConfig, Unnamed
from moe.config.words import Step, dotted, shown
from moe.errors import ConfigError

Path = tuple[Step, ...]


@dataclass(frozen=True)
class Slot:
    """What one place may hold: a leaf, a config, one member of a family, a router, or a list of such."""

    base: Any
    """The type, without annotations and None."""
    constraints: tuple[Any, ...] = ()
    """Bounds from annotated_types."""
    optional: bool = False
    """Whether null is allowed."""
    config: type | None = None
    """The config class, if there is exactly one."""
    members: Mapping[str, type] = field(default_factory=dict)
    """Config classes by name, if this is a family other than the routers."""
    unnamed: str = ""
    """The member that an object without a name is; empty: a name is required."""
    items: "Slot | None" = None
    """What each element of a list may hold."""

    @property
    def is_router(self) -> bool:
        return self.base is RouterConfig

    @property
    def is_family(self) -> bool:
        return self.is_router or bool(self.members)

    @property
    def is_node(self) -> bool:
        """Whether it holds fields or elements, so that other overrides may reach below it."""
        return self.is_family or self.config is not None or (self.items is not None and self.items.is_node)


def is_config(cls: Any) -> bool:
    """Whether a class is a config, made by `schema.config`."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls) and hasattr(cls, "__pydantic_config__")


def slot_of(hint: Any) -> Slot:
    """The Slot of a type hint."""
    constraints: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *metadata = typing.get_args(hint)
        constraints = tuple(metadata)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        optional = len(choices) < len(typing.get_args(hint))
        if len(choices) == 1:
            return dataclasses.replace(slot_of(choices[0]), optional=optional)
        if all(is_config(choice) for choice in choices):
            members = {name_of(choice): choice for choice in choices}
            unnamed = next((item.name for item in constraints if isinstance(item, Unnamed)), "")
            return Slot(base=hint, optional=optional, members=members, unnamed=unnamed)
        return Slot(base=hint, constraints=constraints, optional=optional)
    if typing.get_origin(hint) is tuple:
        return Slot(base=hint, constraints=constraints, items=slot_of(typing.get_args(hint)[0]))
    return Slot(base=hint, constraints=constraints, config=hint if is_config(hint) else None)


def name_of(cls: Any) -> str:
    """The name of a family's member, from its `name` field."""
    return typing.get_args(typing.get_type_hints(cls)["name"])[0]


@cache
def fields_of(cls: Any) -> dict[str, Slot]:
    """The fields of a config class in their order, each with its Slot."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: slot_of(hints[item.name]) for item in dataclasses.fields(cls)}


def defaults_of(cls: Any) -> dict[str, Any]:
    """The defaults of a config class as plain values; required fields are absent."""
    values = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            values[item.name] = plain(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            values[item.name] = plain(item.default_factory())
    return values


def class_of(slot: Slot, value: Any) -> type | None:
    """The config class that a plain dict describes; None if it has no or an unknown name.

    Raises ConfigError for an unknown router, without the path: the caller knows it.
    """
    if slot.is_router:
        name = value.get("name") if isinstance(value, dict) else None
        return resolve_router(name).Config if isinstance(name, str) else None
    if slot.members:
        name = value.get("name") if isinstance(value, dict) else None
        return slot.members.get(name) if isinstance(name, str) else None
    return slot.config


def plain(value: Any, path: Path = ()) -> Any:
    """A config, or any value inside one, as what JSON can hold; a router gains its `name`.

    Raises ConfigError, with the path, for a value that JSON cannot hold.
    """
    if is_config(type(value)):
        items = {item.name: plain(getattr(value, item.name), (*path, item.name)) for item in dataclasses.fields(value)}
        return {"name": router_name(value), **items} if isinstance(value, RouterConfig) else items
    if isinstance(value, dict):
        return {key: plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, (*path, index)) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{dotted(path) or 'a config'} holds a {type(value).__name__} ({shown(value)}), which a run.json cannot: "
        "use a number, text, true or false, a list, or a config class"
    )


def complete(slot: Slot, value: Any) -> Any:
    """A plain value with names written out and every absent default filled in; what is wrong is left for validation."""
    if slot.is_family and isinstance(value, str):
        value = {"name": value}
    if slot.items is not None and isinstance(value, list):
        return [complete(slot.items, item) for item in value]
    if not isinstance(value, dict):
        return value
    if slot.unnamed:
        value = {"name": slot.unnamed, **value}
    try:
        cls = class_of(slot, value)
    except ConfigError:
        return value
    if cls is None:
        return value
    named = {"name": value["name"]} if slot.is_router else {}
    slots = fields_of(cls)
    merged = {**named, **defaults_of(cls), **value}
    return {key: complete(slots[key], item) if key in slots else item for key, item in merged.items()}


# --------------------------------------------------------------------------------------------------------- in words


def described(slot: Slot) -> str:
    """What a slot accepts, as the object of 'must be'."""
    text = _described(slot)
    return f"{text}, or null" if slot.optional else text


def _described(slot: Slot) -> str:
    nouns = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if slot.is_router:
        return "the name of a router, or an object with its name and fields"
    if slot.members:
        return f"one of {', '.join(slot.members)}, or an object with such a name and its fields"
    if slot.config is not None:
        return f"an object with the fields {', '.join(fields_of(slot.config))}"
    if slot.items is not None:
        count = next((f" of at least {c.min_length}" for c in slot.constraints if isinstance(c, MinLen)), "")
        return f"a list{count}, each {described(slot.items)}"
    if typing.get_origin(slot.base) is Literal:
        return f"one of {', '.join(shown(choice) for choice in typing.get_args(slot.base))}"
    noun = nouns.get(slot.base, str(slot.base))
    bounds = [text for constraint in slot.constraints if (text := _bound(constraint))]
    return f"{noun} {' and '.join(bounds)}" if bounds else noun


def _bound(constraint: Any) -> str:
    match constraint:
        case Gt(gt=bound):
            return f"greater than {bound}"
        case Ge(ge=bound):
            return f"of at least {bound}"
        case Lt(lt=bound):
            return f"less than {bound}"
        case Le(le=bound):
            return f"of at most {bound}"
        case MinLen(min_length=1):
            return "that is not empty"
        case _:
            return ""


_TYPICAL: dict[str, Any] = {
    "name": "experiment",
    "vocab_size": 512,
    "dim": 256,
    "num_layers": 4,
    "ffn_hidden": 1024,
    "num_kv_heads": 2,
    "head_dim": 64,
    "top_k": 2,
    "expert_hidden": 256,
    "factor": 4.0,
    "original_length": 4096,
    "steps": 1000,
    "batch_rows": 32,
    "lr": 0.001,
    "decay_steps": 100,
    "paths": ["data/*.txt"],
    "path": "gpt2",
    "dataset": "roneneldan/TinyStories",
}
"""Usual values of fields that have no default, for the examples in messages."""


def example(slot: Slot, field_name: str = "") -> Any:
    """Some plain value that the slot of this field accepts."""
    if field_name in _TYPICAL and slot.config is None:
        return _TYPICAL[field_name]
    if slot.is_router:
        return "topk"
    if slot.members:
        return next(iter(slot.members))
    if slot.config is not None:
        required = [key for key in fields_of(slot.config) if key not in defaults_of(slot.config)]
        return {key: example(fields_of(slot.config)[key], key) for key in required}
    if slot.items is not None:
        item = example(slot.items)
        return [{"name": item} if slot.items.is_family else item]
    if typing.get_origin(slot.base) is Literal:
        return typing.get_args(slot.base)[0]
    low = next((constraint.ge for constraint in slot.constraints if isinstance(constraint, Ge)), 0)
    return {int: max(8, low), float: max(0.1, low), bool: True, str: "text"}.get(slot.base)  # type: ignore[type-var]
