"""The settings of a training run, as frozen dataclasses: the only place where a flag is declared.

Field names are the flags of the diffusers training scripts, because people paste those commands. The command line, its
`--help`, and the `train_config.toml` beside the weights all come from these fields. The line under a field is its help,
and the range of its values stands in its type. Nothing here imports torch, so that `--help` is quick.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from minidiff.core.errors import SettingsError
from minidiff.files import values
from minidiff.files.values import A_FOLDER, Rule, at_least, at_most, between, check_values
from minidiff.trainer.rules import RULES

MOST = 10_000_000  # updates of a run
DEFAULT_UPDATES = 400


def size_in_bytes(text: str) -> int | None:
    """Bytes of a size such as 8GB, 7.5 GiB or 900mb (GB is 1000^3, GiB is 1024^3); None for any other text."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        return None
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))
    return size if 10**6 <= size <= 10**14 else None


Count = Annotated[int, at_least(1)]
BatchSize = Annotated[int, at_least(1), at_most(4096)]
Decay = Annotated[float, values.BELOW_ONE]
Positive = Annotated[float, values.POSITIVE]
NotNegative = Annotated[float, values.NOT_NEGATIVE]
Folder = Annotated[str, A_FOLDER]
MemorySize = Annotated[str, Rule("must be a size from 1MB to 100TB, such as 8GB or 7.5GiB", size_in_bytes)]
NewWord = Annotated[str, Rule("must be a new word such as <my-dog>", lambda word: bool(word.strip()))]
KnownWord = Annotated[str, Rule('must be a word such as "dog"', lambda word: bool(word.strip()))]
Layers = Annotated[tuple[str, ...], Rule("must name at least one layer", bool)]
NoPrior = Annotated[bool, Rule("means nothing here: the model is frozen. Leave it out", lambda on: not on)]
LayerRank = Annotated[str, Rule("must give layers and ranks, such as resnets=8", re.compile("[^=]+=[1-9][0-9]{0,5}").fullmatch)]


@dataclass(frozen=True)
class TrainSettings:
    """The settings of the training loop, for any model."""

    output_dir: Folder = "minidiff-model"
    """Folder for the result, its checkpoints, metrics.jsonl and sample sheets."""
    overwrite_output_dir: bool = False
    """Start again in an output_dir that holds an earlier run. The files of that run are deleted."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest one: "latest"."""
    seed: Annotated[int, Rule("must fit in 64 bits", lambda seed: -(2**63) <= seed < 2**63)] = 0
    """Seed of all random values: order, noise, crops, dropout. The same seed gives the same result."""
    train_batch_size: BatchSize = 4
    """Samples in one forward pass. With several GPUs they share these samples."""
    gradient_accumulation_steps: BatchSize = 1
    """Forward passes in one update. Their gradients are averaged, as for one larger batch."""
    max_train_steps: Annotated[int, at_least(1), at_most(MOST)] | None = None
    """Updates in total, including those before a resume. Default: 400, unless --num_train_epochs is given."""
    num_train_epochs: Annotated[int, at_least(1), at_most(1_000_000)] | None = None
    """How many times all samples are used, instead of --max_train_steps."""
    learning_rate: Positive = 1e-4
    """Learning rate of AdamW after warm-up."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate changes during the run. linear and cosine end at zero."""
    lr_warmup_steps: Annotated[int, values.NOT_NEGATIVE] = 0
    """Updates during which the learning rate rises from zero (not with "constant")."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's running mean of the gradients."""
    adam_beta2: Decay = 0.999
    """Decay of AdamW's running mean of the squared gradients."""
    adam_weight_decay: NotNegative = 1e-2
    """Decoupled weight decay of AdamW."""
    adam_epsilon: Positive = 1e-8
    """Number added to the denominator of AdamW's update."""
    max_grad_norm: Positive = 1.0
    """If the norm of all gradients together is larger than this, scale them down to it."""
    use_8bit_adam: bool = False
    """Store AdamW's two running means in 8 bits each: 2 bytes for each weight instead of 8."""
    optimizer_in_backward: bool = False
    """Update each weight once its gradient is known, then free the gradient. --max_grad_norm limits each one separately."""
    use_ema: bool = False
    """Keep a running average of the weights. The result and the sample sheets use the average; training does not."""
    ema_decay: Decay = 0.9999
    """Decay of that average: the closer to 1, the slower it follows the weights."""
    dataloader_num_workers: Annotated[int, between(0, 64)] = 0
    """Without effect: a batch is prepared when it is needed. Accepted because training commands often have it."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the forward pass. Trained weights stay in fp32. fp16 needs a GPU."""
    checkpointing_steps: Count = 100
    """Save a checkpoint every N updates, and at the end."""
    checkpoints_total_limit: Count | None = 2
    """How many checkpoints to keep: the newest ones. "None" keeps all."""
    validation_steps: Annotated[int, values.NOT_NEGATIVE] = 100
    """Draw a sample sheet and measure the validation loss every N updates; 0: never."""

    # These fields do not change the weights at a given step.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        "output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
        "validation_steps dataloader_num_workers".split()
    )
    # These are not written into train_config.toml: they are for one session, or private (the result may be published).
    NOT_SAVED: ClassVar[frozenset[str]] = frozenset("overwrite_output_dir resume_from_checkpoint".split())

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work, or for two flags that exclude each other."""
        check_values(self)
        for flag, holds, rule in RULES:
            if value := getattr(self, flag, None):
                self.need(bool(holds(self)), flag, f"{rule}; it is {value!r}" if value is not True else rule)
        if self.num_train_epochs is None:
            self.updates(None)

    def need(self, holds: bool, flag: str, rule: str) -> None:
        """One check: raise SettingsError with the flag and the rule unless the rule `holds`."""
        if not holds:
            raise SettingsError(f"--{flag} {rule}.")

    def updates(self, samples: int | None) -> int:
        """Updates in total. `samples` is the length of an epoch; None for a task without epochs.

        Samples are numbered through the whole run, so an update may use the last of one epoch and the first of the next.
        """
        total = self.max_train_steps or DEFAULT_UPDATES
        if self.num_train_epochs is not None:
            self.need(samples is not None, "num_train_epochs", "needs a task with epochs; give --max_train_steps")
            a_update = self.train_batch_size * self.gradient_accumulation_steps
            total = math.ceil(self.num_train_epochs * (samples or 0) / a_update)
            self.need(total <= MOST, "num_train_epochs", f"makes {total} updates, and a run has at most {MOST}")
        self.need(self.lr_warmup_steps <= total, "lr_warmup_steps", f"must not exceed the {total} updates in total")
        return total

    def identity(self, total: int) -> dict[str, Any]:
        """The fields that change the result, in JSON's types: a resumed run must have the same values."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in self.HARMLESS}
        del values["max_train_steps"], values["num_train_epochs"]
        if not self.lr_scheduler.startswith("constant"):  # else a step does not depend on the length of the run
            values["max_train_steps"] = total
        if not self.use_ema:
            del values["ema_decay"]
        return values


@dataclass(frozen=True)
class FineTuneSettings(TrainSettings):
    """The settings that all ways of fine-tuning share: base model, pictures, prior preservation, sample sheet."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model: a folder with SD 1.5's layout, or a Hugging Face id whose files are in the local cache."""
    device: str | None = None
    """Where to train: cpu or cuda. Default: cuda if there is a GPU."""
    instance_data_dir: str | None = None
    """Folder of training pictures that share one prompt: --instance_prompt."""
    instance_prompt: str | None = None
    """The prompt of all pictures in --instance_data_dir, with a rare word for the subject: "a photo of a sks dog"."""
    train_data_dir: str | None = None
    """Folder of training pictures with captions: metadata.jsonl, metadata.csv, or a .txt or .caption file for each."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions. Default: text, caption, prompt, or the only column of strings."""
    skip_bad: bool = False
    """Skip pictures that cannot be read or are too small, and name them. Without it, they stop the run."""
    resolution: Annotated[int, at_least(8), at_most(8192)] | None = None
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
    prior_loss_weight: NotNegative = 1.0
    """Weight w of the class loss: loss = instance loss + w * class loss. 0: do not train on the class."""
    prior_from_base: bool = False
    """Prior preservation without class pictures: with --class_prompt, the U-Net learns to predict what the base predicts."""
    validation_data_dir: str | None = None
    """Folder of pictures for the validation loss. Default: the training pictures."""
    validation_prompt: tuple[str, ...] = ()
    """Prompts of the sample sheet. Default: --instance_prompt, or the first caption."""
    num_validation_images: Annotated[int, at_least(1), at_most(1000)] = 4
    """Pictures for each validation prompt. Their seeds stay the same through the run."""
    validation_guidance_scale: NotNegative = 5.0
    """Guidance scale of the sample sheet."""
    validation_inference_steps: Annotated[int, between(1, 1000)] = 25
    """Sampling steps of the sample sheet."""

    # Model, pictures, captions and resolution are compared by their content, not by their paths: see latents.py and task.py.
    HARMLESS = TrainSettings.HARMLESS | frozenset(
        "pretrained_model_name_or_path device cache_dir instance_data_dir train_data_dir caption_column skip_bad resolution "
        "gradient_checkpointing fit class_data_dir num_class_images sample_batch_size validation_data_dir "
        "validation_prompt num_validation_images validation_guidance_scale validation_inference_steps".split()
    )
    NOT_SAVED = TrainSettings.NOT_SAVED | frozenset(
        "instance_data_dir train_data_dir class_data_dir validation_data_dir cache_dir".split()
    )

    @property
    def prompt(self) -> str | None:
        """The prompt of all pictures in --instance_data_dir."""
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

    HARMLESS = FineTuneSettings.HARMLESS | {"layerwise_casting"}

    @property
    def may_cast(self) -> bool:
        return self.mixed_precision == "no" and (self.layerwise_casting or self.fit is not None)


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

    @property
    def rank_of(self) -> dict[str, int]:
        """--rank_pattern as a table."""
        return {target: int(rank) for target, _, rank in (entry.rpartition("=") for entry in self.rank_pattern)}


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Teach a frozen model a subject or a style with small additions to its layers (LoRA, DoRA)."""

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

    @property
    def prompt(self) -> str | None:
        """--instance_prompt, or the new word alone, which TEMPLATES turn into sentences."""
        return self.instance_prompt or (self.placeholder_token if self.instance_data_dir else None)


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
