"""Run under torchrun: each rank does optimizer steps with the others and the same steps alone; rank 0 prints the differences.

Float64, with unequal padding and targets per row, so that any mean of means, any double count and any wrong scale shows.
"""

import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor

from moe import parallel
from moe.config.schema import AdamW, Balance, Cosine, GroupedQueryAttention, Model, MoE, Run, Train
from moe.data import Batch
from moe.model import IGNORE
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.routers.expert_choice import Config as ExpertChoice
from moe.routers.loss_free import Config as LossFree
from moe.routers.topk import Config as TopK
from moe.train.health import measure
from moe.train.sharding import build_model
from moe.train.step import State, train_step

ROWS, S, STEPS = 8, 10, 3
COSTS = ("sent_bytes", "undelivered_rows")
"""Statistics that only some layouts have."""


class UnevenCorpus:
    """Random rows whose padding grows with the row and whose targets are mostly in the last rows.

    A step of more than ROWS rows has the same ROWS, each followed by rows that are padding throughout. Rows come from two
    sources in turn.
    """

    data = SimpleNamespace(sources=("even", "odd"), sequence_length=S)
    num_validation_rows = ROWS

    def train_batch(self, step: int, rows: range, *, batch_rows: int, seed: int) -> Batch:
        """Rows of a step, each a function of (step, row)."""
        every = batch_rows // ROWS
        row_B = torch.tensor([row // every if row % every == 0 else 100 + row for row in rows])
        ids = torch.stack([self._row(step, row) for row in row_B.tolist()])
        position = torch.arange(S)
        valid = position < (S - row_B.unsqueeze(1)).clamp(min=0)
        targets = torch.where(valid & (position < 1 + row_B.unsqueeze(1)), ids.roll(-1, 1), IGNORE)
        document = (position >= 4).long().expand_as(ids)
        return Batch(ids, targets, document, valid, row_B, (targets != IGNORE).sum(1).double())

    def train_sources(self, step: int, rows: list[int], *, batch_rows: int) -> torch.Tensor:
        """Rows take turns."""
        return torch.tensor(rows) % 2

    def validation_batch(self, rows: range) -> Batch:
        """Rows of a step that nobody trains on."""
        return self.train_batch(99, rows, batch_rows=ROWS, seed=0)

    def _row(self, step: int, row: int) -> torch.Tensor:
        return torch.randint(0, 40, (S,), generator=torch.Generator().manual_seed(1000 * step + row))


def run_of(router, micro_rows: int, recompute: bool, rows: int = ROWS) -> Run:
    """A float64 run of a two-layer model, with `rows` rows a step, a multiple of ROWS."""
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    experts = MoE(num_experts=4, top_k=2, expert_hidden=8, router=router)
    model = Model(vocab_size=40, dim=16, num_layers=2, ffn_hidden=16, attention=attention, moe=experts, init_std=0.3)
    train = Train(
        steps=STEPS,
        batch_rows=rows,
        micro_rows=micro_rows,
        optimizer=AdamW(lr=0.01),
        schedule=Cosine(),
        clip_norm=0.0,
        activation_checkpointing=recompute,
    )
    return Run(name="case", seed=1, model=model, train=train)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which ranks may hold parts; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(run: Run, ranks: Ranks, count: int = STEPS, *, dtype: torch.dtype | None = torch.float64) -> SimpleNamespace:
    """Losses, norms, gradients of the first and the last step, loads and router state of a few optimizer steps."""
    model = build_model(run, ranks, dtype=dtype)
    state = State(run, ranks, UnevenCorpus(), model, model, build_optimizer(model, run.train.optimizer))
    results = [train_step(state, 0, maxima=True)]
    first = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    results += [train_step(state, step, maxima=True) for step in range(1, count)]
    return SimpleNamespace(
        losses=[[r.loss, r.grad_norm, *r.losses.values()] for r in results],
        loads=[[s[k].tolist() for k in sorted(s) if k not in COSTS] for r in results for _, s in r.statistics],
        first=first,
        grads={name: whole(p.grad).clone() for name, p in model.named_parameters()},
        values={name: whole(p.detach()).clone() for name, p in model.named_parameters()},
        buffers=dict(model.named_buffers()),
    )


def health(run: Run, ranks: Ranks, folder: Path) -> torch.Tensor:
    """Every number that an evaluation measures of the routing, twice: the second knows its churn."""
    model = build_model(run, ranks, dtype=torch.float64)
    state = State(run, ranks, UnevenCorpus(), model, model, build_optimizer(model, run.train.optimizer))
    lines = [*measure(state, 1, folder), *measure(state, 2, folder)]
    return torch.cat([numbers(line[name]) for line in lines for name in sorted(line)])


def numbers(value) -> torch.Tensor:
    """A field's numbers, float64; -1 for null."""
    return torch.tensor(-1.0 if value is None else value, dtype=torch.float64).flatten()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


ROUTERS = {
    "sequence": TopK(balance=Balance(weight=1.0, scope="sequence"), z_weight=0.1),
    "global": TopK(balance=Balance(weight=1.0, scope="global"), z_weight=0.1),
    "noisy with drops": TopK(noise="gaussian", noise_scale=0.5, capacity_factor=0.8),
    "jitter": TopK(noise="jitter", noise_scale=0.2),
    "loss_free": LossFree(bias_rate=0.1, balance=Balance(weight=1.0, scope="sequence")),
    "expert_choice": ExpertChoice(z_weight=1.0),
}


def main() -> None:
    """Every case against one process with one micro-batch."""
    ranks = parallel.start("cpu")
    alone = Ranks(0, 1, ranks.device)
    rows = {}
    share = ROWS // ranks.world_size
    for (name, router), recompute in itertools.product(ROUTERS.items(), (False, True)):
        expected = steps(run_of(router, ROWS, False), alone)
        for micro_rows in [share // n for n in (1, 2, 4) if share % n == 0]:
            ours = steps(run_of(router, micro_rows, recompute), ranks)
            rows[f"{name} micro_rows={micro_rows} recompute={recompute}"] = {
                "losses": difference(torch.tensor(ours.losses), torch.tensor(expected.losses)),
                "grads": max(difference(ours.grads[key], value) for key, value in expected.grads.items()),
                "loads": ours.loads == expected.loads
                or difference(
                    torch.cat([torch.tensor(v).double().flatten() for r in ours.loads for v in r]),
                    torch.cat([torch.tensor(v).double().flatten() for r in expected.loads for v in r]),
                ),
                "state": max(difference(ours.buffers[k].double(), v.double()) for k, v in expected.buffers.items()),
            }
    trained = run_of(ROUTERS["global"], share // 2 or 1, True)
    with TemporaryDirectory() as folder:
        expected = health(run_of(ROUTERS["global"], ROWS, False), alone, Path(folder) / "alone")
        ours = health(trained, ranks, Path(ranks.broadcast(folder)) / "ours")
        error = difference(ours, expected)
        ranks.wait_for_all()
    rows["health"] = {"losses": error, "grads": error, "loads": True, "state": error}
    if ranks.first:
        json.dump(rows, sys.stdout)
    parallel.stop()


if __name__ == "__main__":
    main()
