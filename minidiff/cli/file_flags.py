"""The flags of `inspect`, `convert` and `merge`, in the style of flags.py. Nothing here imports torch."""

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from minidiff.cli.flags import need

Dtype = Literal["float32", "float16", "bfloat16"]
Style = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class Inspect:
    """Say what a weight file is: its program and model family, ranks, trigger words, and what is odd about it."""

    file: Positional[str]
    """A LoRA, a textual inversion, a model or a part of one; a file or its folder."""
    pretrained_model_name_or_path: str | None = None
    """A model folder: how many tensors of the file find their place in it?"""
    json: bool = False
    """Print it as JSON, for scripts."""

    def check(self) -> None:
        need(bool(self.file.strip()), "the file has no name", "a file or folder", flag=False)


@dataclass(frozen=True)
class Convert:
    """Write a file in another program's form, read it again, and say how far its numbers moved."""

    source: Positional[str]
    """A LoRA, a textual inversion or a whole model; pickles (.ckpt, .pt, .bin) are opened here; no code of theirs runs."""
    output: Positional[str]
    """A new .safetensors file or, where the form is one, a new folder."""
    to: Literal["diffusers", "kohya", "peft", "ldm", "safetensors"] = "diffusers"
    """LoRA: diffusers, kohya, peft. Textual inversion: diffusers, kohya. Model: diffusers (a folder), ldm (one file for
    A1111 and ComfyUI). safetensors: a pickle's tensors, as they are."""
    dtype: Dtype | None = None
    """Number format; default: that of the source."""
    alpha: float | None = None
    """For a LoRA that does not say its own."""
    token: str | None = None
    """The word, for a textual inversion that does not say it, or holds several; or another word for it."""
    pretrained_model_name_or_path: str | None = None
    """A model folder that says how a single file's networks are built; default: as SD 1.5. Its tokenizer goes along."""
    tokenizer: str | None = None
    """Folder of a tokenizer; a single file has none, and a model folder needs one."""

    def check(self) -> None:
        need(self.alpha is None or 0 < self.alpha < math.inf, f"alpha is {self.alpha}", "a positive number")
        need(bool(self.output.strip()), "the output has no name", "a new file or folder", flag=False)


@dataclass(frozen=True)
class Merging:
    """What the `merge` commands share."""

    output: str = ""
    """The new file or folder; nothing is overwritten."""
    dtype: Dtype | None = None
    """Number format. Default: that of the base for a model, float32 for an adapter."""

    def check(self) -> None:
        need(bool(self.output.strip()), "output is missing", "a new file or folder")


@dataclass(frozen=True)
class WithAdapters(Merging):
    """What `bake` and `join` share."""

    lora: tuple[str, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[float, ...] = ()
    """Strength of each LoRA; default: 1."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.lora_weight or (1.0,) * len(self.lora)

    def check(self) -> None:
        super().check()
        need(bool(self.lora), "lora is missing", "one or more LoRA files or folders")
        weights = f"lora_weight has {len(self.lora_weight)} numbers for {len(self.lora)} LoRAs"
        need(len(self.lora_weight) in (0, len(self.lora)), weights, "one for each")
        finite = all(map(math.isfinite, self.lora_weight))
        need(finite, f"lora_weight is {' '.join(map(str, self.lora_weight))}", "finite numbers, such as 0.8")


@dataclass(frozen=True)
class Bake(WithAdapters):
    """Fold adapters into a model for good: a model folder or a single file that needs no LoRA any more."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model: a folder, a hub id in the local cache, or a single .safetensors file."""
    tokenizer: str | None = None
    """Folder of a tokenizer, where a single file becomes a folder."""


@dataclass(frozen=True)
class Join(WithAdapters):
    """Make one adapter of several, exactly; with --rank, as near as that rank comes."""

    rank: int | None = None
    """At most this rank, by truncated SVD; default: exact, and the ranks add up."""
    to: Style = "diffusers"
    """The style to write."""

    def check(self) -> None:
        super().check()
        need(self.rank is None or self.rank >= 1, f"rank is {self.rank}", "at least 1")


@dataclass(frozen=True)
class Extract(Merging):
    """Get the adapter that leads from one model to a fine-tuned one."""

    base: Positional[str] = ""
    """The model before: a folder or a single file."""
    tuned: Positional[str] = ""
    """The model after."""
    rank: int = 16
    """At most this rank, by truncated SVD; the error is printed."""
    to: Style = "diffusers"
    """The style to write."""

    def check(self) -> None:
        need(bool(self.base and self.tuned), "two models are needed", "the base and the tuned one", flag=False)
        super().check()
        need(self.rank >= 1, f"rank is {self.rank}", "at least 1")


@dataclass(frozen=True)
class Resize(Merging):
    """Cut an adapter to a lower rank, the best of that rank, and print what is lost."""

    adapter: Positional[str] = ""
    """A LoRA file or folder."""
    rank: int = 4
    """At most this rank."""
    to: Style = "diffusers"
    """The style to write."""

    def check(self) -> None:
        need(bool(self.adapter), "there is no adapter", "a LoRA file or folder", flag=False)
        super().check()
        need(self.rank >= 1, f"rank is {self.rank}", "at least 1")
