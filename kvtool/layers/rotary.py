"""Rotary position embedding (RoFormer, Su et al. 2021) and its context extensions, as Hugging Face defines them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rope:
    """Unscaled rotary embedding.

    Attributes:
        dim: leading elements of a head that are rotated, even; the rest pass through.
        theta: base of the wavelengths.
    """

    dim: int
    theta: float

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def inverse_frequencies(self, max_len: int, dtype: torch.dtype) -> Tensor:
        """Radians per position, [dim / 2], for a model that serves sequences of up to `max_len` tokens."""
        return 1.0 / self.theta ** (torch.arange(0, self.dim, 2, dtype=dtype) / self.dim)


@dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al. 2023): every position divided by `factor`."""

    factor: float

    def inverse_frequencies(self, max_len: int, dtype: torch.dtype) -> Tensor:
        return super().inverse_frequencies(max_len, dtype) / self.factor


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def inverse_frequencies(self, max_len: int, dtype: torch.dtype) -> Tensor:
        kept = super().inverse_frequencies(max_len, dtype)
        turns = self.original_max_position * kept / (2 * math.pi)  # over the original context
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(kept / self.factor, kept, ramp.clamp(0, 1))


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023): dimensions that turn more than `beta_fast` times over the original context are kept,
    those below `beta_slow` turns divided by `factor`, a linear ramp between; `truncate` rounds its ends outwards."""

    factor: float
    original_max_position: int
    scale: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        return self.scale

    def inverse_frequencies(self, max_len: int, dtype: torch.dtype) -> Tensor:
        kept = super().inverse_frequencies(max_len, dtype)
        low, high = self._dimension(self.beta_fast), self._dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = (torch.arange(self.dim // 2, dtype=dtype) - low) / (high - low)
        return torch.lerp(kept, kept / self.factor, ramp.clamp(0, 1))

    def _dimension(self, turns: float) -> float:
        """The pair of dimensions that turns this often over the original context."""
        return self.dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclass(frozen=True)
class LongRope(Rope):
    """LongRoPE (Ding et al. 2024): one divisor per pair of dimensions, from one of two lists.

    Hugging Face takes the long list as soon as a sequence outgrows the original context, which changes keys already
    cached. A server must choose once: the long list when it serves sequences beyond the original context, as vLLM does.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    scale: float

    @property
    def attention_factor(self) -> float:
        return self.scale

    def inverse_frequencies(self, max_len: int, dtype: torch.dtype) -> Tensor:
        factors = self.long_factor if max_len > self.original_max_position else self.short_factor
        return super().inverse_frequencies(max_len, dtype) / torch.tensor(factors, dtype=dtype)


class Rotary(nn.Module):
    """cos and sin of every position below `max_len`, computed once in fp32 (fp64 for a float64 model)."""

    table: Tensor

    def __init__(self, rope: Rope, max_len: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # To compute on the meta device torch imports its compiler, which takes seconds.
        where = torch.device("cpu") if device.type == "meta" else device
        frequencies = rope.inverse_frequencies(max_len, exact).to(where)
        angles = torch.arange(max_len, dtype=exact, device=where)[:, None] * frequencies
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        # The signs of rotate_half go with the sines, so that a rotation is x·cos + swapped(x)·sin.
        table = torch.stack((cos, cos, -sin, sin), dim=1)
        self.register_buffer("table", table.to(device, dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, 1, 2, dim / 2] of positions [T] int64, to be used by all layers of a step."""
        table = self.table[positions][:, None]
        return table[:, :, :2], table[:, :, 2:]
