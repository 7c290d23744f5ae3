"""The flags of the commands that draw, as frozen dataclasses.

A class is a command: its docstring is the command's help, a field is a flag, and the line under the field is the flag's help.
The range of a value stands in its type (files/values.py). Nothing here imports torch, so that `--help` is quick.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from minidiff.core.errors import SettingsError
from minidiff.files.values import A_PATH, FINITE, between, check_values

Path = Annotated[str, A_PATH]
Finite = Annotated[float, FINITE]
Pictures = Annotated[int, between(1, 1000)]
NumberFormat = Literal["float32", "float16", "bfloat16"]


def need(holds: bool, what: str, give: str) -> None:
    """One check: SettingsError with what is wrong and what to give, unless the rule `holds`."""
    if not holds:
        raise SettingsError(f"{what}; give {give}.")


@dataclass(frozen=True)
class Flags:
    """The flags of every command here."""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work; the model's own limits come with the model."""
        check_values(self)


@dataclass(frozen=True)
class Sampling(Flags):
    """The flags of all commands that draw. Steps and guidance suit the pocket checkpoint; `pipe()` has 30 and 7.5."""

    pretrained_model_name_or_path: Path = "checkpoints/pocket"
    """The model: a folder with SD 1.5's layout, a Hugging Face id in the local cache, or one .safetensors file."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. Only a model in one file needs it."""
    lora: tuple[Path, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[Finite, ...] = ()
    """Strength of each LoRA. Default: 1."""
    lora_dir: str = "outputs"
    """Folder in which <lora:NAME:0.8> in a prompt finds the folder NAME or the file NAME.safetensors."""
    textual_inversion: tuple[Path, ...] = ()
    """Files or folders of new words that the prompt can then use."""
    negative_prompt: str = ""
    """Things that the picture should not show."""
    num_inference_steps: Annotated[int, between(1, 1000)] = 25
    """Steps from noise to picture. Most samplers call the U-Net once in each step."""
    guidance_scale: Finite = 5.0
    """How closely the picture follows the prompt. 1 or less switches guidance off."""
    sampler: str | None = None
    """ddpm, ddim, pndm, euler, euler_a, heun, dpm++_2m, dpm++_2m_sde, unipc or lcm. Default: the model's own."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """How the timesteps are spread. Default: as the model or the sampler has it."""
    use_karras_sigmas: bool | None = None
    """Use more of the steps where there is little noise; for samplers that work with sigma. Default: the model's own."""
    eta: Annotated[float, between(0, 1)] = 0.0
    """New noise in each step of ddim: 0 is none, 1 is as much as ddpm."""
    clip_skip: Annotated[int, between(0, 100)] = 0
    """Leave out the last N layers of the text encoder. A1111 counts one more: its "Clip skip: 2" is 1 here."""
    seed: int = 0
    """The first picture uses this seed, the next one seed + 1, and so on."""
    width: int | None = None
    """Width in pixels. Default: that of the model, or of --image."""
    height: int | None = None
    """Height in pixels. Default: that of the model, or of --image."""
    image: Path | None = None
    """Start from this picture instead of from noise. It is resized to --width and --height if they are given."""
    mask_image: Path | None = None
    """Draw only the white area of this mask anew. The rest of --image stays as it is."""
    strength: float | None = None
    """Share of the steps that change --image: 0.3 changes little, 1 almost everything. Default: 0.8, or 1 with a mask."""
    tile_size: int | None = None
    """Draw in overlapping tiles of N pixels, for pictures that do not fit in memory. Default: the whole picture at once."""
    compile: bool = False
    """Compile the U-Net (torch.compile) before the first step. This takes a minute and makes each step faster."""
    plain: bool = False
    """Compute as the textbook minidiff/core says, without the faster code of minidiff/fast. Slower; the same picture."""
    torch_dtype: NumberFormat | None = None
    """Number format of the U-Net and the text encoder. Default: float16 on a GPU, float32 on a CPU."""
    device: str | None = None
    """Where to draw: cpu or cuda. Default: cuda if there is a GPU."""

    def check(self) -> None:
        super().check()
        check_weights(self.lora, self.lora_weight)
        need(self.image is not None or self.mask_image is None, "--mask_image needs a picture to work on", "--image")
        need(self.image is not None or self.strength is None, "--strength needs a picture to start from", "--image")
        if self.strength is not None:
            need(0 < self.strength <= 1, f"--strength is {self.strength}", "a number above 0, up to 1")


def check_weights(loras: tuple[str, ...], weights: tuple[float, ...]) -> None:
    needed = f"--lora_weight has {len(weights)} numbers for {len(loras)} LoRAs"
    need(len(weights) in (0, len(loras)), needed, "one for each")


@dataclass(frozen=True)
class OnePrompt(Sampling):
    """The flags of the commands that draw one prompt."""

    prompt: Positional[str | None] = None
    """A description of the picture. (word:1.3) weighs more, [word] less; BREAK and <lora:NAME:0.8> work, too."""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", f'one, as in minidiff {type(self).__name__.lower()} "a red dog"')
        super().check()


@dataclass(frozen=True)
class ManyPrompts(Sampling):
    """The flags of the commands that draw several prompts."""

    prompts: Positional[tuple[str, ...]] = ()
    """One column for each prompt. With --columns or --rows, one prompt is enough."""

    def check(self) -> None:
        command = type(self).__name__.lower()
        need(bool(self.prompts), "there are no prompts", f'one or more, as in minidiff {command} "a dog" "a cat"')
        super().check()


@dataclass(frozen=True)
class Sample(OnePrompt):
    """Draw pictures from a prompt. With --from PICTURE.png, draw that picture again; other flags change it."""

    num_images_per_prompt: Pictures = 1
    """Number of pictures. Their seeds are seed, seed + 1, …"""
    output: str = "picture.png"
    """The PNG file. Several pictures become picture-0.png, picture-1.png, …"""
    preview: str | None = None
    """A small PNG file that is written again after every step, to watch the picture appear."""


@dataclass(frozen=True)
class Sheet(ManyPrompts):
    """Draw a labelled contact sheet over any two settings; or prompts before and after training."""

    columns: str | None = None
    """A setting and its values: guidance_scale=1.5,5,20 or seed=0..3 or lora_weight=0,0.5,1 …; or prompt."""
    rows: str | None = None
    """Another setting and its values: sampler=ddim,euler_a,unipc …"""
    num_images_per_prompt: Pictures = 1
    """Without --columns and --rows: number of pictures for each prompt. Their seeds are seed, seed + 1, …"""
    title: str = ""
    """A heading above the sheet."""
    tile: Annotated[int, between(16, 2048)] = 256
    """Size of each picture on the sheet in pixels."""
    output: str = "sheet.png"
    """The PNG file. It is written after the last picture, so Ctrl-C leaves no file."""

    def check(self) -> None:
        super().check()
        once = self.num_images_per_prompt == 1 or self.columns is self.rows is None
        need(once, "--num_images_per_prompt does nothing with --columns and --rows", "an axis such as seed=0..3")
        need(len(self.title) <= 500, f"--title is {len(self.title)} letters long", "500 at most")


@dataclass(frozen=True)
class Morph(ManyPrompts):
    """Draw a loop without a visible end through keyframes: prompts, seeds, or both."""

    seeds: tuple[int, ...] = ()
    """Seeds of the keyframes. Default: --seed for all prompts; or for one prompt seed, seed + 1 and seed + 2."""
    frames: int = 24
    """Frames from each keyframe to the next."""
    fps: float = 12.0
    """Frames per second."""
    ease: Literal["even", "smooth"] = "even"
    """Move at the same speed all the time, or slow down at each keyframe."""
    output: str = "morph.gif"
    """A .gif, .webp or .png (APNG) file. It is written after the last frame, so Ctrl-C leaves no file."""

    def check(self) -> None:
        super().check()
        keys = f"--seeds has {len(self.seeds)} numbers for {len(self.prompts)} prompts"
        need(len(self.prompts) == 1 or len(self.seeds) in (0, 1, len(self.prompts)), keys, "one for each, or one for all")
        need(self.image is None, "--image is no keyframe", "prompts and seeds; leave --image out")


@dataclass(frozen=True)
class Looking(OnePrompt):
    """The flags of the commands that look inside the U-Net."""

    def check(self) -> None:
        super().check()
        need(not self.compile, "--compile hides from this command what it looks at", "no --compile")


@dataclass(frozen=True)
class Filmstrip(Looking):
    """Show how a picture appears from noise: what the U-Net sees in each step, and the picture that it expects."""

    count: Annotated[int, between(1, 50)] = 8
    """How many of the steps to show."""
    output: str = "filmstrip.png"
    """The PNG file."""


@dataclass(frozen=True)
class Attention(Looking):
    """Show where in the picture the U-Net looks for each word of the prompt."""

    resolution: int | None = None
    """Use only the layers whose maps are N cells high. Default: all layers."""
    output: str = "attention.png"
    """The PNG file."""


@dataclass(frozen=True)
class Tokens(Flags):
    """Show how CLIP splits a prompt: tokens, weights, chunks, and what training would cut off."""

    prompt: Positional[str | None] = None
    """The prompt."""
    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model whose tokenizer is used."""
    trigger: str | None = None
    """The trigger word of a LoRA: is it one token?"""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff tokens "a red dog"')
