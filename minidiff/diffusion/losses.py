"""Training losses.

Shapes: B samples, C H W one latent; timesteps, weights and per-sample losses (B,).
Papers: DDPM arXiv 2006.11239, min-SNR 2303.09556.
"""

from torch import Tensor

from minidiff.diffusion.schedule import NoiseSchedule
from minidiff.errors import SettingsError


def mse(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error, fp32: the mean over each sample (B, C, H, W), times its weight (B,), and the mean over B."""
    per_sample = (output.float() - target.float()).square().flatten(1).mean(1)  # (B,); DDPM eq. 14
    return per_sample.mean() if weights is None else (weights * per_sample).mean()


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights (B,) for timesteps `t` (B,) that keep the nearly clean timesteps from dominating.

    The paper's weight on the x0 error is min(SNR, gamma). An error in eps is one in x0 times SNR, in v times SNR + 1,
    so the weights on the losses that we really compute are divided by that. SettingsError unless gamma > 0.
    """
    if not gamma > 0:
        raise SettingsError(f"snr_gamma is {gamma}; it has to be above 0, and the paper's value is 5.")
    a_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = a_bar / (1 - a_bar)
    x0_weight = snr.clamp(max=gamma)  # min-SNR-gamma: 2303.09556, section 3.4
    return x0_weight / (snr if schedule.prediction_type == "epsilon" else snr + 1)
