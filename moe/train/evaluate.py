"""Language-model loss on fixed validation rows: no auxiliary loss, no noise, no change of any state."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from moe.data import Batch, Corpus
from moe.model import IGNORE, Transformer
from moe.parallel import Ranks
from moe.routing import Tokens
from moe.train.stages import through_stages


@dataclass(frozen=True)
class EvaluationResult:
    """Sums per validation row, float64 [rows], over the row's targets."""

    nats_row: np.ndarray
    bytes_row: np.ndarray
    tokens_row: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return float(self.nats_row.sum() / max(self.tokens_row.sum(), 1))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the targets' text; comparable across tokenizers."""
        return float(self.nats_row.sum() / math.log(2) / max(self.bytes_row.sum(), 1))


def rounds(
    corpus: Corpus, ranks: Ranks, *, rows: int, micro_rows: int, begin: int = 0
) -> Iterator[tuple[range, Batch, Tokens]]:
    """This rank's share of `rows` validation rows from `begin` on, as (rows, batch on its device, tokens), micro_rows at a time.

    Every rank gets as many, because a model that is spread over ranks computes together: one that has run out of rows gets
    an empty range, and a row without valid tokens or targets.
    """
    shares = ranks.layout.data_ranks
    first, end = (begin + rows * rank // shares for rank in (ranks.data_rank, ranks.data_rank + 1))
    most = -(-rows // shares)
    for turn in range(-(-most // micro_rows)):
        start = first + turn * micro_rows
        span = range(start, min(start + micro_rows, end))
        batch = corpus.validation_batch(span if len(span) else range(1)).to(ranks.device)
        if not len(span):
            nothing = torch.full_like(batch.targets_BS, IGNORE)
            batch = replace(batch, targets_BS=nothing, valid_BS=torch.zeros_like(batch.valid_BS))
        batch = batch.part(ranks.context_rank, ranks.layout.context)
        yield span, batch, _tokens(batch, ranks)


def _tokens(batch: Batch, ranks: Ranks) -> Tokens:
    S = batch.ids_BS.shape[1]
    tokens = Tokens.of(
        batch.ids_BS,
        valid_BS=batch.valid_BS,
        document_BS=batch.document_BS,
        first_position=ranks.context_rank * S,
    )
    return replace(tokens, row_T=batch.row_B.repeat_interleave(S))


@torch.no_grad()
def evaluate(
    model: Transformer, corpus: Corpus, ranks: Ranks, *, rows: int, micro_rows: int, begin: int = 0
) -> EvaluationResult:
    """Loss on `rows` validation rows from `begin` on (as many as there are), shared out over the ranks."""
    rows = min(rows, corpus.num_validation_rows - begin)
    was_training = model.training
    model.eval()
    sums_3R = torch.zeros(3, rows, dtype=torch.float64, device=ranks.device)
    for span, batch, tokens in rounds(corpus, ranks, rows=rows, micro_rows=micro_rows, begin=begin):
        call = partial(model, batch.ids_BS, batch.targets_BS, tokens=tokens, each=True)
        losses_BS = through_stages(ranks, model, batch.ids_BS, call).losses_BS
        if losses_BS is None:  # the last stage counts
            continue
        here, n = slice(span.start - begin, span.stop - begin), len(span)
        sums_3R[0, here] = losses_BS.double().sum(1)[:n]
        sums_3R[1, here] = batch.bytes_B[:n]
        sums_3R[2, here] = (batch.targets_BS != IGNORE).sum(1).double()[:n]
    model.train(was_training)
    nats, size, tokens_row = ranks.sum_over_stages(ranks.sum(sums_3R)).cpu().numpy()
    return EvaluationResult(nats, size, tokens_row)
