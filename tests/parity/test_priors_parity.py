"""The prior-preservation loss beside that of diffusers' train_dreambooth.py, written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from minidiff.core.losses import min_snr_weights, prior_preservation, squared_error
from minidiff.core.schedule import NoiseSchedule, add_noise, training_target

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.0])
def test_prior_loss_of_train_dreambooth(prediction_type: str, weight: float) -> None:
    """Noising, target and both halves: the batch is chunked, and the class's mean is added with its weight."""
    from minidiff.core.config import NoiseConfig

    draws = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(6, 4, 8, 8, generator=draws) for _ in range(3))
    t = torch.randint(1000, (6,), generator=draws)
    reference = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    target = noise if prediction_type == "epsilon" else reference.get_velocity(x0, noise, t)
    instance, prior = (F.mse_loss(a, b) for a, b in zip(output.chunk(2), target.chunk(2)))
    expected = instance + weight * prior

    ours = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction_type))
    torch.testing.assert_close(add_noise(ours, x0, noise, t), reference.add_noise(x0, noise, t), atol=1e-6, rtol=0)
    got = prior_preservation(squared_error(output, training_target(ours, x0, noise, t)), weight)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_of_diffusers(prediction_type: str) -> None:
    from diffusers.training_utils import compute_snr

    from minidiff.core.config import NoiseConfig

    reference = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    snr = compute_snr(reference, t)
    weights = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    ours = min_snr_weights(NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction_type)), t)
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=1e-4)
