"""Samplers: from noise to a clean latent, one call of the network at a time. Each sampler is one function.

    def sampler(denoise, x, grid, noise): yields (t, x, x0) after every call of the network

    denoise   (x, t, a_bar) -> x0 and eps: the network's answer, read as a clean latent and as noise (`Denoiser`)
    x         the latents at the start (B, C, H, W), fp32: B pictures, C H W one latent
    grid      one row per step: the timestep t, the noise level at t, the level that the step goes to (`grids.py`)
    noise     i -> fresh standard normal noise (B, C, H, W) for step i; only stochastic samplers call it

The names in the papers:

    a_bar, a_bar_prev   alpha_t and alpha_{t-1} in DDIM, alpha-bar in DDPM. "prev" is the next one visited, because t falls
    sigma, sigma_next   sigma in EDM and k-diffusion: noise / signal; a_bar = 1 / (1 + sigma^2)
    x0, eps             the network's answer as a clean latent ("predicted x_0", x_theta) and as noise
    h                   lambda_{t_i} - lambda_{t_{i-1}} in DPM-Solver++: the length of a step in lambda = -log sigma

There are two scales for the same noisy latent. DDPM, DDIM, PNDM, LCM and TCD use x_t, whose variance stays near 1. The network
sees this scale, too. The others use x_t / sqrt(a_bar) = x0 + sigma eps, and solve dx = eps dsigma for it (DDIM eq. 14). If x0
is constant over a step of length h, the exact solution is x e^-h + x0 (1 - e^-h).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, expm1, inf, log, sqrt
from typing import Any

import torch
from torch import Tensor

from minidiff.core.schedule import NoiseSchedule, read_output

Grid = list[tuple[float, float, float]]  # t, the level there, the level that the step goes to
Visit = tuple[float, Tensor, Tensor]  # the t that the network saw; x after the step, with a variance of about 1; x0
StepNoise = Callable[[int], Tensor]  # i -> noise
Model = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps or v

# PNDM eq. 12, and below it the rules of lower order: the weights of the last 1 to 4 outputs, newest first
ADAMS_BASHFORTH = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
LCM_SIGMA_DATA, LCM_TIMESTEP_SCALING = 0.5, 10.0  # in c_skip and c_out, from the code of LCM's authors (2310.04378)


@dataclass(frozen=True)
class Denoiser:
    """The network as samplers see it: it takes x_t and answers with x0 and eps."""

    model: Model
    schedule: NoiseSchedule  # on which the model was trained
    fix_x0: Callable[[Tensor], Tensor] | None = None  # corrects the predicted x0: inpainting knows a part of the picture

    def output(self, x: Tensor, t: float) -> Tensor:
        """The raw answer to x, eps or v, in fp32."""
        return self.model(x, torch.full((len(x),), float(t), device=x.device)).float()

    def read(self, output: Tensor, x: Tensor, a_bar: float) -> tuple[Tensor, Tensor]:
        """A raw answer to x as x0 and eps."""
        x0, eps = read_output(output, x, a_bar, self.schedule.config.prediction_type)
        if self.fix_x0:
            x0 = self.fix_x0(x0)
            eps = (x - a_bar**0.5 * x0) / (1 - a_bar) ** 0.5  # DDPM eq. 4, solved for eps
        return x0, eps

    def __call__(self, x: Tensor, t: float, a_bar: float) -> tuple[Tensor, Tensor]:
        """x0 and eps at `x`: one call of the network."""
        return self.read(self.output(x, t), x, a_bar)

    def at_sigma(self, x: Tensor, t: float, sigma: float) -> tuple[Tensor, Tensor]:
        """The same for x = x0 + sigma eps."""
        return self(unit_variance(x, sigma), t, 1 / (sigma**2 + 1))


# --- samplers that walk the timesteps of training; levels are a_bar ----------------------------------------------------


def ddpm(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """DDPM (2006.11239): draw from the posterior q(x_prev | x_t, x0), with the predicted x0 in place of the true one."""
    for i, (t, a_bar, a_bar_prev) in enumerate(grid):
        x0, _ = denoise(x, t, a_bar)
        alpha = a_bar / a_bar_prev
        beta = 1 - alpha
        mean_x0, mean_x = sqrt(a_bar_prev) * beta / (1 - a_bar), sqrt(alpha) * (1 - a_bar_prev) / (1 - a_bar)
        variance = (1 - a_bar_prev) / (1 - a_bar) * beta  # DDPM eq. 7, beta tilde; 0 in the last step
        x = mean_x0 * x0 + mean_x * x + sqrt(variance) * noise(i)  # DDPM eq. 6; eq. 7 for the mean
        yield t, x, x0


def ddim(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise, eta: float = 0.0) -> Iterator[Visit]:
    """DDIM (2010.02502): back to x0, then forward again to the next noise level, with the same eps.

    `eta` is the share of fresh noise: 0 is deterministic, 1 is DDPM's posterior.
    """
    for i, (t, a_bar, a_bar_prev) in enumerate(grid):
        x0, eps = denoise(x, t, a_bar)
        sigma = eta * sqrt((1 - a_bar_prev) / (1 - a_bar)) * sqrt(1 - a_bar / a_bar_prev)  # DDIM eq. 16
        x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev - sigma**2) * eps  # DDIM eq. 12: "predicted x_0", "direction"
        if eta > 0:
            x = x + sigma * noise(i)  # DDIM eq. 12: "random noise"
        yield t, x, x0


def pndm(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """PNDM without its Runge-Kutta start (2202.09778; PLMS): DDIM's step, with an output extrapolated from the last four.

    The first step has no past, so it is taken twice: first as in DDIM, then with the mean of the outputs at its start and its
    end. N steps take N + 1 calls. For eps the extrapolation is of high order, for v only of the first.
    """
    start, past = x, list[Tensor]()
    for i, (t, a_bar, a_bar_prev) in enumerate(grid):
        output = denoise.output(x, t)
        if i == 1:  # the first step again, from its start
            x, output = start, (output + past[-1]) / 2  # Heun's mean: second order
        else:
            past = [*past[-3:], output]
            weights = ADAMS_BASHFORTH[len(past) - 1]
            output = sum((w * p for w, p in zip(weights, reversed(past))), start=0 * output)  # PNDM eq. 12
        x0, eps = denoise.read(output, x, a_bar)
        x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev) * eps  # PNDM eq. 11 = DDIM eq. 12 with sigma = 0
        yield t, x, x0


def lcm(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """LCM (2310.04378), for models distilled to it: jump to x0, add fresh noise of a lower level, jump to x0 again."""
    for i, (t, a_bar, a_bar_prev) in enumerate(grid):
        x0, _ = denoise(x, t, a_bar)
        c_skip, c_out = lcm_boundary(t)
        x = x0 = c_skip * x + c_out * x0  # LCM eq. 9
        if i + 1 < len(grid):
            x = sqrt(a_bar_prev) * x0 + sqrt(1 - a_bar_prev) * noise(i)  # LCM algorithm 3
        yield t, x, x0


def lcm_boundary(t: Any) -> tuple[Any, Any]:
    """c_skip and c_out at t, a number or a tensor: 1 and 0 at t = 0, where a consistency function must change nothing."""
    scaled = LCM_TIMESTEP_SCALING * t
    norm = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / norm, scaled / norm**0.5  # consistency models, 2303.01469, appendix C


def tcd(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise, eta: float = 0.0) -> Iterator[Visit]:
    """TCD (2402.19159), for models distilled to it: jump to s, a timestep below the next t, and add fresh noise up to that t.

    `eta` is gamma in the paper: at 0, s is the next t, as in DDIM; at 1, s is 0, nearly as in LCM.
    """
    for i, (t, a_bar, a_bar_prev) in enumerate(grid):
        x0, eps = denoise(x, t, a_bar)
        t_prev = grid[i + 1][0] if i + 1 < len(grid) else 0
        s = int((1 - eta) * t_prev)  # TCD, strategic stochastic sampling: (1 - gamma) t_prev
        a_bar_s = denoise.schedule.alphas_cumprod[s].item()
        x = sqrt(a_bar_s) * x0 + sqrt(1 - a_bar_s) * eps  # DDIM eq. 12, to s
        if eta > 0 and t_prev > 0:
            x = sqrt(a_bar_prev / a_bar_s) * x + sqrt(1 - a_bar_prev / a_bar_s) * noise(i)  # DDPM eq. 2, from s to t_prev
        yield t, x, x0


# --- samplers that solve an equation over sigma; levels are sigma ------------------------------------------------------


def euler(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """Euler's method (EDM, 2206.00364): a straight step to the next sigma, with the same eps."""
    for t, sigma, sigma_next in grid:
        x0, eps = denoise.at_sigma(x, t, sigma)
        x = x0 + sigma_next * eps  # = x + (sigma_next - sigma) eps, rounded less: DDIM eq. 13, EDM algorithm 1, line 5
        yield t, unit_variance(x, sigma_next), x0


def euler_a(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """Euler ancestral (k-diffusion): an Euler step to a lower level than the next, then fresh noise up to the next."""
    for i, (t, sigma, sigma_next) in enumerate(grid):
        x0, eps = denoise.at_sigma(x, t, sigma)
        sigma_up = sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)  # the fresh noise: 2011.13456, appendix F
        sigma_down = sqrt(sigma_next**2 - sigma_up**2)  # so that down^2 + up^2 = next^2
        x = x + eps * (sigma_down - sigma)  # DDIM eq. 13, in the reference's order of rounding
        x = x + sigma_up * noise(i)
        yield t, unit_variance(x, sigma_next), x0


def heun(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """Heun's method (EDM, 2206.00364, algorithm 1): an Euler step; then this step with the mean eps of its start and end.

    Second order for two calls per step. The last step is Euler's, because there is no eps at its end, sigma = 0.
    """
    for i, (t, sigma, sigma_next) in enumerate(grid):
        x0, eps = denoise.at_sigma(x, t, sigma)
        x_euler = x + (sigma_next - sigma) * eps  # EDM algorithm 1, line 5
        yield t, unit_variance(x_euler, sigma_next), x0
        if sigma_next > 0:
            t_next = grid[i + 1][0]
            x0, eps_next = denoise.at_sigma(x_euler, t_next, sigma_next)
            x = x + (sigma_next - sigma) * (eps + eps_next) / 2  # EDM algorithm 1, line 8
            yield t_next, unit_variance(x, sigma_next), x0


def dpmpp_2m(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise, sde: bool = False) -> Iterator[Visit]:
    """DPM-Solver++ 2M (2211.01095, algorithm 2): second order for one call per step, because it remembers the last x0.

    In log sigma the linear part of the equation is solved exactly; only x0 is extrapolated over the step. The first step has no
    past, and the last one is infinitely long in log sigma: both are DDIM's, of first order.
    With `sde`, each step goes twice as far in log sigma, and fresh noise leads back up to the next level.
    """
    x0s, hs = list[Tensor](), list[float]()  # x0 and h of the last step
    for i, (t, sigma, sigma_next) in enumerate(grid):
        x0, _ = denoise.at_sigma(x, t, sigma)
        h = log(sigma / sigma_next) if sigma_next > 0 else inf
        far = 2 * h if sde else h
        x = exp(-far) * x - expm1(-far) * half_a_step_ahead(x0, h, x0s, hs)  # algorithm 2, x_{t_i}; or the SDE's mean
        if sde:
            x = x + sigma_next * sqrt(-expm1(-far)) * noise(i)  # SDE-DPM-Solver++(2M): the SDE's noise
        x0s, hs = [x0], [h]
        yield t, unit_variance(x, sigma_next), x0


def unipc(denoise: Denoiser, x: Tensor, grid: Grid, noise: StepNoise) -> Iterator[Visit]:
    """UniPC (2302.04867; order 2, B(h) = e^h - 1, on x0): the step of 2M, corrected when the x0 at its end is known.

    The next step needs this x0 anyway, so the correction costs no call.
    """
    x_start, x0s, hs = x, list[Tensor](), list[float]()
    for t, sigma, sigma_next in grid:
        x0, _ = denoise.at_sigma(x, t, sigma)
        if hs:
            x = exp(-hs[-1]) * x_start - expm1(-hs[-1]) * corrected(x0, x0s, hs)  # UniC-2; after the first step UniC-1
        x_start, h = x, log(sigma / sigma_next) if sigma_next > 0 else inf
        x = exp(-h) * x - expm1(-h) * half_a_step_ahead(x0, h, x0s, hs)  # UniP-2 is 2M's step
        x0s, hs = [*x0s[-1:], x0], [*hs[-1:], h]
        yield t, unit_variance(x, sigma_next), x0


def unit_variance(x: Tensor, sigma: float) -> Tensor:
    """x = x0 + sigma eps on the network's scale: x sqrt(a_bar)."""
    return x / sqrt(sigma**2 + 1)


def half_a_step_ahead(x0: Tensor, h: float, x0s: list[Tensor], hs: list[float]) -> Tensor:
    """D of 2211.01095, algorithm 2: x0 in the middle of this step, on the line through this x0 and the last one."""
    if not hs or h == inf:
        return x0
    r = hs[-1] / h
    return (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0s[-1]


def corrected(x0: Tensor, x0s: list[Tensor], hs: list[float]) -> Tensor:
    """UniC's replacement for D of the last step, which went from `x0s[-1]` to `x0`. Now the x0 at both ends are known."""
    if len(hs) == 1:
        return x0s[-1] + (x0 - x0s[-1]) / 2
    z, r = -hs[-1], -hs[-2] / hs[-1]  # on x0 the exponent is -h
    phi_1 = expm1(z) / z
    phi_2 = (phi_1 - 1) / z  # 2302.04867: phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z
    phi_3 = (phi_2 - 1 / 2) / z
    b_1, b_2 = z * phi_2 / expm1(z), 2 * z * phi_3 / expm1(z)  # k! z phi_{k+1}(z) / B(z)
    rho_before = (b_1 - b_2) / (1 - r)  # 2302.04867, theorem 3.1: rho_before + rho = b_1, r rho_before + rho = b_2
    return x0s[-1] + rho_before * (x0s[-2] - x0s[-1]) / r + (b_1 - rho_before) * (x0 - x0s[-1])
