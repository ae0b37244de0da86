"""Published throughput of MoE trainings against what `moe plan`'s model predicts for the same model, GPUs and layout.

    python scripts/plan_published.py [--write docs/scaling.md]

prints the table, or renews it, the constants and the layouts chosen for shipped recipes between their marks in a page. One set
of constants serves all rows (`moe.cost.step_time.Assumptions`); what a row may say of its software is what its source says:
which transfers run behind computation, and how many parts of the model a pipeline rank holds.
"""

import argparse
import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe.config.layout import Layout
from moe.config.load import load
from moe.config.schema import (
    AdamW,
    Balance,
    Data,
    GroupedQueryAttention,
    LatentAttention,
    Model,
    MoE,
    Parallel,
    Run,
    Train,
)
from moe.cost.search import search
from moe.cost.step_time import OURS, Assumptions, Cluster, predict_step
from moe.cost.throughput import train_flops_per_token
from moe.routers.topk import Config as TopK
from moe_triton.chips import LINKS
from moe_triton.roofline import MACHINES

ROOT = Path(__file__).parents[1]
MEGATRON = replace(OURS, hide_copies=0.9)
"""Gradients are reduced while the backward pass runs (its options overlap-grad-reduce and overlap-param-gather)."""
DEEP_EP = {"exchange_by_node": True, "network_exchange": 0.85}
"""DeepEP hands vectors on within a node; its README measures 43 to 58 GB/s between nodes with 400 Gb/s cards."""


@dataclass(frozen=True)
class Training:
    """One published throughput."""

    name: str
    gpus: int
    machine: str
    run: Callable[[], Run]
    layout: Layout
    assume: Assumptions
    rate: float
    """Tokens per second and GPU."""
    stated: str
    """What the source prints, where that is not the rate."""
    source: str
    fitted: bool
    """Whether the constants were chosen with this row in view."""


# -------------------------------------------------------------------------------------------------------------- models


def _run(name: str, model: Model, parallel: Parallel | None = None, **train: Any) -> Run:
    common = {"steps": 1, "optimizer": AdamW(lr=1e-4), "precision": "bfloat16"}
    length = train.pop("length", 4096)
    settings = Train(**{**common, **train})
    return Run(
        name=name,
        model=replace(model, document_mask=False),
        data=Data(sequence_length=length),
        train=settings,
        parallel=parallel or Parallel(),
    )


def _router() -> TopK:
    """A balance loss per sequence: one over the whole step would need a first pass, which none of these runs had."""
    return TopK(gate="selected", balance=Balance(weight=0.001, scope="sequence"), z_weight=0.0)


def _recipe(name: str) -> Model:
    model = load(str(ROOT / f"recipes/{name}.py")).model
    assert model.moe is not None
    return replace(model, moe=replace(model.moe, router=_router()))


def deepseek_v3(precision: str = "native") -> Model:
    """DeepSeek-V3 without its multi-token prediction (arXiv 2412.19437, section 4.2)."""
    return Model(
        vocab_size=129280,
        dim=7168,
        num_layers=61,
        ffn_hidden=18432,
        attention=LatentAttention(num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoE(
            num_experts=256,
            top_k=8,
            expert_hidden=2048,
            shared_hidden=2048,
            first_dense=3,
            router=_router(),
            precision=precision,  # pyright: ignore[reportArgumentType]
        ),
    )


def qwen3_235b() -> Model:
    """Qwen3-235B-A22B, from its config.json."""
    attention = GroupedQueryAttention(num_heads=64, num_kv_heads=4, head_dim=128, qk_norm="head")
    moe = MoE(num_experts=128, top_k=8, expert_hidden=1536, router=_router())
    return Model(vocab_size=151936, dim=4096, num_layers=94, ffn_hidden=12288, attention=attention, moe=moe)


def kimi_k2() -> Model:
    """Kimi K2 (arXiv 2507.20534), from its config.json."""
    attention = LatentAttention(num_heads=64, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    moe = MoE(num_experts=384, top_k=8, expert_hidden=2048, shared_hidden=2048, first_dense=1, router=_router())
    return Model(vocab_size=163840, dim=7168, num_layers=61, ffn_hidden=18432, attention=attention, moe=moe)


def gpt_oss(layers: int, experts: int) -> Model:
    """gpt-oss 20B (24 layers, 32 experts) and 120B (36, 128), from their config.json."""
    attention = GroupedQueryAttention(
        num_heads=64, num_kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True, windows=(128, 0)
    )
    moe = MoE(num_experts=experts, top_k=4, expert_hidden=2880, router=_router())
    return Model(vocab_size=201088, dim=2880, num_layers=layers, ffn_hidden=2880, attention=attention, moe=moe)


# ----------------------------------------------------------------------------------------------------------- trainings

AUTOMODEL = "NeMo AutoModel, docs/performance-summary.md, 2025-10-02"
QWEN_ZOO = (
    "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md; context 2 stands for its tensor 2 with sequence parallelism"
)
TRAININGS = (
    Training(
        "Qwen3-30B-A3B",
        8,
        "h100",
        lambda: _run(
            "qwen3-30b", _recipe("qwen3_30b_a3b"), batch_rows=512, micro_rows=4, activation_checkpointing=True
        ),
        Layout(shard=8, expert=8),
        replace(OURS, **DEEP_EP),
        12_040,
        "",
        AUTOMODEL,
        True,
    ),
    Training(
        "Mixtral-8x7B",
        64,
        "h100",
        lambda: _run("mixtral", _recipe("mixtral_8x7b"), Parallel(dispatch="rows"), batch_rows=256, micro_rows=1),
        Layout(pipeline=4, replicate=16, expert=8),
        replace(MEGATRON, virtual_stages=8),
        468e12 / train_flops_per_token(_recipe("mixtral_8x7b"), 4096),
        "468 TFLOP/s per GPU",
        "Megatron-LM, megatron/core/transformer/moe/README.md, MCore 0.9; layout: its table of mappings",
        True,
    ),
    Training(
        "OLMoE-1B-7B",
        256,
        "h100",
        lambda: _run("olmoe", _recipe("olmoe_1b_7b"), batch_rows=1024, micro_rows=4),
        Layout(shard=256),
        OURS,
        23_600,
        "",
        "arXiv 2409.02060, section 4.1; GPUs and batch as its main run's (5.1T tokens in about 10 days agrees)",
        False,
    ),
    Training(
        "gpt-oss-20b",
        8,
        "h100",
        lambda: _run("gpt-oss-20b", gpt_oss(24, 32), batch_rows=256, micro_rows=2),
        Layout(shard=8, expert=8),
        replace(OURS, **DEEP_EP),
        13_058,
        "",
        AUTOMODEL,
        False,
    ),
    Training(
        "gpt-oss-120b",
        64,
        "h100",
        lambda: _run("gpt-oss-120b", gpt_oss(36, 128), batch_rows=512, micro_rows=2),
        Layout(shard=64, expert=64),
        replace(OURS, **DEEP_EP),
        7_626,
        "",
        AUTOMODEL,
        False,
    ),
    Training(
        "Qwen3-235B-A22B",
        256,
        "h100",
        lambda: _run("qwen3-235b", qwen3_235b(), batch_rows=2048, micro_rows=1),
        Layout(pipeline=8, replicate=16, context=2, expert=32),
        replace(MEGATRON, virtual_stages=4, **DEEP_EP),
        2048 * 4096 / 19.7 / 256,
        "19.7 s per step of 2,048 rows",
        QWEN_ZOO,
        False,
    ),
    Training(
        "DeepSeek-V3",
        256,
        "h100",
        lambda: _run("deepseek-v3", deepseek_v3(), batch_rows=512, micro_rows=1, activation_checkpointing=True),
        Layout(pipeline=4, shard=64, expert=64),
        replace(OURS, virtual_stages=8, **DEEP_EP),
        1_002,
        "",
        AUTOMODEL,
        False,
    ),
    Training(
        "DeepSeek-V3",
        1024,
        "h100",
        lambda: _run("deepseek-v3", deepseek_v3(), batch_rows=8192, micro_rows=1, activation_checkpointing=True),
        Layout(pipeline=4, shard=256, expert=64),
        replace(OURS, virtual_stages=8, **DEEP_EP),
        865,
        "",
        AUTOMODEL,
        False,
    ),
    Training(
        "Kimi K2",
        256,
        "h100",
        lambda: _run("kimi-k2", kimi_k2(), batch_rows=512, micro_rows=1, activation_checkpointing=True),
        Layout(pipeline=8, shard=32, expert=32),
        replace(OURS, virtual_stages=4, **DEEP_EP),
        924,
        "",
        AUTOMODEL,
        False,
    ),
    Training(
        "Qwen3-235B-A22B",
        256,
        "h100",
        lambda: _run("qwen3-235b", qwen3_235b(), batch_rows=2048, micro_rows=4, activation_checkpointing=True),
        Layout(shard=128, context=2, expert=8),
        replace(MEGATRON, **DEEP_EP),
        2048 * 4096 / 17.6 / 256,
        "17.6 s per step of 2,048 rows",
        QWEN_ZOO,
        False,
    ),
    Training(
        "DeepSeek-V3",
        2048,
        "h800",
        lambda: _run("deepseek-v3", deepseek_v3("fp8_block"), batch_rows=15360, micro_rows=1),
        Layout(pipeline=16, replicate=128, expert=64),
        replace(MEGATRON, virtual_stages=3, hide_exchange=1.0, computing=112 / 132),
        1e12 / (180e3 * 3600),
        "180K GPU hours per 1T tokens",
        "arXiv 2412.19437, section 4.2 and table 1",
        False,
    ),
)


PLANNED = (
    ("tiny_stories_gpu", 1, "a100"),
    ("olmoe_1b_7b", 8, "h100"),
    ("olmoe_1b_7b", 64, "h100"),
    ("deepseek_v2_lite", 64, "h100"),
    ("qwen3_30b_a3b", 64, "h100"),
    ("mixtral_8x7b", 64, "h100"),
)
"""Recipe, GPUs and their kind."""


def cluster_of(name: str) -> Cluster:
    """A machine of the roofline table; an H800 is an H100 with slower links."""
    if name == "h800":
        return Cluster(MACHINES["h100"], LINKS["H800"])
    return Cluster.of(MACHINES[name])


def rows() -> list[tuple[Training, float]]:
    """Each training with the predicted tokens per second and GPU."""
    predicted = []
    for training in TRAININGS:
        step = predict_step(training.run(), training.layout, cluster_of(training.machine), training.assume)
        predicted.append((training, step.tokens_per_second / training.gpus))
    return predicted


def table() -> str:
    """The comparison in Markdown."""
    lines = [
        "| model | GPUs | layout, in this project's names | tokens/s per GPU, published | predicted | error | constants |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sources: dict[str, int] = {}
    for training, rate in rows():
        note = sources.setdefault(training.source, len(sources) + 1)
        stated = f" ({training.stated})" if training.stated else ""
        lines.append(
            f"| {training.name} | {training.gpus} {training.machine.upper()} | {training.layout.describe()} | "
            f"{training.rate:,.0f}{stated} [{note}] | {rate:,.0f} | {rate / training.rate - 1:+.0%} | "
            f"{'chosen with it in view' if training.fitted else 'held out'} |"
        )
    notes = [f"{number}. {source}." for source, number in sources.items()]
    return "\n".join([*lines, "", "Sources:", "", *notes])


def plans() -> str:
    """What `moe plan` chooses for shipped recipes, in Markdown."""
    lines = [
        "| recipe | GPUs | chosen | rows per pass | recompute | GiB per GPU | tokens/s | MFU |",
        "| --- " * 8 + "|",
    ]
    for recipe, gpus, gpu in PLANNED:
        run = load(str(ROOT / f"recipes/{recipe}.py"))
        best = search(run, gpus, cluster_of(gpu)).plans[0]
        lines.append(
            f"| `{recipe}` | {gpus} {gpu.upper()} | {best.layout.describe()} | {best.run.train.micro_rows} | "
            f"{'yes' if best.run.train.activation_checkpointing else 'no'} | {best.memory_total / 2**30:.0f} | "
            f"{best.step.tokens_per_second:,.0f} | {best.step.mfu:.0%} |"
        )
    return "\n".join(lines)


def constants() -> str:
    """The constants with their meanings in Markdown."""
    lines = ["| constant | value | meaning |", "| --- | --- | --- |"]
    texts = described(Assumptions)
    lines += [f"| `{field.name}` | {getattr(OURS, field.name):g} | {texts[field.name]} |" for field in fields(OURS)]
    return "\n".join(lines)


def described(cls: type) -> dict[str, str]:
    """The docstring under each field of a class, from its source."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in pairwise(body.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(after.value, ast.Constant)
            found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


PARTS = {"plans": plans, "published": table, "constants": constants}


def renewed(page: str, names: Iterable[str] = PARTS) -> str:
    """A page with the text between its marks made anew."""
    for name in names:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{PARTS[name]()}\n{end}{tail}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page to renew")
    options = parser.parse_args()
    if options.write is None:
        print(table())
    else:
        options.write.write_text(renewed(options.write.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
