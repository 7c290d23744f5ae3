"""Training losses. Shapes: B samples, C H W one latent; timesteps, weights and per-sample losses (B,)."""

from torch import Tensor

from minidiff.core.schedule import NoiseSchedule


def squared_error(output: Tensor, target: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample, times its weight: (B,), fp32. `mask` (B, 1, H, W) is 1 where to learn, or 0:

    sum over c, i, j of m_ij e_cij^2  /  (C  sum over i, j of m_ij)        so a small mask is no small loss
    """
    error = (output.float() - target.float()).square()
    if mask is None:
        per_sample = error.flatten(1).mean(1)  # DDPM (arXiv 2006.11239), eq. 14
    else:
        per_sample = (mask * error).flatten(1).mean(1) / mask.flatten(1).mean(1).clamp(min=1e-6)
    return per_sample if weights is None else weights * per_sample


def mse(output: Tensor, target: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The mean of `squared_error` over the samples."""
    return squared_error(output, target, weights, mask).mean()


def prior_preservation(
    output: Tensor, target: Tensor, prior_weight: float, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """DreamBooth's loss for a batch whose first half is the instance and whose second half is the class.

    L = L_instance + prior_weight · L_class, each the mean over its own half. (kohya's trainer: one mean over both.)
    """
    instance, prior = squared_error(output, target, weights, mask).chunk(2)
    return instance.mean() + prior_weight * prior.mean()  # DreamBooth (arXiv 2208.12242), eq. 2


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights (B,) for timesteps `t` (B,) that keep the nearly clean timesteps from dominating.

    The paper's weight on the x0 error is min(SNR, gamma). An error in eps is one in x0 times SNR, in v times SNR + 1,
    so the weights on the losses that we really compute are divided by that.
    """
    a_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = a_bar / (1 - a_bar)
    x0_weight = snr.clamp(max=gamma)  # min-SNR-gamma (arXiv 2303.09556), section 3.4
    return x0_weight / (snr if schedule.config.prediction_type == "epsilon" else snr + 1)
