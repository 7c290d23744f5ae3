"""Training losses. Shapes: B samples, C H W one latent; timesteps, weights and per-sample losses (B,)."""

from torch import Tensor

from minidiff.core.schedule import NoiseSchedule


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample (B,), in fp32. `mask` (B, 1, H, W) is 1 where to learn and 0 where not:

    sum over c, i, j of m_ij e_cij^2  /  (C  sum over i, j of m_ij)        so a small mask is no small loss
    """
    error = (output.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)  # DDPM (arXiv 2006.11239), eq. 14
    return (mask * error).flatten(1).mean(1) / mask.flatten(1).mean(1).clamp(min=1e-6)


def mse(output: Tensor, target: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The mean over B of each sample's squared error, times its weight (B,) if there are weights."""
    per_sample = squared_error(output, target, mask)
    return per_sample.mean() if weights is None else (weights * per_sample).mean()


def prior_preservation(
    output: Tensor, target: Tensor, prior_weight: float, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """DreamBooth's loss for a batch whose first half is the instance and whose second half is the class.

    L = L_instance + prior_weight · L_class, each the mean over its own half. (kohya's trainer: one mean over both.)
    """
    half, odd = divmod(len(output), 2)
    if odd:
        raise ValueError(f"a batch of {len(output)} has no two halves")

    def loss(part: slice) -> Tensor:
        w, m = (None if x is None else x[part] for x in (weights, mask))
        return mse(output[part], target[part], w, m)

    return loss(slice(half)) + prior_weight * loss(slice(half, None))  # DreamBooth (arXiv 2208.12242), eq. 2


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights (B,) for timesteps `t` (B,) that keep the nearly clean timesteps from dominating.

    The paper's weight on the x0 error is min(SNR, gamma). An error in eps is one in x0 times SNR, in v times SNR + 1,
    so the weights on the losses that we really compute are divided by that.
    """
    a_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = a_bar / (1 - a_bar)
    x0_weight = snr.clamp(max=gamma)  # min-SNR-gamma (arXiv 2303.09556), section 3.4
    return x0_weight / (snr if schedule.config.prediction_type == "epsilon" else snr + 1)
