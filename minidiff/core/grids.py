"""Which timesteps a sampler visits, at which noise levels, and where it starts: one row of `SAMPLERS` for each sampler.

    for step in SAMPLERS["ddim"](model, noise, schedule, steps=30, step_noise=draw):
        show(step.x0)
    latents = step.x

A sampler is an iterator of `Step`s, one after each call of the network, so progress bars and previews live outside.

    B pictures   C H W one latent   T = 1000 training timesteps   a_bar, sigma: as in schedule.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import sqrt

import numpy as np
from torch import Tensor

from minidiff.core import samplers
from minidiff.core.errors import SettingsError
from minidiff.core.samplers import Denoiser, Grid, Model, StepNoise, Visit
from minidiff.core.schedule import NoiseSchedule

RHO = 7.0  # EDM, table 1: steps are equal in sigma^(1/RHO), so a larger RHO puts more of them where sigma is small
LCM_STEPS = 50  # the timesteps that a latent consistency model was distilled on


@dataclass(frozen=True, eq=False)
class Step:
    """Where a sampler is after one call of the network. Tensors are (B, C, H, W), fp32."""

    index: int  # 0 .. total - 1
    total: int  # calls of the network: Heun makes two per step, PNDM one more than there are steps
    t: float  # the timestep that the network saw
    x: Tensor  # the latents after the step; the VAE decodes those of the last step
    x0: Tensor  # the clean latents that the network predicts at t: decode these for a preview


@dataclass(frozen=True)
class Sampler:
    """One row of `SAMPLERS`: an update rule of samplers.py, its grid, its start, and the settings that it takes."""

    rule: Callable[..., Iterator[Visit]]
    grid: Callable[[NoiseSchedule, int, int, str, bool], Grid]  # (schedule, steps, how many to leave out, spacing, karras)
    start: Callable[[Tensor, Tensor | None, float, str], Tensor]  # (noise, image, the first level, spacing) -> x
    spacing: str | None  # the default; None: the sampler has its own timesteps
    karras: bool = False
    eta: bool = False
    fresh_noise: bool = False  # calls `step_noise` even where eta is 0
    calls: Callable[[int], int] = lambda length: length  # calls of the network for a grid of this length

    def __call__(
        self, model: Model, noise: Tensor, schedule: NoiseSchedule, steps: int, step_noise: StepNoise, *,
        image: Tensor | None = None, strength: float = 1.0, fix_x0: Callable[[Tensor], Tensor] | None = None,
        spacing: str | None = None, karras: bool | None = None, eta: float = 0.0,
    ) -> Iterator[Step]:  # fmt: skip
        """Draw. A setting that the sampler does not take has no effect.

        model       (x, t) -> eps or v, for fp32 x (B, C, H, W) with a variance of about 1, and fp32 t (B,)
        noise       (B, C, H, W), standard normal; `step_noise(i)` gives more of it for step i
        image       clean latents (B, C, H, W) to start from, under as much noise as `strength` says
        strength    the share of the steps that is taken, 0 to 1; the first ones are left out. 1 without an image
        fix_x0      corrects the predicted x0: inpainting knows a part of the picture
        spacing     which timesteps (see `timesteps`); None: the model's own choice, else the sampler's default
        karras      sigmas by EDM eq. 5, for samplers that can use them; None: the model's own choice
        eta         the share of fresh noise, for DDIM and TCD only: 0 is deterministic, 1 is DDPM, or nearly LCM
        """
        config = schedule.config
        spacing = spacing or config.timestep_spacing or self.spacing or ""
        karras = self.karras and (config.use_karras_sigmas if karras is None else karras)
        grid = self.grid(schedule, steps, steps - int(steps * strength), spacing, karras)
        noise = noise.float()
        x = self.start(noise, None if image is None else image.to(noise), grid[0][1], spacing)
        rule = partial(self.rule, eta=eta) if self.eta else self.rule
        visits = rule(Denoiser(model, schedule, fix_x0), x, grid, lambda i: step_noise(i).to(x))
        total = self.calls(len(grid))
        return (Step(index, total, t, x, x0) for index, (t, x, x0) in enumerate(visits))


def timesteps(schedule: NoiseSchedule, steps: int, spacing: str, whole: bool = True, spare: int = 0) -> list[float]:
    """`steps` timesteps from noisy to clean, whole ones if `whole`. SettingsError if the spacing has fewer different ones.

    With `spare` = 1 the grid has one more point, the cleanest, which is not returned: DPM-Solver++ ends at sigma = 0.
    """
    T, points = len(schedule.alphas_cumprod), steps + spare
    grids = {  # by numpy, which rounds 499.5 as in the reference. For T = 1000 and 4 steps:
        "leading": np.arange(points - 1, -1, -1.0) * (T // points) + schedule.config.steps_offset,  # 751, 501, 251, 1
        "linspace": np.linspace(0, T - 1, points)[::-1],  # 999, 666, 333, 0: both ends
        "trailing": np.arange(T, 0, -T / steps).round() - 1,  # 999, 749, 499, 249: for very few steps (2305.08891, table 2)
    }
    t: list[float] = (grids[spacing].round() if whole else grids[spacing])[:steps].tolist()
    if t[0] > T - 1 or t[-1] < 0 or any(later >= earlier for earlier, later in pairwise(t)):
        raise SettingsError(f'num_inference_steps is {steps}; "{spacing}" timestep_spacing has fewer different timesteps.')
    return t


def sigmas_at(schedule: NoiseSchedule, t: Sequence[float]) -> list[float]:
    """Sigma at timesteps `t`, linear between whole ones; and a final 0."""
    table = schedule.sigmas.double().numpy()
    return [*np.interp(t, np.arange(len(table)), table).tolist(), 0.0]


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> list[float]:
    """`steps` sigmas from `sigma_max` down to `sigma_min`. They are dense where details form: under little noise."""
    high, low = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return [float(sigma) for sigma in (high + np.linspace(0, 1, steps) * (low - high)) ** RHO]  # EDM eq. 5


def timesteps_at(schedule: NoiseSchedule, sigmas: Sequence[float]) -> list[float]:
    """The timesteps with these noise levels, rarely whole: linear in log sigma between those of the table."""
    table = schedule.sigmas.log().double().numpy()
    return [float(t) for t in np.interp(np.log(sigmas), table, np.arange(len(table)))]


def a_bar_at(schedule: NoiseSchedule, t: float) -> float:
    """a_bar at a whole timestep. Below 0, where the last step of DDIM and PNDM ends: 1 or a_bar[0]."""
    if t < 0:
        return 1.0 if schedule.config.set_alpha_to_one else schedule.alphas_cumprod[0].item()
    return schedule.alphas_cumprod[int(t)].item()


def rows(ts: list[float], levels: list[float]) -> Grid:
    """A grid from timesteps and their levels, one level more: each step goes to the level where the next step starts."""
    return list(zip(ts, levels, levels[1:]))


# --- grids: levels are a_bar -------------------------------------------------------------------------------------------


def ancestors(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DDPM: from each timestep to the next one, and at last to the clean picture, a_bar = 1."""
    ts = timesteps(schedule, steps, spacing)[first:]
    return rows(ts, [*(a_bar_at(schedule, t) for t in ts), 1.0])


def downwards(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DDIM: from each timestep to the next one, and at last to the level below timestep 0 (`a_bar_at`).

    The reference always goes T // steps back. Unless spacing is "leading", it misses the next timestep, and noise stays.
    """
    ts = timesteps(schedule, steps, spacing)[first:]
    return rows(ts, [a_bar_at(schedule, t) for t in (*ts, -1)])


def first_jump_twice(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """PNDM: DDIM's grid with the first step twice. The second time, t is the timestep at its end; the levels are the same."""
    jump, *others = downwards(schedule, steps, first, spacing, karras)
    return [jump, *((t, jump[1], level) for t, level, _ in others[:1]), *others]


def distilled(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """LCM and TCD: `steps` of the 50 timesteps of distillation, evenly spread."""
    known = np.arange(LCM_STEPS, 0, -1) * (len(schedule.alphas_cumprod) // LCM_STEPS) - 1  # 999, 979, ... 19
    ts = [float(t) for t in known[np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False)).astype(int)][first:]]
    return rows(ts, [*(a_bar_at(schedule, t) for t in ts), 1.0])


# --- grids: levels are sigma -------------------------------------------------------------------------------------------


def between_timesteps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """Euler and Heun: timesteps need not be whole. Karras sigmas go from the first to the last sigma of the spacing."""
    ts = timesteps(schedule, steps, spacing, whole=False)
    sigmas = sigmas_at(schedule, ts)
    if karras:
        sigmas = [*karras_sigmas(sigmas[0], sigmas[-2], steps), 0.0]
        ts = timesteps_at(schedule, sigmas[:-1])
    return rows(ts, sigmas)[first:]


def whole_timesteps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DPM-Solver++ and UniPC: whole timesteps; sigma = 0 replaces the cleanest one. Karras sigmas span all of training."""
    ts = timesteps(schedule, steps, spacing, spare=1)
    sigmas = sigmas_at(schedule, ts)
    if karras:
        sigmas = [*karras_sigmas(schedule.sigmas[-1].item(), schedule.sigmas[0].item(), steps), 0.0]
        ts = [float(round(t)) for t in timesteps_at(schedule, sigmas[:-1])]
    return rows(ts, sigmas)[first:]


def start_vp(noise: Tensor, image: Tensor | None, a_bar: float, spacing: str) -> Tensor:
    """x for the first step on the scale of x_t: pure noise, or `image` with the noise of level `a_bar`."""
    return noise if image is None else sqrt(a_bar) * image + sqrt(1 - a_bar) * noise  # DDPM eq. 4


def start_ve(noise: Tensor, image: Tensor | None, sigma: float, spacing: str) -> Tensor:
    """The same on the scale x0 + sigma eps. Pure noise gets the variance that it has together with an x0 of variance 1."""
    return sqrt(sigma**2 + 1) * noise if image is None else image + sigma * noise  # DDPM eq. 4 over sqrt(a_bar)


def start_euler(noise: Tensor, image: Tensor | None, sigma: float, spacing: str) -> Tensor:
    """`start_ve`; but pure noise gets sigma for sqrt(sigma^2 + 1) unless spacing is "leading", as in the reference."""
    return sigma * noise if image is None and spacing != "leading" else start_ve(noise, image, sigma, spacing)


dpmpp_2m_sde = partial(samplers.dpmpp_2m, sde=True)
# Karras sigmas for euler_a are k-diffusion's; diffusers ignores the setting.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(samplers.ddpm, ancestors, start_vp, "leading", fresh_noise=True),
    "ddim": Sampler(samplers.ddim, downwards, start_vp, "leading", eta=True),
    "pndm": Sampler(samplers.pndm, first_jump_twice, start_vp, "leading"),
    "euler": Sampler(samplers.euler, between_timesteps, start_euler, "linspace", karras=True),
    "euler_a": Sampler(samplers.euler_a, between_timesteps, start_euler, "linspace", karras=True, fresh_noise=True),
    "heun": Sampler(samplers.heun, between_timesteps, start_euler, "linspace", karras=True, calls=lambda n: 2 * n - 1),
    "dpm++_2m": Sampler(samplers.dpmpp_2m, whole_timesteps, start_ve, "linspace", karras=True),
    "dpm++_2m_sde": Sampler(dpmpp_2m_sde, whole_timesteps, start_ve, "linspace", karras=True, fresh_noise=True),
    "unipc": Sampler(samplers.unipc, whole_timesteps, start_ve, "linspace", karras=True),
    "lcm": Sampler(samplers.lcm, distilled, start_vp, None, fresh_noise=True),
    "tcd": Sampler(samplers.tcd, distilled, start_vp, None, eta=True),
}
ddim = SAMPLERS["ddim"]
