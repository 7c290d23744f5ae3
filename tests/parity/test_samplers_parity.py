"""Samplers and schedule, step by step beside diffusers."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from minidiff.config import NoiseConfig
from minidiff.diffusion.losses import min_snr_weights
from minidiff.diffusion.samplers import SAMPLERS, ddim
from minidiff.diffusion.schedule import SPACINGS, NoiseSchedule, add_noise, timesteps, training_target
from minidiff.errors import SettingsError

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_samplers.py"))
SHAPE = (2, 4, 6, 5)


def trajectory(name, schedule, steps, eta=0.0, spacing=None):
    noise = GOLDEN["noises"](SHAPE, steps)
    sampler = SAMPLERS[name] if not eta else ddim
    only_ddim = {"eta": eta} if eta else {}
    walk = sampler(
        GOLDEN["fake_network"], noise[0], schedule, steps, lambda i: noise[i + 1], spacing=spacing, **only_ddim
    )
    return torch.stack([step.x for step in walk])


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 30, 50])
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("euler_a", 0.0), ("dpm++_2m", 0.0)]
)
def test_trajectories(name, eta, prediction, spacing, steps):
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction))
    reference = GOLDEN["reference_scheduler"](name, prediction, spacing)
    expected = GOLDEN["reference_trajectory"](reference, steps, SHAPE, eta)
    torch.testing.assert_close(trajectory(name, schedule, steps, eta, spacing), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_to_alpha_one(eta):
    schedule = NoiseSchedule.from_config(NoiseConfig(set_alpha_to_one=True))
    reference = GOLDEN["reference_scheduler"]("ddim", "epsilon", None, set_alpha_to_one=True)
    expected = GOLDEN["reference_trajectory"](reference, 10, SHAPE, eta)
    torch.testing.assert_close(trajectory("ddim", schedule, 10, eta), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "convention"), [("ddim", {}), ("euler_a", {"whole": False}), ("dpm++_2m", {"spare": 1})]
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


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_side(beta_schedule, prediction):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": beta_schedule, "prediction_type": prediction}
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
