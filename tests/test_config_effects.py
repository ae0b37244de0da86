"""Every config field against what it does: config_effects.py names two values and an observable, which must differ.

The table must name every field of every config class, every member of every family, and nothing else; and what is
looked at must be the same when nothing is changed, or a difference would prove nothing.
"""

from typing import Annotated, Literal

import pytest
from compiler import WHY_NOT
from config_effects import EFFECTS, fields, fields_below
from lab import Lab
from pydantic import Discriminator

from moe.config.schema import config


@config
class Plain:
    width: int


@config
class Left:
    name: Literal["left"] = "left"
    depth: int = 1


@config
class Right:
    name: Literal["right"] = "right"


@config
class Planted:
    label: str = "x"
    plain: Plain
    maybe: Plain | None = None
    sides: tuple[Annotated[Left | Right, Discriminator("name")], ...] = ()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


def test_the_walk_finds_every_setting():
    assert fields_below(Planted) == [
        "label",
        "plain.width",
        "maybe",
        "maybe.width",
        "sides",
        "sides[left]",
        "sides[left].depth",
        "sides[right]",
    ]


def test_the_table_names_every_setting():
    assert sorted(set(fields()) - EFFECTS.keys()) == [], "settings without an entry in config_effects.py"
    assert sorted(EFFECTS.keys() - set(fields())) == [], "entries for settings that do not exist"


@pytest.mark.parametrize("key", EFFECTS)
def test_a_setting_has_an_effect(key, lab):
    if key == "model.backend" and WHY_NOT:
        pytest.skip(WHY_NOT)
    effect = EFFECTS[key]
    first, second = effect.runs(key, lab)
    assert first != second
    assert effect.see(lab, first) != effect.see(lab, second), effect.see.__doc__


@pytest.mark.parametrize("see", dict.fromkeys(effect.see for effect in EFFECTS.values()), ids=lambda see: see.__name__)
def test_what_is_looked_at_repeats_when_nothing_is_changed(see, lab):
    run = lab.run("logging.console=plain")
    assert see(Lab(lab.folder), run) == see(Lab(lab.folder), run)
