"""The validation loss: the same pictures, noise and timesteps every time, so that two numbers can be compared.

The loss of a training step says little: it depends on the timestep that was drawn far more than on what was learnt. Here
each picture is noised at one fixed timestep in each quarter of the schedule, and each quarter is a number of its own.

Shapes: B = 4 samples, one a quarter; C h w a latent; L tokens, D width of the text; T training timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.losses import squared_error
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule, training_target
from minidiff.draw.progress import progress
from minidiff.trainer.latents import ENOUGH, LatentData
from minidiff.trainer.settings import FineTuneSettings

QUARTERS = 4
MOST = 16  # pictures; with more, as many are taken evenly from the whole set


@dataclass(frozen=True)
class ValidationSet:
    """A batch for each picture, as `LatentData.batch` gives them, and the bounds of the quarters (5 timesteps)."""

    batches: list[dict[str, Tensor]]
    bounds: list[int]

    @torch.no_grad()
    def loss(self, errors: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, float]:
        """val_loss, and val_loss_0_250 … for each quarter; `errors` gives the squared error of each sample, (B,)."""
        seen = progress(self.batches, "picture", "validation loss")
        each = torch.stack([errors(batch).float().cpu() for batch in seen])  # (pictures, B)
        names = [f"val_loss_{first}_{end}" for first, end in zip(self.bounds, self.bounds[1:])]
        return {"val_loss": each.mean().item(), **dict(zip(names, each.mean(0).tolist()))}


def explained(settings: FineTuneSettings, data: LatentData) -> str:
    """For the terminal, before the first update: what the two losses mean."""
    said, held = "loss: the error of the last 20 updates. It jumps with the noise, and need not fall much.", data.held_out
    why = "When it rises again, the model learns its pictures by heart: stop there."
    others = f"the pictures in {settings.validation_data_dir}"
    if held:
        others = f"{' and '.join(e.path.name for e in held[:3])}{' …' * (len(held) > 3)}, held out (--validation_share)"
    elif not settings.validation_data_dir:
        others = "the training pictures themselves"
        more = f"{ENOUGH} pictures or more" if settings.validation_share else "--validation_share"
        why = f"It cannot show overfitting: that takes {more}, or --validation_data_dir."
    return said + f"\nval_loss: the error on {others}, always under the same noise. {why}" * bool(settings.validation_steps)


def validation_set(data: LatentData) -> ValidationSet:
    """The pictures of `data` at fixed timesteps under fixed noise, whatever the run's seed is."""
    T, count, batches = data.timesteps, min(MOST, len(data.examples)), []
    bounds = [T * quarter // QUARTERS for quarter in range(QUARTERS + 1)]
    for k in range(count):
        fixed = data.fixed(k * len(data.examples) // count)
        # picture k of n takes the (k + ½)/n-th part of each quarter: together they cover it
        t = [first + (2 * k + 1) * (end - first) // (2 * count) for first, end in zip(bounds, bounds[1:])]
        noise = [normal(fixed["latents"].shape, 0, "validation noise", k, quarter) for quarter in range(QUARTERS)]
        batch = {name: row.expand(QUARTERS, *row.shape) for name, row in fixed.items()}
        batches.append(batch | {"t": torch.tensor(t), "noise": torch.stack(noise)})
    return ValidationSet(batches, bounds)


@torch.no_grad()
def check_prediction_type(
    schedule: NoiseSchedule, fixed: ValidationSet, predict: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """SettingsError where the base clearly predicts v and its scheduler says eps, or the other way round.

    `predict` gives the U-Net's output (B, C, h, w) for a batch. Clearly: on the first picture, the other reading explains
    more than half of the target's variance, and errs less than half as much. An untrained network does neither, and passes.
    """
    batch, named, error, variance = fixed.batches[0], schedule.config.prediction_type, {}, {}
    other: Literal["epsilon", "v_prediction"] = "v_prediction" if named == "epsilon" else "epsilon"
    output = predict(batch).float().cpu()
    for kind in (named, other):
        reading = replace(schedule, config=replace(schedule.config, prediction_type=kind))
        target = training_target(reading, batch["latents"], batch["noise"], batch["t"])
        error[kind], variance[kind] = squared_error(output, target).mean().item(), target.var().item()
    if error[other] < 0.5 * min(variance[other], error[named]):
        raise SettingsError(
            f'The base model\'s scheduler_config.json says prediction_type "{named}", but the U-Net answers with "{other}" '
            f"(mean error {error[other]:.2g}, not {error[named]:.2g}). Set prediction_type to \"{other}\" there, else training "
            "would undo the model."
        )
