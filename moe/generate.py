"""Continue a text: sampling token by token with cached keys and values, and each token's experts when asked.

A model comes from a run's folder or from one in transformers' format; its tokenizer comes with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.attention import KeyValue
from moe.errors import ConfigError, UserError
from moe.model import LayerRouting, Transformer
from moe.opened import Opened


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the largest."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with at least this probability together (arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature ({self.temperature}) must be 0 (the most probable token) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p ({self.top_p}) must be above 0 and at most 1 (no limit)")


@dataclass(frozen=True)
class Step:
    """One more token of every row."""

    token_B: Tensor
    """Ids, int64, on the CPU; after a row's end, the end again."""
    experts_BLK: list[dict[int, list[int]]]
    """For every row, by block index, the experts that its last token went to: the token that token_B was drawn from."""


def next_token(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one id per row [B] from logits [B, V]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(1)
    # in float64, and from the largest down: any temperature above 0 has finite quotients or 0 probability
    far_BV = (logits_BV.double() - logits_BV.double().amax(1, keepdim=True)) / sampling.temperature
    probability_BV, order_BV = far_BV.softmax(1).sort(dim=1, descending=True)
    before_BV = probability_BV.cumsum(1) - probability_BV
    kept_BV = probability_BV.masked_fill((before_BV >= sampling.top_p) & (sampling.top_p < 1), 0.0)
    return order_BV.gather(1, torch.multinomial(kept_BV, 1, generator=generator)).squeeze(1)


@torch.no_grad()
def stream(
    model: Transformer,
    ids_BS: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[Step]:
    """Continue rows of equal length [B, S], one `Step` at a time, until every row has ended.

    Raises UserError for a router that cannot work token by token: one that looks at later tokens of the row, or at ids before
    the last; and for logits that are not finite.
    """
    _check(model, ids_BS)
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(seed)
    cache = tuple(KeyValue(ids_BS.shape[1] + max_new_tokens) for _ in model.layers)
    ended_B = torch.zeros(ids_BS.shape[0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        output = model(ids_BS, cache=cache)
        assert output.logits_BSV is not None
        logits_BV = output.logits_BSV[:, -1].cpu().float()
        if not logits_BV.isfinite().all():
            raise UserError(
                f"the model's logits are not finite after {cache[0].length} tokens: its weights are broken, or diverged"
            )
        token_B = next_token(logits_BV, sampling, generator)
        if end is not None:
            token_B = token_B.masked_fill(ended_B, end)
            ended_B |= token_B == end
        yield Step(token_B, _experts(output.routing, *ids_BS.shape))
        if ended_B.all():
            return
        ids_BS = token_B.unsqueeze(1).to(ids_BS.device)


def _check(model: Transformer, ids_BS: Tensor) -> None:
    if not ids_BS.numel():
        raise UserError("there is no text to continue: give a prompt of at least one token")
    largest = int(ids_BS.max())
    if largest >= model.config.vocab_size:
        raise UserError(f"id {largest} is not below the model's vocabulary of {model.config.vocab_size}")
    for layer, experts in model.moe_layers():
        router = experts.router
        if not router.causal:
            raise UserError(
                f"the router of layer {layer} chooses by looking at the whole row, later tokens included: it cannot "
                "choose for a text that is still being written"
            )
        ngram = getattr(getattr(router, "config", None), "ngram", 1)
        if ngram > 1:
            raise UserError(f"the router of layer {layer} hashes {ngram} ids, which no cache holds")


def _experts(reports: Sequence[LayerRouting], B: int, S: int) -> list[dict[int, list[int]]]:
    """By row and block, the experts of the row's last token."""
    chosen: list[dict[int, list[int]]] = [{} for _ in range(B)]
    for report in reports:
        token_R, expert_R = report.selection.token_R.cpu(), report.selection.expert_R.cpu()
        for row in range(B):
            chosen[row][report.layer] = expert_R[token_R == row * S + S - 1].tolist()
    return chosen


def encode_prompt(opened: Opened, prompt: str) -> list[int]:
    """A prompt's ids; the end-of-text token, which a text starts after, for an empty one.

    Raises UserError for a prompt that is not UTF-8, and for an empty one where the tokenizer has no such token.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt!r} is not UTF-8 text: give it in UTF-8") from error
    ids = opened.encode(prompt)
    if not ids and opened.end is None:
        raise UserError("an empty prompt needs a tokenizer with an end-of-text token to start from: give some text")
    return ids or [opened.end or 0]


def generate(
    opened: Opened,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    on_text: Callable[[int, str, dict[int, list[int]]], None] | None = None,
) -> list[str]:
    """Continue every prompt; prompts of equal length go through the model together.

    `on_text(prompt index, new text, experts)` is called for every drawn token, the one that ends a text included; bytes that do
    not yet make a character wait, and the text is empty then.
    """
    encoded = [encode_prompt(opened, prompt) for prompt in prompts]
    texts = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        rows = [index for index, ids in enumerate(encoded) if len(ids) == length]
        written: dict[int, list[int]] = {index: [] for index in rows}
        ended: set[int] = set()
        ids_BS = torch.tensor([encoded[index] for index in rows])
        steps = stream(opened.model, ids_BS, max_new_tokens, sampling=sampling, seed=seed, end=opened.end)
        for number, step in enumerate(steps, 1):
            for place, index in enumerate(rows):
                if index in ended:
                    continue
                token = int(step.token_B[place])
                if token == opened.end:
                    ended.add(index)
                else:
                    written[index].append(token)
                text = opened.decode(written[index])
                if text.endswith("\ufffd") and index not in ended and number < max_new_tokens:
                    text = texts[index]
                if on_text is not None:
                    on_text(index, text[len(texts[index]) :], step.experts_BLK[place])
                texts[index] = text
    return texts
