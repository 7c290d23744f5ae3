"""Sample sheets: training pictures, and under them what the base draws and what the model draws now, on the same seeds."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from minidiff.draw.images import contact_sheet, load_image, to_pil
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.draw.prompting import literal
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import LatentData, crop, hint_of
from minidiff.trainer.settings import ControlNetSettings, FineTuneSettings, IPAdapterSettings

Row = list[Image.Image]


class Sheets:
    """Sheets of the validation prompts. Make it while the model still is the base, whose row is drawn here."""

    def __init__(self, pipe: StableDiffusionPipeline, settings: FineTuneSettings, data: LatentData) -> None:
        self.pipe, self.settings, self.data, first = pipe, settings, data, data.examples[0]
        own = literal(first.templates[0].replace("{}", settings.prompt or first.caption))
        self.prompts = settings.validation_prompt or (own,)
        self.seeds = [settings.seed + i for i in range(settings.num_validation_images)]
        shown = self.prompts if settings.validation_prompt or settings.prompt else ("the first caption",)  # which is private
        self.columns = [f"{prompt}, seed {seed}" for prompt in shown for seed in self.seeds]
        self.calls: list[dict[str, Any]] = [{"prompt": p, "seed": seed} for p in self.prompts for seed in self.seeds]
        self.hints: Row = []  # of a ControlNet or an IP-Adapter: each column shows another picture, with its caption
        if isinstance(settings, ControlNetSettings | IPAdapterSettings):
            seen = [*data.held_out, *data.examples][: settings.num_validation_images]
            kind = getattr(settings, "hint", None)
            self.hints = [hint_image(example, kind, data.resolution) for example in seen]
            prompts = settings.validation_prompt or [literal(example.prompts[0]) for example in seen]
            self.calls = [{"prompt": prompts[i % len(prompts)], "seed": settings.seed} for i in range(len(seen))]
            self.columns = [f"picture {i + 1}" for i in range(len(seen))]
        if settings.prompt and (escaped := literal(settings.prompt)) != settings.prompt:
            print(f"Note: in a prompt that is drawn, brackets are weights; write this one as {escaped}", file=sys.stderr)
        self.base = self._row(tuned=False) if settings.validation_steps else []
        self.now: tuple[int, Row] = (-1, [])  # updates made, and the row that was drawn then

    def sheet(self, done: int) -> Image.Image:
        """The sheet after `done` updates. Its first row is private: pictures of the training set."""
        data, count = self.data, min(len(self.columns), len(self.data.examples))
        pictures = [to_pil(crop(load_image(data.examples[i].path), data.sizes[i])[None])[0] for i in range(count)]
        with on_device(idle_networks(self.pipe, data), self.pipe.device):
            self.now = (done, self._row())
        rows: list[Sequence[Image.Image | str]] = [pictures, self.columns, self.base, self.now[1]]
        if self.hints:
            rows[:2] = [self.hints, [call["prompt"] for call in self.calls]]
        return contact_sheet(rows, row_labels=["shown" if self.hints else "training pictures", "", "base", f"step {done}"])

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
        name, hints = "ip_adapter_image" if ip else "control_image", self.hints if ip or tuned else []
        each = [call | ({name: hints[i]} if hints else {}) for i, call in enumerate(self.calls)]
        draw = partial(self.pipe, width=side, height=side, guidance_scale=s.validation_guidance_scale)
        draw = partial(draw, num_inference_steps=s.validation_inference_steps)
        with without_dropout(self.pipe):  # one picture at a time, to spare memory
            bar = progress(each, "picture", "drawing the sheet")
            row = [draw(**call).images[0] for call in bar]
        if ip:
            ip.set_scale(1.0)  # in training, the pictures count
        return row


def hint_image(example: Example, kind: str | None, side: int) -> Image.Image:
    """The hint of a picture, as a picture; for an IP-Adapter the picture itself."""
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
