"""The flags of what draws, and of `lesson`, `judge`, `data check`, `ladder`, `bench`. Training's: trainer/settings.py.

As there, the line under a field is its help, and nothing imports torch.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Positional

from minidiff.core.errors import SettingsError


def need(holds: bool, what: str, give: str, flag: bool = True) -> None:
    """One check: what is wrong, and what works."""
    if not holds:
        raise SettingsError(f"{'--' if flag else ''}{what}; give {give}.")


@dataclass(frozen=True)
class Sampling:
    """What all commands that draw share. Steps and guidance suit the pocket checkpoint; `pipe()` has diffusers' 30 and 7.5."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """A model folder in SD 1.5's layout, a hub id in the local cache, or a single .safetensors file."""
    tokenizer: str | None = None
    """Folder of the tokenizer; only a single-file model needs one."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders."""
    lora_weight: tuple[float, ...] = ()
    """Strength of each LoRA; default: 1."""
    lora_dir: str = "outputs"
    """Where <lora:NAME:0.8> in a prompt looks for NAME, a folder or NAME.safetensors."""
    textual_inversion: tuple[str, ...] = ()
    """Files or folders of new words, which the prompt may then use."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    num_inference_steps: int = 25
    """Steps from noise to picture; most samplers call the U-Net once in each."""
    guidance_scale: float = 5.0
    """How strongly the prompt is followed; 1 or less turns guidance off."""
    sampler: str | None = None
    """ddpm, ddim, pndm, euler, euler_a, heun, dpm++_2m, dpm++_2m_sde, unipc or lcm; default: the model's own."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """Which timesteps are visited; default: the model's or the sampler's own."""
    use_karras_sigmas: bool | None = None
    """More of the steps at little noise, for samplers that go by sigma; default: the model's own."""
    eta: float = 0.0
    """Fresh noise in each step of ddim: 0 none, 1 as much as ddpm."""
    clip_skip: int = 0
    """Leave out so many of the text encoder's last layers. A1111's "Clip skip" is one higher: its 2 is 1 here."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    width: int | None = None
    """In pixels; default: the model's own, or the picture's."""
    height: int | None = None
    """In pixels; default: the model's own, or the picture's."""
    image: str | None = None
    """A picture to start from, instead of noise alone; --width and --height, where given, enlarge it first."""
    mask_image: str | None = None
    """White: what of --image is drawn anew. The rest stays as it is."""
    strength: float | None = None
    """Share of the steps walked from --image: 0.3 retouches, 1 hardly looks at it. Default: 0.8; with a mask 1."""
    tile_size: int | None = None
    """Draw in overlapping tiles of so many pixels, for pictures larger than the memory; default: in one piece."""
    compile: bool = False
    """Compile the U-Net (torch.compile) before the first step: takes a minute, and then saves time at every step."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the U-Net and text encoder; default: float16 on a GPU, else float32."""
    device: str | None = None
    """cpu or cuda; default: cuda if there is one."""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for a value that cannot work; the model's own limits come with the model."""
        for name in ("pretrained_model_name_or_path", "tokenizer", "lora", "textual_inversion", "image", "mask_image"):
            value = getattr(self, name)
            need("" not in (value if isinstance(value, tuple) else (value,)), f"{name} is empty", "a path, or leave it out")
        if not 1 <= self.num_inference_steps <= 1000:
            raise SettingsError(f"--num_inference_steps is {self.num_inference_steps}; it can be 1 to 1000.")
        need(0 <= self.eta <= 1, f"eta is {self.eta}", "0 … 1")
        need(0 <= self.clip_skip <= 100, f"clip_skip is {self.clip_skip}", "0, or how many layers to leave out")
        weights = f"lora_weight has {len(self.lora_weight)} numbers for {len(self.lora)} LoRAs"
        need(len(self.lora_weight) in (0, len(self.lora)), weights, "one for each")
        finite = all(map(math.isfinite, self.lora_weight))
        need(finite, f"lora_weight is {' '.join(map(str, self.lora_weight))}", "finite numbers, such as 0.8")
        need(math.isfinite(self.guidance_scale), f"guidance_scale is {self.guidance_scale}", "a number, such as 5")
        need(self.image is not None or self.mask_image is None, "mask_image needs a picture to work on", "--image")
        need(self.image is not None or self.strength is None, "strength needs a picture to start from", "--image")
        if self.strength is not None:
            need(0 < self.strength <= 1, f"strength is {self.strength}", "a number above 0, up to 1")


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw pictures from a prompt, or with --from PICTURE.png as that one was drawn; other flags win."""

    prompt: Positional[str | None] = None
    """What the pictures should show. (word:1.3) weighs more, [word] less; BREAK, and <lora:NAME:0.8>, work too."""
    num_images_per_prompt: int = 1
    """Pictures, from seed, seed + 1, …"""
    output: str = "picture.png"
    """The PNG file; with several pictures: picture-0.png, picture-1.png, …"""
    preview: str | None = None
    """A small PNG that is rewritten at every step, to watch the picture come."""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff sample "a red dog"', flag=False)
        need(1 <= self.num_images_per_prompt <= 1000, f"num_images_per_prompt is {self.num_images_per_prompt}", "1 … 1000")
        super().check()


@dataclass(frozen=True)
class Sheet(Sampling):
    """Draw a labelled contact sheet over any two settings; or prompts before and after what was learned."""

    prompts: Positional[tuple[str, ...]] = ()
    """One column each; with --columns or --rows, one is enough."""
    columns: str | None = None
    """A setting and its values: guidance_scale=1.5,5,20 or seed=0..3 or lora_weight=0,0.5,1 …; or prompt."""
    rows: str | None = None
    """Another: sampler=ddim,euler_a,unipc …"""
    num_images_per_prompt: int = 1
    """Without --columns and --rows: pictures of each prompt, from seed, seed + 1, …"""
    title: str = ""
    """A heading above the sheet."""
    tile: int = 256
    """Size of each picture on the sheet, in pixels."""
    output: str = "sheet.png"
    """The PNG file, written once all pictures are drawn: Ctrl-C leaves none."""

    def check(self) -> None:
        need(bool(self.prompts), "there are no prompts", 'one or more, as in minidiff sheet "a dog" "a cat"', flag=False)
        need(1 <= self.num_images_per_prompt <= 1000, f"num_images_per_prompt is {self.num_images_per_prompt}", "1 … 1000")
        need(16 <= self.tile <= 2048, f"tile is {self.tile}", "16 … 2048 pixels")
        once = self.num_images_per_prompt == 1 or self.columns is self.rows is None
        need(once, "num_images_per_prompt does nothing with --columns and --rows", "an axis such as seed=0..3")
        need(len(self.title) <= 500, f"title is {len(self.title)} letters long", "500 at most")
        super().check()


@dataclass(frozen=True)
class Morph(Sampling):
    """Draw a seamless loop through keyframes: prompts, seeds, or both."""

    prompts: Positional[tuple[str, ...]] = ()
    """The keyframes' prompts; one for all, or one for each seed."""
    seeds: tuple[int, ...] = ()
    """The keyframes' seeds; default: --seed for every prompt, or seed, seed + 1, seed + 2 for a single prompt."""
    frames: int = 24
    """From each keyframe to the next."""
    fps: float = 12.0
    """Frames a second."""
    ease: Literal["even", "smooth"] = "even"
    """The same pace all the way, or a rest at each keyframe."""
    output: str = "morph.gif"
    """A .gif, .webp or .png (APNG) file, written once all frames are drawn: Ctrl-C leaves none."""

    def check(self) -> None:
        need(bool(self.prompts), "there are no prompts", 'one or more, as in minidiff morph "a dog" "a cat"', flag=False)
        keys = f"seeds has {len(self.seeds)} numbers for {len(self.prompts)} prompts"
        need(len(self.prompts) == 1 or len(self.seeds) in (0, 1, len(self.prompts)), keys, "one for each, or one for all")
        need(self.image is None, "image is no keyframe", "prompts and seeds; leave --image out")
        super().check()


@dataclass(frozen=True)
class Filmstrip(Sampling):
    """Show how a picture comes out of the noise: what the network sees, and what it believes, step by step."""

    prompt: Positional[str | None] = None
    """What the picture should show."""
    count: int = 8
    """How many of the steps."""
    output: str = "filmstrip.png"
    """The PNG file."""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff filmstrip "a red dog"', flag=False)
        need(1 <= self.count <= 50, f"count is {self.count}", "1 … 50")
        not_compiled(self)
        super().check()


@dataclass(frozen=True)
class Attention(Sampling):
    """Show where the network looks for each word of the prompt."""

    prompt: Positional[str | None] = None
    """What the picture should show."""
    resolution: int | None = None
    """Only the layers whose maps are so many cells high; default: all of them."""
    output: str = "attention.png"
    """The PNG file."""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff attention "a red dog"', flag=False)
        not_compiled(self)
        super().check()


def not_compiled(s: Sampling) -> None:
    """A compiled network shows nothing of what happens inside."""
    need(not s.compile, "compile hides from this command what it looks at", "no --compile")


@dataclass(frozen=True)
class Tokens:
    """Show how CLIP splits a prompt: tokens, weights, chunks, and what training would cut off."""

    prompt: Positional[str | None] = None
    """The prompt."""
    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The model whose tokenizer splits it."""
    trigger: str | None = None
    """A word that a LoRA listens to: is it one token?"""

    def check(self) -> None:
        need(self.prompt is not None, "there is no prompt", 'one, as in minidiff tokens "a red dog"', flag=False)


@dataclass(frozen=True)
class Lesson:
    """Run a lesson; its figures go into outputs/lessons."""

    number: Positional[int]
    """0: the three stations. 5: samplers. 11: LoRA."""


@dataclass(frozen=True)
class Judge:
    """Score a pocket checkpoint: does it draw what held-out prompts say, and how sharp is its autoencoder?"""

    folder: Positional[str] = "checkpoints/pocket"
    """The checkpoint."""
    count: int = 500
    """How many held-out prompts."""
    judge: str = "outputs/judge.safetensors"
    """The classifier; trained first if the file is not there."""

    def check(self) -> None:
        need(1 <= self.count <= 512, f"count is {self.count}", "1 … 512: there are no more held-out prompts")


@dataclass(frozen=True)
class DataCheck:
    """Look over a folder of training pictures: list everything that is wrong with it, before training starts."""

    folder: Positional[str]
    """The folder, as for --instance_data_dir or --train_data_dir."""
    instance_prompt: str | None = None
    """The prompt of all pictures; without it each needs a caption."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions."""
    resolution: int = 512
    """Side in pixels at which the pictures will be trained; the pocket checkpoint's is 128."""
    aspect_ratio_buckets: bool = False
    """As in training: pictures keep their shape."""
    masked_loss: bool = False
    """As in training: look at the masks, too."""
    trigger: str | None = None
    """A word that every caption should hold, such as sks."""
    tokenizer: str | None = None
    """Folder of a tokenizer; then captions that are too long for CLIP are found."""

    def check(self) -> None:
        need(8 <= self.resolution <= 8192, f"resolution is {self.resolution}", "8 … 8192")


@dataclass(frozen=True)
class Ladder:
    """Climb the whole ladder: train a subject by every method, and measure what each costs and does."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model; its folder needs an image_encoder to look at the pictures with."""
    instance_data_dir: str = "lessons/data/dog"
    """Folder of the subject's pictures."""
    output_dir: str = "outputs/ladder"
    """A folder for each rung, ladder.md and ladder.png."""
    rungs: tuple[str, ...] = ()
    """Which rungs; default: all."""

    def check(self) -> None:
        need(bool(self.output_dir.strip()), "output_dir is empty", "a folder")


@dataclass(frozen=True)
class Bench:
    """Measure minidiff beside diffusers + peft on this machine; from a checkout, with pip install -e ".[bench]"."""

    quick: bool = False
    """Small work only, in five minutes on two cores."""
    only: tuple[str, ...] = ()
    """Some of saved, train, picture, start, memory, unet, attention; default: all."""
    compile: bool = True
    """Let torch.compile have the peers' best (never in a quick run: it takes minutes)."""
    device: Literal["cpu", "cuda"] | None = None
    """cpu or cuda; default: cuda if there is one."""
    output_dir: str = "outputs/bench"
    """A folder for bench.png, bench.json, and in a full run a random model of SD 1.5's size (4 GB)."""

    GROUPS: ClassVar[tuple[str, ...]] = ("saved", "train", "picture", "start", "memory", "unet", "attention")

    def check(self) -> None:
        need(bool(self.output_dir.strip()), "output_dir is empty", "a folder")
        for group in self.only:
            need(group in self.GROUPS, f'only names "{group}"', f"some of {', '.join(self.GROUPS)}")
