"""The settings of the training loop, for any model; and `RULES`, which say where one flag of training needs or forbids another.

settings.py adds the flags of fine-tuning, and says what a field is.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from minidiff.core.errors import SettingsError
from minidiff.files import values
from minidiff.files.values import A_FOLDER, Flags, Rule, at_least, between

DEFAULT_UPDATES = 400
MOST = 10_000_000  # updates of a run


def size_in_bytes(text: str) -> int | None:
    """Bytes of a size such as 8GB, 7.5 GiB or 900mb (GB is 1000^3, GiB is 1024^3); None for any other text."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        return None
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))
    return size if 10**6 <= size <= 10**14 else None


Count = Annotated[int, at_least(1)]
BatchSize = Annotated[int, between(1, 4096)]
Decay = Annotated[float, values.BELOW_ONE]
Positive = Annotated[float, values.POSITIVE]
NotNegative = Annotated[float, values.NOT_NEGATIVE]
Folder = Annotated[str, A_FOLDER]
Curve = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(frozen=True)
class TrainSettings(Flags):
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
    max_train_steps: Annotated[int, between(1, MOST)] | None = None
    """Updates in total, including those before a resume. Default: 400, unless --num_train_epochs is given."""
    num_train_epochs: Annotated[int, between(1, 1_000_000)] | None = None
    """How many times all samples are used, instead of --max_train_steps."""
    learning_rate: Positive = 1e-4
    """Learning rate of AdamW after warm-up."""
    scale_lr: bool = False
    """Multiply --learning_rate by the samples of an update."""
    lr_scheduler: Curve = "constant"
    """How the learning rate changes during the run. All but the constant ones end at zero."""
    lr_num_cycles: Count = 1
    """How often cosine_with_restarts falls from the learning rate to zero."""
    lr_power: Positive = 1.0
    """Power of polynomial: 1 is linear, 2 falls faster at first."""
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
    validation_epochs: Count | None = None
    """The same every N epochs, instead of --validation_steps."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Also write the metrics for TensorBoard, which needs pip install tensorboard. metrics.jsonl has them in any case."""
    logging_dir: str = "logs"
    """Folder for TensorBoard, inside --output_dir."""

    # These fields do not change the weights at a given step.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        "output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
        "validation_steps validation_epochs report_to logging_dir dataloader_num_workers".split()
    )
    # These are not written into train_config.toml: they are for one session, or private (the result may be published).
    NOT_SAVED: ClassVar[frozenset[str]] = frozenset("overwrite_output_dir resume_from_checkpoint".split())

    def __post_init__(self) -> None:
        if self.scale_lr:  # once: what is scaled says so no more
            samples = self.train_batch_size * self.gradient_accumulation_steps
            object.__setattr__(self, "learning_rate", self.learning_rate * samples)
            object.__setattr__(self, "scale_lr", False)

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work, or for two flags that exclude each other."""
        super().check()
        for flag, holds, rule in RULES:
            if (value := getattr(self, flag, None)) and not holds(self):
                raise SettingsError(f"--{flag} {rule}{'' if value is True else f'; it is {value!r}'}.")
        if self.num_train_epochs is None:
            self.updates(None)

    def updates_of(self, epochs: int | None, samples: int | None) -> int:
        """Updates in so many epochs of `samples`, which are numbered through the run: one update may belong to two epochs."""
        return math.ceil((epochs or 0) * (samples or 0) / (self.train_batch_size * self.gradient_accumulation_steps))

    def updates(self, samples: int | None) -> int:
        """Updates in total. `samples` is the length of an epoch; None for a task without epochs."""
        total = self.updates_of(self.num_train_epochs, samples) or self.max_train_steps or DEFAULT_UPDATES
        if self.num_train_epochs and samples is None:
            raise SettingsError("--num_train_epochs needs a task with epochs; give --max_train_steps.")
        if total > MOST:
            raise SettingsError(f"--num_train_epochs makes {total} updates, and a run has at most {MOST}.")
        if self.lr_warmup_steps > total:
            raise SettingsError(f"--lr_warmup_steps must not exceed the {total} updates in total.")
        return total

    def validate_every(self, samples: int | None) -> int:
        """Updates from one sheet to the next; `samples` is the length of an epoch."""
        return self.updates_of(self.validation_epochs, samples) or self.validation_steps

    def identity(self, total: int) -> dict[str, Any]:
        """The fields that change the result: a resumed run must have the same values."""
        values = {name: value for name, value in asdict(self).items() if name not in self.HARMLESS}
        del values["max_train_steps"], values["num_train_epochs"]
        if self.lr_num_cycles == self.lr_power == 1:  # as before they were flags
            del values["lr_num_cycles"], values["lr_power"]
        if not self.lr_scheduler.startswith("constant"):  # else a step does not depend on the length of the run
            values["max_train_steps"] = total
        if not self.use_ema:
            del values["ema_decay"]
        return values


# --- rules about two flags -----------------------------------------------------------------------------------------------


def word(s: Any) -> str:
    """The new word in small letters; empty for a method that learns none."""
    return getattr(s, "placeholder_token", "").lower()


def outside(s: Any, flag: str) -> bool:
    """Does a folder that outlives the run lie outside the run's own?"""
    return not Path(getattr(s, flag)).resolve().is_relative_to(Path(s.output_dir).resolve())


def apart(s: Any, flag: str) -> bool:
    """Is a folder another one than that of the pictures?"""
    return Path(getattr(s, flag)).resolve() != Path(s.instance_data_dir or s.train_data_dir or "").resolve()


OWN = "lies in --output_dir, which is for what minidiff writes"
APART = "is the folder of the training pictures, too: give another folder"
ONE = "give only one of them"
FAST = f"needs the faster code of minidiff/fast, which --plain leaves out: {ONE}"
AGAIN = f"starts again, and --resume_from_checkpoint continues: {ONE}"
RESTARTS = "cosine_with_restarts"
FREED = "cannot be joined with --gradient_accumulation_steps: a gradient that is freed cannot be added to the next one"
CROP = "cannot be joined with --no-center_crop, as a cached latent has one crop; add --no-cache_latents"
SQUARE = "cannot be joined with --class_data_dir, whose pictures are square; take --prior_from_base"
PROMPT = 'needs --instance_prompt, such as "a photo of a sks dog"; for pictures with captions there is --train_data_dir'
CLASS = "needs --class_data_dir, where the base draws missing pictures; or --prior_from_base (dreambooth always has it on)"
RULES: tuple[tuple[str, Callable[[Any], object], str], ...] = (  # where the flag is given, the condition must hold
    ("num_train_epochs", lambda s: s.max_train_steps is None, f"and --max_train_steps both say how long to train: {ONE}"),
    ("lr_warmup_steps", lambda s: s.lr_scheduler != "constant", "needs another --lr_scheduler, such as constant_with_warmup"),
    ("lr_num_cycles", lambda s: s.lr_num_cycles == 1 or s.lr_scheduler == RESTARTS, f"goes with --lr_scheduler {RESTARTS}"),
    ("lr_power", lambda s: s.lr_power == 1 or s.lr_scheduler == "polynomial", "goes with --lr_scheduler polynomial"),
    ("overwrite_output_dir", lambda s: not s.resume_from_checkpoint, AGAIN),
    ("optimizer_in_backward", lambda s: s.gradient_accumulation_steps == 1, FREED),
    ("optimizer_in_backward", lambda s: s.mixed_precision != "fp16", "cannot be joined with --mixed_precision fp16; use bf16"),
    ("layerwise_casting", lambda s: s.mixed_precision == "no", "needs --mixed_precision no"),
    *((flag, lambda s: not s.plain, FAST) for flag in ("gradient_checkpointing", "fit", "layerwise_casting")),
    ("instance_data_dir", lambda s: s.train_data_dir is None, f"and --train_data_dir both name the pictures: {ONE}"),
    ("instance_data_dir", lambda s: (s.prompt or "").strip(), PROMPT),
    ("train_data_dir", lambda s: s.captions or s.prompt, "with --no_captions needs --instance_prompt"),
    ("instance_prompt", lambda s: word(s) in s.instance_prompt.lower(), "must contain the new word"),
    ("conditioning_data_dir", lambda s: not s.hint, f"has no use with --hint, which makes the conditioning pictures: {ONE}"),
    ("cache_latents", lambda s: s.center_crop, CROP),
    *((flag, lambda s, flag=flag: outside(s, flag), OWN) for flag in ("cache_dir", "class_data_dir")),
    *((flag, lambda s, flag=flag: apart(s, flag), APART) for flag in ("cache_dir", "class_data_dir")),
    ("cache_dir", lambda s: s.cache_latents, "cannot be joined with --no-cache_latents"),
    *((flag, lambda s: s.with_prior_preservation, "goes with --with_prior_preservation")
      for flag in ("class_data_dir", "class_prompt", "prior_from_base")),
    ("with_prior_preservation", lambda s: (s.class_prompt or "").strip(), 'needs --class_prompt, such as "a photo of a dog"'),
    ("with_prior_preservation", lambda s: s.class_data_dir or s.prior_from_base, CLASS),
    ("class_prompt", lambda s: not word(s) or word(s) not in s.class_prompt.lower(), "must be without the new word"),
    ("report_to", lambda s: s.report_to == "none" or find_spec("tensorboard"), "needs a package: pip install tensorboard"),
    ("text_encoder_lr", lambda s: s.train_text_encoder, "goes with --train_text_encoder"),
    ("class_data_dir", lambda s: not s.prior_from_base, f"has no use with --prior_from_base: {ONE}"),
    ("aspect_ratio_buckets", lambda s: not s.class_data_dir, SQUARE),
)
