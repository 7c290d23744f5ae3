"""The settings of each fine-tuning method. settings.py holds what all methods share."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from minidiff.core.errors import SettingsError
from minidiff.files.values import Rule, between
from minidiff.trainer.settings import Count, Decay, FineTuneSettings, Folder, Positive

NewWord = Annotated[str, Rule("must be a new word such as <my-dog>", lambda word: bool(word.strip()))]
KnownWord = Annotated[str, Rule('must be a word such as "dog"', lambda word: bool(word.strip()))]
Layers = Annotated[tuple[str, ...], Rule("must name at least one layer", bool)]


@dataclass(frozen=True)
class FullSettings(FineTuneSettings):
    """Fine-tune all weights of the U-Net and, if asked, of the text encoder."""

    output_dir: Folder = "minidiff-full"
    """Folder for the fine-tuned model, its checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: Positive = 1e-5
    """Learning rate of AdamW after warm-up."""
    train_text_encoder: bool = False
    """Train the text encoder, too."""


@dataclass(frozen=True)
class DreamBoothSettings(FullSettings):
    """Teach the whole model a subject without forgetting the subject's class (DreamBooth)."""

    output_dir: Folder = "minidiff-dreambooth"
    """Folder for the fine-tuned model, its checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: Positive = 5e-6
    """Learning rate of AdamW after warm-up."""
    with_prior_preservation: bool = True
    """Also train on pictures of --class_prompt, so that the model does not forget the class."""


@dataclass(frozen=True)
class FrozenSettings(FineTuneSettings):
    """The settings of all methods that freeze the U-Net's own weights."""

    layerwise_casting: bool = False
    """Keep frozen weights in the half precision of their file, and cast them layer by layer. A tenth slower, same result."""

    HARMLESS = FineTuneSettings.HARMLESS | {"layerwise_casting"}

    def check(self) -> None:
        super().check()
        rule = "goes with --mixed_precision no: under the others, frozen weights are in half precision anyway"
        off = "needs the faster code of minidiff/fast, which --plain leaves out: give only one of them"
        self.need(not (self.plain and self.layerwise_casting), "layerwise_casting", off)
        self.need(not self.layerwise_casting or self.mixed_precision == "no", "layerwise_casting", rule)


@dataclass(frozen=True)
class AdapterSettings(FrozenSettings):
    """The adapter's settings, for LoRA and pivotal tuning."""

    rank: Count = 4
    """Rank r of each layer's update, alpha / r * B A."""
    lora_alpha: Positive | None = None
    """The number alpha in alpha / r * B A. Default: the rank, so that the scale is 1."""
    lora_targets: Layers = ("attention",)
    """Layers: attention, cross_attention, feed_forward, projections, resnets, samplers; or ends of layer names: "to_q"."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some of the U-Net's layers: resnets=8 attn2.to_k=16."""
    use_rslora: bool = False
    """Scale the update by alpha / √r instead of alpha / r, so that high ranks learn as fast as low ones (rsLoRA)."""
    use_dora: bool = False
    """Learn the length of each weight row separately from its direction (DoRA)."""
    lora_dropout: Decay = 0.0
    """Share of the adapter's inputs that are set to zero during training."""
    train_text_encoder: bool = False
    """Adapt the text encoder's attention, too."""

    def check(self) -> None:
        super().check()
        for entry in self.rank_pattern:
            if not re.fullmatch(r"[^=]+=[1-9][0-9]{0,5}", entry):
                raise SettingsError(f'--rank_pattern "{entry}": give a layer and its rank, such as resnets=8.')

    @property
    def rank_of(self) -> dict[str, int]:
        """--rank_pattern as a table."""
        return {target: int(rank) for target, _, rank in (entry.rpartition("=") for entry in self.rank_pattern)}


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Teach a frozen model a subject or a style with small additions to its layers (LoRA, DoRA)."""

    output_dir: Folder = "minidiff-lora"
    """Folder for the adapter, its checkpoints, metrics.jsonl and sample sheets."""


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

    @property
    def prompt(self) -> str | None:
        """--instance_prompt, or the new word alone, which TEMPLATES turn into sentences."""
        return self.instance_prompt or (self.placeholder_token if self.instance_data_dir else None)

    def check(self) -> None:
        super().check()
        word, prompt = self.placeholder_token, self.instance_prompt
        self.need(prompt is None or word.lower() in prompt.lower(), "instance_prompt", f"must contain the new word, {word}")
        apart = word.lower() not in (self.class_prompt or "").lower()
        self.need(apart, "class_prompt", f"must be without the new word, {word}")


@dataclass(frozen=True)
class TextualInversionSettings(WordSettings):
    """Teach a frozen model one new word by learning only the word's vectors (textual inversion)."""

    output_dir: Folder = "minidiff-textual-inversion"
    """Folder for the vectors, their checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: Positive = 5e-4
    """Learning rate of AdamW after warm-up."""

    def check(self) -> None:
        none = "means nothing here: the model is frozen, and the class prompt is without the new word. Leave it out"
        self.need(not self.with_prior_preservation, "with_prior_preservation", none)
        super().check()


@dataclass(frozen=True)
class PivotalSettings(AdapterSettings, WordSettings):
    """Learn a new word and a LoRA together (pivotal tuning)."""

    output_dir: Folder = "minidiff-pivotal"
    """Folder for the vectors and the adapter, their checkpoints, metrics.jsonl and sample sheets."""
    learning_rate_embedding: Positive = 5e-4
    """Learning rate of the word's vectors. --learning_rate is that of the adapter."""


# Sentences to train a new word {} with, if there are no captions; by --learnable_property. As in the appendix of arXiv
# 2208.01618: many neutral sentences, true of any picture, so that the word learns what the pictures have in common. They use
# only words that the pocket checkpoint knows, too: those of the captions in pocket/world.py.
TEMPLATES = {
    "object": (
        "a photo of {}", "a photo of a {}", "a photo of the {}", "the photo of {}", "the photo of a {}", "the photo of the {}",
        "photo of {}", "photo of a {}", "photo of the {}",
        "a picture of {}", "a picture of a {}", "a picture of the {}", "the picture of {}", "the picture of a {}",
        "the picture of the {}", "picture of a {}", "picture of the {}",
        "{}", "a {}", "the {}",
    ),
    "style": (
        "a picture in {}", "the picture in {}", "picture in {}", "art in {}",
        "a picture in the style of {}", "the picture in the style of {}", "a picture in {} style", "art in the style of {}",
        "a picture in {} art", "the picture in {} art", "a picture of {} art", "the picture of {} art", "{} art", "the {} art",
        "a {} picture", "the {} picture", "{} picture",
        "{}", "a {}", "the {}",
    ),
}  # fmt: skip
