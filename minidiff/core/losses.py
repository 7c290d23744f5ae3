"""Training losses. Shapes: B samples, C H W one latent; timesteps, weights and per-sample losses (B,)."""

from torch import Tensor

from minidiff.core.schedule import NoiseSchedule


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample: (B,), fp32.

    Where `mask` m (B, 1, H, W) is 0, the error counts for nothing. The mean is over the rest, so a small mask is no small loss:

        sum over c, i, j of m_ij error_cij  /  (C  sum over i, j of m_ij)
    """
    error = (output.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)  # DDPM (arXiv 2006.11239), eq. 14
    return (mask * error).flatten(1).mean(1) / mask.flatten(1).mean(1).clamp(min=1e-6)


def prior_preservation(losses: Tensor, prior_weight: float) -> Tensor:
    """DreamBooth's loss from the losses (B,) of a batch. Its first half shows the instance, its second half the class."""
    instance, prior = losses.chunk(2)
    return instance.mean() + prior_weight * prior.mean()  # DreamBooth (arXiv 2208.12242), eq. 2


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights (B,) for timesteps `t` (B,). They keep the nearly clean timesteps from dominating.

    The paper's weight on the squared error of x0 is min(SNR, gamma). The squared error of eps is SNR times as large, that of v
    SNR + 1 times. So the weight is divided by SNR or SNR + 1.
    """
    a_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = a_bar / (1 - a_bar)
    x0_weight = snr.clamp(max=gamma)  # min-SNR-gamma (arXiv 2303.09556), section 3.4
    return x0_weight / (snr if schedule.config.prediction_type == "epsilon" else snr + 1)
