"""The noise schedule: how much of the picture is left at time t, and what the network's output means there.

Noise is mixed in over T = 1000 training timesteps. One number says everything about a timestep: the share of the
signal's variance that is left,

    x_t = sqrt(a_bar_t) x_0 + sqrt(1 - a_bar_t) eps,    eps ~ N(0, I)                                  DDPM eq. 4

| here        | paper                                                                 | meaning                   |
|-------------|-----------------------------------------------------------------------|---------------------------|
| `a_bar`     | alpha-bar_t in DDPM; DDIM writes alpha_t for the same thing           | share of signal, 1 to 0   |
| `sigma`     | sigma in EDM: sqrt((1 - a_bar) / a_bar)                               | noise / signal, 0 to 14.6 |
| `betas`     | beta_t in DDPM: the share of variance that one timestep replaces      | 1 - a_bar_t / a_bar_{t-1} |
| `x0`        | x_0; in latent diffusion the latent z_0                               | the clean latent          |
| `eps`, `v`  | epsilon in DDPM; v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 (2202.00512)| what the network predicts |

Two scales of the same noisy latent appear in the samplers: `x_t` above, whose variance stays near 1 (variance
preserving, VP: what the network sees and `vae.decode` wants), and x_t / sqrt(a_bar_t) = x_0 + sigma eps (variance
exploding, VE).

Shapes: B pictures, T training timesteps; latents (B, C, H, W), timesteps (B,).
Papers: DDPM arXiv 2006.11239, DDIM 2010.02502, EDM 2206.00364, latent diffusion 2112.10752, v-prediction 2202.00512,
zero terminal SNR 2305.08891.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import SettingsError, did_you_mean

SPACINGS = ("leading", "linspace", "trailing")
RHO = 7.0  # EDM, table 1: steps are equal in sigma^(1/RHO), so the larger, the denser where sigma is small


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The tables of the forward process, and the five settings that samplers read from `scheduler_config.json`.

    With `rescale_betas_zero_snr` the last timestep is pure noise: there a_bar is 0, for training and for samplers that
    walk timesteps. Sigma would be infinite; it is 4096, that of a_bar = 2^-24, as the reference has it.
    """

    alphas_cumprod: Tensor  # (T,) fp32, a_bar
    sigmas: Tensor  # (T,) fp32, sqrt((1 - a_bar) / a_bar)
    prediction_type: str = "epsilon"  # or "v_prediction"
    steps_offset: int = 1  # added to "leading" timesteps
    set_alpha_to_one: bool = False  # DDIM's last step: all the way to a_bar = 1, or to a_bar[0]
    timestep_spacing: str | None = None  # None: each sampler's own default
    use_karras_sigmas: bool = False  # for samplers that can: sigmas by EDM eq. 5

    @classmethod
    def from_config(cls, config: NoiseConfig) -> "NoiseSchedule":
        """The schedule that `config` describes. SettingsError where it describes none."""
        try:
            config.check()
        except ValueError as error:
            raise SettingsError(f"noise schedule: {error}.") from error
        # fp32 throughout, as the reference has it: in fp64 the last sigma is 14.6146412 instead of 14.6146469
        if config.beta_schedule == "scaled_linear":  # the choice of latent diffusion: linear in sqrt(beta)
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        else:
            betas = torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
        if config.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        a_bar = torch.cumprod(1 - betas, dim=0)  # DDPM, beside eq. 4
        never_0 = a_bar.clamp(min=2.0**-24)  # fp16's smallest number
        return cls(
            alphas_cumprod=a_bar,
            sigmas=((1 - never_0) / never_0).sqrt(),
            prediction_type=config.prediction_type,
            steps_offset=config.steps_offset,
            set_alpha_to_one=config.set_alpha_to_one,
            timestep_spacing=config.timestep_spacing,
            use_karras_sigmas=config.use_karras_sigmas,
        )


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """`betas` (T,) bent so that nothing of the picture is left at T - 1, where plain ones leave 7 % of its amplitude."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))  # 2305.08891, algorithm 1
    a_bar = signal**2
    return 1 - torch.cat([a_bar[:1], a_bar[1:] / a_bar[:-1]])


# ---------------------------------------------------------------------------------------------- training: adding noise


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for clean latents `x0` (B, C, H, W) and integer timesteps `t` (B,), in the dtype of `x0`.

    The fp32 `a_bar` lifts the whole line to fp32, and the result is cast last. In fp16, 1 - a_bar[0] would be
    15 % wrong, and so the noise 7 % too strong.
    """
    a_bar = _a_bar_at(schedule, t, x0)
    return (a_bar.sqrt() * x0 + (1 - a_bar).sqrt() * noise).to(x0.dtype)  # DDPM eq. 4


def training_target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer for `add_noise(schedule, x0, noise, t)`: (B, C, H, W), in the dtype of `noise`."""
    if schedule.prediction_type == "epsilon":
        return noise  # DDPM eq. 14
    a_bar = _a_bar_at(schedule, t, x0)
    return (a_bar.sqrt() * noise - (1 - a_bar).sqrt() * x0).to(noise.dtype)  # v: 2202.00512, appendix D


def read_output(output: Tensor, x_t: Tensor, a_bar: float | Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """x0 and eps, the clean latent and the noise that the network's `output` (B, C, H, W) at `x_t` implies.

    `a_bar` is a number, or a (B, 1, 1, 1) tensor where each sample has a level of its own.
    """
    signal, noise = a_bar**0.5, (1 - a_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output  # DDPM eq. 15, DDIM eq. 9: eq. 4 solved for x_0
    return signal * x_t - noise * output, signal * output + noise * x_t  # 2202.00512, appendix D


def _a_bar_at(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """a_bar at timesteps `t` (B,), shaped (B, 1, 1, 1) so that it multiplies `like`, on its device."""
    table = schedule.alphas_cumprod.to(like.device)
    return table[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))


# ------------------------------------------------------------------------------ sampling: which timesteps, which sigmas


def timesteps(schedule: NoiseSchedule, steps: int, spacing: str, whole: bool = True, spare: int = 0) -> list[float]:
    """`steps` timesteps from noisy to clean, for T = 1000 and 4 steps:

    leading   751, 501, 251, 1    multiples of T // steps, plus `steps_offset`; never reaches pure noise
    linspace  999, 666, 333, 0    both ends, rounded if `whole`
    trailing  999, 749, 499, 249  from pure noise down; the one to use for very few steps (2305.08891, table 2)

    With `spare` = 1 the grid has one more point, the cleanest, which is not returned: DPM-Solver++ ends at sigma = 0.
    One step of leading or linspace starts at t = 1 or 0, where there is no noise left to remove.
    SettingsError for an unknown spacing, or where there are not that many different timesteps.
    """
    # numpy, not torch: 499.5 and its like round to the reference's side only with the reference's arithmetic
    T, points = len(schedule.alphas_cumprod), steps + spare
    if not 1 <= steps <= T:
        raise SettingsError(f"num_inference_steps is {steps}; it can be 1 to {T}, the timesteps this model was trained on.")
    if spacing == "leading":
        grid = np.arange(points - 1, -1, -1.0) * (T // points) + schedule.steps_offset
    elif spacing == "linspace":
        grid = np.linspace(0, T - 1, points)[::-1]
    elif spacing == "trailing":
        grid = np.arange(T, 0, -T / steps).round() - 1
    else:
        known = ", ".join(SPACINGS)
        hint = did_you_mean(spacing, SPACINGS)
        raise SettingsError(f'timestep_spacing "{spacing}" is unknown; it is one of {known}.{hint}')
    t: list[float] = (grid.round() if whole else grid)[:steps].tolist()
    if t[0] > T - 1 or t[-1] < 0 or any(later >= earlier for earlier, later in pairwise(t)):
        raise SettingsError(
            f'num_inference_steps is {steps}: with "{spacing}" spacing this sampler has fewer different timesteps '
            f"between 0 and {T - 1}. Use fewer steps or another timestep_spacing."
        )
    return t


def sigmas_at(schedule: NoiseSchedule, t: Sequence[float]) -> list[float]:
    """sigma at timesteps `t`, whole or not (linear in between), and a final 0: one more number than `t` has."""
    at = torch.tensor(t, dtype=torch.float64)
    low = at.floor().long()
    high = at.ceil().long()
    table = schedule.sigmas.double()
    between: list[float] = torch.lerp(table[low], table[high], at - low).tolist()
    return [*between, 0.0]


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> list[float]:
    """`steps` sigmas from `sigma_max` down to `sigma_min`, dense where little noise is left: details are made there."""
    ramp = np.linspace(0, 1, steps)
    high, low = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    sigmas: list[float] = ((high + ramp * (low - high)) ** RHO).tolist()  # EDM eq. 5
    return sigmas


def timesteps_at(schedule: NoiseSchedule, sigmas: Sequence[float]) -> list[float]:
    """The timesteps with these noise levels, rarely whole: linear in log sigma between those of the table."""
    table = schedule.sigmas.log().double().numpy()
    t: list[float] = np.interp(np.log(sigmas), table, np.arange(len(table))).tolist()
    return t
