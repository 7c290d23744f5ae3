"""The noise schedule: how much of the picture is left at time t, and what the network's output means there.

One number, a_bar, says everything about a timestep: the share of the picture's variance that is left.

    x_t = sqrt(a_bar_t) x_0 + sqrt(1 - a_bar_t) eps,    eps ~ N(0, I)                                  DDPM eq. 4

    a_bar    the share of signal, 1 to 0: alpha-bar_t in DDPM, alpha_t in DDIM
    sigma    noise / signal, 0 to 14.6: sqrt((1 - a_bar) / a_bar), sigma in EDM
    betas    beta_t in DDPM, the share of variance that one timestep replaces: 1 - a_bar_t / a_bar_{t-1}
    x0       x_0, the clean latent; z_0 in latent diffusion
    eps, v   the network predicts one of them: epsilon in DDPM, or v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 (2202.00512)

    B pictures   T = 1000 training timesteps   C H W one latent

Papers: DDPM arXiv 2006.11239, DDIM 2010.02502, EDM 2206.00364.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.core.config import NoiseConfig


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of all timesteps, as tables."""

    config: NoiseConfig
    alphas_cumprod: Tensor  # (T,) fp32: a_bar
    sigmas: Tensor  # (T,) fp32: sqrt((1 - a_bar) / a_bar); 4096 in pure noise, where it would be infinite

    @classmethod
    def from_config(cls, config: NoiseConfig) -> "NoiseSchedule":
        """The schedule that `config` describes."""
        # fp32 throughout, as in the reference: in fp64 the last sigma would be 14.6146412 instead of 14.6146469
        if config.beta_schedule == "scaled_linear":  # latent diffusion's choice: linear in sqrt(beta)
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        else:
            betas = torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
        if config.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)  # then the network must predict v: from pure noise and eps, x0 does not follow
        a_bar = torch.cumprod(1 - betas, dim=0)  # DDPM, beside eq. 4
        above_0 = a_bar.clamp(min=2.0**-24)  # as in the reference: fp16's smallest number
        return cls(config, a_bar, ((1 - above_0) / above_0).sqrt())


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) -> betas (T,) that leave nothing of the picture at the last timestep. SD's own leave 7 % of its amplitude."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))  # 2305.08891, algorithm 1
    a_bar = signal**2
    return 1 - torch.cat([a_bar[:1], a_bar[1:] / a_bar[:-1]])


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for clean latents `x0` (B, C, H, W) and integer timesteps `t` (B,), in the dtype of `x0`."""
    a_bar = a_bar_of(schedule, t, x0)  # in fp32: in fp16 the noise at t = 0 would be 7 % too strong
    return (a_bar.sqrt() * x0 + (1 - a_bar).sqrt() * noise).to(x0.dtype)  # DDPM eq. 4


def training_target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The right prediction at `add_noise(schedule, x0, noise, t)`: (B, C, H, W), in the dtype of `noise`."""
    if schedule.config.prediction_type == "epsilon":
        return noise  # DDPM eq. 14
    a_bar = a_bar_of(schedule, t, x0)
    return (a_bar.sqrt() * noise - (1 - a_bar).sqrt() * x0).to(noise.dtype)  # v: 2202.00512, appendix D


def read_output(output: Tensor, x_t: Tensor, a_bar: float | Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The network's output at `x_t`, eps or v, as x0 and eps. All are (B, C, H, W).

    `a_bar` is a number, or a (B, 1, 1, 1) tensor with one level per sample.
    """
    signal, noise = a_bar**0.5, (1 - a_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output  # DDPM eq. 15, DDIM eq. 9: DDPM eq. 4 solved for x_0
    return signal * x_t - noise * output, signal * output + noise * x_t  # 2202.00512, appendix D


def a_bar_of(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """a_bar at timesteps `t` (B,), on the device of `like`, shaped (B, 1, 1, 1) as a factor of `like`."""
    return schedule.alphas_cumprod.to(like.device)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))
