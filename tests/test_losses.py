"""Losses: the mean over samples, their weights, and min-SNR."""

import pytest
import torch

from minidiff.config import NoiseConfig
from minidiff.diffusion.losses import min_snr_weights, mse
from minidiff.diffusion.schedule import NoiseSchedule, add_noise, training_target, x0_and_eps
from minidiff.errors import SettingsError

EPSILON = NoiseSchedule.from_config(NoiseConfig())
VELOCITY = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
T_ALL = torch.arange(1000)


def pair(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 3, 3, generator=generator), torch.randn(batch, 4, 3, 3, generator=generator)


def test_mse_ddpm_eq14():
    output, target = pair()
    torch.testing.assert_close(mse(output, target), torch.nn.functional.mse_loss(output, target))


def test_weights_are_per_sample():
    output, target = pair()
    each = torch.stack([mse(output[i : i + 1], target[i : i + 1]) for i in range(4)])
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5])
    torch.testing.assert_close(mse(output, target, weights), (each * weights).sum() / 4)
    assert torch.equal(mse(output, target, torch.ones(4)), mse(output, target))


def test_weights_carry_prior_preservation():
    """instance + lambda * class is one weighted mean over a batch that holds both halves."""
    output, target = pair()
    weights = 2 * torch.tensor([1.0, 1.0, 0.3, 0.3])
    expected = mse(output[:2], target[:2]) + 0.3 * mse(output[2:], target[2:])
    torch.testing.assert_close(mse(output, target, weights), expected)


def test_mse_is_fp32_for_half_networks():
    output, target = torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1)
    assert mse(output, target).item() == 90000.0  # above what fp16 can hold
    assert mse(output, target).dtype == torch.float32


def test_gradient_is_the_weighted_difference():
    output, target = pair()
    output.requires_grad_()
    mse(output, target, torch.tensor([0.0, 1.0, 1.0, 1.0])).backward()
    assert output.grad is not None
    assert output.grad[0].abs().max() == 0
    torch.testing.assert_close(output.grad[1], 2 * (output - target)[1].detach() / output.numel())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("schedule", [EPSILON, VELOCITY], ids=["epsilon", "v"])
def test_min_snr_section_3_4(schedule, gamma):
    """2303.09556, section 3.4: the weighted loss is the x0 error times min(SNR, gamma), whatever is predicted."""
    x0, noise = (z.repeat(250, 1, 1, 1).double() for z in pair())
    x_t, target = add_noise(schedule, x0, noise, T_ALL), training_target(schedule, x0, noise, T_ALL)
    output = target + 0.1
    predicted_x0, _ = x0_and_eps(schedule, output, x_t, T_ALL)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    expected = snr.clamp(max=gamma) * (predicted_x0 - x0).square().flatten(1).mean(1)
    got = min_snr_weights(schedule, T_ALL, gamma) * (output - target).square().flatten(1).mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)  # x0 is recovered in fp32 from a_bar near 1


def test_min_snr_weights_values():
    weights = min_snr_weights(EPSILON, T_ALL)
    snr = EPSILON.alphas_cumprod / (1 - EPSILON.alphas_cumprod)
    assert torch.equal(weights[snr <= 5], torch.ones(int((snr <= 5).sum())))  # noisy timesteps: the plain eps loss
    assert weights[0].item() == pytest.approx(5 / snr[0].item())
    assert min_snr_weights(VELOCITY, torch.tensor([999])).item() == pytest.approx(
        snr[999].item() / (snr[999].item() + 1)
    )


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_bad_gamma(gamma):
    with pytest.raises(SettingsError, match="snr_gamma"):
        min_snr_weights(EPSILON, T_ALL, gamma)
