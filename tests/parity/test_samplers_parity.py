"""Samplers and schedule, step by step beside diffusers.

Where the reference is not followed, or cannot be asked:

- PNDM from an image: its list of timesteps is cut in the wrong place (see `repeated_second` in make_samplers.py); it is
  given the right one.
- Euler at zero terminal SNR: its first step subtracts numbers of size 4096 · x in fp32. With two steps 1e-3 of the picture
  is lost, and less with more; ours does not lose it. Heun and PNDM have no zero SNR there.
- DDIM and PNDM with another spacing than leading: ours is given the reference's grid (reference_grids.py).
- DDPM and others with 1000 steps: t = 1000, an IndexError. Ours is a SettingsError.
- Euler ancestral has no Karras sigmas there; ours are Euler's.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import assert_as_near
from reference_grids import as_in_the_reference

pytest.importorskip("diffusers")

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import SettingsError
from minidiff.core.grids import SAMPLERS, timesteps
from minidiff.core.losses import min_snr_weights
from minidiff.core.schedule import NoiseSchedule, add_noise, training_target

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_samplers.py"))
SPACINGS = GOLDEN["SPACINGS"]
SHAPE = (2, 4, 6, 5)
MANY = (32, 4, 6, 5)  # so many that two roundings have nearly the same size
EVERY_STEPS = [1, 2, 3, 10, 20, *(pytest.param(n, marks=pytest.mark.slow) for n in (30, 50))]  # a minute for these two
VARIANTS = [
    (name, prediction, special)
    for name in SAMPLERS
    for prediction in ("epsilon", "v_prediction")
    for special in ("", "karras", "zero_snr")
    if special != "karras" or name in GOLDEN["KARRAS"]
    if special != "zero_snr" or (prediction == "v_prediction" and name not in ("pndm", "heun"))
]


def trajectory(name, schedule, steps, strength=1.0, shape=SHAPE, **settings):
    noise = GOLDEN["noises"](shape, steps)
    image = None if strength == 1 else GOLDEN["picture"](shape)
    walk = (as_in_the_reference(name) if settings.get("spacing") else SAMPLERS[name])(
        GOLDEN["fake_network"], noise[0], schedule, steps, lambda i: noise[i + 1], image=image, strength=strength, **settings
    )
    return torch.stack([step.x for step in walk])


def assert_same(ours, theirs, tolerance=1e-5):
    """Each step's x, to `tolerance` of its largest number: the fake network is no denoiser, and some x reach 200."""
    assert ours.shape == theirs.shape
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error <= tolerance, f"{error:.1e} after call {i}"


@pytest.mark.parametrize("steps", EVERY_STEPS)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize(("name", "prediction", "special"), VARIANTS)
def test_trajectories(name, prediction, special, spacing, steps):
    """Text to image, and image to image at two strengths, with the start noise of each sampler's own `add_noise`."""
    if SAMPLERS[name].spacing is None and spacing:
        pytest.skip("LCM and TCD have one spacing, their own")
    config = NoiseConfig(prediction_type=prediction, rescale_betas_zero_snr=special == "zero_snr")
    schedule = NoiseSchedule.from_config(config)
    for strength in (1.0, 0.75, 0.3):
        if int(steps * strength) < 1:
            continue
        reference = GOLDEN["reference_scheduler"](name, prediction, spacing, special)
        expected = GOLDEN["reference_trajectory"](reference, steps, SHAPE, 0.0, strength)
        ours = trajectory(name, schedule, steps, strength, spacing=spacing, karras=special == "karras")
        assert_same(ours, expected, 2e-3 if special == "zero_snr" and "euler" in name else 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 30, 50])
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("euler_a", 0.0), ("dpm++_2m", 0.0)]
)
def test_trajectories_element_by_element(name, eta, prediction, spacing, steps):
    """Small elements count as much as large ones. Both programs round, and 50 steps of the fake network enlarge that, on some
    processors beyond 1e-5: so each is judged by the reference in float64.
    """
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction))
    single, double = (GOLDEN["reference_scheduler"](name, prediction, spacing) for _ in range(2))
    expected = GOLDEN["reference_trajectory"](single, steps, MANY, eta)
    exact = GOLDEN["exact_trajectory"](double, steps, MANY, eta)
    ours = trajectory(name, schedule, steps, shape=MANY, spacing=spacing, eta=eta)
    for a, b, c in zip(ours, expected, exact, strict=True):
        assert_as_near([a], [b], [c])


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_with_eta(prediction, spacing, eta):
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction))
    for steps in (1, 3, 20):
        for strength in (1.0, 0.75):
            if int(steps * strength) < 1:
                continue
            reference = GOLDEN["reference_scheduler"]("ddim", prediction, spacing)
            expected = GOLDEN["reference_trajectory"](reference, steps, SHAPE, eta, strength)
            assert_same(trajectory("ddim", schedule, steps, strength, spacing=spacing, eta=eta), expected)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_tcd_with_eta(prediction, eta):
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction))
    for steps, strength in ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (4, 0.75)):
        reference = GOLDEN["reference_scheduler"]("tcd", prediction, None)
        expected = GOLDEN["reference_trajectory"](reference, steps, SHAPE, eta, strength)
        assert_same(trajectory("tcd", schedule, steps, strength, eta=eta), expected)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_to_alpha_one(name, eta):
    if name == "pndm" and eta:
        pytest.skip("PNDM has no eta")
    schedule = NoiseSchedule.from_config(NoiseConfig(set_alpha_to_one=True))
    reference = GOLDEN["reference_scheduler"](name, "epsilon", None, set_alpha_to_one=True)
    ours, expected = trajectory(name, schedule, 10, eta=eta), GOLDEN["reference_trajectory"](reference, 10, SHAPE, eta)
    assert_same(ours, expected)
    if name == "ddim":
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_pndm_from_an_image_in_the_reference():
    """Its own list, cut at step 3 of 10, is [t_2, t_3, t_4 …] where [t_3, t_4, t_4, t_5 …] is meant."""
    reference = GOLDEN["reference_scheduler"]("pndm", "epsilon", None)
    reference.set_timesteps(10)
    assert reference.timesteps[3:].tolist() == [701, 601, 501, 401, 301, 201, 101, 1]
    assert GOLDEN["repeated_second"](reference.timesteps, 3).tolist() == [601, 501, 501, 401, 301, 201, 101, 1]


def test_euler_a_karras_sigmas_are_eulers():
    schedule = NoiseSchedule.from_config(NoiseConfig())
    reference = GOLDEN["reference_scheduler"]("euler", "epsilon", None, "karras")
    reference.set_timesteps(20)
    grid = SAMPLERS["euler_a"].grid(schedule, 20, 0, "linspace", True)
    torch.testing.assert_close(torch.tensor([t for t, _, _ in grid]), reference.timesteps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(torch.tensor([sigma for _, sigma, _ in grid]), reference.sigmas[:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "convention"),
    [("ddpm", {}), ("ddim", {}), ("euler", {"whole": False}), ("dpm++_2m", {"spare": 1}), ("unipc", {"spare": 1})],
)
def test_timesteps_for_every_number_of_steps(name, convention, spacing):
    schedule = NoiseSchedule.from_config(NoiseConfig())
    reference = GOLDEN["reference_scheduler"](name, "epsilon", spacing)
    for steps in range(1, 1001):
        reference.set_timesteps(steps)
        expected = reference.timesteps[:steps].double()  # for 61 steps, trailing, the reference has a 62nd: t = -1
        try:
            ours = torch.tensor(timesteps(schedule, steps, spacing, **convention), dtype=torch.float64)
        except SettingsError:  # 1000 steps: there the reference asks for t = 1000, or for one t twice
            assert steps >= 999 and (expected.max() == 1000 or (expected.diff() == 0).any())
            continue
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN["KARRAS"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_karras_timesteps_for_many_numbers_of_steps(name, spacing):
    schedule = NoiseSchedule.from_config(NoiseConfig())
    reference = GOLDEN["reference_scheduler"](name, "epsilon", spacing, "karras")
    for steps in range(1, 200, 3):
        if len(np.arange(1000, 0, -1000 / steps)) > steps and spacing == "trailing":
            continue  # 61 and some more, by rounding: the reference's list has one too many, t = -1
        reference.set_timesteps(steps)
        ours = torch.tensor([t for t, _, _ in SAMPLERS[name].grid(schedule, steps, 0, spacing, True)])
        once = torch.cat([reference.timesteps[:1], reference.timesteps[1::2]]) if name == "heun" else reference.timesteps
        torch.testing.assert_close(ours, once.float(), rtol=0, atol=2e-3)


def test_lcm_timesteps_for_every_number_of_steps():
    schedule = NoiseSchedule.from_config(NoiseConfig())
    reference = GOLDEN["reference_scheduler"]("lcm", "epsilon", None)
    for steps in range(1, 51):
        reference.set_timesteps(steps)
        assert [t for t, _, _ in SAMPLERS["lcm"].grid(schedule, steps, 0, "", False)] == reference.timesteps.tolist()


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_side(beta_schedule, prediction, zero_snr):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    if zero_snr and prediction == "epsilon":
        pytest.skip("zero SNR needs v_prediction")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": beta_schedule, "prediction_type": prediction}
    config |= {"rescale_betas_zero_snr": zero_snr}
    reference, schedule = DDPMScheduler(**config), NoiseSchedule.from_config(NoiseConfig(**config))
    assert torch.equal(schedule.alphas_cumprod, reference.alphas_cumprod)
    x0, noise = GOLDEN["noises"]((5, 4, 3, 3), 1)
    t = torch.tensor([0, 1, 250, 700, 999])
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), reference.add_noise(x0, noise, t))
    expected = noise if prediction == "epsilon" else reference.get_velocity(x0, noise, t)
    torch.testing.assert_close(training_target(schedule, x0, noise, t), expected)
    snr = compute_snr(reference, t)  # the weights as diffusers' training scripts compute them
    weights = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr_weights(schedule, t, 5.0), weights, rtol=1e-6, atol=0)
