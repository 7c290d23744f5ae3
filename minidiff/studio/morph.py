"""A seamless loop through pictures: from keyframe to keyframe, and from the last back to the first.

    keys = [Keyframe("a photo of a red dog", 0), Keyframe("a photo of a blue cat", 1)]
    loop = Loop(len(keys), frames=24, fps=12)     # print(loop): 2 keyframes x 24 frames = 48 frames, at 12 …
    noises, texts = keyframe_tensors(pipe, keys)
    def draw(noise, text): return pipe(prompt_embeds=text, latents=noise, sampler="ddim").images[0]
    save_animation(morph(loop, noises, texts, draw), "morph.gif", loop.fps)

A keyframe is a prompt and a seed. Between two keyframes the noise moves along an arc (`slerp`), and the encoded prompt along
a straight line (`lerp`). Noise of n numbers is always about √n long. Halfway along a straight line between two noises it would
be √(n/2) long; the network has never seen such weak noise, and draws fog. An arc keeps the length. The encoded prompt is read
by linear maps, so halfway the network reads the mean of both prompts.

Shapes: B pictures, C H W one latent, S tokens, D text width.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.core.grids import sampler_named
from minidiff.draw.images import write_picture
from minidiff.draw.pipeline import StableDiffusionPipeline, check_seeds, noise_source
from minidiff.draw.progress import progress
from minidiff.draw.prompting import count_chunks, parse_prompt

Draw = Callable[[Tensor, Tensor], Image.Image]  # (noise (1, C, H, W), text (1, S, D)) -> picture
EASES = ("even", "smooth")
MAX_FRAMES = 2000
FORMATS = (".gif", ".webp", ".png")  # .png: APNG
PARALLEL = 1e-4  # radians: below, arc and line agree to 1e-9 of their length, and at 0 the arc is 0 / 0
OPPOSITE = 1e-3  # radians from half a turn: there every arc is as short as any other

# --- between two tensors -----------------------------------------------------------------------------------------------


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b: the straight line, from exactly a at t = 0 to exactly b at t = 1. Any two equal shapes."""
    return a if t == 0 else b if t == 1 else (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b: the arc (Shoemake, "Animating Rotation with Quaternion Curves",
    SIGGRAPH 1985, section 3.3), at an even speed; exactly a at t = 0 and b at t = 1.

    a, b (B, …): each picture is one vector and has its own angle θ. Between two vectors of one length all have that length.
    SettingsError for vectors that point opposite ways, or nowhere.
    """
    if t in (0, 1):
        return a if t == 0 else b
    angle = angle_between(a, b)  # (B, 1, …), fp64
    near = angle < PARALLEL
    sine = torch.where(near, 1.0, angle.sin())
    of_a = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)  # Shoemake 1985, section 3.3
    of_b = torch.where(near, t, (t * angle).sin() / sine)
    return of_a.to(a.dtype) * a + of_b.to(a.dtype) * b


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each pair of vectors in radians, (B, 1, …) in fp64.

    2 atan2(|u - v|, |u + v|) for unit vectors u, v (Kahan, "How Futile are Mindless Assessments of Roundoff", 2006,
    section 12): exact for small angles too, where the arc cosine has lost half of its digits.
    """
    u, v = (x.double().flatten(1) for x in (a, b))
    lengths = [x.norm(dim=1, keepdim=True) for x in (u, v)]
    if not all((length > 0).all() and length.isfinite().all() for length in lengths):
        raise SettingsError("slerp: one of the two is zero or not finite, so it points nowhere; give two noises.")
    u, v = u / lengths[0], v / lengths[1]
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    if (angle > torch.pi - OPPOSITE).any():
        raise SettingsError("slerp: the two point opposite ways, so no arc is the shortest; take another seed.")
    return angle.reshape(-1, *[1] * (a.ndim - 1))


# --- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keyframe:
    """A picture that the loop passes through."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Loop:
    """How many keyframes, how many frames from each to the next, and how fast. `str` says it in a line."""

    keyframes: int
    frames: int = 24
    fps: float = 12.0
    ease: str = "even"

    def __post_init__(self) -> None:
        if self.keyframes < 2:
            raise SettingsError(f"{self.keyframes} keyframes make no loop; give two prompts or seeds, or more.")
        if self.frames < 1 or self.total > MAX_FRAMES:
            raise SettingsError(f"{self.keyframes} keyframes x {self.frames} frames; a loop has 1 … {MAX_FRAMES} in all.")
        if not 0.1 <= self.fps <= 60:
            raise SettingsError(f"fps is {self.fps}; give 0.1 … 60 frames a second.")
        if self.ease not in EASES:
            hint = did_you_mean(self.ease, EASES)
            raise SettingsError(f'ease "{self.ease}" is unknown; it is one of {", ".join(EASES)}.{hint}')

    @property
    def total(self) -> int:
        return self.keyframes * self.frames

    def __str__(self) -> str:
        count = f"{self.keyframes} keyframes x {self.frames} frames = {self.total} frames"
        return f"{count}, at {self.fps:g} frames a second: a loop of {self.total / self.fps:.1f} s"

    def places(self) -> Iterator[tuple[int, int, float]]:
        """(from keyframe, to keyframe, t in [0, 1)) of each frame. After the last frame comes the first again."""
        for frame in range(self.total):
            start, t = frame // self.frames, frame % self.frames / self.frames
            yield start, (start + 1) % self.keyframes, eased(t) if self.ease == "smooth" else t


def eased(t: float) -> float:
    """3 t² - 2 t³: Hermite's cubic with speed 0 at both ends, so that the loop turns at its keyframes without a jerk."""
    return t * t * (3 - 2 * t)


def keyframe_tensors(
    pipe: StableDiffusionPipeline,
    keyframes: Sequence[Keyframe],
    height: int | None = None,
    width: int | None = None,
    clip_skip: int = 0,
    negative_prompt: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """The noises (1, C, H, W) and encoded prompts (1, S, D) that `pipe(prompt, seed=…)` would begin with, one by one.

    `negative_prompt` counts where it is longer than 75 tokens: S is that of the longer of the two.
    """
    if any(parse_prompt(key.prompt).loras for key in keyframes):
        raise SettingsError("a keyframe's prompt names a LoRA, which cannot be faded in or out. Attach it for all, by --lora.")
    shape = pipe.latent_shape(1, height, width)
    noises = [noise_source(shape, check_seeds(key.seed, None, 1))("latents") for key in keyframes]
    chunks = count_chunks(pipe.tokenizer, [parse_prompt(negative_prompt)], pipe.placeholders)
    return noises, [pipe.encode_prompt([key.prompt], clip_skip, chunks) for key in keyframes]


def morph(
    loop: Loop, noises: Sequence[Tensor], texts: Sequence[Tensor], draw: Draw, show: bool = True
) -> Iterator[Image.Image]:
    """Draw the frames, one by one, with a progress bar. `noises` (1, C, H, W) and `texts` (1, S, D): one for each keyframe.

    The first frame of each keyframe is drawn from exactly its noise and its text. SettingsError, before anything is drawn,
    for keyframes that do not fit together.
    """
    if not len(noises) == len(texts) == loop.keyframes:
        raise SettingsError(f"{len(noises)} noises and {len(texts)} texts for {loop.keyframes} keyframes; give one of each.")
    if len({text.shape for text in texts}) > 1:
        chunks = ", ".join(str(text.shape[1] // 77) for text in texts)
        raise SettingsError(f"the prompts take {chunks} chunks of 75 tokens; all have to take as many. Shorten the longest.")
    if len({noise.shape for noise in noises}) > 1:
        raise SettingsError("the noises differ in size; all keyframes need the same width and height.")
    places = progress(loop.places(), "frame", total=loop.total, show=show)
    return (draw(slerp(noises[a], noises[b], t), lerp(texts[a], texts[b], t)) for a, b, t in places)


def check_sampler(name: str, eta: float, keyframes: Sequence[Keyframe]) -> None:
    """The fresh noise of each step cannot be interpolated from seed to seed: the frames would flicker."""
    if (sampler_named(name).fresh_noise or eta > 0) and len({key.seed for key in keyframes}) > 1:
        raise SettingsError(
            f"{name}{f' with eta {eta:g}' if eta else ''} draws fresh noise in each step, so the frames would flicker between "
            "seeds. Take ddim, dpm++_2m or unipc; or keep one seed for all keyframes."
        )


# --- files -------------------------------------------------------------------------------------------------------------


def check_animation(path: Path | str, fps: float) -> None:
    """SettingsError for a file whose ending is not in FORMATS, and for more frames a second than a GIF has."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise SettingsError(f'"{path}": loops are written as GIF, WebP or APNG; give a name that ends in .gif, .webp or .png.')
    if fps > 50 and ending == ".gif":
        raise SettingsError(f"{path}: {fps:g} frames a second; GIF goes up to 50. Give less, or a name that ends in .webp.")


def save_animation(frames: Iterable[Image.Image], path: Path | str, fps: float, text: str = "") -> None:
    """Write an endless loop as .gif, .webp or .png (APNG), whole or not at all. The format is checked before a frame is drawn.

    GIF has 256 colours, the same ones for all frames. WebP is written at quality 90, APNG without loss. `text` says how the
    loop was made. SettingsError for another ending, or no frames.
    """
    check_animation(path, fps)
    pictures = [frame.convert("RGB") for frame in frames]
    if not pictures:
        raise SettingsError(f"{path}: there are no frames to write.")
    if len({picture.size for picture in pictures}) > 1:
        raise SettingsError(f"{path}: the frames differ in size; a loop has one size.")
    ending, options = Path(path).suffix.lower(), dict[str, Any]()
    if ending == ".gif":
        pictures, options = one_palette(pictures), {"optimize": False, "disposal": 1, "comment": text.encode()}
    elif ending == ".webp":
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")  # EXIF's UserComment, as A1111 writes it
        options = {"quality": 90, "method": 4, "minimize_size": False, "exif": exif}
    else:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        options = {"default_image": False, "pnginfo": chunks}
    file, times = io.BytesIO(), durations(len(pictures), fps, 10 if ending == ".gif" else 1)
    try:
        first, *rest = pictures
        first.save(file, ending[1:].upper(), save_all=True, append_images=rest, duration=times, loop=0, **options)
    except (ValueError, RuntimeError, OSError) as error:  # Pillow's, for example where a side is beyond the format's limit
        raise MinidiffError(f"{path}: cannot be written ({error}). Choose another format.") from error
    write_picture(path, file.getvalue())


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame, in whole `unit`s, so that no frame is ever half a unit off its time."""
    ends = [round(1000 * i / fps / unit) * unit for i in range(count + 1)]
    return [after - before for before, after in zip(ends, ends[1:])]


def one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures -> 256 colours, the same ones for all, without dithering: so still parts of a loop do not flicker."""
    width, height = pictures[0].size
    sample = pictures[:: len(pictures) // 16 + 1]
    montage = Image.new("RGB", (width, height * len(sample)))
    for i, picture in enumerate(sample):
        montage.paste(picture, (0, i * height))
    palette = montage.quantize(256)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
