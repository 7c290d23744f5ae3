"""The settings of a training run, as frozen dataclasses: the only place where a flag is declared.

Field names are the flags of the diffusers training scripts, because people paste those commands. The command line, its
`--help`, and the `train_config.toml` beside the weights all come from these fields. The line under a field is its help,
and the range of its values stands in its type. This file holds what all methods share; methods.py holds the rest.
Nothing here imports torch, so that `--help` is quick.
"""

import json
import math
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.files.values import (
    A_FOLDER,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    at_least,
    at_most,
    between,
    check_values,
    fits,
)

AnySettings = TypeVar("AnySettings", bound="TrainSettings")
DEFAULT_UPDATES, MOST_UPDATES = 400, 10_000_000

Count = Annotated[int, at_least(1)]
BatchSize = Annotated[int, at_least(1), at_most(4096)]
Decay = Annotated[float, BELOW_ONE]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Folder = Annotated[str, A_FOLDER]


def size_in_bytes(text: str) -> int | None:
    """Bytes of a size such as 8GB, 7.5 GiB or 900mb (GB is 1000^3, GiB is 1024^3); None for any other text."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        return None
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))
    return size if 10**6 <= size <= 10**14 else None


MemorySize = Annotated[str, Rule("must be a size from 1MB to 100TB, such as 8GB or 7.5GiB", size_in_bytes)]


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
    max_train_steps: Annotated[int, at_least(1), at_most(MOST_UPDATES)] | None = None
    """Updates in total, including those before a resume. Default: 400, unless --num_train_epochs is given."""
    num_train_epochs: Annotated[int, at_least(1), at_most(1_000_000)] | None = None
    """How many times all samples are used, instead of --max_train_steps."""
    learning_rate: Positive = 1e-4
    """Learning rate of AdamW after warm-up."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate changes during the run. linear and cosine end at zero."""
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
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
    """Threads that prepare the next batches during training; 0 prepares each batch when it is needed. Same result."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the forward pass. Trained weights stay in fp32, unless --bf16_weights is given. fp16 needs a GPU."""
    bf16_weights: bool = False
    """With --mixed_precision bf16: store the trained weights in bf16, too. Stochastic rounding keeps small updates."""
    checkpointing_steps: Count = 100
    """Save a checkpoint every N updates, and at the end."""
    checkpoints_total_limit: Count | None = 2
    """How many checkpoints to keep: the newest ones. "None" keeps all."""
    validation_steps: Annotated[int, NOT_NEGATIVE] = 100
    """Draw a sample sheet and measure the validation loss every N updates; 0: never."""

    # These fields do not change the weights at a given step.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        "output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
        "validation_steps dataloader_num_workers".split()
    )
    # These are not written into train_config.toml: they are for one session, or private (the result may be published).
    NOT_SAVED: ClassVar[frozenset[str]] = frozenset("overwrite_output_dir resume_from_checkpoint".split())

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work, or for two values that exclude each other."""
        check_values(self)
        one = self.max_train_steps is None or self.num_train_epochs is None
        self.need(one, "num_train_epochs", "and --max_train_steps both say how long to train: give only one of them")
        warms = self.lr_scheduler != "constant" or self.lr_warmup_steps == 0
        self.need(warms, "lr_warmup_steps", "needs another --lr_scheduler than constant, such as constant_with_warmup")
        fresh = not (self.overwrite_output_dir and self.resume_from_checkpoint)
        self.need(fresh, "overwrite_output_dir", "starts again, and --resume_from_checkpoint continues: give only one of them")
        once = self.gradient_accumulation_steps == 1 or not self.optimizer_in_backward
        flag, rule = "optimizer_in_backward", "cannot be joined with --gradient_accumulation_steps"
        self.need(once, flag, f"{rule}: a gradient that is freed cannot be added to the next one")
        unscaled = self.mixed_precision != "fp16" or not self.optimizer_in_backward
        self.need(unscaled, flag, "cannot be joined with --mixed_precision fp16, whose gradients are scaled; use bf16")
        same = not self.bf16_weights or self.mixed_precision == "bf16"
        self.need(same, "bf16_weights", "needs --mixed_precision bf16: the forward pass has the dtype of the weights")
        exact = not (self.bf16_weights and self.use_ema)
        self.need(exact, "bf16_weights", "cannot be joined with --use_ema: bf16 is too coarse for a slow average")
        if self.num_train_epochs is None:
            self.updates(None)

    def need(self, holds: bool, flag: str, rule: str) -> None:
        """One check: raise SettingsError with the flag, the rule and the value unless the rule `holds`."""
        if not holds:
            raise SettingsError(f"--{flag} {rule}; it is {getattr(self, flag)!r}.")

    def updates(self, samples: int | None) -> int:
        """Updates in total. `samples` is the length of an epoch; None for a task without epochs.

        Samples are numbered through the whole run, so an update may use the last of one epoch and the first of the next.
        """
        total = self.max_train_steps or DEFAULT_UPDATES
        if self.num_train_epochs is not None:
            self.need(samples is not None, "num_train_epochs", "needs a task with epochs; give --max_train_steps")
            a_update = self.train_batch_size * self.gradient_accumulation_steps
            total = math.ceil(self.num_train_epochs * (samples or 0) / a_update)
        rule = f"makes {total} updates, and a run has at most {MOST_UPDATES}"
        self.need(total <= MOST_UPDATES, "num_train_epochs", rule)
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
    """Learn only the white area of each picture's mask: a.mask.png beside a.png, or the column "mask" of the metadata."""
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
    """Keep encoded pictures and prompts in this folder for later runs. They are as private as the pictures themselves."""
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

    def check(self) -> None:
        super().check()
        if (self.instance_data_dir is None) == (self.train_data_dir is None):
            raise SettingsError(
                "Give the pictures with one of --instance_data_dir (one prompt) and --train_data_dir (a caption each)."
            )
        if self.instance_data_dir is not None and not (self.prompt or "").strip():
            raise SettingsError('--instance_data_dir needs --instance_prompt, such as "a photo of a sks dog".')
        one_prompt = self.instance_prompt is None or self.instance_data_dir is not None
        self.need(one_prompt, "instance_prompt", "goes with --instance_data_dir; --train_data_dir has captions")
        off = "needs the faster code of minidiff/fast, which --plain leaves out: give only one of them"
        self.need(not (self.plain and self.gradient_checkpointing), "gradient_checkpointing", off)
        self.need(not (self.plain and self.fit), "fit", off)
        crop_works = self.center_crop or not self.cache_latents
        self.need(crop_works, "center_crop", "off needs --no-cache_latents too: a cached latent has one crop")
        if self.cache_dir is not None:
            folders = (self.instance_data_dir, self.train_data_dir, self.class_data_dir, self.validation_data_dir)
            own = Path(self.cache_dir).resolve() not in {Path(folder).resolve() for folder in folders if folder}
            self.need(own, "cache_dir", "has pictures in it: give the cache a folder of its own")
            self.need(self.cache_latents, "cache_dir", "cannot be joined with --no-cache_latents, which caches nothing")
            self.need_apart("cache_dir")
        self._check_prior()

    @property
    def prompt(self) -> str | None:
        """The prompt of all pictures in --instance_data_dir."""
        return self.instance_prompt

    def need_apart(self, flag: str) -> None:
        """A folder that outlives the run must not lie in the run's own folder."""
        inside = Path(getattr(self, flag)).resolve().is_relative_to(Path(self.output_dir).resolve())
        self.need(not inside, flag, f"lies in --output_dir {self.output_dir}, which is for what minidiff writes")

    def _check_prior(self) -> None:
        on, folder = self.with_prior_preservation, self.class_data_dir
        for name in ("class_data_dir", "class_prompt", "prior_from_base"):
            self.need(on or not getattr(self, name), name, "goes with --with_prior_preservation")
        if not on:
            return
        if not (self.class_prompt or "").strip():
            raise SettingsError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
        if self.prior_from_base:
            self.need(folder is None, "class_data_dir", "has no use with --prior_from_base: give only one of them")
            return
        if not folder:
            raise SettingsError(
                "--with_prior_preservation needs --class_data_dir, the folder of the class pictures (it may be empty: the "
                "base model draws them); or --prior_from_base, which needs no pictures."
            )
        pictures = self.instance_data_dir or self.train_data_dir or ""
        apart = Path(folder).resolve() != Path(pictures).resolve()
        self.need(apart, "class_data_dir", f"is the folder of the training pictures {pictures} too: give another folder")
        self.need_apart("class_data_dir")
        square = "cannot be joined with --class_data_dir, whose pictures are square; take --prior_from_base"
        self.need(not self.aspect_ratio_buckets, "aspect_ratio_buckets", square)


def to_toml(settings: TrainSettings) -> str:
    """The settings as a TOML file that `from_toml` reads; without fields that are None and those in NOT_SAVED."""
    rows = {k: v for k, v in asdict(settings).items() if v is not None and k not in settings.NOT_SAVED}
    lines = "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in rows.items())
    return lines.replace("\x7f", "\\u007f")  # JSON allows this one character unescaped, TOML does not


def from_toml(kind: type[AnySettings], path: Path) -> AnySettings:
    """Settings from a TOML file. Raises SettingsError for an unknown key, or a value of the wrong type."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read as TOML settings: {error}.") from error
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise SettingsError(f'{path}: "{key}" is no setting of this task.{did_you_mean(key, known)}')
        if not fits(value, hints[key]):
            kind_of = hints[key].__name__ if type(hints[key]) is type else str(hints[key]).replace("typing.", "")
            raise SettingsError(f"{path}: {key} = {value!r:.60} has the wrong type; it must be {kind_of}.")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise SettingsError(f"{path}: {key} = {value!r:.60} does not fit in 64 bits, as TOML's numbers do.")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**given)
