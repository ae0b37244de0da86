"""What every settings class is made of: a frozen dataclass that is validated, and the kinds of numbers."""

from dataclasses import dataclass
from typing import Annotated, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Ge(0), Lt(1)]


T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a class a config: frozen, keyword-only, slotted, and validated without unknown fields or coercion."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@dataclass(frozen=True)
class Unnamed:
    """In a family's hint: which member an object without a name is, for files older than the family."""

    name: str
