"""What a profile is of: the shape of an expert layer, the chip, and the rows that each expert takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.analysis.rows import read_routing
from moe.config.load import load
from moe.config.schema import expert_dim, expert_widths
from moe.errors import ConfigError, UserError
from moe_triton import roofline
from moe_triton.roofline import MACHINES, Machine, Shape

SHAPE = re.compile(r"\s*\d+\s*(,\s*\d+\s*){4}")


@dataclass(frozen=True)
class Routing:
    """Rows per expert, and where they come from."""

    counts_LE: tuple[tuple[float, ...], ...]
    """One tuple per layer of the record; one in all for a made-up routing."""
    layers: tuple[int, ...]
    """True indices of the layers; empty for a made-up routing."""
    origin: str


def shape_of(target: str, overrides: Sequence[str] = ()) -> Shape:
    """The expert layer of a recipe (T: the tokens of a micro-batch), or of the text "T,D,F,E,K"."""
    if SHAPE.fullmatch(target):
        if overrides:
            raise ConfigError(
                f"a shape ({target}) has no settings to override ({overrides[0]}): change the shape itself"
            )
        T, D, F, E, K = (int(part) for part in target.split(","))
        if min(T, D, F, E, K) < 1 or K > E:
            raise ConfigError(f"the shape T,D,F,E,K = {target} must be positive, with K ({K}) at most E ({E})")
        return Shape(T, D, F, E, K)
    if re.fullmatch(r"[\d\s,]+", target):
        count = len(target.split(","))
        raise ConfigError(f"a shape is five numbers T,D,F,E,K, and {target} has {count}: e.g. 32768,2048,1024,64,8")
    run = load(target, overrides)
    moe = run.model.moe
    if moe is None:
        raise ConfigError(f"{target} has no expert layers: profile a sparse recipe, or a shape T,D,F,E,K")
    widths = set(expert_widths(moe))
    if len(widths) > 1:
        raise ConfigError(
            f"moe profile describes the grouped kernels, which take experts of one width, and the experts of {target} have "
            f"{len(widths)} ({min(widths)} to {max(widths)}): profile a shape T,D,F,E,K, or set model.moe.expert_widths=[]"
        )
    rows = moe.router.rows_per_token(num_experts=moe.num_experts, top_k=moe.top_k)
    T = run.train.micro_rows * run.data.sequence_length
    return Shape(T, expert_dim(run.model), min(widths), moe.num_experts, rows)


def machine_of(chip: str) -> Machine:
    """A chip by name. Raises ConfigError listing the known ones."""
    if chip not in MACHINES:
        raise ConfigError(f"chip {chip!r} is not in the table of the roofline: use one of {', '.join(MACHINES)}")
    return MACHINES[chip]


def routing_of(routing: str, shape: Shape) -> Routing:
    """Rows per expert: "uniform", "zipf", or those of the last step in a routing.jsonl."""
    if routing == "uniform":
        return Routing((tuple(roofline.uniform_counts(shape)),), (), "uniform: experts drawn at random")
    if routing == "zipf":
        return Routing((tuple(roofline.zipf_counts(shape)),), (), "zipf: experts drawn with probability 1/rank")
    path = Path(routing)
    if not path.is_file():
        raise ConfigError(
            f"routing {routing!r} must be uniform, zipf, or the routing.jsonl of a run, which does not exist"
        )
    rows = read_routing(path)
    if not rows:
        raise UserError(f"{path} holds no line: train at least logging.routing_every steps.")
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    experts = len(last[0]["counts"])
    if experts != shape.E:
        raise ConfigError(
            f"{path} counts {experts} experts and the shape has {shape.E}: profile the recipe that the run was made from"
        )
    counts = tuple(tuple(map(float, row["counts"])) for row in last)
    if not all(sum(layer) > 0 for layer in counts):
        raise UserError(
            f"{path}: at step {last[0]['step']} a layer has no rows at all, so there is nothing to profile."
        )
    return Routing(counts, tuple(row["layer"] for row in last), f"{path}, step {last[0]['step']}")
