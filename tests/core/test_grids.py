"""The samplers beside recorded trajectories of the reference, what all of them promise, and what they refuse.

Their equations one by one, and problems with exact answers, are in test_samplers.py.
"""

import runpy
from pathlib import Path

import pytest
import torch
from reference_grids import as_in_the_reference
from safetensors.torch import load_file
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import SettingsError
from minidiff.core.grids import SAMPLERS, Step, karras_sigmas, sigmas_at, timesteps, timesteps_at
from minidiff.core.schedule import NoiseSchedule

HERE = Path(__file__).parents[1]
GOLDEN = runpy.run_path(str(HERE / "golden" / "make_samplers.py"))
SCHEDULE = NoiseSchedule.from_config(NoiseConfig())
V_SCHEDULE = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
ZERO_SNR = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True))
CALLS = {"heun": lambda steps: 2 * steps - 1, "pndm": lambda steps: steps + 1}  # the others: one a step


def draw(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def silent(i: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def calls(name: str, steps: int) -> int:
    return CALLS.get(name, lambda n: n)(steps)


# ------------------------------------------------------------------------------------------------------ the reference


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(HERE / "golden" / "samplers.safetensors")


@pytest.mark.parametrize("case", GOLDEN["CASES"], ids=lambda case: "/".join(map(str, case)))
def test_golden_trajectories(golden, case):
    name, eta, prediction, spacing, strength, special = case
    expected, noise = golden["/".join(map(str, case))], golden["noises"]
    schedule = NoiseSchedule.from_config(
        NoiseConfig(
            prediction_type=prediction,
            timestep_spacing=spacing,
            use_karras_sigmas=special == "karras",
            rescale_betas_zero_snr=special == "zero_snr",
        )
    )
    image = None if strength == 1 else golden["picture"]
    walk = as_in_the_reference(name)(
        GOLDEN["fake_network"], noise[0], schedule, 7, lambda i: noise[i + 1], image=image, strength=strength, eta=eta
    )
    # with zero SNR the reference's Euler subtracts numbers of size 4096, and loses four digits
    tolerance = 1e-4 if special == "zero_snr" and "euler" in name else 1e-5
    for step, x in zip(walk, expected, strict=True):
        torch.testing.assert_close(step.x, x, rtol=0, atol=tolerance * x.abs().max().item())
        if name in ("ddim", "euler_a", "dpm++_2m") and strength == 1 and not special:
            torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5)  # small elements count as much as large ones


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_with_leading_spacing_the_grids_are_the_references(name):
    for steps in (1, 3, 7, 20, 30, 999):
        for first in (0, steps // 3):
            assert SAMPLERS[name].grid(SCHEDULE, steps, first, "leading", False) == as_in_the_reference(name).grid(
                SCHEDULE, steps, first, "leading", False
            )


# ------------------------------------------------------------------------------------------------- the common promises


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_samplers_with_fresh_noise_ask_for_it(name):
    asked = list[int]()

    def draw_step(i: int) -> Tensor:
        asked.append(i)
        return noise

    noise = draw(1, 1, 4, 2, 2)[0]
    list(SAMPLERS[name](GOLDEN["fake_network"], noise, SCHEDULE, 3, draw_step))
    assert bool(asked) == SAMPLERS[name].fresh_noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_yielded_lazily(name):
    asked: list[tuple[torch.Size, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        asked.append((x.shape, x.dtype))
        return torch.zeros_like(x)

    noise = draw(6, 2, 4, 3, 3)
    steps: list[Step] = []
    for step in SAMPLERS[name](model, noise[0], SCHEDULE, 5, lambda i: noise[i + 1]):
        steps.append(step)
        assert len(asked) == len(steps)
        assert step.x.shape == step.x0.shape == noise[0].shape
    total = calls(name, 5)
    assert [(step.index, step.total) for step in steps] == [(i, total) for i in range(total)]
    ts = [step.t for step in steps]
    assert len(set(ts)) == 5 and ts == sorted(ts, reverse=True)
    assert asked == [(noise[0].shape, torch.float32)] * total


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


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_alone_or_in_a_batch(name, strength):
    noise = draw(8, 3, 4, 3, 3)
    image = None if strength == 1 else draw(1, 3, 4, 3, 3)[0]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)

    def last(part: slice) -> Tensor:
        sampler, start = SAMPLERS[name], None if image is None else image[part]
        walk = sampler(model, noise[0][part], SCHEDULE, 7, lambda i: noise[i + 1][part], image=start, strength=strength)
        return [step.x for step in walk][-1]

    assert torch.equal(last(slice(3))[1:2], last(slice(1, 2)))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "heun"])
def test_zero_snr_is_finite_and_forgets_the_start(name):
    """At t = 999 nothing of a picture is left: what the network says of x0 is all there is."""
    noise = draw(8, 1, 4, 3, 3)
    spacing = "trailing" if SAMPLERS[name].spacing else None
    walk = list(SAMPLERS[name](GOLDEN["fake_network"], noise[0], ZERO_SNR, 5, lambda i: noise[i + 1], spacing=spacing))
    assert walk[0].t == 999
    torch.testing.assert_close(walk[0].x0, -GOLDEN["fake_network"](noise[0], 999.0), rtol=0, atol=2e-3)
    assert all(step.x.isfinite().all() and step.x.abs().max() < 10 for step in walk)


# ---------------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("steps", "strength", "walked"), [(10, 1.0, 10), (10, 0.75, 7), (10, 0.1, 1), (50, 0.58, 28)])
def test_strength_is_truncated(name, steps, strength, walked):
    """int(50 · 0.58) is 28: as the reference has it, the last int(steps · strength) steps are walked."""
    noise, image = draw(2, 1, 4, 2, 2)
    full = [step.t for step in SAMPLERS[name](lambda x, t: x, noise, SCHEDULE, steps, lambda i: noise)]
    part = list(SAMPLERS[name](lambda x, t: x, noise, SCHEDULE, steps, lambda i: noise, image=image, strength=strength))
    assert sorted({step.t for step in part}) == sorted(set(full))[:walked]
    assert len(part) == part[0].total == (1 if walked == 1 else calls(name, walked))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_first_sees_the_image_under_noise_ddpm_eq4(name):
    seen: list[tuple[Tensor, float]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t[0].item()))
        return x

    noise, image = draw(2, 1, 4, 2, 2)
    next(SAMPLERS[name](model, noise, SCHEDULE, 10, lambda i: noise, image=image, strength=0.6))
    x, t = seen[0]
    a_bar = 1 / (1 + sigmas_at(SCHEDULE, [t])[0] ** 2)
    torch.testing.assert_close(x, a_bar**0.5 * image + (1 - a_bar) ** 0.5 * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_image_gives_it_back(name):
    noise, image = draw(2, 1, 4, 3, 3)

    def knows(x: Tensor, t: Tensor) -> Tensor:
        a_bar = 1 / (1 + sigmas_at(SCHEDULE, [t[0].item()])[0] ** 2)
        return (x - a_bar**0.5 * image) / (1 - a_bar) ** 0.5

    *_, last = SAMPLERS[name](knows, noise, SCHEDULE, 10, lambda i: noise, image=image, strength=0.5)
    torch.testing.assert_close(last.x, image, rtol=0, atol=0.1)  # DDIM and PNDM keep the noise of t = 0, 3 %


# ---------------------------------------------------------------------------------------------------------- settings


def first_t(name: str, schedule: NoiseSchedule, **settings) -> float:
    x = draw(1, 1, 4, 2, 2)[0]
    return next(SAMPLERS[name](lambda x, t: x, x, schedule, 20, lambda i: x, **settings)).t


def test_spacing_argument_beats_config_beats_default():
    trailing = NoiseSchedule.from_config(NoiseConfig(timestep_spacing="trailing"))
    own = [name for name, sampler in SAMPLERS.items() if sampler.spacing]
    walkers, whole = ("ddpm", "ddim", "pndm"), ("dpm++_2m", "dpm++_2m_sde", "unipc")
    assert [first_t(name, SCHEDULE) for name in own] == [951 if name in walkers else 999 for name in own]
    assert [first_t(name, trailing) for name in own] == [999] * 9
    assert [first_t(name, trailing, spacing="leading") for name in own] == [941 if n in whole else 951 for n in own]
    assert first_t("lcm", SCHEDULE) == first_t("lcm", trailing) == 999


def test_karras_argument_beats_config():
    karras, x = NoiseSchedule.from_config(NoiseConfig(use_karras_sigmas=True)), draw(1, 1, 4, 2, 2)[0]

    def ts(schedule: NoiseSchedule, name: str = "dpm++_2m", **settings) -> list[float]:
        return [step.t for step in SAMPLERS[name](lambda x, t: x, x, schedule, 20, lambda i: x, **settings)]

    assert ts(karras)[:5] == [999, 962, 921, 876, 827]
    assert ts(karras) == ts(SCHEDULE, karras=True) != ts(SCHEDULE)
    assert ts(karras, karras=False) == ts(SCHEDULE)
    assert ts(karras, "ddim") == ts(SCHEDULE, "ddim")  # the model's own choice is for those that can
    assert ts(karras, "euler_a") == ts(karras, "euler") == pytest.approx(ts(karras), abs=0.5)


def test_no_two_samplers_are_the_same():
    x, ends = draw(10, 1, 4, 3, 3), list[Tensor]()
    for sampler in SAMPLERS.values():
        *_, last = sampler(GOLDEN["fake_network"], x[0], SCHEDULE, 6, lambda i: x[i + 1])
        assert all((last.x - other).abs().max() > 1e-3 for other in ends)
        ends.append(last.x)


# --------------------------------------------------------------------------------------- timesteps, spacings, Karras


def test_spacings():
    """2305.08891, table 2, and the docstring's example."""
    assert timesteps(SCHEDULE, 4, "leading") == [751, 501, 251, 1]
    assert timesteps(SCHEDULE, 4, "linspace") == [999, 666, 333, 0]
    assert timesteps(SCHEDULE, 4, "trailing") == [999, 749, 499, 249]
    assert timesteps(SCHEDULE, 20, "leading") == list(range(951, 0, -50))
    assert timesteps(SCHEDULE, 30, "leading")[0] == 958  # 1000 // 30 is 33: the integer division trap
    no_offset = NoiseSchedule.from_config(NoiseConfig(steps_offset=0))
    assert timesteps(no_offset, 4, "leading") == [750, 500, 250, 0]


def test_spacing_conventions_of_the_samplers():
    euler = timesteps(SCHEDULE, 20, "linspace", whole=False)
    assert euler[1] == pytest.approx(946.421, abs=1e-3)
    assert euler[-2] == pytest.approx(52.579, abs=1e-3)
    dpm = timesteps(SCHEDULE, 20, "linspace", spare=1)
    assert (dpm[:3], dpm[-2:], len(dpm)) == ([999, 949, 899], [100, 50], 20)
    assert timesteps(SCHEDULE, 20, "leading", spare=1)[0::19] == [941, 48]
    assert timesteps(SCHEDULE, 61, "trailing")[-1] == 15  # and not a 62nd one at -1


def test_more_steps_than_different_timesteps():
    assert len(timesteps(SCHEDULE, 1000, "linspace")) == 1000
    for spacing, spare in (("leading", 0), ("leading", 1), ("linspace", 1)):
        with pytest.raises(SettingsError, match="fewer different timesteps"):
            timesteps(SCHEDULE, 1000, spacing, spare=spare)


def test_sigmas_between_timesteps():
    table = SCHEDULE.sigmas.tolist()
    sigmas = sigmas_at(SCHEDULE, [999.0, 10.25, 0.0])
    assert sigmas == pytest.approx([table[999], 0.75 * table[10] + 0.25 * table[11], table[0], 0.0])


def test_karras_sigmas_edm_eq5():
    """The ends are kept, and sigma^(1/7) goes down in equal steps. The numbers are those of A1111 and diffusers."""
    sigmas = karras_sigmas(14.6146469, 0.0291675, 10)
    assert (sigmas[0], sigmas[-1]) == pytest.approx((14.6146469, 0.0291675))
    roots = torch.tensor(sigmas).double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(9), rtol=1e-5, atol=0)
    t = [round(t) for t in timesteps_at(SCHEDULE, karras_sigmas(14.6146469, 0.0291675, 20))]
    assert t == [999, 962, 921, 876, 827, 772, 710, 640, 561, 474, 380, 285, 197, 123, 69, 35, 15, 6, 2, 0]
    assert karras_sigmas(14.6, 0.03, 1) == pytest.approx([14.6])


def test_timesteps_at_undoes_sigmas_at():
    ts = [999.0, 500.0, 20.0, 1.0, 0.0]
    assert timesteps_at(SCHEDULE, sigmas_at(SCHEDULE, ts)[:-1]) == pytest.approx(ts, abs=1e-3)
    half_way = (SCHEDULE.sigmas[500] * SCHEDULE.sigmas[501]).sqrt().item()  # in log sigma
    assert timesteps_at(SCHEDULE, [half_way, 100.0, 0.001]) == pytest.approx([500.5, 999, 0], abs=1e-3)
