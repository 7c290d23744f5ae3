"""Losses: the mean over samples, their weights, and min-SNR."""

import pytest
import torch

from minidiff.core.config import NoiseConfig
from minidiff.core.losses import min_snr_weights, prior_preservation, squared_error
from minidiff.core.schedule import NoiseSchedule, add_noise, read_output, training_target

EPSILON = NoiseSchedule.from_config(NoiseConfig())
VELOCITY = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
T_ALL = torch.arange(1000)


def pair(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 3, 3, generator=generator), torch.randn(batch, 4, 3, 3, generator=generator)


def mse(output, target, mask=None):
    return squared_error(output, target, mask).mean()


def test_mse_ddpm_eq14():
    output, target = pair()
    torch.testing.assert_close(mse(output, target), torch.nn.functional.mse_loss(output, target))


def test_losses_are_per_sample():
    output, target = pair()
    each = torch.stack([mse(output[i : i + 1], target[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(squared_error(output, target), each)


def test_prior_preservation_eq2():
    """DreamBooth, 2208.12242, eq. 2: the instance's mean plus lambda times the class's mean."""
    output, target = pair()
    expected = mse(output[:2], target[:2]) + 0.3 * mse(output[2:], target[2:])
    assert torch.equal(prior_preservation(squared_error(output, target), 0.3), expected)
    mask = torch.rand(4, 1, 3, 3)
    halves = [mse(output[h], target[h], mask[h]) for h in (slice(2), slice(2, 4))]
    torch.testing.assert_close(prior_preservation(squared_error(output, target, mask), 0.3), halves[0] + 0.3 * halves[1])


def test_prior_weight_0_is_the_plain_loss():
    output, target = pair()
    assert torch.equal(prior_preservation(squared_error(output, target), 0.0), mse(output[:2], target[:2]))


def test_halves_never_mix():
    """The gradient of each row is that of its own half alone; at weight 0 the class half has none."""
    output, target = pair()
    alone = [half.clone().requires_grad_() for half in output.chunk(2)]
    (mse(alone[0], target[:2]) + 0.7 * mse(alone[1], target[2:])).backward()
    both = output.clone().requires_grad_()
    prior_preservation(squared_error(both, target), 0.7).backward()
    torch.testing.assert_close(both.grad, torch.cat([half.grad for half in alone]))
    other = target.clone()
    other[2:] += 5  # what the class should be is nothing to the instance
    again = output.clone().requires_grad_()
    prior_preservation(squared_error(again, other), 0.7).backward()
    assert torch.equal(both.grad[:2], again.grad[:2]) and not torch.equal(both.grad[2:], again.grad[2:])
    unweighted = output.clone().requires_grad_()
    prior_preservation(squared_error(unweighted, target), 0.0).backward()
    assert torch.equal(unweighted.grad[:2], both.grad[:2]) and unweighted.grad[2:].abs().max() == 0


def test_masked_squared_error():
    """sum of m e^2 over sum of m, over the channels too."""
    output, target = pair(2)
    mask = torch.rand(2, 1, 3, 3)
    error = (output - target).square()
    expected = [sum(mask[b, 0, i, j] * error[b, c, i, j] for c in range(4) for i in range(3) for j in range(3))
                / (4 * mask[b].sum()) for b in range(2)]  # fmt: skip
    torch.testing.assert_close(squared_error(output, target, mask=mask), torch.stack(expected))
    torch.testing.assert_close(squared_error(output, target, mask=mask), squared_error(output, target, mask=0.2 * mask))
    assert torch.equal(squared_error(output, target, mask=torch.ones(2, 1, 3, 3)), squared_error(output, target))
    assert torch.equal(squared_error(output, target, mask=torch.zeros(2, 1, 3, 3)), torch.zeros(2))
    one = torch.zeros(2, 1, 3, 3)
    one[:, :, 1, 2] = 1
    torch.testing.assert_close(squared_error(output, target, mask=one), error[:, :, 1, 2].mean(1))


def test_mse_is_fp32_for_half_networks():
    output, target = torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1)
    assert mse(output, target).item() == 90000.0  # above what fp16 can hold
    assert mse(output, target).dtype == torch.float32


def test_gradient_is_the_weighted_difference():
    output, target = pair()
    output.requires_grad_()
    (torch.tensor([0.0, 1.0, 1.0, 1.0]) * squared_error(output, target)).mean().backward()
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
    a_bar = schedule.alphas_cumprod
    predicted_x0, _ = read_output(output, x_t, a_bar.view(-1, 1, 1, 1), schedule.config.prediction_type)
    snr = a_bar / (1 - a_bar)
    expected = snr.clamp(max=gamma) * (predicted_x0 - x0).square().flatten(1).mean(1)
    got = min_snr_weights(schedule, T_ALL, gamma) * (output - target).square().flatten(1).mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)  # x0 is recovered in fp32 from a_bar near 1


def test_min_snr_weights_values():
    weights = min_snr_weights(EPSILON, T_ALL)
    snr = EPSILON.alphas_cumprod / (1 - EPSILON.alphas_cumprod)
    assert torch.equal(weights[snr <= 5], torch.ones(int((snr <= 5).sum())))  # noisy timesteps: the plain eps loss
    assert weights[0].item() == pytest.approx(5 / snr[0].item())
    assert min_snr_weights(VELOCITY, torch.tensor([999])).item() == pytest.approx(snr[999].item() / (snr[999].item() + 1))
