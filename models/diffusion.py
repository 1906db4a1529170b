"""Schedule, noise, rate-aware modulation and sampling steps: functions of tensors and numbers.

Symbols: x clean latent, y what the decoder knows of it, eta in (0, 1] the noise level (its square root is what the
schedule lists), kappa the noise's scale, t the step from 0 to T-1. Equations: ResShift (Yue et al. 2023) for the
diffusion, DiffO (arXiv 2506.16572) for the single step and the modulation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import require, require_from

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (scaled input, t, lq) -> predicted x


@dataclass(frozen=True)
class DiffusionParams:
    """The schedule and its noise. The defaults are the published ones."""

    steps: int = 2  # T
    kappa: float = 2.0
    power: float = 0.3
    etas_end: float = 0.8  # sqrt(eta) of the last step
    min_noise_level: float = 0.04

    def __post_init__(self):
        require_from(1, self, "steps")
        for name in ("kappa", "power", "min_noise_level"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)}: above 0")
        first = first_sqrt_eta(self)
        require(first < self.etas_end <= 1, f"etas_end {self.etas_end}: above the first step's {first:g}, at most 1")


@dataclass(frozen=True)
class RateParams:
    """Rate-aware noise modulation: eta = clip(c / B, eta_min, eta_max) (DiffO, Eq. 11).

    c = 0.02 gives the schedule's own eta = 0.64 at 0.03125 bits per pixel. Equal bounds make eta constant, whatever c.
    """

    c: float = 0.02
    eta_min: float = 0.02
    eta_max: float = 1.0

    def __post_init__(self):
        require(self.c > 0, f"c {self.c}: above 0")
        good = 0 < self.eta_min <= self.eta_max <= 1
        require(good, f"eta_min {self.eta_min}, eta_max {self.eta_max}: above 0, at most 1, in this order")

    def eta(self, bits_per_pixel: float) -> float:
        """Noise level for the rate B_eta of the sections used, in bits per pixel of the latent's 16x16 cells."""
        return min(max(self.c / bits_per_pixel, self.eta_min), self.eta_max)


def first_sqrt_eta(params: DiffusionParams) -> float:
    """s_0 = min(min_noise / kappa, min_noise, sqrt(0.001))."""
    return min(params.min_noise_level / params.kappa, params.min_noise_level, math.sqrt(0.001))


def time_of_eta(eta: Tensor, params: DiffusionParams) -> Tensor:
    """The schedule's inverse: t(eta) = (T-1) (ln(sqrt(eta)/s_0) / ln(etas_end/s_0))^(1/power).

    Args:
        eta: noise levels, any shape; below the schedule's first they count as the first.
    Returns:
        real times, float64; T-1 at eta = etas_end^2, and 0 everywhere for T = 1.
    """
    s0 = first_sqrt_eta(params)
    fraction = torch.log(eta.double().sqrt() / s0).clamp(min=0) / math.log(params.etas_end / s0)
    return (params.steps - 1) * fraction ** (1 / params.power)


class Schedule(nn.Module):
    """Noise levels of the T steps. Take `spaced` of a schedule to run fewer steps than it was trained with.

    The tables are buffers, so that they lie where the networks lie; state dicts do not have them.

    Attributes:
        sqrt_etas, etas: float64 (T,). timesteps: the step numbers that the network is told, int64 (T,).
    """

    def __init__(self, sqrt_etas: Tensor, kappa: float, timesteps: Tensor | None = None):
        super().__init__()
        self.kappa = kappa
        if timesteps is None:
            timesteps = torch.arange(len(sqrt_etas), device=sqrt_etas.device)
        for name, table in {"sqrt_etas": sqrt_etas, "etas": sqrt_etas.square(), "timesteps": timesteps}.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the codec, but no cast of the networks rounds the tables."""
        for name, table in self._buffers.items():
            moved = fn(table)
            self._buffers[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        return self

    @classmethod
    def exponential(cls, params: DiffusionParams) -> "Schedule":
        """sqrt(eta_t) = s_0 (etas_end/s_0)^((t/(T-1))^power); for T = 1, where t/(T-1) is undefined, [etas_end]."""
        if params.steps == 1:
            return cls(torch.tensor([params.etas_end], dtype=torch.float64), params.kappa)
        s0 = first_sqrt_eta(params)
        fraction = np.linspace(0, 1, params.steps, dtype=np.float64) ** params.power
        return cls(torch.from_numpy(s0 * (params.etas_end / s0) ** fraction), params.kappa)

    def spaced(self, count: int) -> "Schedule":
        """Keep the steps int(T/count * i); asking for more than there are keeps all."""
        if count >= len(self):
            return self
        keep = [int(len(self) / count * i) for i in range(count)]
        sqrt_etas, timesteps = (torch.stack([table[i] for i in keep]) for table in (self.sqrt_etas, self.timesteps))
        return Schedule(sqrt_etas, self.kappa, timesteps)

    def __len__(self) -> int:
        return len(self.sqrt_etas)

    def neighbours(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """eta_t and eta_{t-1}, which is 0 before the first step, of steps int64 (N,): float64 (N,) each."""
        return self.etas[t], F.pad(self.etas[:-1], (1, 0))[t]


def _each(numbers: Tensor) -> Tensor:
    """One number per sample, (N,), as float32 N x 1 x 1 x 1."""
    return numbers.float().view(-1, 1, 1, 1)


def q_sample(schedule: Schedule, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = x + eta_t (y - x) + kappa sqrt(eta_t) noise (ResShift, Eq. 2), t int64 (N,)."""
    return _each(schedule.etas[t]) * (y - x) + x + _each(schedule.sqrt_etas[t] * schedule.kappa) * noise


def prior_sample(y: Tensor, eta: Tensor, kappa: float, noise: Tensor) -> Tensor:
    """x~ = y + kappa sqrt(eta) noise: all that the decoder starts from. eta: (N,)."""
    return y + kappa * eta.sqrt().to(y.dtype).view(-1, 1, 1, 1) * noise


def scale_input(x: Tensor, eta: Tensor, kappa: float) -> Tensor:
    """x / sqrt(1 + kappa^2 eta): about unit variance, given a latent of unit variance. eta: (N,)."""
    return x / (1 + kappa**2 * eta).sqrt().to(x.dtype).view(-1, 1, 1, 1)


def one_step(
    denoiser: Denoiser, x_noisy: Tensor, lq: Tensor, eta: Tensor, params: DiffusionParams, centre: Tensor | float = 0.0
) -> Tensor:
    """x^ = U((x~ - centre) / sqrt(1 + kappa^2 eta), t(eta), lq): the codec's single DDIM step (DiffO, Alg. 1).

    Args:
        x_noisy: x~, N x d x h x w. lq: z_q. eta: float64 (N,).
        centre: what the network's input is a difference to (the paper's adapter); 0 in the published code.
    Returns:
        the predicted latent, as x_noisy.
    """
    return denoiser(scale_input(x_noisy - centre, eta, params.kappa), time_of_eta(eta, params).float(), lq)


def predict(
    schedule: Schedule, denoiser: Denoiser, x_t: Tensor, t: Tensor, lq: Tensor, centre: Tensor | float = 0.0
) -> Tensor:
    """The network's prediction of x at step t, int64 (N,)."""
    return denoiser(scale_input(x_t - centre, schedule.etas[t], schedule.kappa), schedule.timesteps[t], lq)


def ddim_step(schedule: Schedule, x_t: Tensor, x_0: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The deterministic step k x_0 + m x_t + j y."""
    eta, eta_prev = schedule.neighbours(t)
    m = (eta_prev / eta).sqrt()
    j = eta_prev - (eta_prev * eta).sqrt()
    k = 1 - eta_prev + (eta_prev * eta).sqrt() - m
    return _each(k) * x_0 + _each(m) * x_t + _each(j) * y


def ancestral_step(schedule: Schedule, x_t: Tensor, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(x_{t-1} | x_t, x_0) (ResShift, Eq. 6); without noise at t = 0."""
    eta, eta_prev = schedule.neighbours(t)
    alpha = eta - eta_prev
    deviation = (schedule.kappa**2 * eta_prev / eta * alpha).sqrt()
    return _each(eta_prev / eta) * x_t + _each(alpha / eta) * x_0 + _each(deviation) * noise


def sample(
    schedule: Schedule,
    denoiser: Denoiser,
    y: Tensor,
    lq: Tensor,
    draw: Callable[[], Tensor],
    ddim: bool,
    centre: Tensor | float = 0.0,
) -> Tensor:
    """The whole reverse process with the schedule's own noise levels (the paper's Table 2).

    Args:
        y, centre: as in `one_step`. draw: gives a fresh standard normal tensor shaped as y.
        ddim: deterministic steps; otherwise ancestral ones.
    Returns:
        the sampled latent, as y.
    """
    last = len(schedule) - 1
    x_t = prior_sample(y, schedule.etas[last].expand(len(y)), schedule.kappa, draw())
    for step in range(last, -1, -1):
        t = torch.full((len(y),), step, dtype=torch.int64, device=y.device)
        x_0 = predict(schedule, denoiser, x_t, t, lq, centre)
        x_t = ddim_step(schedule, x_t, x_0, y, t) if ddim else ancestral_step(schedule, x_t, x_0, t, draw())
    return x_t
