"""Language-model loss on fixed validation rows: no auxiliary loss, no noise, no change of any state."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe.data import Corpus
from moe.model import IGNORE, Transformer, token_losses
from moe.parallel import Ranks
from moe.routing import Tokens


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


@torch.no_grad()
def evaluate(model: Transformer, corpus: Corpus, ranks: Ranks, *, rows: int, micro_rows: int) -> EvaluationResult:
    """Loss on the first `rows` validation rows (all, if there are fewer), shared out over the ranks."""
    rows = min(rows, corpus.num_validation_rows)
    was_training = model.training
    model.eval()
    sums_3R = torch.zeros(3, rows, dtype=torch.float64, device=ranks.device)
    first, end = rows * ranks.rank // ranks.world_size, rows * (ranks.rank + 1) // ranks.world_size
    for start in range(first, end, micro_rows):
        span = range(start, min(start + micro_rows, end))
        batch = corpus.validation_batch(span)
        ids_BS, targets_BS = batch.ids_BS.to(ranks.device), batch.targets_BS.to(ranks.device)
        tokens = Tokens.of(
            ids_BS, valid_BS=batch.valid_BS.to(ranks.device), document_BS=batch.document_BS.to(ranks.device)
        )
        row_T = batch.row_B.repeat_interleave(ids_BS.shape[1]).to(ranks.device)
        logits_BSV = model(ids_BS, tokens=replace(tokens, row_T=row_T)).logits_BSV
        sums_3R[0, span.start : span.stop] = token_losses(logits_BSV, targets_BS).double().sum(1)
        sums_3R[1, span.start : span.stop] = batch.bytes_B.to(ranks.device)
        sums_3R[2, span.start : span.stop] = (targets_BS != IGNORE).sum(1).double()
    model.train(was_training)
    nats, size, tokens_row = ranks.sum(sums_3R).cpu().numpy()
    return EvaluationResult(nats, size, tokens_row)
