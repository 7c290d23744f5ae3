"""The flags of the commands for files, data and lessons, and the table of all commands. See draw_flags.py."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from minidiff.cli.draw_flags import (
    Attention,
    Filmstrip,
    Finite,
    Flags,
    Morph,
    NumberFormat,
    Sample,
    Sheet,
    Tokens,
    check_weights,
    need,
)
from minidiff.files.values import A_FOLDER, POSITIVE, at_least, between
from minidiff.pocket.settings import LadderSettings, PretrainSettings
from minidiff.trainer.methods import (
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)

Folder = Annotated[str, A_FOLDER]
Rank = Annotated[int, at_least(1)]
Style = Literal["diffusers", "kohya", "peft"]
Group = Literal["saved", "train", "picture", "start", "memory", "unet", "attention"]


# --- files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspect(Flags):
    """Describe a weight file: the program and model family it is for, ranks, trigger words, and problems."""

    file: Positional[str]
    """A LoRA, a textual inversion, a model or a part of a model: a file or its folder."""
    pretrained_model_name_or_path: str | None = None
    """A model folder: how many tensors of the file fit in it?"""
    json: bool = False
    """Print JSON, for scripts."""

    def check(self) -> None:
        need(bool(self.file.strip()), "the file has no name", "a file or folder")


@dataclass(frozen=True)
class Convert(Flags):
    """Write a file in another program's format, read it again, and print how much its numbers changed."""

    source: Positional[str]
    """A LoRA, a textual inversion or a whole model. Pickles (.ckpt, .pt, .bin) can be read here; their code does not run."""
    output: Positional[str]
    """A new .safetensors file, or a new folder if the format is a folder."""
    to: Literal["diffusers", "kohya", "peft", "ldm", "safetensors"] = "diffusers"
    """LoRA: diffusers, kohya, peft. Textual inversion: diffusers, kohya. Model: diffusers (a folder), ldm (one file for
    A1111 and ComfyUI). safetensors: the tensors of a pickle, unchanged."""
    dtype: NumberFormat | None = None
    """Number format. Default: that of the source."""
    alpha: Annotated[float, POSITIVE] | None = None
    """Alpha of a LoRA whose file does not name it."""
    token: str | None = None
    """The word of a textual inversion whose file names no word, or several; or a new name for it."""
    pretrained_model_name_or_path: str | None = None
    """A model folder with the sizes of the networks and the tokenizer, for a source in one file. Default: SD 1.5's sizes."""
    tokenizer: str | None = None
    """Folder of a tokenizer. One file has none, and a model folder needs one."""

    def check(self) -> None:
        super().check()
        need(bool(self.output.strip()), "the output has no name", "a new file or folder")


@dataclass(frozen=True)
class Merging(Flags):
    """The flags of all `merge` commands."""

    output: str = ""
    """The new file or folder. Nothing is overwritten."""
    dtype: NumberFormat | None = None
    """Number format. Default: that of the base for a model, float32 for an adapter."""

    def check(self) -> None:
        super().check()
        need(bool(self.output.strip()), "--output is missing", "a new file or folder")


@dataclass(frozen=True)
class WithAdapters(Merging):
    """The flags of `merge bake` and `merge join`."""

    lora: tuple[str, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[Finite, ...] = ()
    """Strength of each LoRA. Default: 1."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.lora_weight or (1.0,) * len(self.lora)

    def check(self) -> None:
        super().check()
        need(bool(self.lora), "--lora is missing", "one or more LoRA files or folders")
        check_weights(self.lora, self.lora_weight)


@dataclass(frozen=True)
class Bake(WithAdapters):
    """Add adapters to a model's weights: the result is a model folder or file that needs no LoRA."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model: a folder, a Hugging Face id in the local cache, or one .safetensors file."""
    tokenizer: str | None = None
    """Folder of a tokenizer, to write a model folder from one file."""


@dataclass(frozen=True)
class Join(WithAdapters):
    """Make one adapter from several: exactly, or with --rank as closely as that rank allows."""

    rank: Rank | None = None
    """Largest rank of the result, by truncated SVD. Default: the sum of the ranks, which is exact."""
    to: Style = "diffusers"
    """Format to write."""


@dataclass(frozen=True)
class Extract(Merging):
    """Make an adapter from the difference between a model and a fine-tuned one."""

    base: Positional[str] = ""
    """The model before fine-tuning: a folder or one file."""
    tuned: Positional[str] = ""
    """The model after fine-tuning."""
    rank: Rank = 16
    """Largest rank of the adapter, by truncated SVD. The error is printed."""
    to: Style = "diffusers"
    """Format to write."""

    def check(self) -> None:
        need(bool(self.base and self.tuned), "two models are needed", "the base and the tuned one")
        super().check()


@dataclass(frozen=True)
class Resize(Merging):
    """Reduce an adapter to a lower rank, as closely as possible, and print the error."""

    adapter: Positional[str] = ""
    """A LoRA file or folder."""
    rank: Rank = 4
    """Largest rank of the result."""
    to: Style = "diffusers"
    """Format to write."""

    def check(self) -> None:
        need(bool(self.adapter), "there is no adapter", "a LoRA file or folder")
        super().check()


# --- data, lessons, measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataCheck(Flags):
    """Check a folder of training pictures: list all problems before training starts."""

    folder: Positional[str]
    """The folder, as for --instance_data_dir or --train_data_dir."""
    instance_prompt: str | None = None
    """The prompt of all pictures. Without it, each picture needs a caption."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions."""
    resolution: Annotated[int, between(8, 8192)] = 512
    """Side in pixels at which the pictures will be trained. The pocket checkpoint uses 128."""
    aspect_ratio_buckets: bool = False
    """As in training: pictures keep their shape."""
    masked_loss: bool = False
    """As in training: check the masks, too."""


@dataclass(frozen=True)
class Lesson(Flags):
    """Run a lesson. Its figures are written to outputs/lessons."""

    number: Positional[int]
    """0: the three stations. 5: samplers. 11: LoRA. 13: the ladder."""


@dataclass(frozen=True)
class Judge(Flags):
    """Score a pocket checkpoint: does it draw what unseen prompts say, and how sharp is its autoencoder?"""

    folder: Positional[str] = "checkpoints/pocket"
    """The checkpoint."""
    count: Annotated[int, between(1, 512)] = 500
    """How many unseen prompts to draw. There are 512."""
    judge: str = "outputs/judge.safetensors"
    """The classifier. It is trained first if the file does not exist."""


@dataclass(frozen=True)
class Bench(Flags):
    """Compare minidiff with diffusers + peft on this machine; from a checkout, with pip install -e ".[bench]"."""

    quick: bool = False
    """Measure only small work: five minutes on two cores."""
    only: tuple[Group, ...] = ()
    """Measure only some of these. Default: all."""
    compile: bool = True
    """Let the other programs use torch.compile (never with --quick: it takes minutes)."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to measure: cpu or cuda. Default: cuda if there is a GPU."""
    output_dir: Folder = "outputs/bench"
    """Folder for bench.png, bench.json, and without --quick a random model of SD 1.5's size (4 GB)."""


COMMANDS: dict[str, tuple[type, str]] = {  # what is typed -> its flags, and the function that gets them: file:function in cli/
    "sample": (Sample, "draw_commands:sample"),
    "sheet": (Sheet, "draw_commands:sheet"),
    "morph": (Morph, "draw_commands:morph"),
    "filmstrip": (Filmstrip, "draw_commands:filmstrip"),
    "attention": (Attention, "draw_commands:attention"),
    "tokens": (Tokens, "draw_commands:tokens"),
    "train full": (FullSettings, "train_commands:train"),
    "train dreambooth": (DreamBoothSettings, "train_commands:train"),
    "train lora": (LoRASettings, "train_commands:train"),
    "train textual_inversion": (TextualInversionSettings, "train_commands:train"),
    "train pivotal": (PivotalSettings, "train_commands:train"),
    "data check": (DataCheck, "train_commands:data_check"),
    "inspect": (Inspect, "files_commands:inspect"),
    "convert": (Convert, "files_commands:convert"),
    "merge bake": (Bake, "files_commands:bake"),
    "merge join": (Join, "files_commands:join"),
    "merge extract": (Extract, "files_commands:extract"),
    "merge resize": (Resize, "files_commands:resize"),
    "ladder": (LadderSettings, "train_commands:ladder"),
    "lesson": (Lesson, "train_commands:lesson"),
    "bench": (Bench, "train_commands:bench"),
    "pretrain": (PretrainSettings, "train_commands:pretrain"),
    "judge": (Judge, "train_commands:judge"),
}
