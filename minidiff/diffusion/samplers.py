"""Samplers: from pure noise to a clean latent, one network call at a time.

Every sampler is a generator that yields a `Step` after each network call, so progress bars, previews and lessons live
outside:

    for step in SAMPLERS["ddim"](model, noise, schedule, steps=30, step_noise=draw):
        show(step.x0)
    latents = step.x

What they share:

| argument     | meaning                                                                                              |
|--------------|------------------------------------------------------------------------------------------------------|
| `model`      | (x, t) -> raw output (eps or v) for fp32 x (B, C, H, W) of variance about 1 and fp32 t (B,); `guided` |
|              | makes one. The output may be of any float dtype: the sampler's own arithmetic is fp32                |
| `noise`      | (B, C, H, W), standard normal; its device is where everything happens                                |
| `step_noise` | i -> standard normal noise (B, C, H, W) for step i, on any device; only stochastic samplers call it  |
| `spacing`    | which timesteps (see `schedule.timesteps`); None: the model's own choice, else the sampler's default  |

| in the code          | in the papers                                                                                |
|----------------------|----------------------------------------------------------------------------------------------|
| `a_bar`, `a_bar_prev`| alpha_t and alpha_{t-1} in DDIM, alpha-bar in DDPM. "prev" is the next one visited: t falls   |
| `sigma`, `sigma_next`| sigma in EDM and k-diffusion, noise / signal; a_bar = 1 / (1 + sigma^2)                      |
| `x0`, `eps`          | the network's output read as a clean latent ("predicted x_0", x_theta) and as noise           |
| `h`                  | lambda_{t_i} - lambda_{t_{i-1}} in DPM-Solver++, where lambda = -log sigma                   |

To add a sampler: one function here, one row in `SAMPLERS`.
Shapes: B pictures, C H W one latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log, sqrt
from typing import Protocol

import torch
from torch import Tensor

from minidiff.diffusion.schedule import NoiseSchedule, read_output, sigmas_at, timesteps
from minidiff.errors import SettingsError, did_you_mean

Model = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps or v
StepNoise = Callable[[int], Tensor]  # i -> noise


@dataclass(frozen=True, eq=False)
class Step:
    """Where the sampler stands after one network call. All tensors fp32, (B, C, H, W)."""

    index: int  # 0 .. total - 1
    total: int
    t: float  # the timestep the network saw
    x: Tensor  # the latents after the step, VP scale; after the last step: what vae.decode wants
    x0: Tensor  # the clean latents as the network saw them at t: decode these for a preview


class Sampler(Protocol):
    """What every row of `SAMPLERS` can be called with. Bad settings raise SettingsError at the first step."""

    def __call__(
        self,
        model: Model,
        noise: Tensor,
        schedule: NoiseSchedule,
        steps: int,
        step_noise: StepNoise,
        *,
        spacing: str | None = None,
    ) -> Iterator[Step]: ...


def ddim(
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    step_noise: StepNoise,
    eta: float = 0.0,
    spacing: str | None = None,
) -> Iterator[Step]:
    """DDIM (2010.02502): go back to x0, then forward again to the previous noise level, with the same eps.

    `eta` is the share of fresh noise: 0 is deterministic, 1 is DDPM's posterior sampling.
    """
    if not 0 <= eta <= 1:
        raise SettingsError(f"eta is {eta}; it can be 0 (deterministic) to 1 (as DDPM).")
    a_bars = schedule.alphas_cumprod.tolist()
    a_bar_final = 1.0 if schedule.set_alpha_to_one else a_bars[0]
    x = noise.float()
    for i, t in enumerate(timesteps(schedule, steps, spacing or schedule.timestep_spacing or "leading")):
        # The reference always goes T // steps back: with leading spacing the next t, with the others only near it.
        t_prev = int(t) - len(a_bars) // steps
        a_bar, a_bar_prev = a_bars[int(t)], a_bars[t_prev] if t_prev >= 0 else a_bar_final
        x0, eps = _predict(model, schedule, x, t, a_bar)
        sigma = eta * sqrt((1 - a_bar_prev) / (1 - a_bar)) * sqrt(1 - a_bar / a_bar_prev)  # DDIM eq. 16
        x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev - sigma**2) * eps  # DDIM eq. 12: "predicted x_0", "direction"
        if eta > 0:
            x = x + sigma * step_noise(i).to(x)  # DDIM eq. 12: "random noise"
        yield Step(i, steps, t, x, x0)


def euler_a(
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    step_noise: StepNoise,
    spacing: str | None = None,
) -> Iterator[Step]:
    """Euler ancestral (k-diffusion): an Euler step to less noise than wanted, then fresh noise up to the wanted level.

    Inside, x is in VE scale, x0 + sigma eps. There the ODE is simply dx = eps d sigma, DDIM eq. 14.
    """
    spacing = spacing or schedule.timestep_spacing or "linspace"
    ts = timesteps(schedule, steps, spacing, whole=False)
    sigmas = sigmas_at(schedule, ts)
    # x0 + sigma eps has variance sigma^2 + 1 where x0 has 1. The reference leaves the 1 out unless spacing is leading.
    x = noise.float() * (sqrt(sigmas[0] ** 2 + 1) if spacing == "leading" else sigmas[0])
    for i, (t, sigma, sigma_next) in enumerate(zip(ts, sigmas, sigmas[1:], strict=False)):
        x0, eps = _predict(model, schedule, x / sqrt(sigma**2 + 1), t, 1 / (sigma**2 + 1))
        sigma_up = sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)  # 2011.13456, appendix F: its noise
        sigma_down = sqrt(sigma_next**2 - sigma_up**2)  # so that down^2 + up^2 = next^2
        x = x + eps * (sigma_down - sigma)  # Euler's method on DDIM eq. 14
        x = x + sigma_up * step_noise(i).to(x)
        yield Step(i, steps, t, x / sqrt(sigma_next**2 + 1), x0)


def dpmpp_2m(
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    step_noise: StepNoise,
    spacing: str | None = None,
) -> Iterator[Step]:
    """DPM-Solver++ 2M (2211.01095, Algorithm 2): second order for one network call a step, by remembering the last x0.

    In log sigma the linear part of the ODE is solved exactly; only x0 has to be extrapolated over the step. The first
    step has no past, and the last ends at sigma = 0, infinitely far in log sigma: both are first order, that is DDIM.
    """
    ts = timesteps(schedule, steps, spacing or schedule.timestep_spacing or "linspace", spare=1)
    sigmas = sigmas_at(schedule, ts)
    x, x0_before = noise.float(), torch.empty(0)
    for i, (t, sigma, sigma_next) in enumerate(zip(ts, sigmas, sigmas[1:], strict=False)):
        signal, signal_next = 1 / sqrt(sigma**2 + 1), 1 / sqrt(sigma_next**2 + 1)  # the papers' alpha = sqrt(a_bar)
        x0, _ = _predict(model, schedule, x, t, signal**2)
        D = x0
        if i > 0 and sigma_next > 0:
            h, h_before = log(sigma / sigma_next), log(sigmas[i - 1] / sigma)
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before  # Algorithm 2: x0 half a step ahead
        exp_minus_h = sigma_next / sigma
        x = exp_minus_h * signal_next / signal * x - signal_next * (exp_minus_h - 1) * D  # Algorithm 2: x_{t_i}
        x0_before = x0
        yield Step(i, steps, t, x, x0)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler_a": euler_a,
    "dpm++_2m": dpmpp_2m,
}


def sampler_named(name: str) -> Sampler:
    """The row of `SAMPLERS`, or a SettingsError that lists them."""
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise SettingsError(f'sampler "{name}" is unknown; it is one of {known}.{did_you_mean(name, SAMPLERS)}')
    return SAMPLERS[name]


def _predict(model: Model, schedule: NoiseSchedule, x: Tensor, t: float, a_bar: float) -> tuple[Tensor, Tensor]:
    """Call the network at VP-scale `x` and read its output: x0 and eps, fp32."""
    output = model(x, torch.full((len(x),), float(t), device=x.device))
    return read_output(output.float(), x, a_bar, schedule.prediction_type)
