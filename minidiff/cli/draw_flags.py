"""The flags of the commands that draw, as frozen dataclasses.

A class is a command: its docstring is the command's help, a field is a flag, and the line under the field is the flag's help.
The range of a value stands in its type (files/values.py). Nothing here imports torch, so that `--help` is quick.
"""

import math
import os
import pathlib
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from secrets import randbelow
from typing import Annotated, Any, Literal, Self
from warnings import warn

from minidiff.core.errors import SettingsError
from minidiff.files.bundled import here_or_bundled
from minidiff.files.folder import check_sampler, config_of, local_folder
from minidiff.files.values import A_PATH, FINITE, Flags, Positional, Rule, between, near_path

Path = Annotated[str, A_PATH]
Finite = Annotated[float, FINITE]
Prompts = Annotated[tuple[str, ...], Rule('must be one or more, as in "a dog" "a cat"', bool)]
Side = Annotated[int, between(1, 8192)]  # pixels
Share = Annotated[float, between(0, 1)]
Count = Annotated[int, between(1, 1000)]
NumberFormat = Literal["float32", "float16", "bfloat16"]
Prediction = Literal["epsilon", "v_prediction"]
FILES = (
    *("tokenizer", "lora", "textual_inversion", "image", "mask_image", "ip_adapter", "ip_adapter_image", "image_encoder"),
    *("controlnet", "control_image"),
)


def check_weights(loras: tuple[str, ...], weights: tuple[float, ...]) -> None:
    if len(weights) not in (0, len(loras)):
        raise SettingsError(f"--lora_weight has {len(weights)} numbers for {len(loras)} LoRAs; give one for each.")


def picture_size(path: str) -> tuple[int, int]:
    """Width and height as a viewer shows it; (1, 1) for a file that is no picture, which is told when it is read."""
    from PIL import Image

    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
        return (image.height, image.width) if image.getexif().get(0x0112, 1) > 4 else image.size  # turned by a quarter
    return 1, 1


def own_side(name: str) -> tuple[int, int]:
    """Pixels of the model's own side, and of a latent cell."""
    if os.path.isfile(name):
        return 512, 8
    unet, vae = (config_of(local_folder(name) / part)[0] for part in ("unet", "vae"))
    cell = 2 ** (len(vae.get("block_out_channels", [1] * 4)) - 1)
    return int(unet.get("sample_size", 64)) * cell, cell


@dataclass(frozen=True, kw_only=True)
class Sampling(Flags):
    """The flags of all commands that draw. Steps and guidance suit the pocket checkpoint; `pipe()` has 30 and 7.5."""

    pretrained_model_name_or_path: Path = "checkpoints/pocket"
    """The model: a folder with SD 1.5's layout, a Hugging Face id in the local cache, or one .safetensors file."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. Only a model in one file needs it."""
    prediction_type: Prediction | None = None
    """Output of the U-Net of a model in one file: the file does not say it. Default: epsilon."""
    lora: tuple[Path, ...] = ()
    """LoRA files or folders. Of a folder of `train pivotal`, the new word is loaded, too."""
    lora_weight: tuple[Finite, ...] = ()
    """Strength of each LoRA. Default: 1."""
    lora_dir: str = "outputs"
    """Folder in which <lora:NAME:0.8> in a prompt finds the folder NAME or the file NAME.safetensors."""
    textual_inversion: tuple[Path, ...] = ()
    """Files or folders of new words that the prompt can then use."""
    negative_prompt: str = ""
    """Things that the picture should not show."""
    num_inference_steps: Count = 25
    """Steps from noise to picture. Most samplers call the U-Net once in each step."""
    guidance_scale: Finite = 5.0
    """How closely the picture follows the prompt. 1 or less switches guidance off."""
    sampler: str | None = None
    """ddpm, ddim, pndm, euler, euler_a, heun, dpm++_2m, dpm++_2m_sde, unipc, lcm or tcd. Default: the model's own."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """How the timesteps are spread. Default: as the model or the sampler has it."""
    use_karras_sigmas: bool | None = None
    """Use more of the steps where there is little noise; for samplers that work with sigma. Default: the model's own."""
    eta: Annotated[float, between(0, 1)] = 0.0
    """New noise in each step of ddim or tcd: 0 is none, 1 is as much as ddpm, or lcm."""
    clip_skip: Annotated[int, between(0, 100)] = 0
    """Leave out the last N layers of the text encoder. A1111 counts one more: its "Clip skip: 2" is 1 here."""
    seed: int = 0
    """The first picture uses this seed, the next one seed + 1, and so on. -1: a new one, which is printed."""
    width: Side | None = None
    """Width in pixels. Default: that of the model, or of --image."""
    height: Side | None = None
    """Height in pixels. Default: that of the model, or of --image."""
    image: Path | None = None
    """Start from this picture instead of from noise. It is resized to --width and --height if they are given."""
    resize: bool = False
    """Draw at the model's own size, in the shape of --image or --control_image."""
    mask_image: Path | None = None
    """Draw only the white area of this mask anew; or of a copy of --image with a hole in it, the hole. The rest stays."""
    strength: Annotated[float, between(0, 1)] | None = None
    """Share of the steps that change --image: 0.1 sharpens, 0.3 changes details, 0.8 most, 1 everything. Default: 0.8; 1 with
    a mask; 0.1 where the picture is enlarged."""
    ip_adapter: Path | None = None
    """IP-Adapter, a file or a folder: it draws what the pictures of --ip_adapter_image show, with or without a prompt."""
    ip_adapter_image: tuple[Path, ...] = ()
    """Pictures that the IP-Adapter looks at, side by side; of each it sees the square in the middle."""
    ip_adapter_scale: tuple[Finite, ...] = (1.0,)
    """How much these pictures count: 1 without a prompt, about 0.5 beside one; or a number for each cross-attention."""
    image_encoder: Path | None = None
    """Folder of the IP-Adapter's image tower. Default: image_encoder beside its file, or in the model's folder."""
    controlnet: tuple[Path, ...] = ()
    """ControlNets, files or folders: the picture follows --control_image."""
    control_image: tuple[Path, ...] = ()
    """A picture for each ControlNet: edges, depth, … Default: --image, which tile ControlNets want."""
    hint: Literal["canny"] | None = None
    """Make --control_image from a photograph: canny finds its edges."""
    controlnet_conditioning_scale: tuple[Finite, ...] = (1.0,)
    """How closely the picture follows: one number, or one for each ControlNet."""
    control_guidance_start: tuple[Share, ...] = (0.0,)
    """Share of the steps after which a ControlNet begins to act."""
    control_guidance_end: tuple[Share, ...] = (1.0,)
    """Share of the steps after which it acts no more."""
    guess_mode: bool = False
    """Follow --control_image without a prompt: it acts on the guided half alone, and less on fine structure."""
    tile_size: Side | None = None
    """Draw in overlapping tiles of N pixels, for pictures that do not fit in memory. Default: the whole picture at once."""
    compile: bool = False
    """Compile the U-Net (torch.compile) before the first step. This takes a minute and makes each step faster."""
    plain: bool = False
    """Compute as the textbook minidiff/core says, without the faster code of minidiff/fast. Slower; the same picture."""
    torch_dtype: NumberFormat | None = None
    """Number format of the U-Net and the text encoder. Default: float16 on a GPU, float32 on a CPU."""
    device: str | None = None
    """Where to draw: cpu, cuda, or mps on a Mac. Default: a GPU if there is one."""

    def check(self) -> None:
        super().check()
        check_weights(self.lora, self.lora_weight)
        if self.sampler is not None:
            check_sampler(self.sampler)
        if bool(self.ip_adapter) != bool(self.ip_adapter_image):
            raise SettingsError("--ip_adapter and --ip_adapter_image need each other: the adapter, and what it looks at.")
        if self.controlnet and not (self.control_image or self.image) or self.control_image and not self.controlnet:
            raise SettingsError("--controlnet and --control_image need each other: the net, and the picture that it follows.")
        if self.hint and not self.control_image:
            raise SettingsError("--hint needs --control_image, the photograph from which the hint is made.")
        for flag, value in ((name, getattr(self, name)) for name in FILES):
            for path in (value,) if isinstance(value, str) else value or ():
                if not here_or_bundled(path).exists() and (os.path.isdir(os.path.dirname(path) or ".") or path.count("/") != 1):
                    raise SettingsError(f"--{flag} {path}: no such file or folder.{near_path(path)}")  # nor a hub id
                if flag == "lora" and os.path.exists(os.path.join(path, "model_index.json")):
                    raise SettingsError(f"--lora {path} is a whole model; give it as --pretrained_model_name_or_path {path}")

    def settled(self) -> Self:
        """A new seed for -1; sizes, strength and prompt that suit --image. SettingsError if it is far larger than the model."""
        if self.seed == -1:
            new_seed = replace(self, seed=randbelow(2**31))
            print(f"seed {new_seed.seed}")
            return new_seed.settled()
        picture, flag = (self.image, "image") if self.image else ((*self.control_image, None)[0], "control_image")
        if self.resize and (picture is None or self.width or self.height or self.tile_size):
            raise SettingsError("--resize needs --image or --control_image, and no --width, --height and --tile_size.")
        if picture is None:
            return self
        w, h = picture_size(picture)
        own, cell = own_side(self.pretrained_model_name_or_path)
        fit = [max(round(side * own / math.sqrt(w * h) / cell), 1) * cell for side in (w, h)]
        if self.resize:
            return replace(self, resize=False, width=fit[0], height=fit[1])
        if w * h > 4 * own * own and not (self.width or self.height or self.tile_size):
            raise SettingsError(
                f"--{flag} {picture} has {w} x {h} pixels, and the model draws {own} x {own}: it would take long and repeat "
                f"things. Give --resize, for {fit[0]} x {fit[1]}; or --width or --height."
            )
        new: dict[str, Any] = {}
        if self.image is None or max((self.width or 0) / w, (self.height or 0) / h) <= 1.2:
            return self
        if self.mask_image is None and self.strength is None:
            new["strength"] = share = 0.5 if self.controlnet else 0.1
            warn(f"--image is enlarged with --strength {share}; 0.1 sharpens it, 0.3 changes details, 0.8 most.", stacklevel=2)
        if not self.tile_size and max(self.width or 0, self.height or 0) > 1.5 * own:
            new["tile_size"] = own
            warn(f"it is drawn in tiles of {own} pixels (--tile_size), for which the model was made.", stacklevel=2)
        if (self.tile_size or new.get("tile_size")) and vars(self).get("prompt"):
            new |= {"prompt": "", "guidance_scale": 1.0}
            warn("the prompt is left out: each tile shows a part of the picture, and would draw all of it.", stacklevel=2)
        return replace(self, **new)

    def beside(self) -> Self:
        """With the next free name, such as outputs/picture-0002.png, where a file of the default --output is there already."""
        me: Any = self
        path = pathlib.Path(me.output)
        names = (path if i == 1 else path.with_name(f"{path.stem}-{i:04}{path.suffix}") for i in count(1))
        free = next(n for n in names if not any(one.exists() for one in (n, n.with_name(f"{n.stem}-0{n.suffix}"))))
        return replace(me, output=free.as_posix())


@dataclass(frozen=True, kw_only=True)
class OnePrompt(Sampling):
    """The flags of the commands that draw one prompt."""

    prompt: Positional[str]
    """A description of the picture. (word:1.3) weighs more, [word] less; BREAK and <lora:NAME:0.8> work, too."""


@dataclass(frozen=True, kw_only=True)
class Sample(OnePrompt):
    """Draw pictures from a prompt. With --from PICTURE.png, draw that picture again; other flags change it."""

    num_images_per_prompt: Count = 1
    """Number of pictures. Their seeds are seed, seed + 1, …"""
    output: Path = "outputs/picture.png"
    """The PNG file. Several pictures become picture-0.png, picture-1.png, … The default takes the next free name."""


@dataclass(frozen=True, kw_only=True)
class Sheet(Sampling):
    """Draw a labelled contact sheet over any two settings; or prompts before and after training."""

    prompts: Positional[Prompts]
    """One column for each prompt. With --columns or --rows, one prompt is enough."""
    columns: str | None = None
    """A setting and its values: guidance_scale=1.5,5,20 or seed=0..3 or lora_weight=0,0.5,1 …; or prompt."""
    rows: str | None = None
    """Another setting and its values: sampler=ddim,euler_a,unipc …"""
    num_images_per_prompt: Count = 1
    """Without --columns and --rows: number of pictures for each prompt. Their seeds are seed, seed + 1, …"""
    title: str = ""
    """A heading above the sheet."""
    tiles_per_row: Count | None = None
    """With one axis: how many pictures stand in a row. Default: up to six."""
    tile: Annotated[int, between(16, 2048)] = 256
    """Size of each picture on the sheet in pixels."""
    output: Path = "outputs/sheet.png"
    """The PNG file. It is written after the last picture, so Ctrl-C leaves no file."""


@dataclass(frozen=True, kw_only=True)
class Morph(Sampling):
    """Draw a loop without a visible end through keyframes: prompts, seeds, or both."""

    prompts: Positional[Prompts]
    """The prompts of the keyframes. One prompt is enough for several seeds."""
    seeds: tuple[int, ...] = ()
    """Seeds of the keyframes. Default: --seed for all prompts; or for one prompt seed, seed + 1 and seed + 2."""
    frames: Annotated[int, between(1, 1000)] = 24
    """Frames from each keyframe to the next."""
    fps: Annotated[float, between(0.1, 50)] = 12.0
    """Frames per second."""
    output: Path = "outputs/morph.webp"
    """A .webp or .gif file. It is written after the last frame, so Ctrl-C leaves no file."""


@dataclass(frozen=True, kw_only=True)
class Filmstrip(OnePrompt):
    """Show how a picture appears from noise: what the U-Net sees in each step, and the picture that it expects."""

    count: Annotated[int, between(1, 50)] = 8
    """How many of the steps to show."""
    output: Path = "outputs/filmstrip.png"
    """The PNG file."""


@dataclass(frozen=True, kw_only=True)
class Attention(OnePrompt):
    """Show where in the picture the U-Net looks for each word of the prompt."""

    output: Path = "outputs/attention.png"
    """The PNG file."""


@dataclass(frozen=True)
class Tokens(Flags):
    """Show how CLIP splits a prompt: tokens, weights, chunks, and what training would cut off."""

    prompt: Positional[str]
    """The prompt."""
    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model whose tokenizer is used."""
    trigger: str | None = None
    """The trigger word of a LoRA: is it one token?"""
