"""The settings of a training run, as frozen dataclasses: the one truth of its flags.

Field names are the flags of the diffusers training scripts, because people paste those commands. The command line, its
`--help`, and the `train_config.toml` beside the weights all come from these fields; the line under a field is its help.
Nothing here imports torch, so that `--help` is quick.
"""

import json
import math
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from minidiff.core.config import fits
from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.trainer.sizes import size_in_bytes

AnySettings = TypeVar("AnySettings", bound="TrainSettings")
DEFAULT_UPDATES = 400
MOST: dict[str, int] = {  # beyond anything that makes sense, and refused before it fills the memory or the day
    "train_batch_size": 4096,
    "gradient_accumulation_steps": 4096,
    "max_train_steps": 10_000_000,
    "num_train_epochs": 1_000_000,
    "resolution": 8192,
    "sample_batch_size": 4096,
    "num_validation_images": 1000,
}


@dataclass(frozen=True)
class TrainSettings:
    """What the loop itself reads, whatever it trains."""

    output_dir: str = "minidiff-model"
    """Folder for the result, its checkpoints, metrics.jsonl and sample sheets."""
    overwrite_output_dir: bool = False
    """Start over in an output_dir that holds an earlier run: removes what that run wrote."""
    resume_from_checkpoint: str | None = None
    """Go on from "latest", or from a checkpoint folder."""
    seed: int = 0
    """Every random value is a function of this seed, the step, the sample and its purpose."""
    train_batch_size: int = 4
    """Samples in one forward pass; with several GPUs, of all of them together."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one update; the update is that of one batch of them all."""
    max_train_steps: int | None = None
    """Updates in all, those of earlier sessions included; default: 400, unless --num_train_epochs is given."""
    num_train_epochs: int | None = None
    """Times through all samples, instead of --max_train_steps."""
    learning_rate: float = 1e-4
    """AdamW's learning rate after warm-up."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Shape of the learning rate over the run; linear and cosine end at zero."""
    lr_warmup_steps: int = 0
    """Updates over which the learning rate rises from zero (not with "constant")."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of Adam's update."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, all tensors taken together."""
    use_8bit_adam: bool = False
    """AdamW remembers 2 bytes for each weight instead of 8, in blocks of 8-bit numbers."""
    optimizer_in_backward: bool = False
    """Move each tensor as soon as its gradient is there, and forget that; --max_grad_norm is then for each tensor by itself."""
    use_ema: bool = False
    """Export and preview a running average of the weights; they themselves go on as they are."""
    ema_decay: float = 0.9999
    """How slowly that average follows, once the run is well under way."""
    dataloader_num_workers: int = 0
    """Threads that prepare batches ahead; 0: each is prepared when it is wanted. Changes no number."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the forward pass; what is trained stays fp32, unless --bf16_weights. fp16 needs a GPU."""
    bf16_weights: bool = False
    """With --mixed_precision bf16: train in bf16, too. Steps are rounded by chance, so that small ones are not lost."""
    checkpointing_steps: int = 100
    """Save the whole state every so many updates, and at the end."""
    checkpoints_total_limit: int | None = 2
    """How many checkpoints to keep, the newest; "None" keeps all."""
    validation_steps: int = 100
    """Draw a sample sheet, and measure, every so many updates; 0: never."""

    # Two runs that differ in nothing but these give the same weights at the same step.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        "output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
        "validation_steps dataloader_num_workers".split()
    )

    # Not in train_config.toml: what was meant for one session, and what is nobody's business where the result is published.
    UNTOLD: ClassVar[frozenset[str]] = frozenset("overwrite_output_dir resume_from_checkpoint".split())

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work."""
        self.need(bool(self.output_dir.strip()), "output_dir", "must name a folder")
        for name, value in asdict(self).items():
            self.need("\0" not in (value if isinstance(value, str) else ""), name, "cannot hold a NUL character")
        self.need(-(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")
        for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
            self.need_count(name)
        for name in ("max_train_steps", "num_train_epochs", "checkpoints_total_limit"):
            self.need_count(name)
        one = self.max_train_steps is None or self.num_train_epochs is None
        self.need(one, "num_train_epochs", "and --max_train_steps both say how long to train: give one of them")
        for name in ("lr_warmup_steps", "validation_steps", "adam_weight_decay"):
            self.need(0 <= getattr(self, name) < math.inf, name, "must not be negative")
        self.need(0 <= self.dataloader_num_workers <= 64, "dataloader_num_workers", "must lie in 0 … 64")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            self.need(0 < getattr(self, name) < math.inf, name, "must be a number above 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self.need(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")
        for field in ("lr_scheduler", "mixed_precision"):
            choices = TrainSettings.__annotations__[field].__args__
            hint = did_you_mean(str(getattr(self, field)), choices)
            self.need(getattr(self, field) in choices, field, f"must be one of {', '.join(choices)}.{hint}".rstrip("."))
        self._check_savings()
        warms = self.lr_scheduler != "constant" or self.lr_warmup_steps == 0
        self.need(warms, "lr_warmup_steps", "needs another --lr_scheduler than constant, such as constant_with_warmup")
        fresh = not (self.overwrite_output_dir and self.resume_from_checkpoint)
        self.need(fresh, "overwrite_output_dir", "starts over, and --resume_from_checkpoint goes on: give one of them")
        if self.num_train_epochs is None:
            self.updates(None)

    def _check_savings(self) -> None:
        """What saves memory, and cannot be joined."""
        flag = "optimizer_in_backward"
        one = self.gradient_accumulation_steps == 1 or not self.optimizer_in_backward
        self.need(one, flag, "cannot be joined with --gradient_accumulation_steps: a gradient that is gone takes no more")
        plain = self.mixed_precision != "fp16" or not self.optimizer_in_backward
        self.need(plain, flag, "cannot be joined with --mixed_precision fp16, whose gradients are scaled; take bf16")
        exact = not (self.bf16_weights and self.use_ema)
        self.need(exact, "bf16_weights", "cannot be joined with --use_ema: an average in bf16 stands still")

    def need(self, holds: bool, flag: str, rule: str) -> None:
        """One check: the flag, what is wrong with it, and the value it has."""
        if not holds:
            raise SettingsError(f"--{flag} {rule}; it is {getattr(self, flag)!r}.")

    def need_count(self, flag: str, least: int = 1) -> None:
        """A whole number that is `least` or more, and within MOST; or None, where the field may be that."""
        value, most = getattr(self, flag), MOST.get(flag)
        self.need(value is None or value >= least, flag, f"must be at least {least}")
        self.need(value is None or most is None or value <= most, flag, f"must be at most {most}")

    def updates(self, samples: int | None) -> int:
        """Updates in all. `samples` are those of an epoch; None for a task that has no epochs.

        Samples are numbered through the whole run, so an update may take the last of one epoch and the first of the next.
        """
        total = self.max_train_steps or DEFAULT_UPDATES
        if self.num_train_epochs is not None:
            self.need(samples is not None, "num_train_epochs", "needs a task with epochs; give --max_train_steps")
            total = math.ceil(
                self.num_train_epochs * (samples or 0) / (self.train_batch_size * self.gradient_accumulation_steps)
            )
        most = MOST["max_train_steps"]
        self.need(total <= most, "num_train_epochs", f"makes {total} updates, and a run has at most {most}")
        self.need(self.lr_warmup_steps <= total, "lr_warmup_steps", f"must not exceed the {total} updates in all")
        return total

    def identity(self, total: int) -> dict[str, Any]:
        """The fields on which a step's result depends, in JSON's types: a resumed run must agree in all of them."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in self.HARMLESS}
        del values["max_train_steps"], values["num_train_epochs"]
        if not self.lr_scheduler.startswith("constant"):  # else the past does not depend on how far it goes
            values["max_train_steps"] = total
        if not self.use_ema:
            del values["ema_decay"]
        return values


@dataclass(frozen=True)
class FineTuneSettings(TrainSettings):
    """What every way of fine-tuning a text-to-image model shares: the base, the pictures, the sample sheet."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model: a folder in the layout of SD 1.5 on the hub, or a hub id that is in the local cache."""
    device: str | None = None
    """Where to train: cpu or cuda; default: cuda if there is one."""
    instance_data_dir: str | None = None
    """Folder of pictures that share one prompt, --instance_prompt."""
    instance_prompt: str | None = None
    """The prompt of all pictures in --instance_data_dir, with a rare word for the subject: "a photo of a sks dog"."""
    train_data_dir: str | None = None
    """Folder of pictures with captions of their own: metadata.jsonl, metadata.csv, or a .txt / .caption beside each."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions; default: text, caption, prompt, or the only column of strings."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read or are too small, naming them, instead of stopping."""
    resolution: int | None = None
    """Side in pixels at which pictures are trained; default: the base model's own."""
    center_crop: bool = True
    """Crop the middle of pictures that are not square; otherwise a place drawn anew each time."""
    random_flip: bool = False
    """Mirror half of the samples; not for subjects with a left and a right."""
    aspect_ratio_buckets: bool = False
    """Train pictures in their own shape, near --resolution squared pixels, instead of cropping them to squares."""
    masked_loss: bool = False
    """Learn only where the mask of a picture is white: a.mask.png beside a.png, or the metadata's column "mask"."""
    gradient_checkpointing: bool = False
    """Spare most of the memory of a step, and make it longer by a third: the backward computes layers again. Same result."""
    fit: str | None = None
    """Memory that the run may take, such as 8GB or 7.5GiB: switches on the cheapest savings that suffice."""
    cuda_graph: bool = False
    """On a GPU, record the U-Net's kernels once, forward and backward, and replay them; spares starting them, takes memory."""
    cache_latents: bool = True
    """Encode each picture once, before training, instead of at every step."""
    cache_dir: str | None = None
    """Keep encoded pictures and prompts in this folder, for the next run; as private as they, since they can be decoded."""
    proportion_empty_prompts: float = 0.0
    """Share of samples trained with an empty prompt (caption dropout)."""
    snr_gamma: float | None = None
    """Min-SNR loss weights with this gamma; 5 is usual. Default: all timesteps weigh the same."""
    noise_offset: float = 0.0
    """Also shift the noise of each whole channel by this much; 0.1 is usual, for very dark and very bright pictures."""
    with_prior_preservation: bool = False
    """DreamBooth: train on pictures of the subject's class as well, so that not every dog becomes this one."""
    class_data_dir: str | None = None
    """Folder of the class pictures; the base model draws what it lacks."""
    class_prompt: str | None = None
    """The prompt of all class pictures, without the rare word: "a photo of a dog"."""
    num_class_images: int = 100
    """How many pictures --class_data_dir shall hold; 0: take what is there, and draw none."""
    sample_batch_size: int = 4
    """How many class pictures are drawn at once."""
    prior_loss_weight: float = 1.0
    """Weight of the class half's loss: instance + weight * class, each the mean over its half. 0: without the class."""
    prior_from_base: bool = False
    """Prior preservation without class pictures: under --class_prompt the model shall answer as the base does."""
    validation_data_dir: str | None = None
    """Folder of pictures for the validation loss; default: the training pictures."""
    validation_prompt: tuple[str, ...] = ()
    """Prompts of the sample sheet; default: --instance_prompt, or the first caption."""
    num_validation_images: int = 4
    """Pictures for each validation prompt, on fixed seeds."""
    validation_guidance_scale: float = 5.0
    """Guidance scale of the sample sheet."""
    validation_inference_steps: int = 25
    """Sampling steps of the sample sheet."""

    HARMLESS = TrainSettings.HARMLESS | frozenset(
        "pretrained_model_name_or_path device cache_dir instance_data_dir train_data_dir caption_column skip_bad resolution "
        "gradient_checkpointing fit cuda_graph "
        "class_data_dir num_class_images sample_batch_size validation_data_dir "
        "validation_prompt num_validation_images validation_guidance_scale validation_inference_steps".split()
    )  # model, pictures, captions and size are compared by what they hold, not by where they lie: see data.py and common.py
    UNTOLD = TrainSettings.UNTOLD | frozenset(
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
        self.need_count("resolution", 8)
        sized = self.fit is None or size_in_bytes(self.fit) is not None
        self.need(sized, "fit", "must be a size from 1MB to 100TB, such as 8GB or 7.5GiB")
        for flag in ("gradient_checkpointing", "fit", "optimizer_in_backward"):
            apart = not (self.cuda_graph and getattr(self, flag))
            self.need(apart, flag, "cannot be joined with --cuda_graph, which replays one whole pass, with all gradients")
        self.need(0 <= self.proportion_empty_prompts <= 1, "proportion_empty_prompts", "must lie in [0, 1]")
        self.need(self.snr_gamma is None or 0 < self.snr_gamma < math.inf, "snr_gamma", "must be a number above 0")
        crop_works = self.center_crop or not self.cache_latents
        if self.cache_dir is not None:
            self.need(bool(self.cache_dir.strip()), "cache_dir", "must name a folder")
            folders = (self.instance_data_dir, self.train_data_dir, self.class_data_dir, self.validation_data_dir)
            own = Path(self.cache_dir).resolve() not in {Path(folder).resolve() for folder in folders if folder}
            self.need(own, "cache_dir", "has pictures in it: give the cache a folder of its own")
            self.need(self.cache_latents, "cache_dir", "keeps what is encoded once: it does not go with --no-cache_latents")
            self.need_apart("cache_dir")
        self.need(crop_works, "center_crop", "off needs --no-cache_latents too: a cached latent has one crop")
        self.need(0 <= self.noise_offset < math.inf, "noise_offset", "must not be negative")
        self._check_prior()
        self.need_count("num_validation_images")
        self.need(1 <= self.validation_inference_steps <= 1000, "validation_inference_steps", "must lie in 1 … 1000")
        self.need(0 <= self.validation_guidance_scale < math.inf, "validation_guidance_scale", "must not be negative")

    @property
    def prompt(self) -> str | None:
        """What every picture in --instance_data_dir is called."""
        return self.instance_prompt

    def need_apart(self, flag: str) -> None:
        """A folder that outlives the run must not lie in that of the run."""
        inside = Path(getattr(self, flag)).resolve().is_relative_to(Path(self.output_dir).resolve())
        self.need(not inside, flag, f"lies in --output_dir {self.output_dir}, which is for what minidiff writes")

    def _check_prior(self) -> None:
        on, folder = self.with_prior_preservation, self.class_data_dir
        for name in ("class_data_dir", "class_prompt", "prior_from_base"):
            self.need(on or not getattr(self, name), name, "goes with --with_prior_preservation")
        self.need(0 <= self.prior_loss_weight < math.inf, "prior_loss_weight", "must not be negative")
        self.need(0 <= self.num_class_images <= 100_000, "num_class_images", "must lie in 0 … 100000")
        self.need_count("sample_batch_size")
        if not on:
            return
        if not (self.class_prompt or "").strip():
            raise SettingsError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
        if self.prior_from_base:
            self.need(folder is None, "class_data_dir", "has no use with --prior_from_base: give one of them")
            return
        if not folder:
            raise SettingsError(
                "--with_prior_preservation needs --class_data_dir, the folder of the class pictures (it may be empty: the "
                "base model draws them); or --prior_from_base, which needs no pictures."
            )
        pictures = self.instance_data_dir or self.train_data_dir or ""
        apart = Path(folder).resolve() != Path(pictures).resolve()
        self.need(apart, "class_data_dir", f"is the folder of the training pictures {pictures} too: give another")
        self.need_apart("class_data_dir")
        square = "cannot be joined with --class_data_dir, whose pictures are square; take --prior_from_base"
        self.need(not self.aspect_ratio_buckets, "aspect_ratio_buckets", square)


def to_toml(settings: TrainSettings) -> str:
    """The settings as a TOML file that `from_toml` reads back; fields that are None are left out, and those in UNTOLD."""
    rows = {k: v for k, v in asdict(settings).items() if v is not None and k not in settings.UNTOLD}
    lines = "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in rows.items())
    return lines.replace("\x7f", "\\u007f")  # the one character that JSON takes as it is, and TOML does not


def from_toml(kind: type[AnySettings], path: Path) -> AnySettings:
    """Settings from a TOML file; a key that is no field, or a value of another type, is a SettingsError."""
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
            raise SettingsError(f"{path}: {key} = {value!r:.60} is not of its kind, {kind_of}.")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise SettingsError(f"{path}: {key} = {value!r:.60} does not fit in 64 bits, as TOML's numbers do.")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**given)
