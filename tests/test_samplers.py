"""The samplers: beside recorded trajectories of the reference, on a problem with exact answers, and beside each other.

The problem with exact answers: data ~ N(MU, S^2). Then x_t is Gaussian too, the best possible network is known in
closed form, and so is the solution of the probability-flow ODE (DDIM eq. 14): x_t keeps its distance from the mean,
counted in standard deviations, all the way down.
"""

import runpy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minidiff.config import NoiseConfig
from minidiff.diffusion.samplers import SAMPLERS, Step, ddim, dpmpp_2m, euler_a, sampler_named
from minidiff.diffusion.schedule import NoiseSchedule, sigmas_at
from minidiff.errors import SettingsError

HERE = Path(__file__).parent
GOLDEN = runpy.run_path(str(HERE / "golden" / "make_samplers.py"))
SCHEDULE = NoiseSchedule.from_config(NoiseConfig())
V_SCHEDULE = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
MU, S = 0.7, 0.5


def draw(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def silent(i: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


# ------------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize(("name", "eta", "prediction", "spacing"), GOLDEN["CASES"])
def test_golden_trajectories(name, eta, prediction, spacing):
    golden = load_file(HERE / "golden" / "samplers.safetensors")
    noise = golden["noises"]
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction, timestep_spacing=spacing))
    only_ddim = {"eta": eta} if eta else {}
    walk = SAMPLERS[name](GOLDEN["fake_network"], noise[0], schedule, 7, lambda i: noise[i + 1], **only_ddim)
    expected = golden[f"{name}/{eta}/{prediction}/{spacing}"]
    torch.testing.assert_close(torch.stack([step.x for step in walk]), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- exact answers


def gaussian_network(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact E[eps | x_t], or E[v | x_t], for data ~ N(MU, S^2)."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        a_bar = a_bar_at(t[0].item())
        x0 = MU + a_bar**0.5 * S**2 / (a_bar * S**2 + 1 - a_bar) * (x - a_bar**0.5 * MU)
        eps = (x - a_bar**0.5 * x0) / (1 - a_bar) ** 0.5
        return eps if schedule.prediction_type == "epsilon" else a_bar**0.5 * eps - (1 - a_bar) ** 0.5 * x0

    return network


def a_bar_at(t: float) -> float:
    return 1 / (1 + sigmas_at(SCHEDULE, [t])[0] ** 2)


def exact(x: Tensor, a_bar: float, a_bar_next: float) -> Tensor:
    """The probability-flow ODE's solution through `x`, from one noise level to another (VP scale)."""
    deviations = (x - a_bar**0.5 * MU) / (a_bar * S**2 + 1 - a_bar) ** 0.5
    return a_bar_next**0.5 * MU + (a_bar_next * S**2 + 1 - a_bar_next) ** 0.5 * deviations


@pytest.mark.parametrize("schedule", [SCHEDULE, V_SCHEDULE], ids=["epsilon", "v"])
@pytest.mark.parametrize(("name", "steps"), [("ddim", 100), ("euler_a", 400), ("dpm++_2m", 100)])
def test_gaussian_mean_and_deviation(name, steps, schedule):
    """Enough steps give the data's own mean and standard deviation, here over 10,000 samples.

    Ancestral steps treat the predicted x0 as certain and so lose variance: std -6 % after 100 steps, -2 % after 400.
    The mean of the deterministic ones is off by a_bar[T]^0.5 S MU = 0.03 MU: training never shows pure noise.
    """
    noise = draw(steps + 1, 10_000, 1, 1, 1)
    *_, last = SAMPLERS[name](gaussian_network(schedule), noise[0], schedule, steps, lambda i: noise[i + 1])
    assert last.x.mean().item() == pytest.approx(MU, rel=0.07)
    assert last.x.std().item() == pytest.approx(S, rel=0.03)


def errors_half_way(name: str, spacing: str, t_stop: float) -> list[float]:
    """Distance from the exact ODE solution when the sampler reaches `t_stop`, for 10, 20 and 40 steps."""
    noise, errors = draw(1, 100, 1, 1, 1)[0], []
    for steps in (10, 20, 40):
        walk = list(SAMPLERS[name](gaussian_network(SCHEDULE), noise, SCHEDULE, steps, silent, spacing=spacing))
        before = next(i for i, step in enumerate(walk) if step.t == t_stop) - 1
        solution = exact(noise, a_bar_at(walk[0].t), a_bar_at(t_stop))
        errors.append((walk[before].x - solution).abs().max().item())
    return errors


@pytest.mark.parametrize(
    ("name", "spacing", "t_stop", "order"), [("ddim", "trailing", 499, 1), ("dpm++_2m", "linspace", 500, 2)]
)
def test_order_of_convergence(name, spacing, t_stop, order):
    """Twice the steps, half the error for DDIM and a quarter for 2M: measured to a fixed t, before sigma nears 0."""
    errors = errors_half_way(name, spacing, t_stop)
    orders = torch.tensor(errors).log2().diff().neg()
    assert (orders - order).abs().max() < 0.25, orders


# ------------------------------------------------------------------------------------- the equations, one by one


def one_by_one(T: int) -> NoiseSchedule:
    """A schedule whose DDIM with T - 1 steps visits every timestep: T - 1, T - 2, ... 1."""
    return NoiseSchedule.from_config(NoiseConfig(num_train_timesteps=T, beta_start=0.01, beta_end=0.3))


def test_ddim_eq12_eta_1_is_the_ddpm_posterior_eq7():
    """DDPM eq. 7: with eta = 1 each step draws from q(x_{t-1} | x_t, x_0): its mean, and noise of its variance."""
    schedule, noise = one_by_one(20), draw(20, 2, 4, 3, 3)
    a_bars, x_t = schedule.alphas_cumprod.double(), noise[0]
    for step in ddim(GOLDEN["fake_network"], noise[0], schedule, 19, lambda i: noise[i + 1], eta=1.0):
        a_bar, a_bar_prev = a_bars[int(step.t)], a_bars[int(step.t) - 1]
        beta = 1 - a_bar / a_bar_prev
        mean = (a_bar_prev.sqrt() * beta * step.x0 + (1 - beta).sqrt() * (1 - a_bar_prev) * x_t) / (1 - a_bar)
        variance = (1 - a_bar_prev) / (1 - a_bar) * beta
        expected = mean + variance.sqrt() * noise[step.index + 1]
        torch.testing.assert_close(step.x, expected.float(), rtol=1e-5, atol=2e-6)
        x_t = step.x
    assert step.t == 1


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


def test_ddim_ends_at_a_bar_0_or_at_1():
    """`set_alpha_to_one`: the last step goes to x0 itself, or keeps the noise of t = 0, as SD 1.5 does."""
    x, model = draw(1, 1, 4, 3, 3)[0], GOLDEN["fake_network"]
    *_, step = ddim(model, x, SCHEDULE, 10, silent)
    assert not torch.allclose(step.x, step.x0)
    *_, step = ddim(model, x, NoiseSchedule.from_config(NoiseConfig(set_alpha_to_one=True)), 10, silent)
    torch.testing.assert_close(step.x, step.x0)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_eq14_euler_in_sigma_is_ddim(steps):
    """DDIM eq. 13 and 14: in x / sqrt(a_bar), DDIM is Euler's method, x + (sigma_next - sigma) eps."""
    x = draw(1, 2, 4, 5, 5)[0]
    walk = list(ddim(GOLDEN["fake_network"], x, SCHEDULE, steps, silent))
    sigmas = [*sigmas_at(SCHEDULE, [step.t for step in walk])[:-1], SCHEDULE.sigmas[0].item()]
    for step, sigma, sigma_next in zip(walk, sigmas, sigmas[1:], strict=False):
        eps = GOLDEN["fake_network"](x, step.t)
        x_ve = x * (sigma**2 + 1) ** 0.5 + (sigma_next - sigma) * eps
        torch.testing.assert_close(x_ve / (sigma_next**2 + 1) ** 0.5, step.x, rtol=1e-6, atol=1e-6)
        x = step.x


def test_euler_a_is_ddim_with_eta_1():
    """Two names, one step: sigma_up is DDIM's sigma (eq. 16) over sqrt(a_bar_prev).

    Only the last step differs: to sigma = 0 here, to a_bar[0] there.
    """
    noise = draw(11, 2, 4, 3, 3)
    model = GOLDEN["fake_network"]
    ancestral = euler_a(model, noise[0], SCHEDULE, 10, lambda i: noise[i + 1], spacing="leading")
    posterior = ddim(model, noise[0], SCHEDULE, 10, lambda i: noise[i + 1], eta=1.0)
    for a, b in list(zip(ancestral, posterior, strict=True))[:-1]:
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-5)


def test_euler_a_last_step_is_x0():
    noise = draw(4, 1, 4, 3, 3)
    *_, last = euler_a(GOLDEN["fake_network"], noise[0], SCHEDULE, 3, lambda i: noise[i + 1])
    torch.testing.assert_close(last.x, last.x0)


def test_dpmpp_2m_algorithm2():
    """2211.01095, Algorithm 2, in the paper's own letters and fp64: alpha, sigma, lambda, h, r, D."""
    walk = list(dpmpp_2m(GOLDEN["fake_network"], draw(1, 2, 4, 3, 3)[0], SCHEDULE, 12, silent))
    a_bars = SCHEDULE.alphas_cumprod.double()[[int(step.t) for step in walk]]
    alpha, sigma = a_bars.sqrt(), (1 - a_bars).sqrt()
    h = (alpha.log() - sigma.log()).diff()  # h[i]: over the step from walk[i] to walk[i + 1]
    for i in range(1, 11):
        r = h[i - 1] / h[i]
        D = (1 + 1 / (2 * r)) * walk[i].x0 - 1 / (2 * r) * walk[i - 1].x0
        x = sigma[i + 1] / sigma[i] * walk[i - 1].x - alpha[i + 1] * ((-h[i]).exp() - 1) * D
        torch.testing.assert_close(walk[i].x, x.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(walk[-1].x, walk[-1].x0)  # to sigma = 0: first order


# ------------------------------------------------------------------------------------------------- the common promises


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_yielded_lazily(name):
    calls: list[tuple[torch.Size, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        calls.append((x.shape, x.dtype))
        return torch.zeros_like(x)

    noise = draw(6, 2, 4, 3, 3)
    steps: list[Step] = []
    for step in SAMPLERS[name](model, noise[0], SCHEDULE, 5, lambda i: noise[i + 1]):
        steps.append(step)
        assert len(calls) == len(steps)
        assert step.x.shape == step.x0.shape == noise[0].shape
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    assert all(earlier.t > later.t for earlier, later in pairwise(steps))
    assert calls == [(noise[0].shape, torch.float32)] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_arithmetic_is_fp32_whatever_the_network(name, dtype):
    """A network that answers in `dtype` changes nothing but its own rounding."""
    noise = draw(21, 1, 4, 3, 3)

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return GOLDEN["fake_network"](x, t).to(dtype)

    def draw_step(i: int) -> Tensor:
        return noise[i + 1].double()  # of another dtype than x: moved over

    walk = list(SAMPLERS[name](rounded, noise[0], SCHEDULE, 20, draw_step))
    same = list(SAMPLERS[name](lambda x, t: rounded(x, t).float(), noise[0], SCHEDULE, 20, draw_step))
    for step, other in zip(walk, same, strict=True):
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert torch.equal(step.x, other.x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_alone_or_in_a_batch(name):
    noise = draw(8, 3, 4, 3, 3)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)

    *_, together = SAMPLERS[name](model, noise[0], SCHEDULE, 7, lambda i: noise[i + 1])
    *_, alone = SAMPLERS[name](model, noise[0][1:2], SCHEDULE, 7, lambda i: noise[i + 1][1:2])
    assert torch.equal(together.x[1:2], alone.x)


def test_spacing_argument_beats_config_beats_default():
    trailing = NoiseSchedule.from_config(NoiseConfig(timestep_spacing="trailing"))
    x = draw(1, 1, 4, 2, 2)[0]

    def first_t(name: str, schedule: NoiseSchedule, spacing: str | None = None) -> float:
        return next(SAMPLERS[name](lambda x, t: x, x, schedule, 20, lambda i: x, spacing=spacing)).t

    assert [first_t(name, SCHEDULE) for name in SAMPLERS] == [951, 999, 999]
    assert [first_t(name, trailing) for name in SAMPLERS] == [999, 999, 999]
    assert [first_t(name, trailing, "leading") for name in SAMPLERS] == [951, 951, 941]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("steps", "spacing"), [(0, None), (1001, None), (10, "karras")])
def test_bad_steps_and_spacing(name, steps, spacing):
    noise = draw(1, 1, 4, 2, 2)[0]
    with pytest.raises(SettingsError):
        next(SAMPLERS[name](lambda x, t: x, noise, SCHEDULE, steps, silent, spacing=spacing))


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(SettingsError, match="eta is"):
        next(ddim(lambda x, t: x, draw(1, 1, 4, 2, 2)[0], SCHEDULE, 10, silent, eta=eta))


def test_unknown_sampler():
    assert sampler_named("dpm++_2m") is dpmpp_2m
    with pytest.raises(SettingsError, match=r'"euler-a" is unknown; .* Did you mean "euler_a"'):
        sampler_named("euler-a")
