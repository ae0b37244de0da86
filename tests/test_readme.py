"""What the README shows, run as it stands there: its Python example, its commands' options, its links."""

import re
from pathlib import Path

import pytest
import torch

from moe.config.load import load

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_layer_example_runs_and_every_parameter_gets_a_gradient():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (4, 32, 128)
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in names["layer"].parameters())


COMMANDS = re.findall(r"^moe (?:train|show|compare) (\S+)([^#\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("recipe", "rest"), COMMANDS)
def test_the_commands_settings_load(recipe, rest):
    settings = [word for word in rest.split() if "=" in word and not word.startswith(("out=", "--"))]
    if any("path/to" in word for word in settings):
        return
    assert load(ROOT / recipe, settings).model.moe is not None


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
