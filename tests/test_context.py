"""Rows in parts: every router against itself on whole rows; the rules of parallel.context and tensor, and their refusals.

Attention over parts, and matrices over ranks, are compared with one process by layout_cases.py, which needs several processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import pytest
import torch
from tiny_runs import tiny_run

from moe.config.layout import resolve
from moe.config.load import known_routers, resolve_router
from moe.config.schema import Balance, MoE, RouterConfig
from moe.errors import ConfigError
from moe.moe_layer import MoELayer
from moe.routers.topk import Config as TopK
from moe.routing import Tokens

B, S, D, E, PARTS = 3, 20, 12, 4, 2
VARIANTS = {
    "capacity_factor": (0.0, 0.7),
    "eval_capacity_factor": (0.0, 0.7),
    "estimator": ("dense_mixer", "default_vector", "sparse_mixer"),
    "noise": ("jitter", "gaussian"),
    "ngram": (1, 3),
    "num_groups": (2,),
    "balance": (Balance(weight=1.0, scope="sequence"), Balance(weight=1.0, scope="global")),
}
"""Values of settings that could make a router look at its whole row; a setting of such a kind belongs here."""
WITH = {"noise": {"noise_scale": 0.5}, "num_groups": {"top_groups": 1}}


def cases() -> Iterator[tuple[str, RouterConfig]]:
    """Every router without capacity where it can, and with each value of each of these settings."""
    for name in known_routers():
        default = resolve_router(name).Config()
        without = {
            f.name: 0.0 for f in fields(default) if f.name.endswith("capacity_factor") and name != "expert_choice"
        }
        base = replace(default, **without)
        yield name, base
        for field in sorted({f.name for f in fields(base)} & VARIANTS.keys()):
            for value in VARIANTS[field]:
                try:
                    config = replace(base, **{field: value}, **WITH.get(field, {}))
                    config.check(num_experts=E, top_k=2)
                except (ConfigError, TypeError):
                    continue
                known = resolve_router(name).Config.__annotations__.get(field, "")
                if field != "estimator" or value != "sparse_mixer" or "Straight" not in str(known):
                    yield f"{name} {field}={value}", config


CASES = dict(cases())
DEFAULTS = [CASES[name] for name in known_routers()]


@dataclass
class Meeting:
    """Sums over parts that are computed one after the other: what each part gave is collected first, then added."""

    given: list[list[torch.Tensor]]
    adding: bool = False

    def of(self, part: int):
        """What a part calls to sum over its row."""
        calls = iter(range(1000))

        def sum_over_row(tensor: torch.Tensor) -> torch.Tensor:
            call = next(calls)
            if not self.adding:
                self.given[part].append(tensor.detach())
                return tensor
            return sum(given[call] for given in self.given)  # type: ignore[return-value]

        return sum_over_row


def columns(tokens: Tokens, part: int, parts: int) -> Tokens:
    """The tokens of one part of every row."""
    cut = {
        field.name: value.view(B, parts, -1)[:, part].flatten()
        for field in fields(tokens)
        if field.name.endswith("_T") and (value := getattr(tokens, field.name)) is not None
    }
    return replace(tokens, **cut)


def results(config: RouterConfig, parts: int, length: int, *, training: bool) -> dict[str, torch.Tensor]:
    """Outputs, losses, sums of statistics and the router's gradient of a layer over rows in so many parts."""
    layer = MoELayer(MoE(num_experts=E, top_k=2, expert_hidden=8, router=config), D, layer=1, seed=3, init_std=0.5)
    layer.double().train(training)
    generator = torch.Generator().manual_seed(5)
    # an offset that all tokens share, so that some experts are wanted more than balance gives them
    x = torch.randn(B, length, D, generator=generator, dtype=torch.float64) + 0.5
    ids = torch.randint(0, 30, (B, length), generator=generator)
    valid = torch.arange(length) < torch.tensor([[length], [length // 2 + 1], [3]])
    document = (torch.arange(length) >= length // 2 - 1).long().expand(B, length)
    tokens = replace(Tokens.of(ids, valid_BS=valid, document_BS=document, step=2), step_counts_LE=torch.ones(2, E))
    meeting = Meeting([[] for _ in range(parts)])
    for meeting.adding in (False, True):
        layer.zero_grad()
        outputs, total = [], {}
        for part in range(parts):
            here = replace(columns(tokens, part, parts), sum_over_row=meeting.of(part) if parts > 1 else None)
            y, routing = layer(x.view(B, parts, -1, D)[:, part], here)
            outputs.append(y.detach())
            (sum(loss.value for loss in routing.losses.values()) + y.square().sum()).backward()
            found = {name: loss.value.detach().double() for name, loss in routing.losses.items()}
            found |= {name: v.double() for name, v in routing.statistics.items() if not name.endswith("_max")}
            total = {name: value + total.get(name, 0) for name, value in found.items()}
    grads = {f"grad {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": torch.cat(outputs, 1), **total, **grads}


def evaluates_apart(config: RouterConfig) -> bool:
    """Whether evaluation may look at more than training does."""
    return hasattr(config, "eval_capacity_factor") or config in DEFAULTS


def differs(config: RouterConfig, length: int = S) -> bool:
    """Whether a router does with rows in parts what it does with whole ones."""
    for training in (True, False) if evaluates_apart(config) else (True,):
        whole, parts = (results(config, n, length, training=training) for n in (1, PARTS))
        assert whole.keys() == parts.keys()
        if any(not torch.allclose(parts[key], whole[key], rtol=1e-5, atol=1e-7) for key in whole):
            return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_a_router_routes_parts_as_whole_rows_or_says_why_not(name):
    """Fails for a router that forgets to say so, and for one that refuses what it could do."""
    reason = CASES[name].whole_rows(part=S // PARTS)
    assert differs(CASES[name]) == bool(reason), reason


def test_default_vectors_go_with_parts_of_whole_strides():
    config = TopK(estimator="default_vector")
    assert config.whole_rows(part=8) == ""
    assert not differs(config, length=16)


CONTEXT = ("parallel.context=2", "train.batch_rows=4", "train.micro_rows=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sequence_length=33"], "data.sequence_length (33) must be divisible by parallel.context (2): use"),
        (
            ["model.attention.num_heads=3", "model.attention.num_kv_heads=1"],
            "num_heads (3) must be divisible by parallel.context (2), whose ranks share the heads: use num_heads=4",
        ),
        (["model.moe.router=expert_choice"], "the router needs whole rows: experts choose among the tokens of a row"),
        (["model.moe.router=switch"], "capacity_factor (1.25) counts the tokens of a row: use capacity_factor=0"),
        (["logging.record_routing=true"], "logging.record_routing needs whole rows, and parallel.context is 2"),
        (["train.compile=true"], "train.compile (true) does not go with a model spread over ranks (context=2"),
    ],
)
def test_what_parts_of_rows_cannot_do_is_refused_by_name(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        resolve(tiny_run(tmp_path, *CONTEXT, *overrides), 2)
    assert message in str(caught.value)
    assert "use" in str(caught.value)


HEADS = ("model.attention.num_heads=4", "model.attention.num_kv_heads=2")
TENSOR = ("parallel.tensor=2", "train.batch_rows=4", "train.micro_rows=4")
LATENT = (
    "model.attention=latent",
    *(f"model.attention.{f}" for f in ("kv_rank=7", "nope_dim=4", "rope_dim=4", "value_dim=4")),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.attention.num_heads=3", "model.attention.num_kv_heads=3"],
            "num_heads (3) must be divisible by parallel.tensor (2)",
        ),
        (
            ["model.attention.num_heads=4", "model.attention.num_kv_heads=1"],
            "num_kv_heads (1) must be divisible by parallel.tensor (2): use num_kv_heads=2 or parallel.tensor=1",
        ),
        (["model.moe.shared_hidden=9"], "model.moe.shared_hidden (9) must be divisible by parallel.tensor (2): use 10"),
        (
            ["model.moe=null", "model.ffn_hidden=33"],
            "model.ffn_hidden of block 0 (33) must be divisible by parallel.tensor (2)",
        ),
        (["model.attention.qk_norm=full"], "qk_norm=full is over all 4 heads at once, and parallel.tensor (2)"),
        (
            ["parallel.shard=2", *LATENT, "model.attention.num_heads=4"],
            "kv_rank (7) must be divisible by shard · context (2)",
        ),
        (["train.compile=true"], "train.compile (true) does not go with a model spread over ranks (tensor=2"),
    ],
)
def test_what_cannot_be_cut_over_tensor_ranks_is_refused_by_name(tmp_path, overrides, message):
    named = {override.split("=")[0] for override in overrides}
    heads = [f for f in HEADS if f.split("=")[0] not in named and LATENT[0] not in overrides]
    run = tiny_run(tmp_path, *TENSOR, *heads, *overrides)
    with pytest.raises(ConfigError) as caught:
        resolve(run, 2 * run.parallel.shard)
    assert message in str(caught.value)
    assert "use" in str(caught.value)


def test_experts_are_spread_over_the_ranks_of_a_row(tmp_path):
    layout = resolve(tiny_run(tmp_path, *CONTEXT, "parallel.expert=2"), 2)
    assert (layout.context, layout.expert, layout.expert_shard, layout.expert_replicate) == (2, 2, 1, 1)
