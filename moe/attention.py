"""Causal self-attention: grouped-query and multi-head latent, over torch's scaled_dot_product_attention or moe_cpu's kernel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad, scaled_dot_product_attention

from moe.config.schema import GroupedQueryAttention, LatentAttention, Llama3Scaling, Model, Rotary
from moe.errors import UserError
from moe.moe_layer import Linear, fits
from moe.parallel.parts import part_here, used_by_heads
from moe.parallel.ulysses import Ulysses
from moe_cpu.attention import causal_attention, unsupported
from moe_cpu.norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32, returned in x's type (arXiv 1910.07467).

    `compiled`: float32 on a CPU is moe_cpu's.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
        self.compiled = False

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled and x.is_contiguous() and fits(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


def rotary_frequencies(rotary: Rotary, rotated_dim: int) -> Tensor:
    """Angular frequency of each rotated pair [rotated_dim / 2], float32, with YaRN's ramp (arXiv 2309.00071 eq. 19-23)."""
    exponent = torch.arange(0, rotated_dim, 2, dtype=torch.float64) / rotated_dim
    frequency = rotary.base**-exponent
    yarn = rotary.yarn
    if rotary.llama3 is not None:
        frequency = _stretched(frequency, rotary.llama3)
    if yarn is None:
        return (frequency / rotary.linear).float()

    def pair_of(rotations: float) -> float:
        """Index of the pair that turns `rotations` times over the original context."""
        return rotated_dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rotary.base))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated_dim - 1)
    pairs = torch.arange(rotated_dim // 2, dtype=torch.float64)
    # an original context shorter than a turn ends the ramp below its start: the quotient is then negative, so nothing is
    # interpolated, as in the paper's code
    interpolated = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return (frequency / yarn.factor * interpolated + frequency * (1 - interpolated)).float()


def _stretched(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's frequencies: a wavelength's turns within the original context decide how much of it is stretched."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def yarn_temperature(factor: float, coefficient: float) -> float:
    """YaRN's attention temperature 0.1·coefficient·ln(factor) + 1 (arXiv 2309.00071 eq. 22); 1 without extension."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 and coefficient else 1.0


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, shared by all layers; half-rotation layout."""

    frequency: Tensor

    def __init__(self, rotary: Rotary, rotated_dim: int):
        super().__init__()
        self.register_buffer("frequency", rotary_frequencies(rotary, rotated_dim), persistent=False)
        yarn = rotary.yarn
        self.scale = 1.0
        if yarn is not None:
            whole = yarn_temperature(yarn.factor, yarn.mscale_all_dim)
            self.scale = yarn_temperature(yarn.factor, yarn.mscale) / whole

    def forward(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [S] to cosines and sines [S, rotated_dim], float32."""
        angle = torch.outer(position_S.float(), self.frequency)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scale, angle.sin() * self.scale


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dimensions of x [B, N, S, H] by the angles of its positions; the rest passes."""
    cos, sin = (t.to(x.dtype) for t in cos_sin)
    rotated_dim = cos.shape[-1]
    turned, passed = x[..., :rotated_dim], x[..., rotated_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


class KeyValue:
    """Keys and values of one layer for the tokens so far, in a buffer of fixed length: generation extends it."""

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key [B, N, S, H] and value [B, N, S, V], and return those of all tokens so far."""
        if self._key is None or self._value is None:
            B, N = key.shape[:2]
            self._key = key.new_empty(B, N, self.max_length, key.shape[3])
            self._value = value.new_empty(B, N, self.max_length, value.shape[3])
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise UserError(f"{end} tokens do not fit a cache of {self.max_length}: make it longer.")
        self._key[:, :, self.length : end], self._value[:, :, self.length : end] = key, value
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]


class Mask(NamedTuple):
    """Which keys a query sees: those from its first one up to the query's own position."""

    first_BS: Tensor
    """Position of the first key, [B or 1, S] int32; never falls along a row."""
    position_S: Tensor
    """Position of the query."""
    allowed: Tensor | None
    """The same as bools, see `keys_allowed`; None where a kernel is expected to read `first_BS`."""

    def keys_allowed(self) -> Tensor:
        """True where a query may see a key: [B or 1, 1, S, keys] bool."""
        if self.allowed is not None:
            return self.allowed
        return _allowed(self.first_BS, self.position_S, len(self.position_S))


def _allowed(first_BS: Tensor, position_S: Tensor, keys: int) -> Tensor:
    key = torch.arange(keys, device=position_S.device)
    return ((key >= first_BS.unsqueeze(2)) & (key <= position_S.unsqueeze(1))).unsqueeze(1)


def attention_mask(
    position_S: Tensor, document_BS: Tensor | None, window: int, past: int = 0, *, bools: bool = True
) -> Mask | None:
    """The mask of queries at `position_S`, after `past` keys; None for plain causal attention.

    document_BS [B, S] is ascending along a row. With `past` tokens before, a single query sees all keys, which is None as well.
    Without `bools`, [B, S, S] is only made for a layer that asks for it.
    """
    if document_BS is None and window == 0 and (past == 0 or len(position_S) == 1):
        return None
    first_BS = (position_S - window + 1 if window else torch.zeros_like(position_S)).clamp(min=0).unsqueeze(0)
    if document_BS is not None:
        begins = torch.ones_like(document_BS, dtype=torch.bool)
        begins[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
        first_BS = torch.maximum(first_BS, (position_S * begins).cummax(1).values)
    allowed = _allowed(first_BS, position_S, past + len(position_S)) if bools else None
    return Mask(first_BS.to(torch.int32), position_S, allowed)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Mask | None,
    *,
    compiled: bool,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Attention [B, N, S, V] of query [B, N, S, H] over key [B, M, S', H] and value [B, M, S', V], rotated first with `cos_sin`.

    `compiled`: by moe_cpu's kernel where it applies, otherwise by torch's operator.
    """
    whole = query.shape[2] == key.shape[2]
    if compiled and whole and fits(query, key, value, *(() if sink_N is None else (sink_N,))):
        first_BS = None if mask is None else mask.first_BS
        if unsupported(query, key, value, cos_sin, first_BS, sink_N) is None:
            return causal_attention(query, key, value, scale, cos_sin, first_BS=first_BS, sink_N=sink_N)
    if cos_sin is not None:
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
    allowed = None if mask is None else mask.keys_allowed()
    if sink_N is not None:
        return _attend_with_sinks(query, key, value, scale, allowed, sink_N)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (mask is not None or not query.is_cuda):
        # torch's fused kernels share key heads only on CUDA and without a mask; elsewhere it would fall back to
        # materialising all scores
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=mask is None and whole, scale=scale, enable_gqa=groups > 1
    )


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None, sink_N: Tensor
) -> Tensor:
    """Put the sink into the softmax as key 0, whose logit is sink_N for every query and whose value is zero.

    An extra dimension holds 1 in queries, sink/scale in key 0 and 0 in the others, so that the product is exact; it is
    padded to eight, the multiple that fused kernels want.
    """
    B, N, S, H = query.shape
    groups = N // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sink = (sink_N / scale).to(query.dtype).view(1, N, 1, 1).expand(B, N, 1, 1)
    sink_key = pad(torch.cat((key.new_zeros(B, N, 1, H), sink), dim=3), (0, 7))
    key = torch.cat((sink_key, pad(key, (0, 8))), dim=2)
    value = pad(value, (0, 8, 1, 0))
    query = pad(pad(query, (0, 1), value=1.0), (0, 7))
    if allowed is None:
        allowed = torch.ones(1, 1, S, key.shape[2] - 1, dtype=torch.bool, device=query.device)
        allowed = allowed.tril(allowed.shape[3] - S)
    allowed = pad(allowed, (1, 0), value=True)
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)[..., :H]


class GroupedQuery(nn.Module):
    """Grouped-query attention with optional biases, query/key norms and sinks.

    With a `context` (moe/train/sharding.py sets it) x_BSD is this rank's part of the rows, and `mask` that of whole rows.
    `compiled`: float32 on a CPU is moe_cpu's.
    """

    def __init__(self, config: GroupedQueryAttention, model: Model):
        super().__init__()
        self.context: Ulysses | None = None
        self.compiled = False
        D, N, M, H = model.dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.query = Linear(D, N * H, bias=config.qkv_bias)
        self.key = Linear(D, M * H, bias=config.qkv_bias)
        self.value = Linear(D, M * H, bias=config.qkv_bias)
        self.out = Linear(N * H, D, bias=config.out_bias)
        self.query_norm = self.key_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.query_norm = RMSNorm(N * H if full else H, model.norm_eps)
            self.key_norm = RMSNorm(M * H if full else H, model.norm_eps)
        self.sink_N = nn.Parameter(torch.zeros(N)) if config.sinks else None
        yarn = model.rotary.yarn
        whole = yarn_temperature(yarn.factor, yarn.mscale_all_dim) if yarn is not None else 1.0
        self.scale = whole * whole / math.sqrt(H)

    def forward(
        self, x_BSD: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Mask | None, past: KeyValue | None = None
    ) -> Tensor:
        H = self.config.head_dim
        query, key, value = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)
        if self.query_norm is not None and self.key_norm is not None and self.config.qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        if clip := self.config.clip_qkv:
            query, key, value = (t.clamp(-clip, clip) for t in (query, key, value))
        query, key, value = (t.unflatten(-1, (-1, H)).transpose(1, 2) for t in (query, key, value))
        if self.query_norm is not None and self.key_norm is not None and self.config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        # where nothing asks for rotated keys, rotation is left to the kernel
        late = past is None and self.context is None
        if not late:
            query, key = rotate(query, cos_sin), rotate(key, cos_sin)
        if past is not None:
            key, value = past.extend(key, value)
        sink_N = None if self.sink_N is None else part_here(self.sink_N)
        if self.context is not None:
            query, key, value = self.context.to_heads(query, key, value)
            sink_N = None if sink_N is None else self.context.heads_here(sink_N)
        turn = cos_sin if late else None
        out = attend(query, key, value, self.scale, mask, compiled=self.compiled, cos_sin=turn, sink_N=sink_N)
        if self.context is not None:
            out = self.context.to_tokens(out)
        return self.out(out.transpose(1, 2).flatten(2))


class Latent(nn.Module):
    """Multi-head latent attention; keys and values are expanded from a vector of rank kv_rank.

    `context` and `compiled`: see GroupedQuery; `tensor`: the ranks that share the heads, set where `context` is.
    """

    def __init__(self, config: LatentAttention, model: Model):
        super().__init__()
        self.context: Ulysses | None = None
        self.compiled = False
        D, N = model.dim, config.num_heads
        self.config = config
        self.tensor: DeviceMesh | None = None
        query_dim = N * (config.nope_dim + config.rope_dim)
        bias, eps = config.bias, config.norm_eps or model.norm_eps
        self.query_down = Linear(D, config.q_rank, bias=bias) if config.q_rank else None
        self.query_norm = RMSNorm(config.q_rank, eps) if config.q_rank else None
        self.query = Linear(config.q_rank or D, query_dim, bias=False)
        self.kv_down = Linear(D, config.kv_rank + config.rope_dim, bias=bias)
        self.kv_norm = RMSNorm(config.kv_rank, eps)
        self.kv = Linear(config.kv_rank, N * (config.nope_dim + config.value_dim), bias=False)
        self.out = Linear(N * config.value_dim, D, bias=bias)
        yarn = model.rotary.yarn
        whole = yarn_temperature(yarn.factor, yarn.mscale_all_dim) if yarn is not None else 1.0
        self.scale = whole * whole / math.sqrt(config.nope_dim + config.rope_dim)

    def forward(
        self, x_BSD: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Mask | None, past: KeyValue | None = None
    ) -> Tensor:
        config = self.config
        if self.query_down is not None and self.query_norm is not None:
            query = self.query(self.query_norm(self.query_down(x_BSD)))
        else:
            query = self.query(x_BSD)
        query = query.unflatten(-1, (-1, config.nope_dim + config.rope_dim)).transpose(1, 2)
        latent, key_rope = self.kv_down(x_BSD).split((config.kv_rank, config.rope_dim), dim=-1)
        key_rope = used_by_heads(key_rope, self.tensor)
        kv = self.kv(self.kv_norm(latent)).unflatten(-1, (-1, config.nope_dim + config.value_dim)).transpose(1, 2)
        key_nope, value = kv.split((config.nope_dim, config.value_dim), dim=-1)
        query_nope, query_rope = query.split((config.nope_dim, config.rope_dim), dim=-1)
        key_rope = rotate(key_rope.unsqueeze(1), cos_sin).expand(-1, kv.shape[1], -1, -1)
        query = torch.cat((query_nope, rotate(query_rope, cos_sin)), dim=-1)
        key = torch.cat((key_nope, key_rope), dim=-1)
        if past is not None:
            key, value = past.extend(key, value)
        if self.context is not None:
            query, key, value = self.context.to_heads(query, key, value)
        out = attend(query, key, value, self.scale, mask, compiled=self.compiled)
        if self.context is not None:
            out = self.context.to_tokens(out)
        return self.out(out.transpose(1, 2).flatten(2))
