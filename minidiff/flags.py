"""The flags of `sample`, `sheet`, `lesson` and `judge`; those of training are in train/settings.py.

As there, the line under a field is its help, and nothing imports torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from minidiff.errors import SettingsError


def need(holds: bool, what: str, give: str, flag: bool = True) -> None:
    """One check: what is wrong, and what works."""
    if not holds:
        raise SettingsError(f"{'--' if flag else ''}{what}; give {give}.")


@dataclass(frozen=True)
class Sampling:
    """What `sample` and `sheet` share."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """A model folder in SD 1.5's layout, a hub id in the local cache, or a single .safetensors file."""
    tokenizer: str | None = None
    """Folder of the tokenizer; only a single-file model needs one."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[float, ...] = ()
    """Strength of each LoRA; default: 1."""
    textual_inversion: tuple[str, ...] = ()
    """Files or folders of new words, which the prompt may then use."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    num_inference_steps: int = 25
    """Calls of the U-Net."""
    guidance_scale: float = 5.0
    """How strongly the prompt is followed; 1 or less turns guidance off."""
    sampler: str | None = None
    """ddim, euler_a or dpm++_2m; default: the model's own."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    width: int | None = None
    """In pixels; default: the model's own."""
    height: int | None = None
    """In pixels; default: the model's own."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the U-Net and text encoder; default: float16 on a GPU, else float32."""
    device: str | None = None
    """cpu or cuda; default: cuda if there is one."""
    num_images_per_prompt: int = 1
    """Pictures of each prompt, from seed, seed + 1, …"""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work; the model's own limits come with the model."""
        need(1 <= self.num_images_per_prompt <= 1000, f"num_images_per_prompt is {self.num_images_per_prompt}", "1 … 1000")
        weights = f"lora_weight has {len(self.lora_weight)} numbers for {len(self.lora)} LoRAs"
        need(len(self.lora_weight) in (0, len(self.lora)), weights, "one for each")
        finite = all(map(math.isfinite, self.lora_weight))
        need(finite, f"lora_weight is {' '.join(map(str, self.lora_weight))}", "finite numbers, such as 0.8")


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw pictures from a prompt."""

    prompt: Positional[str | None] = None
    """What the pictures should show."""
    output: str = "picture.png"
    """The PNG file; with several pictures: picture-0.png, picture-1.png, …"""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff sample "a red dog"', flag=False)
        super().check()


@dataclass(frozen=True)
class Sheet(Sampling):
    """Draw a labelled contact sheet: a column for each prompt; rows for the model before and after what it learned."""

    prompts: Positional[tuple[str, ...]] = ()
    """One column each."""
    title: str = ""
    """A heading above the sheet."""
    output: str = "sheet.png"
    """The PNG file."""

    def check(self) -> None:
        need(bool(self.prompts), "there are no prompts", 'one or more, as in minidiff sheet "a dog" "a cat"', flag=False)
        super().check()


@dataclass(frozen=True)
class Lesson:
    """Run a lesson; its figures go into outputs/lessons."""

    number: Positional[int]
    """0: the three stations. 11: LoRA."""


@dataclass(frozen=True)
class Judge:
    """Score a pocket checkpoint: does it draw what held-out prompts say, and how sharp is its autoencoder?"""

    folder: Positional[str] = "checkpoints/pocket"
    """The checkpoint."""
    count: int = 500
    """How many held-out prompts."""
    judge: str = "outputs/judge.safetensors"
    """The classifier; trained first if the file is not there."""

    def check(self) -> None:
        need(1 <= self.count <= 512, f"count is {self.count}", "1 … 512: there are no more held-out prompts")


@dataclass(frozen=True)
class DataCheck:
    """Look over a folder of training pictures: list everything that is wrong with it, before training starts."""

    folder: Positional[str]
    """The folder, as for --instance_data_dir or --train_data_dir."""
    instance_prompt: str | None = None
    """The prompt of all pictures; without it each needs a caption."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions."""
    resolution: int = 512
    """Side in pixels at which the pictures will be trained; the pocket checkpoint's is 128."""
    aspect_ratio_buckets: bool = False
    """As in training: pictures keep their shape."""
    masked_loss: bool = False
    """As in training: look at the masks, too."""
    trigger: str | None = None
    """A word that every caption should hold, such as sks."""
    tokenizer: str | None = None
    """Folder of a tokenizer; then captions that are too long for CLIP are found."""

    def check(self) -> None:
        need(self.resolution >= 8, f"resolution is {self.resolution}", "at least 8")


@dataclass(frozen=True)
class Ladder:
    """Climb the whole ladder: train a subject by every method, and measure what each costs and does."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model; its folder needs an image_encoder to look at the pictures with."""
    instance_data_dir: str = "lessons/data/dog"
    """Folder of the subject's pictures."""
    output_dir: str = "outputs/ladder"
    """A folder for each rung, ladder.md and ladder.png."""
    rungs: tuple[str, ...] = ()
    """Which rungs; default: all."""

    def check(self) -> None:
        need(bool(self.output_dir.strip()), "output_dir is empty", "a folder")
