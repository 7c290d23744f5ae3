"""Samplers that solve a differential equation over sigma: Euler, Euler ancestral, Heun, DPM-Solver++ and UniPC.

All work on the VE scale, x = x0 + sigma eps, whatever the papers use: there the probability-flow ODE is
dx = eps d sigma (DDIM eq. 14), and with lambda = -log sigma its exact solution for an x0 that stays as it is over a step
of length h is x e^-h + x0 (1 - e^-h). On a paper's VP scale every term has a factor alpha = sqrt(a_bar) more.
The legend is in samplers.py. A rule yields once after each network call: the t that the network saw, x on the VP scale, x0.
"""

from collections.abc import Iterator
from math import exp, expm1, inf, log, sqrt

from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.runs import Grid, Run, Visit, grid_of
from minidiff.core.schedule import NoiseSchedule, karras_sigmas, sigmas_at, timesteps, timesteps_at

LARGEST_SIGMA = 1000.0  # for Heun: above all of training, below those of zero terminal SNR

# ------------------------------------------------------------------------------------------------------ update rules


def euler(run: Run) -> Iterator[Visit]:
    """Euler's method (EDM, 2206.00364): follow the noise that the network sees, straight to the next sigma.

    Its step is x + (sigma_next - sigma) eps. With x = x0 + sigma eps that is x0 + sigma_next eps, which does not lose
    three digits where sigma is 4096, at zero terminal SNR.
    """
    x = run.x
    for t, sigma, sigma_next in run.grid:
        x0, eps = predict(run, x, t, sigma)
        x = x0 + sigma_next * eps  # DDIM eq. 13: Euler's step on eq. 14. EDM algorithm 1, line 5
        yield t, vp(x, sigma_next), x0


def euler_a(run: Run) -> Iterator[Visit]:
    """Euler ancestral (k-diffusion): an Euler step to less noise than wanted, then fresh noise up to the wanted level."""
    x = run.x
    for i, (t, sigma, sigma_next) in enumerate(run.grid):
        x0, eps = predict(run, x, t, sigma)
        sigma_up = sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)  # 2011.13456, appendix F: its noise
        sigma_down = sqrt(sigma_next**2 - sigma_up**2)  # so that down^2 + up^2 = next^2
        x = x + eps * (sigma_down - sigma)  # DDIM eq. 13: Euler's step on eq. 14, in the reference's order of rounding
        x = x + sigma_up * run.fresh_noise(i)
        yield t, vp(x, sigma_next), x0


def heun(run: Run) -> Iterator[Visit]:
    """Heun's method (EDM, 2206.00364, algorithm 1): an Euler step, the direction at its end, the step again with the mean.

    Second order for two calls a step. The last goes to sigma = 0, where there is no direction to ask for: it is Euler's.
    """
    x = run.x
    for i, (t, sigma, sigma_next) in enumerate(run.grid):
        x0, eps = predict(run, x, t, sigma)
        x_euler = x + (sigma_next - sigma) * eps  # EDM algorithm 1, line 5
        yield t, vp(x_euler, sigma_next), x0
        if sigma_next > 0:
            t_next = run.grid[i + 1][0]
            x0, eps_next = predict(run, x_euler, t_next, sigma_next)
            x = x + (sigma_next - sigma) * (eps + eps_next) / 2  # EDM algorithm 1, line 8
            yield t_next, vp(x, sigma_next), x0


def dpmpp_2m(run: Run) -> Iterator[Visit]:
    """DPM-Solver++ 2M (2211.01095, algorithm 2): second order for one network call a step, by remembering the last x0.

    In log sigma the linear part of the ODE is solved exactly; only x0 has to be extrapolated over the step. The first
    step has no past, and the last ends at sigma = 0, infinitely far in log sigma: both are first order, that is DDIM.
    """
    x, x0s, hs = run.x, list[Tensor](), list[float]()  # x0 and h of the steps so far
    for t, sigma, sigma_next in run.grid:
        x0, _ = predict(run, x, t, sigma)
        h = length(sigma, sigma_next)
        x = exp(-h) * x - expm1(-h) * half_a_step_ahead(x0, h, x0s, hs)  # algorithm 2: x_{t_i}
        x0s, hs = [x0], [h]
        yield t, vp(x, sigma_next), x0


def dpmpp_2m_sde(run: Run) -> Iterator[Visit]:
    """DPM-Solver++ 2M for the SDE (2211.01095, SDE-DPM-Solver++(2M)).

    A step of twice the length in log sigma, then fresh noise up to the wanted level.
    """
    x, x0s, hs = run.x, list[Tensor](), list[float]()
    for i, (t, sigma, sigma_next) in enumerate(run.grid):
        x0, _ = predict(run, x, t, sigma)
        h = length(sigma, sigma_next)
        x = exp(-2 * h) * x - expm1(-2 * h) * half_a_step_ahead(x0, h, x0s, hs)  # SDE-DPM-Solver++(2M): its mean
        x = x + sigma_next * sqrt(-expm1(-2 * h)) * run.fresh_noise(i)  # and its noise
        x0s, hs = [x0], [h]
        yield t, vp(x, sigma_next), x0


def unipc(run: Run) -> Iterator[Visit]:
    """UniPC (2302.04867; order 2, B(h) = e^h - 1, on x0): the step of 2M, taken again once its end is known.

    The network's answer at the end of a step is needed for the next one anyway. UniC first uses it to correct where
    that step went, so the correction costs no call.
    """
    x = x_start = run.x
    x0s, hs = list[Tensor](), list[float]()
    for t, sigma, sigma_next in run.grid:
        x0, _ = predict(run, x, t, sigma)
        if hs:
            x = exp(-hs[-1]) * x_start - expm1(-hs[-1]) * corrected(x0, x0s, hs)  # UniC-2; after the first step UniC-1
        x_start, h = x, length(sigma, sigma_next)
        x = exp(-h) * x - expm1(-h) * half_a_step_ahead(x0, h, x0s, hs)  # UniP-2 is 2M's step
        x0s, hs = [*x0s[-1:], x0], [*hs[-1:], h]
        yield t, vp(x, sigma_next), x0


# ------------------------------------------------------------------------------------------------------- their parts


def predict(run: Run, x: Tensor, t: float, sigma: float) -> tuple[Tensor, Tensor]:
    """x0 and eps at VE-scale `x`. The network sees it on the VP scale."""
    return run.predict(vp(x, sigma), t, 1 / (sigma**2 + 1))


def vp(x: Tensor, sigma: float) -> Tensor:
    """From the VE scale to the VP scale: times sqrt(a_bar)."""
    return x / sqrt(sigma**2 + 1)


def length(sigma: float, sigma_next: float) -> float:
    """h, how far a step goes in lambda = -log sigma: infinitely far, if to sigma = 0."""
    return log(sigma / sigma_next) if sigma_next > 0 else inf


def half_a_step_ahead(x0: Tensor, h: float, x0s: list[Tensor], hs: list[float]) -> Tensor:
    """D of 2211.01095, algorithm 2: x0 in the middle of a step h, on the line through this one and the last."""
    if not hs or h == inf:
        return x0
    r = hs[-1] / h
    return (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0s[-1]


def corrected(x0: Tensor, x0s: list[Tensor], hs: list[float]) -> Tensor:
    """What UniC puts in the place of D for the last step, from `x0s[-1]` to `x0`, now that both ends are known."""
    if len(hs) == 1:
        return x0s[-1] + (x0 - x0s[-1]) / 2
    z, r = -hs[-1], -hs[-2] / hs[-1]  # on x0 the exponent is -h
    phi_1 = expm1(z) / z
    phi_2 = (phi_1 - 1) / z  # 2302.04867: phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z
    phi_3 = (phi_2 - 1 / 2) / z
    b_1, b_2 = z * phi_2 / expm1(z), 2 * z * phi_3 / expm1(z)  # k! z phi_{k+1}(z) / B(z)
    rho_before = (b_1 - b_2) / (1 - r)  # 2302.04867, theorem 3.1: rho_before + rho = b_1, r rho_before + rho = b_2
    return x0s[-1] + rho_before * (x0s[-2] - x0s[-1]) / r + (b_1 - rho_before) * (x0 - x0s[-1])


# ----------------------------------------------------------------------------------------------- grids and the start


def between_timesteps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """Euler and Heun: timesteps need not be whole. Karras sigmas go between the first and last sigma of the spacing."""
    ts = timesteps(schedule, steps, spacing, whole=False)
    sigmas = sigmas_at(schedule, ts)
    if karras:
        sigmas = [*karras_sigmas(sigmas[0], sigmas[-2], steps), 0.0]
        ts = timesteps_at(schedule, sigmas[:-1])
    return grid_of(ts, sigmas)[first:]


def without_infinity(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """Heun: Euler's grid. A mean of two directions means nothing for a step from 4096, which stands for infinity."""
    grid = between_timesteps(schedule, steps, first, spacing, karras)
    if grid[0][1] > LARGEST_SIGMA:
        raise SettingsError(
            f"heun cannot begin at zero terminal SNR, where sigma is {grid[0][1]:.0f}; use euler, dpm++_2m or unipc, or "
            '"leading" timestep_spacing.'
        )
    return grid


def whole_timesteps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    """DPM-Solver++ and UniPC: whole timesteps, and the grid's cleanest is left out for sigma = 0.

    Karras sigmas go between the first and last sigma of training, whatever the spacing; the network sees the nearest t.
    """
    ts = timesteps(schedule, steps, spacing, spare=1)
    sigmas = sigmas_at(schedule, ts)
    if karras:
        sigmas = [*karras_sigmas(schedule.sigmas[-1].item(), schedule.sigmas[0].item(), steps), 0.0]
        ts = [float(round(t)) for t in timesteps_at(schedule, sigmas[:-1])]
    return grid_of(ts, sigmas)[first:]


def start_ve(noise: Tensor, image: Tensor | None, sigma: float, spacing: str) -> Tensor:
    """x for the first step: noise as strong as noisy latents are there, or `image` under noise."""
    if image is not None:
        return image + sigma * noise  # DDPM eq. 4 over sqrt(a_bar)
    return sqrt(sigma**2 + 1) * noise  # the variance of x0 + sigma eps, where x0 has 1


def start_euler(noise: Tensor, image: Tensor | None, sigma: float, spacing: str) -> Tensor:
    """`start_ve`, but as the reference starts Euler, Euler ancestral and Heun: sigma, not sqrt(sigma^2 + 1), times the
    noise, unless spacing is leading.
    """
    return sigma * noise if image is None and spacing != "leading" else start_ve(noise, image, sigma, spacing)
