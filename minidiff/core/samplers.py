"""Samplers that walk the timesteps of training: DDPM, DDIM, PNDM, LCM.

They know the noise level as a_bar_t, from the table of training, and visit whole timesteps only. x is on the VP scale.
The legend is in samplers.py. A rule yields once after each network call: the t that the network saw, x, x0.
"""

from collections.abc import Iterator
from math import sqrt

import numpy as np
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.runs import Grid, Run, Visit, grid_of
from minidiff.core.schedule import NoiseSchedule, timesteps

ADAMS_BASHFORTH = {  # how much each of the last outputs counts, newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
LCM_STEPS = 50  # the timesteps that a latent consistency model was distilled on, of which a few are visited
LCM_SIGMA_DATA, LCM_TIMESTEP_SCALING = 0.5, 10.0  # LCM, 2310.04378, authors' code: sigma_data, and t / 0.1 in c_skip and c_out


# ------------------------------------------------------------------------------------------------------ update rules


def ddpm(run: Run) -> Iterator[Visit]:
    """DDPM (2006.11239): draw from the posterior q(x_prev | x_t, x0), with the network's x0 for the true one."""
    x = run.x
    for i, (t, a_bar, a_bar_prev) in enumerate(run.grid):
        x0, _ = run.predict(x, t, a_bar)
        alpha = a_bar / a_bar_prev
        beta = 1 - alpha
        mean_x0, mean_x = sqrt(a_bar_prev) * beta / (1 - a_bar), sqrt(alpha) * (1 - a_bar_prev) / (1 - a_bar)
        variance = (1 - a_bar_prev) / (1 - a_bar) * beta  # DDPM eq. 7, its beta tilde; 0 in the last step
        x = mean_x0 * x0 + mean_x * x + sqrt(variance) * run.fresh_noise(i)  # DDPM eq. 6, and eq. 7 for the mean
        yield t, x, x0


def ddim(run: Run) -> Iterator[Visit]:
    """DDIM (2010.02502): go back to x0, then forward again to the previous noise level, with the same eps.

    `eta` is the share of fresh noise: 0 is deterministic, 1 is DDPM's posterior sampling.
    """
    x = run.x
    for i, (t, a_bar, a_bar_prev) in enumerate(run.grid):
        x0, eps = run.predict(x, t, a_bar)
        sigma = run.eta * sqrt((1 - a_bar_prev) / (1 - a_bar)) * sqrt(1 - a_bar / a_bar_prev)  # DDIM eq. 16
        x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev - sigma**2) * eps  # DDIM eq. 12: "predicted x_0", "direction"
        if run.eta > 0:
            x = x + sigma * run.fresh_noise(i)  # DDIM eq. 12: "random noise"
        yield t, x, x0


def pndm(run: Run) -> Iterator[Visit]:
    """PNDM without its Runge-Kutta start (2202.09778; PLMS): DDIM's step, with an output extrapolated from the last four.

    The first step has no past. It is taken twice: once as DDIM, to ask the network at its end, then with the mean of
    both outputs. So N steps take N + 1 calls. As in the reference, it is the raw output that is extrapolated: for eps
    that is of high order, for v only of the first.
    """
    x, past = run.x, list[Tensor]()
    for i, (t, a_bar, a_bar_prev) in enumerate(run.grid):
        output = run.output(x, t)
        if i == 1:  # the first step again, from its start
            x, output = run.x, (output + past[-1]) / 2  # Heun's mean: second order
        else:
            past = [*past[-3:], output]
            weights = ADAMS_BASHFORTH[len(past)]
            output = sum((w * p for w, p in zip(weights, reversed(past))), start=0 * output)  # PNDM eq. 12
        x0, eps = run.read(output, x, a_bar)
        x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev) * eps  # PNDM eq. 11, which is DDIM eq. 12 with sigma = 0
        yield t, x, x0


def lcm(run: Run) -> Iterator[Visit]:
    """Latent consistency models (2310.04378): jump to x0 at once, add fresh noise of a lower level, jump again.

    For models and LoRAs that were distilled to know where the jump ends.
    """
    x = run.x
    for i, (t, a_bar, a_bar_prev) in enumerate(run.grid):
        x0, _ = run.predict(x, t, a_bar)
        scaled = LCM_TIMESTEP_SCALING * t
        c_skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
        c_out = scaled / sqrt(scaled**2 + LCM_SIGMA_DATA**2)
        x = x0 = c_skip * x + c_out * x0  # LCM eq. 9: at t = 0 it changes nothing, as a consistency function must
        if i + 1 < len(run.grid):
            x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev) * run.fresh_noise(i)  # LCM algorithm 3
        yield t, x, x0


# ----------------------------------------------------------------------------------------------- grids and the start


def ancestors(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DDPM: from each timestep to the next on the list, and at last to the clean picture, a_bar = 1."""
    ts = timesteps(schedule, steps, spacing)[first:]
    return grid_of(ts, [*(a_bar_at(schedule, t) for t in ts), 1.0])


def equal_jumps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DDIM: always T // steps back. With leading spacing that is the next t, with the others only near it."""
    ts = timesteps(schedule, steps, spacing)[first:]
    jump = len(schedule.alphas_cumprod) // steps
    return [(t, a_bar_at(schedule, t), a_bar_at(schedule, t - jump)) for t in ts]


def first_jump_twice(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """PNDM: DDIM's grid, where the first jump is made again once the network was asked at its end.

    Unlike other rows of a Grid, that row holds the t at the jump's end and the level at its start. With linspace spacing
    t + T // steps is only near that start; the reference takes it all the same.

    From an image, too, it is the first jump walked. The reference repeats the second entry of the whole list wherever the
    walk begins, and so asks the network at a t one jump away from the level that x is at.
    """
    grid = equal_jumps(schedule, steps, first, spacing, karras)
    if len(grid) == 1:
        return grid
    t, a_bar, _ = grid[1]
    jump = len(schedule.alphas_cumprod) // steps
    return [grid[0], (t, a_bar_at(schedule, t + jump), a_bar), *grid[1:]]


def distilled(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """LCM: every T / 50th timestep, as in distillation; of these, `steps` evenly spread ones, the noisiest first."""
    T = len(schedule.alphas_cumprod)
    if not 1 <= steps <= min(LCM_STEPS, T):
        raise SettingsError(f"num_inference_steps is {steps}; lcm takes 1 to {min(LCM_STEPS, T)} steps, and 4 to 8 are usual.")
    known = np.arange(LCM_STEPS, 0, -1) * (T // LCM_STEPS) - 1  # the reference's schedule: 999, 979, ... 19
    ts = [float(t) for t in known[np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False)).astype(int)][first:]]
    return grid_of(ts, [*(a_bar_at(schedule, t) for t in ts), 1.0])


def a_bar_at(schedule: NoiseSchedule, t: float) -> float:
    """a_bar at a whole timestep. For t < 0, where the last step of DDIM and PNDM ends: 1 or a_bar[0], as
    `set_alpha_to_one` says.
    """
    if t < 0:
        return 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0].item()
    return schedule.alphas_cumprod[int(t)].item()


def start_vp(noise: Tensor, image: Tensor | None, a_bar: float, spacing: str) -> Tensor:
    """x for the first step: pure noise, or `image` under as much of it as is there at `a_bar`."""
    return noise if image is None else sqrt(a_bar) * image + sqrt(1 - a_bar) * noise  # DDPM eq. 4
