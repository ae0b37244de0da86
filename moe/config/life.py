"""Settings of the Game of Life laboratory (docs/experiments/life.md), and the rules between them.

A recipe for it, recipes/life.py, returns a `Life` as others return a `Run`; `moe life` runs it.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

from moe.config.check import expert_problems
from moe.config.schema import MoE, NonNegativeInt, PositiveFloat, PositiveInt, config
from moe.config.words import joined
from moe.errors import ConfigError

LARGEST_STEPS = 2
"""n up to which every neighbourhood can be tried: 2^9 of one step, 2^25 of two, 2^49 of three."""


@config
class Growing:
    """Networks of growing width: how often does training find the rule?"""

    steps: Annotated[int, Ge(1), Le(LARGEST_STEPS)]
    """n, steps of the game that a network predicts at once."""
    widths: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1, 2, 4, 8)
    """m of each L(n, m): times as many filters as suffice."""
    networks: PositiveInt = 64
    """Networks of each width, each with first values and boards of its own."""
    updates: PositiveInt = 2000
    """Optimizer steps."""
    lr: PositiveFloat = 0.01
    """Largest learning rate of Adam."""


@config
class Pruning:
    """Iterative magnitude pruning of L(1, m) with rewinding, beside a random mask and new first values."""

    width: PositiveInt
    """m of the network that is pruned."""
    networks: PositiveInt = 32
    """Networks, each pruned by its own weights."""
    rounds: PositiveInt = 6
    """Times that the same share of what is left is removed."""
    final_share: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the parameters that is left after the last round."""
    updates: PositiveInt = 1000
    """Optimizer steps of each training."""
    lr: PositiveFloat = 0.01
    """Largest learning rate of Adam."""


@config
class Flips:
    """L(1, 1) trained from the solution written by hand, with the signs of some of its parameters flipped."""

    counts: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = (0, 1, 2, 4, 8)
    """Parameters whose sign is flipped, chosen by chance."""
    networks: PositiveInt = 64
    """Networks for each count."""
    updates: PositiveInt = 1500
    """Optimizer steps."""
    lr: PositiveFloat = 0.01
    """Largest learning rate of Adam."""


@config
class Densities:
    """One L(1, m) trained on boards of different densities."""

    width: PositiveInt = 2
    """m."""
    densities: Annotated[tuple[Annotated[float, Gt(0), Lt(1)], ...], MinLen(1)] = (0.1, 0.2, 0.38, 0.5, 0.7)
    """Probabilities that a cell of a training board is alive."""
    networks: PositiveInt = 64
    """Networks for each density."""
    updates: PositiveInt = 1500
    """Optimizer steps."""
    lr: PositiveFloat = 0.01
    """Largest learning rate of Adam."""


@config
class ExpertArm:
    """The same task for one expert layer of this package; a neighbourhood is a token."""

    label: str
    """What tables and the figure call it."""
    moe: MoE
    """The layer; one expert that every token takes is a dense SwiGLU."""
    layers: PositiveInt = 16
    """Layers that are trained, each with a seed of its own."""
    updates: PositiveInt = 400
    """Optimizer steps."""
    lr: PositiveFloat = 0.03
    """Largest learning rate of Adam."""


@config
class Life:
    """The laboratory: every part is skipped if its list is empty."""

    seed: NonNegativeInt = 0
    """First values and boards are functions of it."""
    board: Annotated[int, Ge(5)] = 8
    """Side of the square boards, whose edges meet (a torus)."""
    density: Annotated[float, Gt(0), Lt(1)] = 0.38
    """Probability that a cell of a training board is alive; 0.38 is the study's."""
    boards: PositiveInt = 8
    """Boards in a batch."""
    threads: PositiveInt = 1
    """Threads of torch; another number may round otherwise."""
    growing: tuple[Growing, ...] = ()
    """Success against width."""
    pruning: tuple[Pruning, ...] = ()
    """Success against the share of parameters that is left."""
    flips: tuple[Flips, ...] = ()
    """Success against flipped signs."""
    densities: tuple[Densities, ...] = ()
    """Success against the density of the boards."""
    experts: tuple[ExpertArm, ...] = ()
    """Expert layers."""


def check_life(life: Life) -> None:
    """Raise ConfigError naming every rule between fields that the laboratory breaks."""
    labels = [arm.label for arm in life.experts]
    problems = [
        text.replace("model.moe", f"experts.{i}.moe")
        for i, arm in enumerate(life.experts)
        for text in expert_problems(arm.moe)
    ]
    problems += [
        f"experts must have different labels, and {label!r} is given {labels.count(label)} times: rename all but one"
        for label in dict.fromkeys(labels)
        if labels.count(label) > 1
    ]
    problems += [
        f"flips.{i}.counts must be at most 25, the parameters of L(1, 1), and {max(flips.counts)} is more: "
        f"use e.g. flips.{i}.counts=[0,1]"
        for i, flips in enumerate(life.flips)
        if max(flips.counts) > 25
    ]
    if problems:
        raise ConfigError(joined(problems))
