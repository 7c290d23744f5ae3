"""Samplers: from pure noise to a clean latent, one network call at a time.

A sampler is an iterator of `Step`s, one after each network call, so progress bars, previews and lessons live outside:

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
| `image`      | clean latents (B, C, H, W) to start from: noise is added to them, as much as `strength` says         |
| `strength`   | the share of the steps that is walked, 0 to 1; the first ones are left out. 1 without an image       |
| `fix_x0`     | x0 as the network believes it -> x0 as it shall be: inpainting knows a part of it                    |
| `spacing`    | which timesteps (see `schedule.timesteps`); None: the model's own choice, else the sampler's default |
| `karras`     | sigmas by EDM eq. 5, for samplers that can; None: the model's own choice                             |
| `eta`        | the share of fresh noise, for DDIM: 0 is deterministic, 1 is DDPM's                                  |

| in the code          | in the papers                                                                                |
|----------------------|----------------------------------------------------------------------------------------------|
| `a_bar`, `a_bar_prev`| alpha_t and alpha_{t-1} in DDIM, alpha-bar in DDPM. "prev" is the next one visited: t falls   |
| `sigma`, `sigma_next`| sigma in EDM and k-diffusion, noise / signal; a_bar = 1 / (1 + sigma^2)                      |
| `x0`, `eps`          | the network's output read as a clean latent ("predicted x_0", x_theta) and as noise           |
| `h`                  | lambda_{t_i} - lambda_{t_{i-1}} in DPM-Solver++, where lambda = -log sigma                   |

The update rules are in walkers.py, for those that walk the timesteps of training, and in solvers.py, for those that solve
an equation over sigma. To add a sampler: one rule there, one row in `SAMPLERS` here, its name for A1111 in
studio/foreign.py, and the help in flags.py.
Shapes: B pictures, C H W one latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from minidiff.core import samplers as walkers
from minidiff.core import solvers
from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.core.runs import Grid, Model, Rule, Run, StepNoise, Visit
from minidiff.core.schedule import NoiseSchedule

MAX_STEPS = 1000  # those of training; the grid, which knows this model's own, refuses more


@dataclass(frozen=True, eq=False)
class Step:
    """Where the sampler stands after one network call. All tensors fp32, (B, C, H, W)."""

    index: int  # 0 .. total - 1
    total: int  # network calls: Heun makes two a step, PNDM one more than there are steps
    t: float  # the timestep the network saw
    x: Tensor  # the latents after the step, VP scale; after the last step: what vae.decode wants
    x0: Tensor  # the clean latents as the network saw them at t: decode these for a preview


@dataclass(frozen=True)
class Sampler:
    """One row of `SAMPLERS`: an update rule, the grid it walks on, where it starts, and what it can be asked for."""

    rule: Rule
    grid: Callable[[NoiseSchedule, int, int, str, bool], Grid]  # (schedule, steps, the first one walked, spacing, karras)
    start: Callable[[Tensor, Tensor | None, float, str], Tensor]  # (noise, image, the first level, spacing) -> x
    spacing: str | None  # the default; None: it has timesteps of its own
    karras: bool = False
    eta: bool = False
    fresh_noise: bool = False  # asks for `step_noise` even where eta is 0
    calls: Callable[[int], int] = lambda length: length  # of the network, on a grid of that length

    def __call__(
        self,
        model: Model,
        noise: Tensor,
        schedule: NoiseSchedule,
        steps: int,
        step_noise: StepNoise,
        *,
        image: Tensor | None = None,
        strength: float = 1.0,
        fix_x0: Callable[[Tensor], Tensor] | None = None,
        spacing: str | None = None,
        karras: bool | None = None,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        """Draw. SettingsError, at once, for settings that this sampler cannot have."""
        self.check(spacing, karras, eta)
        first = first_step(steps, strength, image)
        spacing = spacing or schedule.timestep_spacing or self.spacing or ""
        karras = self.karras and (schedule.use_karras_sigmas if karras is None else karras)
        grid = self.grid(schedule, steps, first, spacing, karras)
        noise = noise.float()
        x = self.start(noise, None if image is None else image.to(noise), grid[0][1], spacing)
        run = Run(model, schedule.prediction_type, x, grid, step_noise, eta, fix_x0)
        return numbered(self.rule(run), self.calls(len(grid)))

    def check(self, spacing: str | None, karras: bool | None, eta: float) -> None:
        """Refuse what is not this sampler's."""
        if spacing and self.spacing is None:
            raise SettingsError(f'timestep_spacing is "{spacing}"; lcm visits the timesteps it was distilled on. Leave it out.')
        if karras and not self.karras:
            able = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.karras)
            raise SettingsError(f"use_karras_sigmas is on; of the samplers, only these take Karras sigmas: {able}.")
        if not 0 <= eta <= 1:
            raise SettingsError(f"eta is {eta}; it can be 0 (deterministic) to 1 (as DDPM).")
        if eta and not self.eta:
            raise SettingsError(f"eta is {eta}; only ddim has one. Leave it out, or use ddim.")


def first_step(steps: int, strength: float, image: Tensor | None) -> int:
    """How many of the steps are left out: none from pure noise, all but strength · steps, rounded down, from an image."""
    if not 0 < strength <= 1:
        raise SettingsError(f"strength is {strength}; it can be above 0 (the image as it is) up to 1 (hardly anything of it).")
    if image is None and strength != 1:
        raise SettingsError(f"strength is {strength} and there is no image to start from; give one, or leave strength out.")
    if strength == 1:
        return 0
    walked = int(min(steps, MAX_STEPS) * strength)  # no float holds a number of 400 digits
    if walked < 1 <= steps:
        enough = f", or {ceil(1 / strength)} steps or more" if strength * MAX_STEPS >= 1 else ""
        raise SettingsError(
            f"0 denoising steps: {steps} steps at strength {strength} are less than one. Use a higher strength{enough}."
        )
    return steps - walked


def numbered(visits: Iterator[Visit], total: int) -> Iterator[Step]:
    for index, (t, x, x0) in enumerate(visits):
        yield Step(index, total, t, x, x0)


# Karras sigmas for euler_a are k-diffusion's: diffusers has none, and draws a folder that asks for them without.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(walkers.ddpm, walkers.ancestors, walkers.start_vp, "leading", fresh_noise=True),
    "ddim": Sampler(walkers.ddim, walkers.equal_jumps, walkers.start_vp, "leading", eta=True),
    "pndm": Sampler(walkers.pndm, walkers.first_jump_twice, walkers.start_vp, "leading"),
    "euler": Sampler(solvers.euler, solvers.between_timesteps, solvers.start_euler, "linspace", karras=True),
    "euler_a": Sampler(
        solvers.euler_a, solvers.between_timesteps, solvers.start_euler, "linspace", karras=True, fresh_noise=True
    ),
    "heun": Sampler(
        solvers.heun, solvers.without_infinity, solvers.start_euler, "linspace", karras=True, calls=lambda n: 2 * n - 1
    ),
    "dpm++_2m": Sampler(solvers.dpmpp_2m, solvers.whole_timesteps, solvers.start_ve, "linspace", karras=True),
    "dpm++_2m_sde": Sampler(
        solvers.dpmpp_2m_sde, solvers.whole_timesteps, solvers.start_ve, "linspace", karras=True, fresh_noise=True
    ),
    "unipc": Sampler(solvers.unipc, solvers.whole_timesteps, solvers.start_ve, "linspace", karras=True),
    "lcm": Sampler(walkers.lcm, walkers.distilled, walkers.start_vp, None, fresh_noise=True),
}
ddim = SAMPLERS["ddim"]


def sampler_named(name: str) -> Sampler:
    """The row of `SAMPLERS`, or a SettingsError that lists them."""
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise SettingsError(f'sampler "{name}" is unknown; it is one of {known}.{did_you_mean(name, SAMPLERS)}')
    return SAMPLERS[name]
