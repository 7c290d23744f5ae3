"""The flags of the commands for files, data and lessons."""

from dataclasses import dataclass
from typing import Annotated, Literal

from minidiff.cli.draw_flags import Finite, NumberFormat, Prediction, check_weights
from minidiff.files.values import A_FOLDER, A_PATH, POSITIVE, Flags, Positional, Rule, at_least, between

Path = Annotated[str, A_PATH]
Rank = Annotated[int, at_least(1)]
Style = Literal["diffusers", "kohya", "peft"]
Group = Literal["saved", "train", "picture", "start", "memory", "unet", "attention"]

# --- files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspect(Flags):
    """Describe a weight file: the program and model family it is for, ranks, trigger words, and problems."""

    file: Positional[Path]
    """A LoRA, a textual inversion, a model or a part of a model: a file or its folder; or a PNG."""
    json: bool = False
    """Print JSON, for scripts."""


@dataclass(frozen=True)
class Convert(Flags):
    """Write a file in another program's format, read it again, and print how much its numbers changed."""

    source: Positional[Path]
    """A LoRA, a textual inversion, a ControlNet or a model. Pickles (.ckpt, .pt, .bin) are read, none of their code runs."""
    output: Positional[Path]
    """A new .safetensors file, or a new folder if the format is a folder."""
    to: Literal["diffusers", "kohya", "peft", "ldm", "safetensors"] = "diffusers"
    """LoRA: diffusers, kohya, peft. Textual inversion: diffusers, kohya. Model, ControlNet: diffusers (a folder), ldm (one
    file for A1111 and ComfyUI). safetensors: the tensors of a pickle or an IP-Adapter, unchanged."""
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
    prediction_type: Prediction | None = None
    """Output of the U-Net of a model in one file: the file does not say it. Default: epsilon."""


@dataclass(frozen=True, kw_only=True)
class Merging(Flags):
    """The flags of all `merge` commands."""

    output: Path
    """The new file or folder. Nothing is overwritten."""
    dtype: NumberFormat | None = None
    """Number format. Default: that of the base for a model, float32 for an adapter."""


@dataclass(frozen=True, kw_only=True)
class WithAdapters(Merging):
    """The flags of `merge bake` and `merge join`."""

    lora: Annotated[tuple[Path, ...], Rule("needs one or more LoRA files or folders", bool)]
    """LoRA files or folders."""
    lora_weight: tuple[Finite, ...] = ()
    """Strength of each LoRA. Default: 1."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.lora_weight or (1.0,) * len(self.lora)

    def check(self) -> None:
        super().check()
        check_weights(self.lora, self.lora_weight)


@dataclass(frozen=True, kw_only=True)
class Bake(WithAdapters):
    """Add adapters to a model's weights: the result is a model folder or file that needs no LoRA."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model: a folder, a Hugging Face id in the local cache, or one .safetensors file."""
    tokenizer: str | None = None
    """Folder of a tokenizer, to write a model folder from one file."""
    prediction_type: Prediction | None = None
    """Output of the U-Net of a model in one file: the file does not say it. Default: epsilon."""


@dataclass(frozen=True, kw_only=True)
class Join(WithAdapters):
    """Make one adapter from several: exactly, or with --rank as closely as that rank allows."""

    rank: Rank | None = None
    """Largest rank of the result, by truncated SVD. Default: the sum of the ranks, which is exact."""
    to: Style = "diffusers"
    """Format to write."""


@dataclass(frozen=True, kw_only=True)
class Extract(Merging):
    """Make an adapter from the difference between a model and a fine-tuned one."""

    base: Positional[Path]
    """The model before fine-tuning: a folder or one file."""
    tuned: Positional[Path]
    """The model after fine-tuning."""
    rank: Rank = 16
    """Largest rank of the adapter, by truncated SVD. The error is printed."""
    to: Style = "diffusers"
    """Format to write."""


@dataclass(frozen=True, kw_only=True)
class Resize(Merging):
    """Reduce an adapter to a lower rank, as closely as possible, and print the error."""

    adapter: Positional[Path]
    """A LoRA file or folder."""
    rank: Rank = 4
    """Largest rank of the result."""
    to: Style = "diffusers"
    """Format to write."""


# --- data, lessons, measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataCheck(Flags):
    """Check a folder of training pictures: list all problems before training starts."""

    folder: Positional[str]
    """The folder, as for --instance_data_dir or --train_data_dir."""
    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model of the training to come."""
    instance_prompt: str | None = None
    """The prompt of all pictures without a caption. Without it, each picture needs one."""
    captions: bool = True
    """As in training: with --no_captions, --instance_prompt is for all pictures."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions."""
    resolution: Annotated[int, between(8, 8192)] | None = None
    """Side in pixels at which the pictures will be trained. Default: the side that the base model was made for."""
    aspect_ratio_buckets: bool = False
    """As in training: pictures keep their shape."""
    masked_loss: bool = False
    """As in training: check the masks, too."""


@dataclass(frozen=True)
class Watch(Flags):
    """Open the newest sheet and the loss curve of a run in a viewer, and again when they change; until Ctrl-C."""

    output_dir: Positional[str]
    """The --output_dir of the training."""


@dataclass(frozen=True)
class Lesson(Flags):
    """Run a lesson. Its figures are written to outputs/lessons. Without a number: list the lessons."""

    number: Positional[int | None] = None
    """The lesson to run."""


@dataclass(frozen=True)
class Completion(Flags):
    """Let Tab complete commands and flags. A line that reads the completions is added to .bashrc or .zshrc."""

    shell: Positional[Literal["bash", "zsh"] | None] = None
    """Default: your own, as $SHELL names it."""


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
    output_dir: Annotated[str, A_FOLDER] = "outputs/bench"
    """Folder for bench.png, bench.json, and without --quick a random model of SD 1.5's size (4 GB)."""
