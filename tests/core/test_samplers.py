"""The samplers' equations one by one, and a problem with exact answers.

The problem: data ~ N(MU, S^2). Then x_t is Gaussian too, the best possible network is known in closed form, and so is the
solution of the probability-flow ODE (DDIM eq. 14): x_t keeps its distance from the mean, counted in standard deviations.
"""

import runpy
from collections.abc import Callable
from math import floor, log
from pathlib import Path

import pytest
import torch
from reference_grids import as_in_the_reference
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.grids import SAMPLERS, Step, ddim, sigmas_at
from minidiff.core.samplers import corrected
from minidiff.core.schedule import NoiseSchedule

fake_network = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_samplers.py"))["fake_network"]
SCHEDULE = NoiseSchedule.from_config(NoiseConfig())
V_SCHEDULE = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
MU, S = 0.7, 0.5


def draw(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def silent(i: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def a_bar_at(t: float) -> float:
    return 1 / (1 + sigmas_at(SCHEDULE, [t])[0] ** 2)


# ---------------------------------------------------------------------------------------------------- exact answers


def gaussian_network(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact E[eps | x_t], or E[v | x_t], for data ~ N(MU, S^2)."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        a_bar = a_bar_at(t[0].item())
        x0 = MU + a_bar**0.5 * S**2 / (a_bar * S**2 + 1 - a_bar) * (x - a_bar**0.5 * MU)
        eps = (x - a_bar**0.5 * x0) / (1 - a_bar) ** 0.5
        return eps if schedule.config.prediction_type == "epsilon" else a_bar**0.5 * eps - (1 - a_bar) ** 0.5 * x0

    return network


def exact(x: Tensor, a_bar: float, a_bar_next: float) -> Tensor:
    """The probability-flow ODE's solution through `x`, from one noise level to another (VP scale)."""
    deviations = (x - a_bar**0.5 * MU) / (a_bar * S**2 + 1 - a_bar) ** 0.5
    return a_bar_next**0.5 * MU + (a_bar_next * S**2 + 1 - a_bar_next) ** 0.5 * deviations


def last_before(name: str, walk: list[Step], t: float) -> Tensor:
    """x on arrival at `t`. Heun arrives with a call there, the others before one."""
    first = next(i for i, step in enumerate(walk) if step.t == t)
    return walk[first if name == "heun" else first - 1].x


@pytest.mark.parametrize("schedule", [SCHEDULE, V_SCHEDULE], ids=["epsilon", "v"])
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.spacing])
def test_gaussian_mean_and_deviation(name, schedule):
    """Enough steps give the data's own mean and standard deviation, here over 10,000 samples.

    Ancestral steps treat the predicted x0 as certain and so lose variance: std -6 % after 100 steps, -2 % after 400.
    The mean of the deterministic ones is off by a_bar[T]^0.5 S MU = 0.03 MU: training never shows pure noise.
    """
    steps = 400 if name in ("ddpm", "euler_a") else 100
    noise = draw(steps + 1, 10_000, 1, 1, 1)
    *_, last = SAMPLERS[name](gaussian_network(schedule), noise[0], schedule, steps, lambda i: noise[i + 1])
    assert last.x.mean().item() == pytest.approx(MU, rel=0.07)
    assert last.x.std().item() == pytest.approx(S, rel=0.03)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [3, 6, 9, 12])
def test_ddim_ends_where_the_next_step_begins(steps, spacing):
    """The mean is right to 4 % (pure noise is not quite x_T: 3 %). On the reference's grid it is 0.509 after three steps."""
    noise, network = draw(1, 65536, 1, 1, 1)[0], gaussian_network(SCHEDULE)

    def mean(sampler):
        *_, last = sampler(network, noise, SCHEDULE, steps, silent, spacing=spacing)
        return last.x.mean().item()

    assert mean(SAMPLERS["ddim"]) == pytest.approx(MU, rel=0.04)
    if (steps, spacing) == (3, "linspace"):
        assert mean(as_in_the_reference("ddim")) == pytest.approx(0.509, rel=0.01)


def ode_error(name: str, schedule: NoiseSchedule, steps: int, t: float) -> float:
    """Distance from the exact solution at `t`."""
    noise = draw(1, 100, 1, 1, 1)[0]
    # a black image under all the noise there is: every sampler starts at the same point
    walk = list(SAMPLERS[name](gaussian_network(schedule), noise, schedule, steps, silent, image=0 * noise, spacing="trailing"))
    solution = exact((1 - a_bar_at(999)) ** 0.5 * noise, a_bar_at(999), a_bar_at(t))
    return (last_before(name, walk, t) - solution).abs().max().item()


def sde_error(name: str, schedule: NoiseSchedule, steps: int, t: float) -> float:
    """Error of the standard deviation at `t`, without drawing.

    The network is linear here, so x is a sum of all the noises drawn: with the k-th of them 1 in row k and 0 in the
    others, row k is its share, and the last row, which has none, the mean.
    """
    unit = torch.eye(steps + 2).view(steps + 2, steps + 2, 1, 1, 1)
    walk = SAMPLERS[name](
        gaussian_network(schedule), unit[0], schedule, steps, lambda i: unit[i + 1], image=0 * unit[0], spacing="trailing"
    )
    x = last_before(name, list(walk), t).flatten().double()
    return abs((x - x[-1]).square().sum().item() - (a_bar_at(t) * S**2 + 1 - a_bar_at(t)))


@pytest.mark.parametrize("schedule", [SCHEDULE, V_SCHEDULE], ids=["epsilon", "v"])
@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++_2m", 2), ("unipc", 3), ("ddpm", 1), ("euler_a", 1), ("dpm++_2m_sde", 2)],
)
def test_order_of_convergence(name, order, schedule):
    """Twice the steps: half the error for order 1, a quarter for order 2, measured at t = 499, before sigma nears 0.

    UniPC is of one order more than its predictor: 2302.04867, theorem 3.1.
    """
    error = sde_error if name in ("ddpm", "euler_a", "dpm++_2m_sde") else ode_error
    orders = torch.tensor([error(name, schedule, steps, 499) for steps in (10, 20, 40)]).log2().diff().neg()
    assert (orders - order).abs().max() < 0.25, orders


def test_order_of_pndm():
    """2202.09778 claims order 2. With v it has only 1: as in the reference, raw outputs are mixed, each of another t."""
    eps, v = ([ode_error("pndm", s, steps, 199) for steps in (25, 50, 100)] for s in (SCHEDULE, V_SCHEDULE))
    assert (torch.tensor(eps).log2().diff().neg() > 1.5).all(), eps
    assert (torch.tensor(v).log2().diff().neg() - 1).abs().max() < 0.1, v
    assert all(e < 0.01 * u for e, u in zip(eps, v))


# ------------------------------------------------------------------------------------------------- walkers' equations


def one_by_one(T: int) -> NoiseSchedule:
    """A schedule whose DDIM with T - 1 steps visits every timestep: T - 1, T - 2, ... 1."""
    return NoiseSchedule.from_config(NoiseConfig(num_train_timesteps=T, beta_start=0.01, beta_end=0.3))


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_ddpm_eq7_the_posterior(name, eta):
    """DDPM eq. 6 and 7, in betas: each step draws from q(x_{t-1} | x_t, x_0). DDIM with eta = 1 (eq. 12) does the same."""
    schedule, noise = one_by_one(20), draw(20, 2, 4, 3, 3)
    a_bars, x_t = schedule.alphas_cumprod.double(), noise[0]
    for step in SAMPLERS[name](fake_network, noise[0], schedule, 19, lambda i: noise[i + 1], eta=eta):
        last = step.t == 1
        a_bar, a_bar_prev = a_bars[int(step.t)], a_bars[int(step.t) - 1]
        if last and name == "ddpm":
            torch.testing.assert_close(step.x, step.x0)  # its last step goes all the way: no noise, only x0
            break
        beta = 1 - a_bar / a_bar_prev
        mean = (a_bar_prev.sqrt() * beta * step.x0 + (1 - beta).sqrt() * (1 - a_bar_prev) * x_t) / (1 - a_bar)
        variance = (1 - a_bar_prev) / (1 - a_bar) * beta
        expected = mean + variance.sqrt() * noise[step.index + 1]
        torch.testing.assert_close(step.x, expected.float(), rtol=1e-5, atol=2e-6)
        x_t = step.x
    assert last


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eq16_keeps_the_noise_level(eta):
    """DDIM lemma 1: whatever eta, a latent at level a_bar goes to exactly level a_bar_prev (x0 here is 0)."""
    noise, drawn = draw(2, 20_000, 1, 1, 1)

    def knows_that_x0_is_0(x: Tensor, t: Tensor) -> Tensor:
        return x / (1 - SCHEDULE.alphas_cumprod[int(t[0])]).sqrt()

    start = noise * (1 - SCHEDULE.alphas_cumprod[901]).sqrt()
    step = next(ddim(knows_that_x0_is_0, start, SCHEDULE, 10, lambda i: drawn, eta=eta))
    assert step.t == 901
    assert step.x.var().item() == pytest.approx(1 - SCHEDULE.alphas_cumprod[801].item(), rel=0.02)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_they_end_at_a_bar_0_or_at_1(name):
    """`set_alpha_to_one`: the last step goes to x0 itself, or keeps the noise of t = 0, as SD 1.5 does."""
    x = draw(1, 1, 4, 3, 3)[0]
    *_, step = SAMPLERS[name](fake_network, x, SCHEDULE, 10, silent)
    assert not torch.allclose(step.x, step.x0)
    *_, step = SAMPLERS[name](fake_network, x, NoiseSchedule.from_config(NoiseConfig(set_alpha_to_one=True)), 10, silent)
    torch.testing.assert_close(step.x, step.x0)


def test_pndm_eq12_linear_multistep():
    """2202.09778 eq. 11 and 12, in the paper's letters: phi is the transfer, e' the mix of the last four outputs."""
    noise, outputs = draw(1, 2, 4, 3, 3)[0], list[Tensor]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(fake_network(x, t))
        return outputs[-1]

    def phi(x: Tensor, e: Tensor, t: int, t_next: int) -> Tensor:
        a, b = SCHEDULE.alphas_cumprod.double()[[t, t_next]]
        return (b / a).sqrt() * x - (b - a) / (a.sqrt() * (((1 - b) * a).sqrt() + ((1 - a) * b).sqrt())) * e

    walk = list(SAMPLERS["pndm"](model, noise, SCHEDULE, 10, silent))
    assert [step.t for step in walk] == [901, 801, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    torch.testing.assert_close(walk[0].x, phi(noise, outputs[0], 901, 801).float())
    torch.testing.assert_close(walk[1].x, phi(noise, (outputs[0] + outputs[1]) / 2, 901, 801).float())
    e = [outputs[0], *outputs[2:]]  # the second output is used only once
    for i in range(4, 10):
        mixed = (55 * e[i - 1] - 59 * e[i - 2] + 37 * e[i - 3] - 9 * e[i - 4]) / 24
        t = int(walk[i].t)
        torch.testing.assert_close(walk[i].x, phi(walk[i - 1].x, mixed, t, t - 100).float(), rtol=1e-5, atol=1e-5)


def test_lcm_eq9_and_algorithm3():
    """2310.04378: the consistency function, then fresh noise of the next level; none is drawn after the last."""
    noise = draw(4, 2, 4, 3, 3)
    walk = list(SAMPLERS["lcm"](fake_network, noise[0], SCHEDULE, 4, lambda i: noise[i + 1]))
    assert [step.t for step in walk] == [999, 759, 499, 259]  # of 999, 979, ... 19: numbers 0, 12, 25, 37
    x = noise[0]
    for i, step in enumerate(walk):
        alpha, sigma = a_bar_at(step.t) ** 0.5, (1 - a_bar_at(step.t)) ** 0.5
        c_skip, c_out = 0.5**2 / ((10 * step.t) ** 2 + 0.5**2), 10 * step.t / ((10 * step.t) ** 2 + 0.5**2) ** 0.5
        z = c_skip * x + c_out * (x - sigma * fake_network(x, step.t)) / alpha
        if i < 3:
            a_bar_next = a_bar_at(walk[i + 1].t)
            z = a_bar_next**0.5 * z + (1 - a_bar_next) ** 0.5 * noise[i + 1]
        torch.testing.assert_close(step.x, z, rtol=1e-5, atol=1e-4)
        x = step.x


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_strategic_stochastic_sampling(eta):
    """2402.19159: DDIM's jump to s = (1 - gamma) t', then fresh noise from s up to t'; the last jump goes to s = 0."""
    noise = draw(4, 2, 4, 3, 3)
    walk = list(SAMPLERS["tcd"](fake_network, noise[0], SCHEDULE, 4, lambda i: noise[i + 1], eta=eta))
    assert [step.t for step in walk] == [999, 759, 499, 259]
    x = noise[0]
    for i, step in enumerate(walk):
        t_next = walk[i + 1].t if i < 3 else 0
        s = floor((1 - eta) * t_next)
        eps = fake_network(x, step.t)
        x0 = (x - (1 - a_bar_at(step.t)) ** 0.5 * eps) / a_bar_at(step.t) ** 0.5
        x = a_bar_at(s) ** 0.5 * x0 + (1 - a_bar_at(s)) ** 0.5 * eps
        if i < 3:
            kept = a_bar_at(t_next) / a_bar_at(s)
            x = kept**0.5 * x + (1 - kept) ** 0.5 * noise[i + 1]
        torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(step.x0, x0, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])  # which extrapolates the output itself
def test_a_network_of_eps_read_as_v_draws_the_same(name):
    """2202.00512, appendix D: v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 = (eps - sqrt(1 - a_bar) x) / sqrt(a_bar)."""

    def v_network(x, t):
        a_bar = SCHEDULE.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return (fake_network(x, t) - (1 - a_bar).sqrt() * x) / a_bar.sqrt()

    noise, spacing = draw(7, 2, 4, 3, 3), "leading" if SAMPLERS[name].spacing else None
    *_, eps = SAMPLERS[name](fake_network, noise[0], SCHEDULE, 6, lambda i: noise[i + 1], spacing=spacing)
    *_, v = SAMPLERS[name](v_network, noise[0], V_SCHEDULE, 6, lambda i: noise[i + 1], spacing=spacing)
    torch.testing.assert_close(v.x, eps.x, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- solvers' equations


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_eq13_euler_in_sigma_is_ddim(steps):
    """DDIM eq. 13, Euler's step on eq. 14: in x / sqrt(a_bar), DDIM is Euler's method, x + (sigma_next - sigma) eps."""
    x = draw(1, 2, 4, 5, 5)[0]
    walk = list(ddim(fake_network, x, SCHEDULE, steps, silent))
    euler = list(SAMPLERS["euler"](fake_network, x, SCHEDULE, steps, silent, spacing="leading"))
    sigmas = [*sigmas_at(SCHEDULE, [step.t for step in walk])[:-1], SCHEDULE.sigmas[0].item()]
    for i, (step, sigma, sigma_next) in enumerate(zip(walk, sigmas, sigmas[1:], strict=False)):
        eps = fake_network(x, step.t)
        x_ve = x * (sigma**2 + 1) ** 0.5 + (sigma_next - sigma) * eps
        torch.testing.assert_close(x_ve / (sigma_next**2 + 1) ** 0.5, step.x, rtol=1e-6, atol=1e-6)
        if i < steps - 1:  # the last goes to sigma = 0 in one, to that of t = 0 in the other
            torch.testing.assert_close(euler[i].x, step.x, rtol=1e-5, atol=1e-5)
        x = step.x


def test_euler_a_is_ddim_with_eta_1():
    """Two names, one step: sigma_up is DDIM's sigma (eq. 16) over sqrt(a_bar_prev).

    Only the last step differs: to sigma = 0 here, to a_bar[0] there.
    """
    noise = draw(11, 2, 4, 3, 3)
    ancestral = SAMPLERS["euler_a"](fake_network, noise[0], SCHEDULE, 10, lambda i: noise[i + 1], spacing="leading")
    posterior = ddim(fake_network, noise[0], SCHEDULE, 10, lambda i: noise[i + 1], eta=1.0)
    for a, b in list(zip(ancestral, posterior, strict=True))[:-1]:
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc", "lcm"])
def test_the_last_step_is_x0(name):
    noise = draw(7, 1, 4, 3, 3)
    *_, last = SAMPLERS[name](fake_network, noise[0], SCHEDULE, 3, lambda i: noise[i + 1])
    torch.testing.assert_close(last.x, last.x0)


def test_heun_edm_algorithm1():
    """EDM, algorithm 1, in its letters: d_i at the start of a step, d'_i at its end, and the step with their mean."""
    noise, t_i = draw(1, 2, 4, 3, 3)[0].double(), [*sigmas_at(SCHEDULE, [999.0, 666.0, 333.0, 0.0])]
    walk = list(SAMPLERS["heun"](fake_network, noise.float(), SCHEDULE, 4, silent))
    assert [step.t for step in walk] == pytest.approx([999, 666, 666, 333, 333, 0, 0])

    def d(x: Tensor, i: int) -> Tensor:
        return fake_network((x / (t_i[i] ** 2 + 1) ** 0.5).float(), [999.0, 666.0, 333.0, 0.0][i])

    x = noise * t_i[0]
    for i in range(3):
        d_i = d(x, i)
        euler = x + (t_i[i + 1] - t_i[i]) * d_i
        x = x + (t_i[i + 1] - t_i[i]) * (d_i / 2 + d(euler, i + 1) / 2)
        scale = (t_i[i + 1] ** 2 + 1) ** 0.5
        torch.testing.assert_close(walk[2 * i].x, (euler / scale).float(), rtol=1e-5, atol=2e-4)
        torch.testing.assert_close(walk[2 * i + 1].x, (x / scale).float(), rtol=1e-5, atol=2e-4)


def levels_of(walk: list[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """The papers' alpha and sigma (VP) at the timesteps of a walk, and h[i], over the step from walk[i] to walk[i + 1]."""
    a_bars = SCHEDULE.alphas_cumprod.double()[[int(step.t) for step in walk]]
    alpha, sigma = a_bars.sqrt(), (1 - a_bars).sqrt()
    return alpha, sigma, (alpha.log() - sigma.log()).diff()


@pytest.mark.parametrize("name", ["dpm++_2m", "dpm++_2m_sde"])
def test_dpmpp_2m_algorithm2(name):
    """2211.01095, algorithm 2 and SDE-DPM-Solver++(2M), in the paper's own letters and fp64: alpha, sigma, h, r, D."""
    noise = draw(13, 2, 4, 3, 3)
    walk = list(SAMPLERS[name](fake_network, noise[0], SCHEDULE, 12, lambda i: noise[i + 1]))
    alpha, sigma, h = levels_of(walk)
    for i in range(1, 11):
        r = h[i - 1] / h[i]
        D = (1 + 1 / (2 * r)) * walk[i].x0 - 1 / (2 * r) * walk[i - 1].x0
        x = sigma[i + 1] / sigma[i] * walk[i - 1].x - alpha[i + 1] * ((-h[i]).exp() - 1) * D
        if name == "dpm++_2m_sde":
            x = sigma[i + 1] / sigma[i] * (-h[i]).exp() * walk[i - 1].x + alpha[i + 1] * (1 - (-2 * h[i]).exp()) * D
            x = x + sigma[i + 1] * (1 - (-2 * h[i]).exp()).sqrt() * noise[i + 1]
        torch.testing.assert_close(walk[i].x, x.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_unipc_theorem_3_1(power):
    """2302.04867: UniC-2's step is exact where x0 is a polynomial in lambda, up to lambda^2.

    The exact solution over a step h is x e^-h plus the integral of e^(lambda - h) x0(lambda): in place of an x0 that stays
    as it is stands D, that integral over 1 - e^-h.
    """
    h_before, h = 0.4, 0.7
    at = torch.linspace(0, h, 10_001, dtype=torch.float64)
    D = torch.trapezoid((at - h).exp() * at**power, at) / (1 - torch.tensor(-h).double().exp())
    x0 = [torch.tensor(-h_before).double() ** power, torch.tensor(0.0).double() ** power]
    torch.testing.assert_close(corrected(torch.tensor(h).double() ** power, x0, [h_before, h]), D, rtol=1e-7, atol=1e-7)


def test_unipc_is_2m_until_it_can_correct():
    x = draw(1, 2, 4, 3, 3)[0]
    a, b = (list(SAMPLERS[name](fake_network, x, SCHEDULE, 12, silent)) for name in ("unipc", "dpm++_2m"))
    torch.testing.assert_close(a[0].x, b[0].x)
    assert not torch.allclose(a[1].x, b[1].x)


def test_lambda_is_minus_log_sigma():
    """log alpha - log sigma of the papers (VP) is -log of our sigma: why the solvers need no alpha."""
    alpha, sigma, h = levels_of([Step(0, 1, t, torch.empty(0), torch.empty(0)) for t in (900.0, 100.0)])
    ours = sigmas_at(SCHEDULE, [900.0, 100.0])
    assert h.item() == pytest.approx(log(ours[0] / ours[1]), rel=1e-6)


@pytest.mark.parametrize("name", ["ddim", "dpm++_2m", "unipc", "lcm"])  # pndm once asks at another level than that of its t
def test_a_network_of_eps_wrapped_as_one_of_v_draws_the_same(name: str) -> None:
    """v = (eps - sqrt(1 - a_bar) x) / sqrt(a_bar), from v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 (2202.00512, appendix D)."""
    noise, *fresh = draw(9, 1, 4, 8, 8)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return (0.8 * x + 0.1 * (t / 1000).view(-1, 1, 1, 1)).tanh()

    def v(x: Tensor, t: Tensor) -> Tensor:
        a_bar = SCHEDULE.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return (eps(x, t) - (1 - a_bar).sqrt() * x) / a_bar.sqrt()

    ends = []
    for network, schedule in zip((eps, v), (SCHEDULE, V_SCHEDULE)):
        *_, last = SAMPLERS[name](network, noise, schedule, 8, lambda i: fresh[i])
        ends.append(last.x)
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-4)
