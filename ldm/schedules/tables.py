"""DDPM tables: T steps of beta, entry i at t = (i + 1) / T, and t = 0 clean and outside the table."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldm.schedules.base import Bounded, Level


@dataclass(frozen=True, kw_only=True)
class Table(Bounded):
    """alpha^2 = alpha_bar, the running product of 1 - beta; between entries linear in log-SNR.

    `zero_terminal_snr` shifts and scales alpha so that its last entry is 0 and its first unchanged (Lin et al. 2023,
    arXiv 2305.08891, algorithm 1). The last interval is then linear in alpha / sigma, whose logarithm is infinite.
    `shift` then lowers log-SNR by 2 ln(shift), for larger images (Hoogeboom et al. 2023, arXiv 2301.11093, section
    3.1).
    The network sees the index i = T t - 1. It is trained at the entries, and where `continuous` between them too: for
    each entry sqrt(alpha_bar) is drawn between its neighbours', which is SR3's level (Saharia et al. 2021, arXiv
    2104.07636, algorithm 1), uniform there in log-SNR instead of in sqrt(alpha_bar).
    """

    limits: ClassVar = {"steps": "[2, inf)", "shift": "(0, inf)"}
    kind: str
    steps: int = 1000
    zero_terminal_snr: bool = False
    shift: float = 1.0
    continuous: bool = False

    @abstractmethod
    def betas(self) -> Tensor:
        """The table (T,) float64 before any rescaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        betas = self.betas()
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"{self.kind}: every beta must lie in (0, 1), got "
                             f"[{betas.min().item():g}, {betas.max().item():g}]")

    @property
    def t_min(self) -> float:
        return 1 / self.steps

    @property
    def pure_noise(self) -> bool:
        return self.zero_terminal_snr

    def alpha_bar(self) -> Tensor:
        """alpha^2 at the T entries, float64 on the CPU."""
        alpha_bar = (1 - self.betas()).cumprod(0)
        if self.zero_terminal_snr:
            alpha = alpha_bar.sqrt()
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return alpha_bar if self.shift == 1 else alpha_bar / (alpha_bar + self.shift**2 * (1 - alpha_bar))

    def logsnr(self, t: Tensor) -> Tensor:
        position, below, above = self._interval(t)
        inside = below + (above - below) * position
        if self.zero_terminal_snr:  # elsewhere its gradient at an entry would not be finite
            inside = torch.where(above.isneginf(), below + 2 * (1 - position).log(), inside)
        return torch.where(t > 0, inside, math.inf)

    def time(self, logsnr: Tensor) -> Tensor:
        table = _logsnr_table(self, logsnr.device)
        index = torch.searchsorted(-table, -logsnr.contiguous()).clamp(1, self.steps - 1)
        below, above = table[index - 1], table[index]
        position = (logsnr - below) / (above - below)
        position = torch.where(above.isneginf(), 1 - ((logsnr - below) / 2).exp(), position)
        return ((index + position) / self.steps).clamp(min=0)

    def __call__(self, t: Tensor) -> Level:
        logsnr = self.logsnr(t)
        level = Level((logsigmoid(logsnr) / 2).exp(), (logsigmoid(-logsnr) / 2).exp())
        if not self.zero_terminal_snr:
            return level
        # From alpha / sigma itself in its last interval: its logarithm has no derivative at t = 1.
        position, below, above = self._interval(t)
        ratio = (1 - position) * (below / 2).exp()
        sigma = (1 + ratio**2).rsqrt()
        return Level(torch.where(above.isneginf(), ratio * sigma, level.alpha),
                     torch.where(above.isneginf(), sigma, level.sigma))

    def rates(self, t: Tensor) -> Level:
        # With r = alpha / sigma: alpha = r / sqrt(1 + r^2), so d alpha = sigma^3 dr and d sigma = -alpha sigma^2 dr.
        _, below, above = self._interval(t)
        alpha, sigma = self(t)
        slope = (alpha / sigma) * (above - below) / 2
        slope = torch.where(above.isneginf(), -(below / 2).exp(), slope) * self.steps
        return Level(sigma**3 * slope, -alpha * sigma**2 * slope)

    def trained(self, t: Tensor) -> Tensor:
        if self.continuous:
            return t.clamp(self.t_min, 1)
        return (t * self.steps).ceil().clamp(1, self.steps) / self.steps

    def noise_level(self, t: Tensor) -> Tensor:
        return self.steps * t - 1

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where t lies between two entries, in [0, 1], and their log-SNRs; below t_min the first interval goes on."""
        table = _logsnr_table(self, t.device)
        place = t * self.steps - 1
        # Rounding keeps t = (i + 1) / T at the end of its interval although T t may exceed i + 1 by an ulp.
        index = (place - 1e-9).ceil().long().clamp(1, self.steps - 1)
        return place - (index - 1), table[index - 1], table[index]


@lru_cache(maxsize=64)
def _logsnr_table(table: Table, device: torch.device) -> Tensor:
    alpha_bar = table.alpha_bar()
    return (alpha_bar.log() - (-alpha_bar).log1p()).to(device)


@dataclass(frozen=True, kw_only=True)
class DDPMLinear(Table):
    """beta linear in i. Ho et al. 2020 (arXiv 2006.11239), section 4."""

    kind: Literal["ddpm-linear"] = "ddpm-linear"
    beta_min: float = 1e-4
    beta_max: float = 0.02

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_min, self.beta_max, self.steps, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class DDPMScaledLinear(Table):
    """sqrt(beta) linear in i: the table of latent diffusion and Stable Diffusion. Rombach et al. 2022, released
    code."""

    kind: Literal["ddpm-scaled-linear"] = "ddpm-scaled-linear"
    beta_min: float = 0.00085
    beta_max: float = 0.012

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_min**0.5, self.beta_max**0.5, self.steps, dtype=torch.float64) ** 2


@dataclass(frozen=True, kw_only=True)
class DDPMCosine(Table):
    """alpha_bar = cos^2(pi/2 (t + s) / (1 + s)), beta capped. Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""

    kind: Literal["ddpm-cosine"] = "ddpm-cosine"
    s: float = 0.008
    max_beta: float = 0.999

    def betas(self) -> Tensor:
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        alpha_bar = (math.pi / 2 * (t + self.s) / (1 + self.s)).cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.max_beta)


@dataclass(frozen=True, kw_only=True)
class DDPMSigmoid(Table):
    """beta a sigmoid in i from beta_min to beta_max over [-width, width]. GeoDiff (arXiv 2203.02923), released code."""

    kind: Literal["ddpm-sigmoid"] = "ddpm-sigmoid"
    beta_min: float = 1e-4
    beta_max: float = 0.02
    width: float = 6.0

    def betas(self) -> Tensor:
        ramp = torch.linspace(-self.width, self.width, self.steps, dtype=torch.float64).sigmoid()
        return self.beta_min + (self.beta_max - self.beta_min) * ramp


SCHEDULES = (DDPMLinear, DDPMScaledLinear, DDPMCosine, DDPMSigmoid)
