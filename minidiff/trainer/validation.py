"""Looking at a model in training: the validation loss, and sample sheets.

The loss of a training step says little: it depends on the timestep that was drawn far more than on what was learnt. The
validation loss has the same pictures, noise and timesteps every time, so that two numbers can be compared: each picture is
noised at one fixed timestep in each quarter of the schedule, and each quarter is a number of its own.

A sample sheet shows training pictures, and under them what the base draws and what the model draws now, on the same seeds.

Shapes: B = 4 samples, one a quarter; C h w a latent; L tokens, D width of the text; T training timesteps.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.losses import squared_error
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule, training_target
from minidiff.draw.images import contact_sheet
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.draw.prompting import literal
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import ENOUGH, LatentData, hint_of
from minidiff.trainer.settings import ControlNetSettings, FineTuneSettings, IPAdapterSettings

QUARTERS = 4
MOST = 16  # pictures; with more, as many are taken evenly from the whole set
Row = list[Image.Image]


@dataclass(frozen=True)
class ValidationSet:
    """A batch for each picture, as `LatentData.batch` gives them, and the bounds of the quarters (5 timesteps)."""

    batches: list[dict[str, Tensor]]
    bounds: list[int]

    @torch.no_grad()
    def loss(self, errors: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, float]:
        """val_loss, and val_loss_0_250 … for each quarter; `errors` gives the squared error of each sample, (B,)."""
        seen = progress(self.batches, "picture", "validation loss")
        each = torch.stack([errors(batch) for batch in seen])  # (pictures, B)
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

    `predict` gives the U-Net's output for a batch, (B, C, h, w) on the CPU. Clearly: on the first picture, the other reading
    explains more than half of the target's variance, and errs less than half as much. An untrained network does neither.
    """
    batch, named = fixed.batches[0], schedule.config.prediction_type
    other: Literal["epsilon", "v_prediction"] = "v_prediction" if named == "epsilon" else "epsilon"
    read_so = replace(schedule, config=replace(schedule.config, prediction_type=other))
    output = predict(batch)
    target, other_target = (training_target(s, batch["latents"], batch["noise"], batch["t"]) for s in (schedule, read_so))
    error, other_error = (squared_error(output, one).mean().item() for one in (target, other_target))
    if other_error < 0.5 * min(other_target.var().item(), error):
        raise SettingsError(
            f'The base model\'s scheduler_config.json says prediction_type "{named}", but the U-Net answers with "{other}" '
            f'(mean error {other_error:.2g}, not {error:.2g}). Set prediction_type to "{other}" there, else training would '
            "undo the model."
        )


# --- sample sheets ---------------------------------------------------------------------------------------------------------


class Sheets:
    """Sheets of the validation prompts. Make it while the model still is the base, whose row is drawn here."""

    def __init__(self, pipe: StableDiffusionPipeline, settings: FineTuneSettings, data: LatentData) -> None:
        self.pipe, self.settings, self.data, first = pipe, settings, data, data.examples[0]
        own = literal(first.templates[0].replace("{}", settings.prompt or first.caption))
        self.prompts = settings.validation_prompt or (own,)
        seeds = [settings.seed + i for i in range(settings.num_validation_images)]
        shown = self.prompts if settings.validation_prompt or settings.prompt else ("the first caption",)  # which is private
        self.columns = [f"{prompt}, seed {seed}" for prompt in shown for seed in seeds]
        self.calls: list[dict[str, Any]] = [{"prompt": p, "seed": seed} for p in self.prompts for seed in seeds]
        self.sees = isinstance(settings, ControlNetSettings | IPAdapterSettings)
        seen = data.examples[: len(self.columns)]
        if self.sees:  # each column shows another picture, with its caption
            seen = [*data.held_out, *data.examples][: settings.num_validation_images]
            prompts = settings.validation_prompt or [literal(example.prompts[0]) for example in seen]
            self.calls = [{"prompt": prompts[i % len(prompts)], "seed": settings.seed} for i in range(len(seen))]
            self.columns = [f"picture {i + 1}" for i in range(len(seen))]
        self.pictures = [hint_image(example, getattr(settings, "hint", None), data.resolution) for example in seen]
        if settings.prompt and (escaped := literal(settings.prompt)) != settings.prompt:
            print(f"Note: in a prompt that is drawn, brackets are weights; write this one as {escaped}", file=sys.stderr)
        self.base = self._row(tuned=False) if settings.validation_steps else []
        self.now: tuple[int, Row] = (-1, [])  # updates made, and the row that was drawn then

    def sheet(self, done: int) -> Image.Image:
        """The sheet after `done` updates. Its first row is private: pictures of the training set."""
        with on_device(idle_networks(self.pipe, self.data), self.pipe.device):
            self.now = (done, self._row())
        words = [call["prompt"] for call in self.calls] if self.sees else self.columns
        labels = ["shown" if self.sees else "training pictures", "", "base", f"step {done}"]
        return contact_sheet([self.pictures, words, self.base, self.now[1]], row_labels=labels)

    def public_sheet(self, done: int) -> Image.Image:
        """Without the training pictures, for the model card."""
        if self.now[0] != done:  # an earlier session drew it
            self.sheet(done)
        rows = [self.base, self.now[1]]
        return contact_sheet(rows, row_labels=["base", f"step {done}"], column_labels=self.columns)

    def _row(self, tuned: bool = True) -> Row:
        s, side, ip = self.settings, self.data.resolution, self.pipe.image_prompt
        if ip:
            ip.set_scale(float(tuned))
        name, sees = "ip_adapter_image" if ip else "control_image", self.sees and (ip or tuned)
        each = [call | ({name: self.pictures[i]} if sees else {}) for i, call in enumerate(self.calls)]
        draw = partial(self.pipe, width=side, height=side, guidance_scale=s.validation_guidance_scale)
        draw = partial(draw, num_inference_steps=s.validation_inference_steps)
        with without_dropout(self.pipe):  # one picture at a time, to spare memory
            bar = progress(each, "picture", "drawing the sheet")
            row = [draw(**call).images[0] for call in bar]
        if ip:
            ip.set_scale(1.0)  # in training, the pictures count
        return row


def hint_image(example: Example, kind: str | None, side: int) -> Image.Image:
    """The hint of a picture, as a picture; where there are no hints, the picture itself."""
    return Image.fromarray(hint_of(example, kind, example.size or (side, side)).permute(1, 2, 0).contiguous().numpy())


# --- networks that no step needs ----------------------------------------------------------------------------------------


def offload(networks: Sequence[nn.Module], needed_again: bool) -> None:
    """Into the CPU's memory, where they can wait; or out of any: on `meta` they keep their shapes, and no numbers."""
    for network in networks:
        network.to("cpu" if needed_again else "meta")


@contextmanager
def on_device(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with`, the networks are on the device; afterwards in the CPU's memory again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        offload(networks, needed_again=True)


def idle_networks(pipe: StableDiffusionPipeline, data: LatentData) -> list[nn.Module]:
    """Those that no training step runs through."""
    tower: list[nn.Module] = [pipe.image_prompt.tower] if pipe.image_prompt else []
    return [pipe.vae] * bool(data.cache) + [*pipe.parts.towers.values()] * (not data.live_text) + tower


@contextmanager
def without_dropout(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Inside the `with`, the networks are as they are for drawing."""
    networks, training = pipe.parts.adaptable.values(), pipe.unet.training  # both are trained, or none yet
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network in networks:
            network.train(training)
