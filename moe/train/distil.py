"""The teacher of a run that learns from one (`train.distil`): a trained model beside the run's own, without gradient."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe import checkpoint
from moe.config.load import load
from moe.config.schema import Distil, Run
from moe.errors import CheckpointError, ConfigError
from moe.init import materialise
from moe.loss import Soft
from moe.model import Transformer
from moe.routing import Tokens


class Teacher:
    """A trained run's model in evaluation mode, whole on this rank, in the student's precision."""

    def __init__(self, config: Distil, run: Run, device: torch.device):
        """Read the newest checkpoint. Raises ConfigError for a folder without one, or text that is cut into other tokens."""
        self.config, folder = config, Path(config.teacher)
        if not (folder / "run.json").is_file():
            raise ConfigError(f"train.distil.teacher ({folder}) holds no run.json: give the folder of a trained run")
        source, saved = load(folder / "run.json"), checkpoint.newest(folder)
        if saved is None:
            raise CheckpointError(f"train.distil.teacher ({folder}) has no checkpoint: train it until it saves one")
        if source.data.tokenizer != run.data.tokenizer or source.model.vocab_size != run.model.vocab_size:
            raise ConfigError(
                f"train.distil.teacher ({folder}) has the tokenizer {source.data.tokenizer} with model.vocab_size="
                f"{source.model.vocab_size}, and this run {run.data.tokenizer} with {run.model.vocab_size}: use the teacher's"
            )
        self.step = saved.step
        dtype = torch.bfloat16 if run.train.precision == "bfloat16" else torch.float32
        with torch.device("meta"):
            model = Transformer(source.model, seed=source.seed, dtype=dtype)
        materialise(model, torch.device("cpu"))
        model.load_state_dict(dict(checkpoint.read_tensors(saved, checkpoint.stored_names(saved))))
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor, tokens: Tokens) -> Soft:
        """Its logits for a micro-batch; documents are masked as in its own training."""
        logits_BSV = self.model(ids_BS, tokens=replace(tokens, step_counts_LE=None)).logits_BSV
        assert logits_BSV is not None
        return Soft(logits_BSV, self.config.temperature, self.config.share)
