"""Time one expert layer, forward and backward: ours, transformers', and a dense layer of equal active FLOPs, interleaved.

    python scripts/bench_layer.py [--dtype float32 bfloat16] [--threads 1] [--rounds 15] [--json FILE]

Every round runs each contender once, in rotating order, so that a machine that slows down slows all of them down. What
is reported is each contender's speed as a share of the dense layer's: the median over rounds of dense time / its time,
with quartiles. The contenders that compute the same function are compared first; if they disagree nothing is timed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
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


@dataclass(frozen=True)
class Row:
    """One contender at one shape: speed as a share of the dense layer's, and milliseconds."""

    shape: tuple[int, ...]
    dtype: str
    threads: int
    contender: str
    share: float
    share_low: float
    share_high: float
    milliseconds: float


def build_ours(shape: tuple[int, ...]) -> MoELayer:
    """Our layer: softmax, top-k, renormalised; the losses' weights are 0 as transformers' block computes none."""
    _, D, F, E, K = shape
    router = TopK(balance=Balance(weight=0.0), z_weight=0.0)
    return MoELayer(
        MoE(num_experts=E, top_k=K, expert_hidden=F, router=router, backend="torch"), D, layer=0, init_std=0.05
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


def contenders(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Callable], torch.Tensor]:
    """Functions of x that do a forward and a backward pass, and x [1, T, D]. Weights are of the type that is timed."""
    T, D, F, _, K = shape
    torch.manual_seed(0)
    x = torch.randn(1, T, D)
    ours = build_ours(shape)
    modules = {name: build_theirs(ours, shape, name).to(dtype) for name in ("grouped_mm", "eager")}
    dense = SwiGLU(D, K * F)
    nn.init.normal_(dense.gate.weight, std=0.05)
    layers: dict[str, nn.Module] = {"dense": dense.to(dtype), "ours": ours}
    # the experts in the timed type, like transformers'; the router stays float32, as in training
    ours.experts.to(dtype)
    layers |= {f"transformers {name}": module for name, module in modules.items()}
    return {name: _forward_backward(layer) for name, layer in layers.items()}, x.to(dtype)


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
    """Output and input gradient of ours equal transformers' for a share of the tokens, else nothing is timed."""
    ours = functions["ours"](x).float()
    for name in ("transformers grouped_mm", "transformers eager"):
        theirs = functions[name](x).float()
        errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        error = errors.flatten().quantile(share).item()
        if not error <= tolerance:
            sys.exit(f"ours and {name} differ by {error:.1e} (at most {tolerance:.0e}): nothing was timed")


def time_shape(shape: tuple[int, ...], dtype: str, rounds: int) -> list[Row]:
    """Interleaved rounds at one shape."""
    functions, x = contenders(shape, DTYPES[dtype])
    check_agreement(functions, x, *AGREEMENT[dtype])
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(round_index + offset) % len(names)]
            start = time.perf_counter()
            functions[name](x)
            if round_index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in names:
        shares = [dense / own for dense, own in zip(seconds["dense"], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        milliseconds = 1000 * statistics.median(seconds[name])
        rows.append(Row(shape, dtype, torch.get_num_threads(), name, middle, low, high, milliseconds))
    return rows


def versions() -> dict[str, str]:
    """What the figures depend on."""
    flags = Path("/proc/cpuinfo")
    model = (
        next((line.split(":")[1].strip() for line in flags.open() if line.startswith("model name")), "")
        if flags.exists()
        else ""
    )
    return {
        "cpu": model or platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Time all shapes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in versions().items()), f"· {arguments.rounds} rounds")
    print(
        "| T, D, F, E, K | type | threads | layer | share of dense speed [quartiles] | ms |\n|---|---|---|---|---|---|"
    )
    rows: list[Row] = []
    for dtype in arguments.dtype:
        for shape in SHAPES:
            for row in time_shape(shape, dtype, arguments.rounds):
                rows.append(row)
                shares = f"{row.share:.2f} [{row.share_low:.2f}, {row.share_high:.2f}]"
                label = ", ".join(map(str, row.shape))
                print(
                    f"| {label} | {dtype} | {row.threads} | {row.contender} | {shares} | {row.milliseconds:.1f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"versions": versions(), "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
