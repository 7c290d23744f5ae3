"""The settings of a training run, as frozen dataclasses: the only place where a flag is declared.

Field names are the flags of the diffusers training scripts, because people paste those commands. The command line, its
`--help`, and the `train_config.toml` beside the weights all come from these fields. The line under a field is its help,
and the range of its values stands in its type. Nothing here imports torch, so that `--help` is quick.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from minidiff.core.errors import SettingsError
from minidiff.files.folder import config_of, local_folder
from minidiff.files.values import Rule, between
from minidiff.trainer.loop_settings import BatchSize, Count, Decay, Folder, NotNegative, Positive, TrainSettings, size_in_bytes

MemorySize = Annotated[str, Rule("must be a size from 1MB to 100TB, such as 8GB or 7.5GiB", size_in_bytes)]
NewWord = Annotated[str, Rule("must be a new word such as <my-dog>", lambda word: bool(word.strip()))]
KnownWord = Annotated[str, Rule('is needed: a word near the subject, such as "dog"', lambda word: bool(word.strip()))]
Layers = Annotated[tuple[str, ...], Rule("must name at least one layer", bool)]
NoPrior = Annotated[bool, Rule("means nothing here: the model is frozen. Leave it out", lambda on: not on)]
LayerRank = Annotated[str, Rule("must give layers and ranks, such as resnets=8", re.compile("[^=]+=[1-9][0-9]{0,5}").fullmatch)]


@dataclass(frozen=True)
class FineTuneSettings(TrainSettings):
    """The settings that all ways of fine-tuning share: base model, pictures, prior preservation, sample sheet."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model: a folder with SD 1.5's layout, or a Hugging Face id whose files are in the local cache."""
    revision: str | None = None
    """Of a Hugging Face id: the branch, tag or commit in the local cache."""
    device: str | None = None
    """Where to train: cpu, cuda, or mps on a Mac. Default: a GPU if there is one."""
    instance_data_dir: str | None = None
    """Folder of training pictures that share one prompt: --instance_prompt."""
    instance_prompt: str | None = None
    """The prompt of all pictures without a caption, with a rare word for the subject: "a photo of a sks dog"."""
    captions: bool = True
    """Read captions beside the pictures, or in a table. With --no_captions, --instance_prompt is for all pictures."""
    train_data_dir: str | None = None
    """Folder of training pictures with captions: metadata.jsonl, metadata.csv, or a .txt or .caption file for each."""
    image_column: str = "file_name"
    """Column of the metadata that names the pictures."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions. Default: text, caption, prompt, or the only column of strings."""
    max_train_samples: Count | None = None
    """Train on so many of the pictures, chosen by the seed."""
    skip_bad: bool = False
    """Skip pictures that cannot be read or are too small, and name them. Without it, they stop the run."""
    resolution: Annotated[int, between(8, 8192)] | None = None
    """Side of the training pictures in pixels. Default: the side that the base model was made for."""
    center_crop: bool = True
    """Crop pictures that are not square in the middle. With --no-center_crop, at a random place each time."""
    random_flip: bool = False
    """Mirror half of the samples. Do not use it if left and right matter."""
    aspect_ratio_buckets: bool = False
    """Keep the shape of each picture, at about --resolution squared pixels, instead of cropping it to a square."""
    masked_loss: bool = False
    """Learn only what the mask shows: white in a.mask.png or the metadata's column "mask"; or the alpha channel of either."""
    gradient_checkpointing: bool = False
    """Save most of the memory of a step: the backward pass computes the layers again. A third slower, same result."""
    fit: MemorySize | None = None
    """Memory that the run may use, such as 8GB or 7.5GiB. Switches on the cheapest savings that are enough."""
    plain: bool = False
    """Compute as the textbook minidiff/core says, without the faster code of minidiff/fast. Slower; same up to rounding."""
    compile: bool = False
    """Compile the U-Net with torch.compile before the first step. It takes minutes, and then each step is faster."""
    cache_latents: bool = True
    """Encode each picture once, before training, instead of in every step."""
    cache_dir: Folder | None = None
    """Keep encoded pictures in this folder for later runs. They are as private as the pictures themselves."""
    proportion_empty_prompts: Annotated[float, between(0, 1)] = 0.0
    """Share of the samples that are trained with an empty prompt (caption dropout)."""
    snr_gamma: Positive | None = None
    """Use Min-SNR loss weights with this gamma; 5 is usual. Default: all timesteps have the same weight."""
    noise_offset: NotNegative = 0.0
    """Also shift the noise of each channel by a random value of this size. 0.1 helps very dark and very bright pictures."""
    with_prior_preservation: bool = False
    """DreamBooth: also train on pictures of the subject's class, so that the model does not forget the class."""
    class_data_dir: str | None = None
    """Folder of class pictures. If it holds too few, the base model draws the missing ones."""
    class_prompt: str | None = None
    """The prompt of all class pictures, without the rare word: "a photo of a dog"."""
    num_class_images: Annotated[int, between(0, 100_000)] = 100
    """How many class pictures to have. 0: use the pictures that are in the folder, and draw none."""
    sample_batch_size: BatchSize = 4
    """How many class pictures to draw at once."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] = "no"
    """Number format in which class pictures are drawn."""
    prior_loss_weight: NotNegative = 1.0
    """Weight w of the class loss: loss = instance loss + w * class loss. 0: do not train on the class."""
    prior_from_base: bool = False
    """Prior preservation without class pictures: with --class_prompt, the U-Net learns to predict what the base predicts."""
    validation_data_dir: str | None = None
    """Folder of pictures for the validation loss. Default: --validation_share of the training pictures."""
    validation_share: Decay = 0.1
    """Share of the pictures that are not trained on, but measured; at least one of five. With fewer than five, or 0: none."""
    validation_prompt: tuple[str, ...] = ()
    """Prompts of the sample sheet. Default: --instance_prompt, or the first caption."""
    num_validation_images: Annotated[int, between(1, 1000)] = 4
    """Pictures for each validation prompt. Their seeds stay the same through the run."""
    validation_guidance_scale: NotNegative = 5.0
    """Guidance scale of the sample sheet."""
    validation_inference_steps: Annotated[int, between(1, 1000)] = 25
    """Sampling steps of the sample sheet."""
    trigger: str | None = None
    """The word that calls up what was learnt, for the model card. Default: one that all captions share and the base lacks."""
    push_to_hub: bool = False
    """Upload the result and its card to the Hugging Face hub at the end; without training pictures and checkpoints."""
    hub_model_id: str | None = None
    """Its name there. Default: the name of --output_dir."""

    # Of all methods. Model, pictures, captions and resolution are compared by their content: see latents.py and task.py.
    HARMLESS = TrainSettings.HARMLESS | frozenset(
        "pretrained_model_name_or_path device cache_dir instance_data_dir train_data_dir captions image_column caption_column "
        "skip_bad revision prior_generation_precision push_to_hub hub_model_id trigger repeats preset "
        "resolution gradient_checkpointing layerwise_casting fit class_data_dir num_class_images sample_batch_size "
        "conditioning_image_column conditioning_data_dir image_encoder validation_data_dir validation_share "
        "validation_prompt num_validation_images validation_guidance_scale validation_inference_steps".split()
    )
    NOT_SAVED = TrainSettings.NOT_SAVED | frozenset(
        "push_to_hub preset instance_data_dir train_data_dir class_data_dir validation_data_dir conditioning_data_dir "
        "cache_dir".split()
    )

    @property
    def prompt(self) -> str | None:
        """The prompt of all pictures without a caption."""
        return self.instance_prompt

    @property
    def may_cast(self) -> bool:
        """Load the U-Net in the half precision of its file, to cast it layer by layer? With --fit, memory.py decides later."""
        return False

    def check(self) -> None:
        super().check()
        if self.instance_data_dir is None and self.train_data_dir is None:
            raise SettingsError("Give the pictures: one of --instance_data_dir (one prompt) and --train_data_dir (captions).")


# --- the methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullSettings(FineTuneSettings):
    """Fine-tune all weights of the U-Net and, if asked, of the text encoder."""

    output_dir: Folder = "minidiff-full"
    learning_rate: Positive = 1e-5
    train_text_encoder: bool = False
    """Train the text encoder, too."""
    text_encoder_lr: Positive | None = None
    """Learning rate of the text encoder. Default: --learning_rate."""


@dataclass(frozen=True)
class DreamBoothSettings(FullSettings):
    """Teach the whole model a subject without forgetting the subject's class (DreamBooth)."""

    output_dir: Folder = "minidiff-dreambooth"
    learning_rate: Positive = 5e-6
    with_prior_preservation: bool = True


@dataclass(frozen=True)
class FrozenSettings(FineTuneSettings):
    """The settings of all methods that freeze the U-Net's own weights."""

    layerwise_casting: bool = False
    """Keep frozen weights in the half precision of their file, and cast them layer by layer. A tenth slower, same result."""

    @property
    def may_cast(self) -> bool:
        return self.mixed_precision == "no" and (self.layerwise_casting or self.fit is not None)


@dataclass(frozen=True)
class ControlNetSettings(FrozenSettings):
    """Teach a frozen model to follow pictures such as edges or depth maps: a ControlNet beside it (arXiv 2302.05543)."""

    output_dir: Folder = "minidiff-controlnet"
    learning_rate: Positive = 1e-5
    conditioning_image_column: str = "conditioning_image"
    """Column of the metadata that names the conditioning pictures, such as edges."""
    conditioning_data_dir: str | None = None
    """Folder of the conditioning pictures, with the names of the pictures that they belong to, in place of that column."""
    hint: Literal["canny", "tile"] | None = None
    """Make the conditioning pictures: canny finds edges; tile shrinks pictures to a quarter and enlarges them again."""
    controlnet_model_name_or_path: str | None = None
    """Go on with this ControlNet, a folder or a file. Default: a copy of the U-Net's way down."""
    with_prior_preservation: NoPrior = False


@dataclass(frozen=True)
class IPAdapterSettings(FrozenSettings):
    """Teach a frozen model to draw what a picture shows: an IP-Adapter (arXiv 2308.06721)."""

    output_dir: Folder = "minidiff-ip-adapter"
    train_batch_size: BatchSize = 8
    image_encoder: str | None = None
    """Folder of the image tower that looks at the pictures. Default: image_encoder in the base model's folder."""
    proportion_empty_prompts: Annotated[float, between(0, 1)] = 0.1
    proportion_empty_images: Annotated[float, between(0, 1)] = 0.1
    """Share of the samples that do not see their picture. Half of these have no prompt, either, as far as there are such."""
    validation_prompt: tuple[str, ...] = ("",)
    with_prior_preservation: NoPrior = False


@dataclass(frozen=True)
class AdapterSettings(FrozenSettings):
    """The adapter's settings, for LoRA and pivotal tuning."""

    rank: Count = 4
    """Rank r of each layer's update, alpha / r * B A."""
    lora_alpha: Positive | None = None
    """The number alpha in alpha / r * B A. Default: the rank, so that the scale is 1."""
    lora_targets: Layers = ("attention",)
    """Layers: attention, cross_attention, feed_forward, projections, resnets, samplers; or ends of layer names: "to_q"."""
    rank_pattern: tuple[LayerRank, ...] = ()
    """Other ranks for some of the U-Net's layers: resnets=8 attn2.to_k=16."""
    use_rslora: bool = False
    """Scale the update by alpha / √r instead of alpha / r, so that high ranks learn as fast as low ones (rsLoRA)."""
    use_dora: bool = False
    """Learn the length of each weight row separately from its direction (DoRA)."""
    lora_dropout: Decay = 0.0
    """Share of the adapter's inputs that are set to zero during training."""
    train_text_encoder: bool = False
    """Adapt the text encoder's attention, too."""
    text_encoder_lr: Positive | None = None
    """Learning rate of the text encoder's adapter. Default: --learning_rate."""

    @property
    def rank_of(self) -> dict[str, int]:
        """--rank_pattern as a table."""
        return {target: int(rank) for target, _, rank in (entry.rpartition("=") for entry in self.rank_pattern)}


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Teach a frozen model a subject or a style with small additions to its layers (LoRA, DoRA)."""

    preset: Literal["object", "style", "face"] | None = None
    """Settings that are known to work for this base, which are printed. Flags that are given win over them."""
    output_dir: Folder = "minidiff-lora"


@dataclass(frozen=True)
class WordSettings(FrozenSettings):
    """The new word's settings, for textual inversion and pivotal tuning."""

    placeholder_token: NewWord = "<subject>"
    """The new word."""
    initializer_token: KnownWord = ""
    """A known word or words, such as "dog". The new word starts with its meaning."""
    num_vectors: Annotated[int, between(1, 75)] = 1
    """Vectors of the new word. More vectors can describe more, and leave less room for the rest of the prompt."""
    learnable_property: Literal["object", "style"] = "object"
    """Which template sentences to train with, if there is neither --instance_prompt nor captions."""
    repeats: Count = 1
    """How often each picture comes in an epoch."""

    @property
    def prompt(self) -> str | None:
        """--instance_prompt, or the new word alone, which TEMPLATES turn into sentences."""
        return self.instance_prompt or self.placeholder_token


@dataclass(frozen=True)
class TextualInversionSettings(WordSettings):
    """Teach a frozen model one new word by learning only the word's vectors (textual inversion)."""

    output_dir: Folder = "minidiff-textual-inversion"
    learning_rate: Positive = 5e-4
    with_prior_preservation: NoPrior = False


@dataclass(frozen=True)
class PivotalSettings(AdapterSettings, WordSettings):
    """Learn a new word and a LoRA together (pivotal tuning)."""

    output_dir: Folder = "minidiff-pivotal"
    learning_rate_embedding: Positive = 5e-4
    """Learning rate of the word's vectors. --learning_rate is that of the adapter."""


# --- presets -------------------------------------------------------------------------------------------------------------

# Numbers for a LoRA that are known to work, for what is taught and for the size of the base. For the pocket checkpoint they
# are those of the README and the ladder, measured there; for SD 1.5, which learns ten times slower, those of the field:
# diffusers' and kohya's guides for a batch of one to four.
SHAPES = ("attention", "resnets", "samplers")  # convolutions learn a new shape best
LOOKS = ("attention", "feed_forward")
POCKET: dict[str, dict[str, Any]] = {
    "object": dict(rank=8, lora_targets=SHAPES, learning_rate=1e-3, max_train_steps=300),
    "style": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-3, max_train_steps=300, noise_offset=0.1),
    "face": dict(rank=8, lora_targets=SHAPES, learning_rate=1e-3, max_train_steps=300),  # a thing like others: it has no people
}
SD15: dict[str, dict[str, Any]] = {
    "object": dict(rank=8, lora_targets=("attention",), learning_rate=1e-4, max_train_steps=500),
    "style": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-4, max_train_steps=1500, noise_offset=0.1),
    "face": dict(rank=16, lora_targets=LOOKS, learning_rate=1e-4, max_train_steps=1000, snr_gamma=5.0),
}


def preset_values(name: str, base: str) -> dict[str, Any]:
    """The settings of a preset, for a base model: a folder, or a hub id in the local cache."""
    widths = config_of(local_folder(base) / "unet")[0].get("block_out_channels") or [320]
    return (POCKET if widths[0] < 320 else SD15)[name]


def told(settings: LoRASettings) -> str:
    """The values of the preset, as flags; without those that were given another value."""
    chosen = preset_values(settings.preset or "", settings.pretrained_model_name_or_path)
    kept = {flag: value for flag, value in chosen.items() if getattr(settings, flag) == value}
    words = (f"--{flag} {' '.join(value) if isinstance(value, tuple) else value}" for flag, value in kept.items())
    return f"--preset {settings.preset}: {' '.join(words)}"
