"""The settings of each way of fine-tuning; what they share is in settings.py, what they do in recipes.py."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from minidiff.core.errors import SettingsError
from minidiff.trainer.settings import FineTuneSettings


@dataclass(frozen=True)
class FullSettings(FineTuneSettings):
    """Fine-tune every weight of the U-Net, and of the text encoder if asked."""

    output_dir: str = "minidiff-full"
    """Folder for the tuned model, its checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: float = 1e-5
    """AdamW's learning rate after warm-up."""
    train_text_encoder: bool = False
    """Train the text encoder as well."""

    def check(self) -> None:
        super().check()
        one = not (self.cuda_graph and self.aspect_ratio_buckets)
        self.need(one, "aspect_ratio_buckets", "cannot be joined with --cuda_graph here: each shape would keep all gradients")


@dataclass(frozen=True)
class DreamBoothSettings(FullSettings):
    """Teach the whole model a subject, while it rehearses the subject's class (DreamBooth)."""

    output_dir: str = "minidiff-dreambooth"
    """Folder for the tuned model, its checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: float = 5e-6
    """AdamW's learning rate after warm-up."""
    with_prior_preservation: bool = True
    """Rehearse the class: pictures of --class_prompt are trained beside those of the subject."""


@dataclass(frozen=True)
class FrozenSettings(FineTuneSettings):
    """What all methods share under which the U-Net's own weights stay as they are."""

    layerwise_casting: bool = False
    """Leave weights in the half precision that their file has; each layer widens its own: a tenth more time. Same result."""

    HARMLESS = FineTuneSettings.HARMLESS | {"layerwise_casting"}

    def check(self) -> None:
        super().check()
        rule = "goes with --mixed_precision no: under the others, weights are in half precision anyway"
        self.need(not self.layerwise_casting or self.mixed_precision == "no", "layerwise_casting", rule)


@dataclass(frozen=True)
class AdapterSettings(FrozenSettings):
    """What LoRA and pivotal tuning share: the shape of the adapter."""

    rank: int = 4
    """Rank r of the update (alpha / r) B A of each layer."""
    lora_alpha: float | None = None
    """The numerator of that scale; default: the rank, so that the scale is 1."""
    lora_targets: tuple[str, ...] = ("attention",)
    """Which layers: attention, cross_attention, feed_forward, projections, resnets, samplers; or ends of names ("to_q")."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some of the U-Net's layers: resnets=8 attn2.to_k=16."""
    use_rslora: bool = False
    """Scale alpha / √r, which lets high ranks learn as fast as low ones."""
    use_dora: bool = False
    """DoRA: learn the length of each weight row apart from its direction."""
    lora_dropout: float = 0.0
    """Share of the detour's inputs that are dropped while training."""
    train_text_encoder: bool = False
    """Adapt the text encoder's attention as well."""

    def check(self) -> None:
        super().check()
        self.need(self.rank >= 1, "rank", "must be at least 1")
        self.need(self.lora_alpha is None or 0 < self.lora_alpha < math.inf, "lora_alpha", "must be a number above 0")
        self.need(len(self.lora_targets) > 0, "lora_targets", "must name at least one layer")
        self.need(0 <= self.lora_dropout < 1, "lora_dropout", "must lie in [0, 1)")
        for entry in self.rank_pattern:
            if not re.fullmatch(r"[^=]+=[1-9][0-9]{0,5}", entry):
                raise SettingsError(f'--rank_pattern "{entry}": give a layer and its rank, such as resnets=8.')

    @property
    def rank_of(self) -> dict[str, int]:
        """--rank_pattern as a table."""
        return {target: int(rank) for target, _, rank in (entry.rpartition("=") for entry in self.rank_pattern)}


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Teach a frozen model a subject or a style through small additions to its layers (LoRA, DoRA)."""

    output_dir: str = "minidiff-lora"
    """Folder for the adapter, its checkpoints, metrics.jsonl and sample sheets."""


@dataclass(frozen=True)
class WordSettings(FrozenSettings):
    """What textual inversion and pivotal tuning share: the new word."""

    placeholder_token: str = "<subject>"
    """The new word."""
    initializer_token: str = ""
    """A known word or words at whose meaning it begins, such as "dog"."""
    num_vectors: int = 1
    """How many vectors it has: more can say more, and leave less room in the prompt."""
    learnable_property: Literal["object", "style"] = "object"
    """Which sentences the word is practised in, where neither --instance_prompt nor captions say."""

    @property
    def prompt(self) -> str | None:
        """The new word alone, where there is no --instance_prompt: then templates make sentences of it."""
        return self.instance_prompt or (self.placeholder_token if self.instance_data_dir else None)

    def check(self) -> None:
        self.need(bool(self.placeholder_token.strip()), "placeholder_token", "must be a new word such as <my-dog>")
        super().check()
        self.need(bool(self.initializer_token.strip()), "initializer_token", 'must be a word such as "dog"')
        self.need(1 <= self.num_vectors <= 75, "num_vectors", "must lie in 1 … 75")
        word, prompt = self.placeholder_token, self.instance_prompt
        self.need(prompt is None or word.lower() in prompt.lower(), "instance_prompt", f"must contain the new word, {word}")
        apart = word.lower() not in (self.class_prompt or "").lower()
        self.need(apart, "class_prompt", f"must be without the new word, {word}")


@dataclass(frozen=True)
class TextualInversionSettings(WordSettings):
    """Teach a frozen model one new word: only the word's vectors are learned (textual inversion)."""

    output_dir: str = "minidiff-textual-inversion"
    """Folder for the vectors, their checkpoints, metrics.jsonl and sample sheets."""
    learning_rate: float = 5e-4
    """AdamW's learning rate after warm-up."""

    def check(self) -> None:
        none = "means nothing here: the model is frozen, and the class prompt is without the new word. Leave it out"
        self.need(not self.with_prior_preservation, "with_prior_preservation", none)
        super().check()


@dataclass(frozen=True)
class PivotalSettings(AdapterSettings, WordSettings):
    """Learn a new word and a LoRA together (pivotal tuning)."""

    output_dir: str = "minidiff-pivotal"
    """Folder for vectors and adapter, their checkpoints, metrics.jsonl and sample sheets."""
    learning_rate_embedding: float = 5e-4
    """The learning rate of the word's vectors; --learning_rate is the adapter's."""

    def check(self) -> None:
        super().check()
        self.need(0 < self.learning_rate_embedding < math.inf, "learning_rate_embedding", "must be a number above 0")
