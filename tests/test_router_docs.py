"""docs/routers.md and `moe show` against the routers there are; the page's example is a file outside the package, and trained."""

import re
import typing
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_run

from moe.config.load import known_routers, load, resolve_router
from moe.config.schema import balances
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.routers._estimators import Estimator
from moe.routing import Tokens
from moe.show import show
from moe.train import train

TEXT = (Path(__file__).parents[1] / "docs/routers.md").read_text(encoding="utf-8")


def rows_of(section: str) -> list[tuple[str, str]]:
    """(name, other cells) of the table in a section of the page."""
    text = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)


def test_every_router_has_a_row():
    rows = rows_of("Which one")
    assert sorted(name for name, _ in rows) == known_routers()
    for name, rest in rows:
        assert len(rest.split(" | ")) == 3, name
        assert ("**not causal**" in rest) is not resolve_router(name).Router.causal, name


@pytest.mark.parametrize("name", known_routers())
def test_a_router_is_one_short_file_that_names_its_choices_and_its_source(name):
    module = resolve_router(name)
    choices = ("Scoring", "Selection", "Gate", "Balancing", "Gradient")
    assert [choice for choice in choices if choice not in (module.__doc__ or "")] == []
    assert len(Path(str(module.__file__)).read_text().splitlines()) < 120
    assert module.Config().source


def test_every_estimator_has_a_row():
    assert [name for name, _ in rows_of("What teaches the router")] == list(typing.get_args(Estimator))


@pytest.mark.parametrize("name", known_routers())
def test_show_prints_the_sources_convention_and_both_coefficients(name, capsys):
    run = load("recipes/smoke.py", [f"model.moe.router={name}"])
    show(run, [])
    shown = " ".join(capsys.readouterr().out.split())
    assert run.model.moe is not None
    router = run.model.moe.router
    assert " ".join(router.source.split()) in shown
    for label, balance in balances(router):
        theirs = f"{balance.weight:g} (1.0 is balance), or {balance.weight / 2:g} where f is not divided by K"
        assert f"{label} weight {theirs}; scope {balance.scope}" in shown


@pytest.fixture
def example(tmp_path) -> Path:
    """The router of the page, in a file of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "second_opinion.py"
    path.write_text(code)
    return path


def test_the_example_trains(example, tmp_path):
    run = tiny_run(tmp_path, f"model.moe.router={example}", "model.moe.router.margin=0.5")
    out = train(run, tmp_path / "run")
    assert '"status": "finished"' in (out / "summary.json").read_text()


def test_the_example_takes_a_second_expert_only_if_it_is_near(example, tmp_path):
    run = tiny_run(tmp_path, f"model.moe.router={example}", "model.moe.router.margin=0.5")
    assert run.model.moe is not None
    layer = MoELayer(run.model.moe, 4, layer=0)
    with torch.no_grad():
        layer.router.weight_ED.copy_(torch.eye(4))
    x = torch.tensor([[[2.0, 1.9, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]]])
    _, routing = layer(x, Tokens.of_hidden(x))
    assert routing.expert_R.tolist() == [0, 1, 0, 4]
    assert torch.isfinite(auxiliary_loss(routing))
