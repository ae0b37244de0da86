"""Time one expert layer, forward and backward: ours, transformers', and a dense layer of equal active FLOPs, interleaved.

    python scripts/bench_layer.py [--dtype float32 bfloat16] [--threads 1 2] [--tokens same new] [--rounds 15] [--json FILE]
    python scripts/bench_layer.py --issue --peers [--write docs/benchmarks.md]

Every round runs each contender once, in rotating order, so that a machine that slows down slows all of them down. The rounds
are done in `--passes` fresh processes, one after another, each over all shapes: where a process's memory lies, and which minute
it is, move a figure by a tenth and more, and belong to its spread. What is reported is each contender's speed as a share of the
dense layer's: the median over rounds of dense time / its time, with quartiles, or with the lowest and the highest median of a
process where they are further out. The contenders that compute the same function are compared first; if they disagree nothing
is timed.

`--tokens same` gives every round the same tokens, `new` others: then experts have other numbers of rows each time, as they
have in training. `dense` is computed by torch; beside it the dense layer by our compiled kernels, and our layer without
them (`moe.backend=torch`). `products` is the floor of torch's own: nothing but the matrix products of each expert's size,
forward and backward, one after another into memory that is there. `--issue` is both types at one thread and at
two, the same tokens. `--peers` adds other projects' layers, those that are installed or those named;
bench_layer_peers.py says how each differs.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import transformers
from bench_common import clock_of, in_passes, keep, machine, options, parse, peak_gigaflops, ratios_of_passes, roof
from bench_layer_page import COMPILED, NAME, PLAIN, Row, figures, print_row, tables
from bench_layer_peers import PEERS, build_peers, installed, missing
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe.config.schema import Balance, MoE
from moe.moe_layer import MoELayer, SwiGLU
from moe.routers.topk import Config as TopK

SHAPES = [(4096, 512, 512, 8, 2), (4096, 512, 256, 64, 8), (1024, 256, 512, 16, 2), (4096, 128, 256, 8, 2)]
"""(T, D, F, E, K)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AGREEMENT = {"float32": (0.99, 1e-4), "bfloat16": (0.5, 5e-2)}
"""Share of the tokens whose relative error must be below the tolerance. transformers' router works in the type of x, ours
in float32: in bfloat16 a token whose K-th and next expert are close may go to the other one, in both directions."""


def build_ours(shape: tuple[int, ...], backend: Literal["auto", "torch"] = "auto") -> MoELayer:
    """Our layer: softmax, top-k, renormalised; the losses' weights are 0 as transformers' block computes none."""
    _, D, F, E, K = shape
    router = TopK(balance=Balance(weight=0.0), z_weight=0.0)
    return MoELayer(
        MoE(num_experts=E, top_k=K, expert_hidden=F, router=router, backend=backend), D, layer=0, init_std=0.05
    )


def build_theirs(ours: MoELayer, shape: tuple[int, ...], implementation: str) -> nn.Module:
    """transformers' Qwen3 block with our weights."""
    _, D, F, E, K = shape
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    experts = ours.experts
    block.load_state_dict(
        {
            "gate.weight": ours.router.get_parameter("weight_ED"),
            "experts.gate_up_proj": torch.cat((experts.w_gate_EDF, experts.w_up_EDF), dim=2).transpose(1, 2),
            "experts.down_proj": experts.w_down_EFD.transpose(1, 2),
        }
    )
    return block


def contenders(
    shape: tuple[int, ...], dtype: torch.dtype, peers: list[str]
) -> tuple[dict[str, Callable], dict[str, nn.Module], Callable[[int], Tensor]]:
    """Functions of x that do a forward and a backward pass, the layers of some, and x [1, T, D] of a round.

    Weights are of the type that is timed.
    """
    T, D, F, _, K = shape
    torch.manual_seed(0)
    ours = build_ours(shape)
    modules = {name: build_theirs(ours, shape, name).to(dtype) for name in ("grouped_mm", "eager")}
    others = build_peers(peers, ours, shape, dtype)
    dense = SwiGLU(D, K * F)
    nn.init.normal_(dense.gate.weight, std=0.05)
    layers: dict[str, nn.Module] = {"dense": dense.to(dtype), "ours": ours}
    if ours.experts.backend == "cpu":
        plain = build_ours(shape, "torch")
        plain.load_state_dict(ours.state_dict())
        layers |= {PLAIN: plain, COMPILED: copy.deepcopy(dense)}
        for part in layers[COMPILED].modules():
            part.compiled = True  # type: ignore[assignment]
    for layer in layers.values():
        if isinstance(layer, MoELayer):
            layer.experts.to(dtype)  # the timed type, like transformers'; the router stays float32, as in training
    layers |= {f"transformers {name}": module for name, module in modules.items()} | others

    def tokens(index: int) -> Tensor:
        return torch.randn(1, T, D, generator=torch.Generator().manual_seed(index)).to(dtype)

    functions = {name: _forward_backward(layer) for name, layer in layers.items()}
    return {**functions, "products": products(ours, tokens(0))}, layers, tokens


def products(ours: MoELayer, x: Tensor) -> Callable[[Tensor], None]:
    """The nine matrix products of each expert at the numbers of rows that x gives, and nothing else."""
    with torch.no_grad():
        counts = ours.experts.plan(ours(x)[1]).counts_E.tolist()
    experts = ours.experts
    gate, up, down = (w.detach().unbind() for w in (experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD))
    dgate, dup, ddown = (torch.empty_like(w) for w in (gate[0], up[0], down[0]))
    D, F = gate[0].shape
    inside, hidden = x[0, :1].expand(max(counts), D).contiguous(), x.new_zeros(max(counts), F)
    model_out, hidden_out = torch.empty_like(inside), torch.empty_like(hidden)

    def run(_: Tensor) -> None:
        for e, n in enumerate(counts):
            outer, inner, to_model, to_hidden = inside[:n], hidden[:n], model_out[:n], hidden_out[:n]
            for weight, gradient in ((gate[e], dgate), (up[e], dup)):
                torch.mm(outer, weight, out=to_hidden)
                torch.mm(inner, weight.t(), out=to_model)
                torch.mm(outer.t(), inner, out=gradient)
            torch.mm(inner, down[e], out=to_model)
            torch.mm(outer, down[e].t(), out=to_hidden)
            torch.mm(inner.t(), outer, out=ddown)

    return run


def _forward_backward(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        y.backward(x.detach())
        assert x.grad is not None
        for parameter in layer.parameters():
            parameter.grad = None
        return torch.stack((y.detach(), x.grad))

    return run


def check_agreement(functions: dict[str, Callable], x: torch.Tensor, share: float, tolerance: float) -> None:
    """Output and gradient of ours are those of all that compute the same, for a share of the tokens, or nothing is timed."""
    ours = functions["ours"](x).float()
    same = [name for name in functions if name.startswith("transformers") or (name in PEERS and PEERS[name].same)]
    for name in same:
        theirs = functions[name](x).float()
        errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        error = errors.flatten().quantile(share).item()
        if not error <= tolerance:
            sys.exit(f"ours and {name} differ by {error:.1e} (at most {tolerance:.0e}): nothing was timed")


class Case(NamedTuple):
    """One line of a table."""

    threads: int
    tokens: str
    dtype: str
    shape: tuple[int, ...]


class Found(NamedTuple):
    """What the rounds of a case took."""

    seconds: dict[str, list[float]]
    """By contender."""
    dropped: dict[str, float]
    """Share of the routed rows that a contender left out, by contender."""


def time_shape(case: Case, rounds: range, clock: Callable[[], float], peers: list[str]) -> Found:
    """Interleaved rounds of one case, after one that warms up; before the first of all, whether contenders agree."""
    functions, layers, tokens_of = contenders(case.shape, DTYPES[case.dtype], peers)
    x = tokens_of(0)
    if rounds.start == 0:
        check_agreement(functions, x, *AGREEMENT[case.dtype])
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in (-1, *rounds):
        if case.tokens == "new":
            x = tokens_of(index + 1)
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            start = clock()
            functions[name](x)
            if index >= 0:
                seconds[name].append(clock() - start)
    return Found(seconds, {name: getattr(layers.get(name), "dropped", 0.0) for name in names})


def one_pass(
    rounds: range, cases: list[Case], clock: Callable[[], float], peers: list[str]
) -> tuple[dict[str, float], list[Found]]:
    """Speeds of this process, GFLOP/s by name, and what each case took: what a fresh process is started for."""
    speeds: dict[str, float] = {}
    found = []
    for (threads, tokens), some in groupby(cases, key=lambda case: case[:2]):
        torch.set_num_threads(threads)
        speeds |= {name: float(value) for name, value in roof().items()}
        for dtype, several in groupby(some, key=lambda case: case.dtype):
            speeds[f"GFLOP/s {dtype} {threads} threads"] = peak_gigaflops(DTYPES[dtype])
            for case in several:
                print(f"  {dtype}, {threads} threads, {tokens} tokens, {case.shape}", file=sys.stderr, flush=True)
                found.append(time_shape(case, rounds, clock, peers))
    return speeds, found


def rows_of(case: Case, passes: Sequence[Found]) -> list[Row]:
    """A case's row for each contender, of the rounds of all passes."""
    seconds = {name: [found.seconds[name] for found in passes] for name in passes[0].seconds}
    return [
        Row(
            shape=case.shape,
            dtype=case.dtype,
            threads=case.threads,
            tokens=case.tokens,
            contender=name,
            share=ratios_of_passes(seconds["dense"], taken),
            ours=ratios_of_passes(taken, seconds["ours"]),
            milliseconds=1000 * statistics.median(value for process in taken for value in process),
            dropped=statistics.fmean(found.dropped[name] for found in passes),
        )
        for name, taken in seconds.items()
    ]


def _parser() -> argparse.ArgumentParser:
    """The options."""
    parser = options(__doc__, rounds=15, passes=6, cpu_time="of this process, on one thread")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="(default: %(default)s)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", nargs="+", choices=["same", "new"], default=["same"], help="in every round (default: %(default)s)"
    )
    shapes = ", ".join(f"{index}: {shape}" for index, shape in enumerate(SHAPES))
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=int,
        choices=range(len(SHAPES)),
        default=list(range(len(SHAPES))),
        help=f"T, D, F, E, K by number ({shapes}; default: all)",
    )
    parser.add_argument("--issue", action="store_true", help="both types at one thread and at two")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        metavar="NAME",
        help=f"other projects' layers ({', '.join(PEERS)}); without a name those that are installed",
    )
    return parser


def main() -> None:
    """Time all shapes, print a table and write what is asked for."""
    parser = _parser()
    arguments = parse(parser, NAME)
    if arguments.peers and missing(arguments.peers):
        parser.error(missing(arguments.peers))
    peers = arguments.peers or ([] if arguments.peers is None else installed())
    if arguments.cpu_time and (arguments.issue or arguments.threads != [1]):
        parser.error("--cpu-time adds up the threads' times: it goes with --threads 1, and not with --issue")
    tables_of = [(threads, tokens) for tokens in arguments.tokens for threads in arguments.threads]
    dtypes = arguments.dtype
    if arguments.issue:
        tables_of, dtypes = [(1, "same"), (2, "same")], list(DTYPES)
    cases = [
        Case(threads, tokens, dtype, SHAPES[index])
        for threads, tokens in tables_of
        for dtype in dtypes
        for index in arguments.shapes
    ]
    passes = in_passes(arguments.rounds, arguments.passes, one_pass, cases, clock_of(arguments), peers)
    speeds = {name: max(speeds[name] for speeds, _ in passes) for name in passes[0][0]}
    of_cases = zip(*(found for _, found in passes), strict=True)
    rows = [row for case, found in zip(cases, of_cases, strict=True) for row in rows_of(case, found)]
    for row in rows:
        print_row(row)
    facts = {
        **machine(),
        "transformers": transformers.__version__,
        "rounds": f"{arguments.rounds} in {arguments.passes} processes",
        **{name: f"{value:.0f}" for name, value in speeds.items()},
    }
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    content = {"facts": facts, "figures": figures(rows), "rows": [asdict(row) for row in rows]}
    keep(arguments, NAME, tables(rows, facts), content)


if __name__ == "__main__":
    main()
