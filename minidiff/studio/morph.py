"""A seamless loop through pictures: from keyframe to keyframe, and from the last back to the first.

    keys = [Keyframe("a photo of a red dog", 0), Keyframe("a photo of a blue cat", 1)]
    loop = Loop(len(keys), frames=24, fps=12)     # print(loop): 2 keyframes x 24 frames = 48 frames, at 12 …
    noises, texts = keyframe_tensors(pipe, keys)
    def draw(noise, text): return pipe(prompt_embeds=text, latents=noise, sampler="ddim").images[0]
    save_animation(morph(loop, noises, texts, draw), "morph.gif", loop.fps)

A keyframe is a prompt and a seed. Between two of them the noise goes around the sphere (`slerp`: noise is always about
√n long, and the network knows no other), and the encoded prompt goes straight (`lerp`): text lives on no sphere, and
cross-attention reads it through linear maps, so that halfway the network reads the mean of what both prompts say.

Shapes: C H W one latent, S tokens, D text width.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.core.grids import sampler_named
from minidiff.core.rng import noise_source
from minidiff.draw.images import write_picture
from minidiff.draw.pipeline import StableDiffusionPipeline, check_seeds
from minidiff.draw.prompting import count_chunks, parse_prompt
from minidiff.studio.interpolation import lerp, slerp

Draw = Callable[[Tensor, Tensor], Image.Image]  # (noise (1, C, H, W), text (1, S, D)) -> picture
EASES = ("even", "smooth")
MAX_FRAMES = 2000


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
        return (
            f"{self.keyframes} keyframes x {self.frames} frames = {self.total} frames, at {self.fps:g} frames a second: "
            f"a loop of {self.total / self.fps:.1f} s"
        )

    def places(self) -> Iterator[tuple[int, int, float]]:
        """(from keyframe, to keyframe, t in [0, 1)) of each frame. After the last frame comes the first again."""
        for frame in range(self.total):
            start, t = frame // self.frames, frame % self.frames / self.frames
            yield start, (start + 1) % self.keyframes, eased(t) if self.ease == "smooth" else t


def eased(t: float) -> float:
    """3 t² - 2 t³: Hermite's cubic with both ends at rest, so that the loop turns at its keyframes without a jerk."""
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
        raise SettingsError(
            "a keyframe's prompt names a LoRA, and no way leads from one to another. Attach it for all, by --lora."
        )
    shape = pipe.latent_shape(1, height, width)
    noises = [noise_source(shape, check_seeds(key.seed, None, 1))("latents") for key in keyframes]
    chunks = count_chunks(pipe.tokenizer, [parse_prompt(negative_prompt)], pipe.placeholders)
    return noises, [pipe.encode_prompt([key.prompt], clip_skip, chunks) for key in keyframes]


def morph(
    loop: Loop, noises: Sequence[Tensor], texts: Sequence[Tensor], draw: Draw, progress: bool = True
) -> Iterator[Image.Image]:
    """Draw the frames, one by one. `noises` (1, C, H, W) and `texts` (1, S, D): one for each keyframe.

    The first frame of each keyframe is drawn from exactly its noise and its text. SettingsError, before anything is drawn,
    for keyframes that do not fit together.
    """
    check_keyframes(loop, noises, texts)
    return _drawn(loop, noises, texts, draw, progress)


def _drawn(loop: Loop, noises: Sequence[Tensor], texts: Sequence[Tensor], draw: Draw, progress: bool) -> Iterator[Image.Image]:
    from tqdm import tqdm

    for here, there, t in tqdm(loop.places(), total=loop.total, unit="frame", leave=False, disable=not progress):
        yield draw(slerp(noises[here], noises[there], t), lerp(texts[here], texts[there], t))


def check_keyframes(loop: Loop, noises: Sequence[Tensor], texts: Sequence[Tensor]) -> None:
    """As many as the loop has, all of one size."""
    if not len(noises) == len(texts) == loop.keyframes:
        raise SettingsError(f"{len(noises)} noises and {len(texts)} texts for {loop.keyframes} keyframes; give one of each.")
    if len({text.shape for text in texts}) > 1:
        chunks = ", ".join(str(text.shape[1] // 77) for text in texts)
        raise SettingsError(f"the prompts take {chunks} chunks of 75 tokens; all have to take as many. Shorten the longest.")
    if len({noise.shape for noise in noises}) > 1:
        raise SettingsError("the noises differ in size; all keyframes need the same width and height.")


def check_sampler(name: str, eta: float, keyframes: Sequence[Keyframe]) -> None:
    """Fresh noise in each step has no way from seed to seed: the frames would flicker, or jump at each keyframe."""
    if (sampler_named(name).fresh_noise or eta > 0) and len({key.seed for key in keyframes}) > 1:
        raise SettingsError(
            f"{name}{f' with eta {eta:g}' if eta else ''} draws fresh noise in each step, so the frames would flicker between "
            "seeds. Take ddim, dpm++_2m or unipc; or keep one seed for all keyframes."
        )


# --- files -------------------------------------------------------------------------------------------------------------


Writer = Callable[[BinaryIO, list[Image.Image], float, str], None]  # (file, frames, fps, how they were made)


def writer_for(path: Path | str, fps: float) -> Writer:
    """By the ending of the name; SettingsError for another one, or more frames a second than the format has."""
    path = Path(path)
    write = {".gif": _write_gif, ".webp": _write_webp, ".png": _write_apng}.get(path.suffix.lower())
    if write is None:
        raise SettingsError(f'"{path}": loops are written as GIF, WebP or APNG; give a name that ends in .gif, .webp or .png.')
    if fps > 50 and write is _write_gif:
        raise SettingsError(f"{path}: {fps:g} frames a second; GIF goes up to 50. Give less, or a name that ends in .webp.")
    return write


def save_animation(frames: Iterable[Image.Image], path: Path | str, fps: float, text: str = "") -> None:
    """Write an endless loop as .gif, .webp or .png (APNG), whole or not at all. The format is checked before a frame is drawn.

    GIF has 256 colours: one palette for all frames, and a fixed pattern of dots for the tones between. WebP is written at
    quality 90, APNG without loss. `text` says how it was made; `picture_texts` reads it back, as "parameters".
    SettingsError for another ending, or no frames.
    """
    write = writer_for(path, fps)
    pictures = [frame.convert("RGB") for frame in frames]
    if not pictures:
        raise SettingsError(f"{path}: there are no frames to write.")
    if len({picture.size for picture in pictures}) > 1:
        raise SettingsError(f"{path}: the frames differ in size; a loop has one size.")
    try:
        write(file := io.BytesIO(), pictures, fps, text)
    except (ValueError, RuntimeError) as error:  # Pillow's, for example where a side is beyond the format's limit
        raise MinidiffError(f"{path}: cannot be written ({error}). Choose another format.") from error
    write_picture(path, file.getvalue())


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame, in whole `unit`s, so that no frame is ever half a unit off its time."""
    ends = [round(1000 * i / fps / unit) * unit for i in range(count + 1)]
    return [after - before for before, after in zip(ends, ends[1:])]


def _write_webp(file: BinaryIO, pictures: list[Image.Image], fps: float, text: str) -> None:
    times, exif = durations(len(pictures), fps, 1), Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")  # the Exif table, and UserComment, as A1111's
    _write(file, "WEBP", pictures, times, {"quality": 90, "method": 4, "minimize_size": False, "exif": exif})


def _write_apng(file: BinaryIO, pictures: list[Image.Image], fps: float, text: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    _write(file, "PNG", pictures, durations(len(pictures), fps, 1), {"default_image": False, "pnginfo": chunks})


def _write_gif(file: BinaryIO, pictures: list[Image.Image], fps: float, text: str) -> None:
    options = {"optimize": False, "disposal": 1, "comment": text.encode()}
    _write(file, "GIF", one_palette(pictures), durations(len(pictures), fps, 10), options)


def _write(file: BinaryIO, kind: str, pictures: list[Image.Image], times: list[int], options: dict[str, Any]) -> None:
    first, *rest = pictures
    first.save(file, format=kind, save_all=True, append_images=rest, duration=times, loop=0, **options)


def one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures -> 256 colours, the same ones for all.

    A palette for each frame, and errors spread from pixel to pixel (Floyd and Steinberg), make still parts crawl. Here the
    tones between are made by a threshold that depends on the place alone (Bayer, 1973), which stands still.
    """
    sample = [pictures[i] for i in sorted({round(i * (len(pictures) - 1) / 31) for i in range(32)})]
    pixels = np.concatenate([np.asarray(picture).reshape(-1, 3) for picture in sample])
    every = pixels[:: max(1, len(pixels) // 500_000)]
    palette = Image.fromarray(every[None]).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    width, height = pictures[0].size
    dots = np.tile(bayer(8) - 0.5, (height // 8 + 1, width // 8 + 1))[:height, :width, None]
    plain = np.asarray(nearest(every[None], palette).convert("RGB"))[0]
    step = 4 * np.median(np.abs(plain - every.astype(float)))  # tones a step apart: the nearest is a quarter of it away
    dotted = (np.clip(np.asarray(picture) + step * dots, 0, 255).round().astype(np.uint8) for picture in pictures)
    return [nearest(values, palette) for values in dotted]


def nearest(pixels: np.ndarray, palette: Image.Image) -> Image.Image:
    """(H, W, 3) bytes -> the nearest colours of the palette."""
    return Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)


def bayer(size: int) -> np.ndarray:
    """The threshold matrix of ordered dithering, (size, size) in [0, 1), size a power of 2: Bayer, "An optimum method for
    two-level rendition of continuous-tone pictures", ICC 1973: M(2n) = [[4M, 4M + 2], [4M + 3, 4M + 1]]."""
    matrix = np.zeros((1, 1))
    while len(matrix) < size:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return matrix / size**2
