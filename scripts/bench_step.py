"""Time one whole training step: ours, our dense twin's, and transformers' Mixtral in a plain AdamW loop, interleaved.

    python scripts/bench_step.py [--threads 2] [--rounds 15] [--json FILE] [--write docs/benchmarks.md] [SETTING=VALUE ...]
    python scripts/bench_step.py --cpu-time --rounds 5        on a machine that others use: processor time, one thread

D 256, 8 layers, F 512, E 8, K 2, rows of 512 tokens, 8 rows a batch, vocabulary 8,192, float32.
Ours is the trainer's own `train_step`: it reads the batch, sums losses and statistics, clips and updates. The dense twin is the
same trainer on the model of equal FLOPs per token that `moe compare` takes. transformers' models start from our weights, get
the same batches as tensors that are there, and do zero_grad, forward with labels, backward, clip_grad_norm_, AdamW (as it comes,
and `fused` beside it); they compute no balancing loss, ours does. If the first logits differ, nothing is timed.

Every round gives each contender one step, in rotating order. Then steps of ours, the twin and the best peer are profiled by
torch, and the time of operators is summed by kind (bench_step_profile.py). Settings can be changed: `train.loss_chunk=0`.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from bench_common import Ratio, clock_of, keep, machine, options, parse, peak_gigaflops, ratios, roof, spread
from bench_step_profile import Profile, profile_of, profile_table
from torch import Tensor, nn

from moe import hf, parallel
from moe.backend import compiled
from moe.config.layout import resolve
from moe.config.load import dump, load
from moe.config.schema import AdamW, BpeTokenizer, Data, GroupedQueryAttention, Model, MoE, Run, Train
from moe.cost import flops_per_step
from moe.cost.counting import flops_by_component
from moe.cost.twin import dense_twin, relative_difference
from moe.data import prepare
from moe.moe_layer import Linear
from moe.routers.topk import Config as TopK
from moe.train.step import State, build_state, train_step

NAME = "bench_step"
TOLERANCE = 1e-3
"""Largest difference of first logits over their largest value."""
OURS, DENSE = "ours", "dense twin"
Step = Callable[[int], int]
"""Does training step i and returns its tokens."""


def step_run(overrides: list[str]) -> Run:
    """The run whose step is timed."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=64)
    run = Run(
        name=NAME,
        model=Model(
            vocab_size=8192,
            dim=256,
            num_layers=8,
            ffn_hidden=1024,
            attention=attention,
            moe=MoE(num_experts=8, top_k=2, expert_hidden=512, router=TopK()),
            document_mask=False,
        ),
        data=Data(sequence_length=512, tokenizer=BpeTokenizer(vocab_size=8192)),
        train=Train(steps=10_000, batch_rows=8, micro_rows=8, optimizer=AdamW(lr=3e-4), device="cpu"),
    )
    return load(dump(run), overrides)


def our_state(run: Run) -> State:
    """The trainer's state of a run, on this process alone."""
    ranks = parallel.start("cpu", run.parallel.timeout_seconds)
    return build_state(run, ranks.arranged(resolve(run, ranks.world_size)), prepare(run.data))


def their_model(state: State, implementation: str) -> nn.Module:
    """transformers' model of our weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = hf.save(state.model, Path(folder) / "model", family="mixtral")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation=implementation
        ).train()


def their_step(model: nn.Module, run: Run, ids_of: Callable[[int], Tensor], *, fused: bool) -> Step:
    """A plain loop's step with our update rule's settings."""
    rule = run.train.optimizer
    assert isinstance(rule, AdamW)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=rule.lr,
        betas=(rule.beta1, rule.beta2),
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        fused=fused or None,
    )

    def step(index: int) -> int:
        ids_BS = ids_of(index)
        optimizer.zero_grad()
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_norm)
        optimizer.step()
        return ids_BS.numel()

    return step


def check_agreement(state: State, models: dict[str, nn.Module], ids_BS: Tensor) -> None:
    """The models compute the same function, else nothing is timed."""
    with torch.no_grad():
        ours = state.model(ids_BS[:1]).logits_BSV
        for name, model in models.items():
            theirs = model(input_ids=ids_BS[:1]).logits
            difference = ((ours - theirs).abs().amax() / theirs.abs().amax()).item()
            if not difference <= TOLERANCE:
                sys.exit(f"first logits of ours and of {name} differ by {difference:.1e}: nothing was timed")


def contenders(run: Run) -> dict[str, Step]:
    """Each contender's step."""
    state, dense = our_state(run), our_state(dense_twin(run))
    rows, ahead = list(range(run.train.batch_rows)), {}

    def ids_of(index: int) -> Tensor:
        if index not in ahead:
            ahead.clear()
            ahead[index] = state.corpus.train_batch(index, rows, batch_rows=len(rows), seed=run.seed).ids_BS
        return ahead[index]

    models = {name: their_model(state, name) for name in ("grouped_mm", "eager")}
    check_agreement(state, models, ids_of(0))
    fused = their_step(their_model(state, "grouped_mm"), run, ids_of, fused=True)
    return {
        OURS: lambda index: train_step(state, index).tokens,
        DENSE: lambda index: train_step(dense, index).tokens,
        **{f"transformers {name}": their_step(model, run, ids_of, fused=False) for name, model in models.items()},
        "transformers grouped_mm, fused AdamW": fused,
    }


@dataclass(frozen=True)
class Row:
    """What one contender took."""

    contender: str
    tokens_per_second: Ratio
    milliseconds: Ratio
    ours: Ratio
    """Our tokens per second as a multiple of its own."""


def time_steps(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> list[Row]:
    """Interleaved rounds, after two that warm up."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for index in range(rounds + 2):
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            start = clock()
            done = steps[name](index)
            if index > 1:
                seconds[name].append(clock() - start)
                tokens[name].append(done)
    speeds = {name: [n / s for n, s in zip(tokens[name], seconds[name], strict=True)] for name in names}
    return [
        Row(name, spread(speeds[name]), spread([1e3 * s for s in seconds[name]]), ratios(speeds[OURS], speeds[name]))
        for name in names
    ]


def best_peer(rows: list[Row]) -> Row:
    """The fastest of transformers' implementations with a plain AdamW."""
    peers = [row for row in rows if row.contender.startswith("transformers") and "fused" not in row.contender]
    return max(peers or rows, key=lambda row: row.tokens_per_second.middle)


def figures(rows: list[Row]) -> dict[str, Ratio]:
    """What a second run is held against, by name."""
    speeds = {f"{row.contender}, tokens per second": row.tokens_per_second for row in rows}
    return speeds | {f"ours over {row.contender}": row.ours for row in rows if row.contender != OURS}


def products_alone(run: Run, clock: Callable[[], float]) -> tuple[float, float]:
    """GFLOP/s of the fastest of 15 products of a layer's size by what computes ours; milliseconds for a step's at that."""
    model, length = run.model, run.data.sequence_length
    tokens = run.train.batch_rows * length
    linear = Linear(model.dim, 2 * model.dim, bias=False)
    linear.compiled = compiled(model.backend)
    x_TD, seconds = torch.randn(tokens, model.dim), []
    with torch.no_grad():
        for _ in range(15):
            start = clock()
            linear(x_TD)
            seconds.append(clock() - start)
    speed = 2 * tokens * 2 * model.dim**2 / min(seconds)
    flops = 3 * tokens * sum(n for part, n in flops_by_component(model, length).items() if part != "scores")
    return speed / 1e9, 1e3 * flops / speed


def page(rows: list[Row], profiles: dict[str, Profile], products: float, facts: dict[str, str]) -> str:
    """The tables of docs/benchmarks.md."""
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += ["| step | tokens/s | milliseconds | ours is, times as fast |", "| --- | --- | --- | --- |"]
    for row in rows:
        speed, milliseconds = (
            [f"{value:,.0f}" for value in ratio] for ratio in (row.tokens_per_second, row.milliseconds)
        )
        cells = [f"{middle} [{low}, {high}]" for low, middle, high in (speed, milliseconds)]
        lines.append(f"| {row.contender} | {cells[0]} | {cells[1]} | {row.ours} |")
    best = best_peer(rows)
    lines += ["", f"Of transformers' implementations in the plain loop, {best.contender.split()[-1]} is the fastest."]
    lines += ["", *profile_table(profiles, products)]
    return "\n".join(lines)


def main() -> None:
    """Time all contenders, profile them, and write what is asked for."""
    parser = options(__doc__, rounds=15, cpu_time="of this process, on one thread")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="of our run and its twin")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="contenders whose names hold one of these words; ours always")
    arguments = parse(parser, NAME)
    if arguments.write and (arguments.cpu_time or arguments.overrides or arguments.only):
        parser.error("--write is for the page's own figures: without --cpu-time, --only and settings")
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    clock = clock_of(arguments)
    transformers.utils.logging.disable_progress_bar()
    run = step_run(arguments.overrides)
    facts = {
        **machine(),
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "clock": "processor time" if arguments.cpu_time else "wall clock",
        "rounds": str(arguments.rounds),
        "GFLOP/s of products of 1024 x 1024 x 1024": f"{peak_gigaflops(torch.float32):.0f}",
        **roof(),
        "GFLOP per step by formula": f"{flops_per_step(run) / 1e9:.0f}",
        "FLOPs per token of the dense twin over ours": f"{1 + relative_difference(run, dense_twin(run)):.4f}",
    }
    speed, products = products_alone(run, clock)
    facts["GFLOP/s of our product of a layer's size"] = f"{speed:.0f}"
    steps = contenders(run)
    if arguments.only:
        steps = {name: step for name, step in steps.items() if any(word in name for word in [OURS, *arguments.only])}
    rows = time_steps(steps, arguments.rounds, clock)
    for row in rows:
        speed, milliseconds = row.tokens_per_second.middle, row.milliseconds.middle
        print(f"{row.contender:38} {speed:8,.0f} tokens/s · {milliseconds:8,.1f} ms · ours is {row.ours} times as fast")
    kept = {OURS, DENSE, best_peer(rows).contender} & set(steps)
    profiles = {name: profile_of(step, arguments.rounds + 2) for name, step in steps.items() if name in kept}
    print("\n".join(profile_table(profiles, products)))
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    content = {"facts": facts, "figures": figures(rows), "rows": [asdict(row) for row in rows], "profiles": profiles}
    content["products_alone_milliseconds"] = products
    keep(arguments, NAME, page(rows, profiles, products, facts), content)


if __name__ == "__main__":
    main()
