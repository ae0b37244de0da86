"""The page of the Game of Life laboratory: method, claims with verdicts, tables, limits; and its figure beside it."""

from pathlib import Path
from typing import Any

from moe.analysis.life_plot import plot
from moe.analysis.life_results import (
    AGAIN,
    MAGNITUDE,
    RANDOM,
    Results,
    claims,
    grown,
    layers,
    median_updates,
    pruned,
    read_results,
    solved,
    without_error,
)
from moe.files import write_text

_HEAD = """\
# The Game of Life laboratory

Written by `{command}`; nothing here is edited by hand. Anyone can repeat it: the command takes minutes on one core,
goes on where it was stopped, and gives the same numbers on the same machine.

**The question.** A network that plays Conway's Game of Life exactly can be written down: {parameters} parameters for
one step. Can training find it? Springer and Kenyon ("It's Hard for Neural Networks To Learn the Game of Life", 2020,
[arXiv 2009.01398](https://arxiv.org/abs/2009.01398)) found that it rarely does, that several times the parameters
make it likely, and read it as a sign of lottery tickets: spare width buys more tries at a lucky start. If so, most of
a trained network can go. This page holds their claims against networks trained here, and asks the same of this
package's expert layers.

**Exact** means right in every neighbourhood there is, tried one by one: 2^9 of one step, 2^25 of two (for networks
that pass {boards} random boards first). Shares come with 95 % Wilson intervals. L(n, m) predicts n steps and has m
times the filters that suffice.

![Six panels: success against width, two of pruning, flipped signs, density, expert layers]({figure})

## What did and did not replicate

A claim about two shares is *replicated* if their intervals do not overlap, *contradicted* if they lie the other way
round, and *undecided* otherwise. Pruned networks are compared winner by winner (McNemar's exact test, times the
number of sizes).

"""

_METHOD = """\
## How it was done, and what it cannot say

* Boards are {side}×{side} with edges that meet, {boards} per update, every cell alive with probability {density};
  every network has its own boards and its own first values, uniform within ±1/√(inputs of a filter). Adam,
  cross-entropy, {warmup} updates of warm-up, then a cosine.
* Pruning removes the smallest parameters of each network, biases included, over all layers at once, starts over from
  the first values (rewinding to update 0; Frankle and Carbin, [arXiv 1803.03635](https://arxiv.org/abs/1803.03635)),
  and repeats. "Winners" are the networks that were exact before. The random mask has as many parameters in every
  tensor. All arms see the same boards for as many updates.
* Expert layers are `moe.MoELayer` with the package's own routers: a neighbourhood is a token of ten numbers (nine
  cells and a 1), and one linear map makes the logit. Experts are SwiGLU, with their products of two maps. `updates`:
  median until all 512 were right.
* The study trained 64 networks of each size on a million boards of 32×32; here are fewer and smaller boards, a larger
  learning rate and more of it early. What its networks were initialised with could not be read again while this was
  written; torch's default is used here. Rates are therefore compared in direction, not in height.
* Learning two steps is compared at one budget of updates, and was tried at learning rates 0.005 and 0.008 (more at
  0.008). More updates might help the wider networks; nothing here bounds that. Density of boards matters there too:
  what is rare on them is learnt last.
* Magnitude pruning was tried with three ways of starting over before this recipe was fixed (from update 0, from
  update 150, and without starting over); the first kept most winners exact and is the one shown. A cell automaton of
  nine bits says nothing about language models.
"""


def write_page(
    results_path: Path, folder: Path, command: str = "moe life recipes/life.py --page docs/experiments"
) -> Path:
    """Write life.md and life.png from results.json into a folder; returns the page. Raises UserError."""
    results = read_results(results_path)
    plot(results, folder / "life.png")
    write_text(folder / "life.md", page(results, command))
    return folder / "life.md"


def page(results: Results, command: str) -> str:
    """The page as markdown."""
    life = results.life
    head = _HEAD.format(command=command, parameters=25, boards=192, figure="life.png")
    rows = [[claim.text, claim.here, f"**{claim.verdict}**"] for claim in claims(results)]
    parts = [head + _table(["claim", "here", "verdict"], rows)]
    if results.growing:
        parts.append("## Success against width\n\n" + _growing(results))
    for part in results.pruning:
        parts.append(f"## Pruning the winners of L(1, {part['settings']['width']})\n\n" + _pruning(part))
    for width in results.without_winners:
        parts.append(f"## L(1, {width}) was not pruned\n\nNo network was exact to begin with.\n")
    for part in results.flips:
        rows = [[str(row["flipped"]), str(solved(row))] for row in part["rows"]]
        parts.append("## Flipped signs\n\n" + _table(["flipped, of 25", "exact after training"], rows))
    for part in results.densities:
        rows = [[str(row["density"]), str(solved(row))] for row in part["rows"]]
        title = f"## Density of the training boards, L(1, {part['settings']['width']})\n\n"
        parts.append(title + _table(["density", "exact"], rows))
    if results.experts:
        parts.append("## Expert layers\n\n" + _experts(results.experts))
    method = {"side": life["board"], "boards": life["boards"], "density": life["density"], "warmup": 50}
    return "\n".join([*parts, _METHOD.format(**method)])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _growing(results: Results) -> str:
    rows = []
    for (steps, width), part in sorted(results.growing.items()):
        near = sorted(part["accuracy"])[len(part["accuracy"]) // 2]
        shares = [str(grown(part)), str(without_error(part))]
        rows.append([f"L({steps}, {width})", str(part["parameters"]), *shares, f"{near:.2%}"])
    head = ["network", "parameters", "exact", "no error on random boards", "median share of right cells there"]
    return _table(head, rows)


def _pruning(part: dict[str, Any]) -> str:
    arms = {arm: pruned(part, arm) for arm in (MAGNITUDE, AGAIN, RANDOM)}
    total = part["parameters"]
    rows = [
        [f"{kept} ({kept / total:.0%})", *(str(found[kept]) if kept in found else "" for found in arms.values())]
        for kept in arms[MAGNITUDE]
    ]
    rows[0][2:] = ["", ""]
    words = ["parameters left", "largest kept, rewound", "same mask, new first values", "random mask"]
    smallest = part["smallest"]
    tail = ""
    if smallest:
        left = sum(1 for value in smallest["values"] if value)
        tail = f"\nThe smallest exact network has {left} parameters other than 0; "
        tail += "the solution written by hand has 25, of which two can be 0.\n"
    return _table(words, rows) + tail


def _experts(parts: list[dict[str, Any]]) -> str:
    rows = []
    for part in parts:
        moe = part["settings"]["moe"]
        used = sum(sum(load > 0 for load in row["loads"]) for row in part["rows"]) / len(part["rows"])
        updates = median_updates(part)
        worst = min(row["right"] for row in part["rows"])
        rows.append(
            [
                part["settings"]["label"],
                f"{moe['num_experts']}, {moe['top_k']}, {moe['expert_hidden']}",
                str(layers(part)),
                f"{updates:.0f}" if updates is not None else "–",
                f"{worst} of 512",
                f"{used:.1f}",
            ]
        )
    head = ["layer", "E, K, F", "exact", "updates", "worst layer", "experts with any of the 512"]
    return _table(head, rows)
