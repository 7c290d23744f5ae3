"""A seamless loop through pictures: from keyframe to keyframe, and from the last back to the first.

    keyframes = [("a photo of a red dog", 0), ("a photo of a blue cat", 1)]                  # prompts and seeds
    noises, texts = keyframe_tensors(pipe, keyframes)
    def draw(noise, text): return pipe(prompt_embeds=text, latents=noise, sampler="ddim").images[0]
    save_animation(morph(noises, texts, 24, draw), "morph.gif", fps=12)      # 24 frames from each keyframe to the next

Between two keyframes the encoded prompt moves along a straight line, and the noise along an arc (`slerp`). Noise of n numbers
is about √n long. Halfway along a straight line it would be √(n/2) long; the network has never seen such weak noise, and draws
fog. An arc keeps the length.

Shapes: B pictures, C H W one latent, S tokens, D text width.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from minidiff import __version__
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.draw.pipeline import StableDiffusionPipeline, noise_source, sampler_for
from minidiff.draw.progress import progress
from minidiff.draw.prompting import count_chunks, parse_prompt
from minidiff.files.atomic import write_bytes

Keyframe = tuple[str, int]  # a prompt and a seed
Draw = Callable[[Tensor, Tensor], Image.Image]  # (noise (1, C, H, W), text (1, S, D)) -> picture
MAX_FRAMES = 2000
FORMATS = (".gif", ".webp", ".png")  # .png: APNG
PARALLEL = 1e-4  # radians: with smaller angles, arc and line agree to 1e-9 of their length, and at 0 the arc is 0 / 0


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b: the arc, at an even speed; exactly a at t = 0 and b at t = 1.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, section 3.3. a, b (B, …): each picture is one vector,
    with its own angle θ. Between two vectors of one length all have that length.
    """
    if t in (0, 1):
        return a if t == 0 else b
    u, v = (x.double().flatten(1) for x in (a, b))
    angle = torch.cosine_similarity(u, v).clamp(-1, 1).arccos().clamp(min=PARALLEL)
    angle = angle.reshape(-1, *[1] * (a.ndim - 1))  # (B, 1, …), fp64
    of_a, of_b = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()  # Shoemake 1985, section 3.3
    return of_a.to(a.dtype) * a + of_b.to(a.dtype) * b


def places(keyframes: int, frames: int) -> Iterator[tuple[int, int, float]]:
    """(from keyframe, to keyframe, t in [0, 1)) of each frame. After the last frame comes the first again."""
    for frame in range(keyframes * frames):
        yield frame // frames, (frame // frames + 1) % keyframes, frame % frames / frames


def keyframe_tensors(
    pipe: StableDiffusionPipeline,
    keyframes: Sequence[Keyframe],
    height: int | None = None,
    width: int | None = None,
    clip_skip: int = 0,
    negative_prompt: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """The noises (1, C, H, W) and encoded prompts (1, S, D) that `pipe(prompt, seed=…)` would begin with, one by one.

    S is that of the longest prompt, `negative_prompt` included.
    """
    prompts = [parse_prompt(prompt) for prompt in (*dict(keyframes), negative_prompt)]
    if any(prompt.loras for prompt in prompts):
        raise SettingsError("a keyframe's prompt names a LoRA, which cannot be faded in or out. Attach it for all, by --lora.")
    shape, chunks = pipe.latent_shape(1, height, width), count_chunks(pipe.tokenizer, prompts, pipe.placeholders)
    noises = [noise_source(shape, seed)("latents") for _, seed in keyframes]
    return noises, [pipe.encode_prompt([prompt], clip_skip, chunks) for prompt, _ in keyframes]


def morph(
    noises: Sequence[Tensor], texts: Sequence[Tensor], frames: int, draw: Draw, show: bool = True
) -> Iterator[Image.Image]:
    """Draw the frames, one by one, with a progress bar. `noises` (1, C, H, W) and `texts` (1, S, D): one for each keyframe.

    The first frame of each keyframe is drawn from exactly its noise and its text.
    """
    total = len(noises) * frames
    for a, b, t in progress(places(len(noises), frames), "frame", total=total, show=show):
        yield draw(slerp(noises[a], noises[b], t), texts[a].lerp(texts[b], t))


def check_loop(keyframes: Sequence[Keyframe], frames: int, sampler: str, eta: float) -> None:
    """SettingsError for a loop that cannot be, before anything is drawn."""
    count = len(keyframes)
    if count < 2 or count * frames > MAX_FRAMES:
        needs = f"a loop needs two prompts or seeds, or more, and has at most {MAX_FRAMES} frames in all"
        raise SettingsError(f"{count} keyframes x {frames} frames: {needs}.")
    if (sampler_for(sampler).fresh_noise or eta > 0) and len({seed for _, seed in keyframes}) > 1:
        raise SettingsError(
            f"{sampler} draws fresh noise in each step (ddim with --eta, too), so the frames would flicker between seeds. Take "
            "ddim, dpm++_2m or unipc; or keep one seed for all keyframes."
        )


def check_animation(path: Path | str) -> None:
    """SettingsError for a file whose ending is not in FORMATS."""
    if Path(path).suffix.lower() not in FORMATS:
        raise SettingsError(f'"{path}": loops are written as GIF, WebP or APNG; give a name that ends in .gif, .webp or .png.')


def save_animation(frames: Iterable[Image.Image], path: Path | str, fps: float, text: str = "") -> None:
    """Write an endless loop as .gif, .webp or .png (APNG), whole or not at all. `text` says how the loop was made."""
    check_animation(path)
    pictures, ending = list(frames), Path(path).suffix.lower()
    ends = [10 * round(100 * i / fps) for i in range(len(pictures) + 1)]  # ms; GIF counts hundredths of a second
    options: dict[str, Any] = {"duration": [b - a for a, b in pairwise(ends)], "loop": 0}
    if ending == ".gif":
        some = np.concatenate([np.asarray(picture) for picture in pictures[:: len(pictures) // 16 + 1]])
        palette = Image.fromarray(some).quantize(256)  # one for all frames, without dithering: else still parts flicker
        pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        mark = f"Version: minidiff {__version__}"  # first: GIF cuts longer comments into pieces
        options |= {"optimize": False, "disposal": 1, "comment": f"{mark}\n{text}".encode()}
    elif ending == ".webp":
        exif = Image.Exif()
        exif[0x010E] = text  # ImageDescription
        options |= {"quality": 90, "exif": exif}
    else:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        options |= {"pnginfo": chunks}
    file = io.BytesIO()
    try:
        pictures[0].save(file, ending[1:], save_all=True, append_images=pictures[1:], **options)
    except (ValueError, RuntimeError, OSError) as error:  # Pillow's, for example where a side is beyond the format's limit
        raise MinidiffError(f"{path}: cannot be written ({error}). Choose another format.") from error
    write_bytes(Path(path), file.getvalue())
