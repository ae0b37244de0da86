"""Counter-based random numbers: a draw is a function of (seed, step, layer, token, column), never of what ran before.

So noise is the same on 1 or 4 ranks, with any accumulation, under recomputation and after a resume. The mixing
function is splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators", figure 17).
"""

import hashlib

import torch
from torch import Tensor

from moe.routing import Tokens


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values: splitmix64's output function. Products wrap around, shifts are logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def token_keys(tokens: Tokens, *, seed: int, layer: int, purpose: str) -> Tensor:
    """One int64 key per token [T], a function of (seed, layer, purpose, step, row, position)."""
    return mix(mix(mix(tokens.step + _salt(seed, layer, purpose)) + tokens.row_T) + tokens.position_T)


def _salt(seed: int, layer: int, purpose: str) -> int:
    """FNV-1a hash of the three in 63 bits; plain integer arithmetic, which torch.compile folds into a constant."""
    value = 0xCBF29CE484222325
    for part in (seed, layer, *(ord(letter) for letter in purpose)):
        value = ((value ^ part) * 0x100000001B3) % 2**63
    return value


def uniform(key_T: Tensor, columns: int) -> Tensor:
    """Uniform float32 draws [T, columns] in the open interval (0, 1)."""
    column_C = torch.arange(columns, device=key_T.device)
    bits_TC = _shift(mix(key_T.unsqueeze(1) + mix(column_C)), 41)
    return (bits_TC.float() + 0.5) * 2.0**-23


def normal(key_T: Tensor, columns: int) -> Tensor:
    """Standard normal float32 draws [T, columns]."""
    return torch.special.ndtri(uniform(key_T, columns))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
