"""Seeded noise: number i of a sample is mix(fold(seed, key) + i golden), the SplitMix64 stream read by counter, and a
normal one sqrt(-2 ln u) cos(2 pi v) of two of these. So each sample owns its random numbers, whatever batch, order,
rank or step it is drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor

from autoencoder.precision import double_device

Words = TypeVar("Words", Tensor, int)
_MASK = (1 << 64) - 1
_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _shift(words: Words, bits: int) -> Words:
    """Logical right shift of 64-bit words: `>>` copies the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), modulo 2^64: int64 tensors wrap around as it needs, and of
    a Python integer, which does not, the low 64 bits are right. So hashing a key touches no device."""
    words = (words ^ _shift(words, 30)) * _signed(_MUL1)
    words = (words ^ _shift(words, 27)) * _signed(_MUL2)
    return words ^ _shift(words, 31)


def _hash_key(key: tuple[int | str, ...]) -> int:
    word = len(key)
    for part in key:
        # The top bit keeps the string "1" apart from the integer 1.
        number = crc32(part.encode()) | 1 << 63 if isinstance(part, str) else part & (_MASK >> 1)
        word = _signed(_mix(word + _GOLDEN ^ _mix(number)))
    return word


@dataclass(frozen=True, eq=False)
class Noise:
    """A source of random numbers keyed by (sample seed, key, element).

    Sample i depends on `seeds[i]` and the key alone: it is a SplitMix64 stream read by counter, so drawing costs no
    state, no synchronisation and no order. `seeds` is an int64 tensor (B,) on the device where numbers are wanted.
    Raises ValueError when `seeds` is not one.
    """

    seeds: Tensor

    def __post_init__(self) -> None:
        if self.seeds.dtype != torch.int64 or self.seeds.ndim != 1:
            raise ValueError(f"seeds must be an int64 tensor of shape (B,), got {self.seeds.dtype} "
                             f"of shape {tuple(self.seeds.shape)}")

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> Noise:
        """A source for a list of Python integers, negative and 64-bit ones included."""
        return cls(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice | Tensor) -> Noise:
        return Noise(self.seeds[index])

    def fold(self, *key: int | str) -> Noise:
        """An independent source for `key`: `fold(a).normal(shape, b)` and `fold(b).normal(shape, a)` are unrelated."""
        seeds = self.seeds.to(double_device(self.seeds.device))  # where whole numbers of 64 bits wrap around, too
        return Noise(_mix(_mix(seeds + _signed(_GOLDEN)) ^ _hash_key(key)).to(self.seeds.device))

    def uniform(self, shape: Sequence[int], *key: int | str) -> Tensor:
        """Uniform float64 numbers strictly inside (0, 1), shape (B, *shape), on the `double_device` of the seeds."""
        seeds = self.fold(*key).seeds.to(double_device(self.seeds.device))
        words = seeds[:, None] + torch.arange(1, math.prod(shape) + 1, device=seeds.device) * _signed(_GOLDEN)
        # 52 bits and a half: one bit more and the largest number would round to 1.
        return ((_shift(_mix(words), 12).double() + 0.5) * 2.0**-52).view(len(self), *shape)

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of shape (B, *shape), by Box-Muller in float64, cast to `dtype`, where the seeds lie.
        """
        size = math.prod(shape)
        half = (size + 1) // 2
        radius, angle = self.uniform((2, half), *key).unbind(1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :size].to(dtype).to(self.seeds.device).view(len(self), *shape)
