"""The rules about two flags of training: `RULES` says where one of them forbids or needs another."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def word(s: Any) -> str | None:
    """The new word in small letters; None for a method that learns none."""
    return getattr(s, "placeholder_token", "").lower() or None


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
CLASS = "needs --class_data_dir, where the base model draws missing pictures; or --prior_from_base, which needs none"
Holds = Callable[[Any], object]
RULES: tuple[tuple[str, Holds, str], ...] = (  # where the flag is given, the condition must hold
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
    ("instance_prompt", lambda s: (word(s) or "") in s.instance_prompt.lower(), "must contain the new word"),
    ("conditioning_data_dir", lambda s: not s.hint, f"has no use with --hint, which makes the conditioning pictures: {ONE}"),
    ("cache_latents", lambda s: s.center_crop, CROP),
    *((flag, lambda s, flag=flag: outside(s, flag), OWN) for flag in ("cache_dir", "class_data_dir")),
    *((flag, lambda s, flag=flag: apart(s, flag), APART) for flag in ("cache_dir", "class_data_dir")),
    ("cache_dir", lambda s: s.cache_latents, "cannot be joined with --no-cache_latents"),
    *((flag, lambda s: s.with_prior_preservation, "goes with --with_prior_preservation")
      for flag in ("class_data_dir", "class_prompt", "prior_from_base")),
    ("with_prior_preservation", lambda s: (s.class_prompt or "").strip(), 'needs --class_prompt, such as "a photo of a dog"'),
    ("with_prior_preservation", lambda s: s.class_data_dir or s.prior_from_base, CLASS),
    ("class_prompt", lambda s: word(s) is None or word(s) not in s.class_prompt.lower(), "must be without the new word"),
    ("report_to", lambda s: s.report_to == "none" or find_spec("tensorboard"), "needs a package: pip install tensorboard"),
    ("text_encoder_lr", lambda s: s.train_text_encoder, "goes with --train_text_encoder"),
    ("class_data_dir", lambda s: not s.prior_from_base, f"has no use with --prior_from_base: {ONE}"),
    ("aspect_ratio_buckets", lambda s: not s.class_data_dir, SQUARE),
)
