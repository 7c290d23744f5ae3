"""A seamless loop through pictures: from keyframe to keyframe, and from the last back to the first.

    keyframes = [("a photo of a red dog", 0), ("a photo of a blue cat", 1)]                  # prompts and seeds
    noises, texts = keyframe_tensors(pipe, keyframes)
    def draw(noise, text): return pipe(**dict(zip(EMBEDS, text)), latents=noise, sampler="ddim").images[0]
    pictures, times = morph(noises, texts, 24, draw)                         # 24 frames from each keyframe to the next
    save_animation(pictures, "morph.webp", fps=12, times=times)

Between two keyframes the encoded prompt moves along a straight line, and the noise along an arc (`slerp`). Noise of n numbers
is about √n long. Halfway along a straight line it would be √(n/2) long; the network has never seen such weak noise, and draws
fog. An arc keeps the length.

Shapes: B pictures, C H W one latent, S tokens, D text width.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff import __version__
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.guidance import Text
from minidiff.draw.pipeline import StableDiffusionPipeline, noise_source, sampler_for
from minidiff.draw.progress import progress
from minidiff.draw.prompting import chunked, parse_prompt
from minidiff.files.atomic import write_bytes

Keyframe = tuple[str, int]  # a prompt and a seed
Draw = Callable[[Tensor, Text], Image.Image]  # (noise (1, C, H, W), text) -> picture
MAX_FRAMES = 2000
FORMATS = (".webp", ".gif")
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


def keyframe_tensors(
    pipe: StableDiffusionPipeline,
    keyframes: Sequence[Keyframe],
    height: int | None = None,
    width: int | None = None,
    clip_skip: int = 0,
    negative_prompt: str = "",
) -> tuple[list[Tensor], list[Text]]:
    """The noises (1, C, H, W) and encoded prompts that `pipe(prompt, seed=…)` would begin with, one by one.

    S is that of the longest prompt, `negative_prompt` included.
    """
    prompts = [parse_prompt(prompt) for prompt in (*dict(keyframes), negative_prompt)]
    if any(prompt.loras for prompt in prompts):
        raise SettingsError("a keyframe's prompt names a LoRA, which cannot be faded in or out. Attach it for all, by --lora.")
    shape = pipe.latent_shape(1, height, width)
    chunks = max(len(chunked(pipe.tokenizer, prompt, pipe.placeholders)) for prompt in prompts)
    noises = [noise_source(shape, seed)("latents") for _, seed in keyframes]
    return noises, [pipe.encode_text([parse_prompt(prompt)], clip_skip, chunks) for prompt, _ in keyframes]


def morph(noises: Sequence[Tensor], texts: Sequence[Text], frames: int, draw: Draw) -> tuple[list[Image.Image], list[float]]:
    """The pictures of the loop, and how long each is shown (1 on average), so that the picture changes at an even speed.

    `noises` (1, C, H, W) and `texts`, (1, S, D) and in SDXL (1, P): one for each keyframe, whose picture is drawn from exactly
    these. The others are drawn where the picture changes most: the gap between the most different neighbours is halved until
    there are `frames` for each way between keyframes. With two keyframes the way back shows the same pictures.
    """
    count, pictures, gaps = len(noises), dict[float, Image.Image](), dict[tuple[float, float], float]()
    ends = [0.0, 1.0] if count == 2 else [float(i) for i in range(count)]
    for i in progress(range(frames + 1 if count == 2 else count * frames), "frame", show=True):
        if i < len(ends):
            place = ends[i]
        else:
            left, right = max(gaps, key=lambda gap: (gaps[gap] * (gap[1] - gap[0] > 0.06 / frames), gap[1] - gap[0]))
            place = (left + right) / 2
        a, t = int(place), place % 1
        b = (a + 1) % count
        pictures[place] = draw(slerp(noises[a], noises[b], t), tuple(x.lerp(y, t) for x, y in zip(texts[a], texts[b])))
        if i + 1 >= len(ends):
            order = sorted(pictures) + [float(count)] * (count > 2)
            now = {(x, y): gaps.get((x, y)) for x, y in pairwise(order)}
            gaps = {(x, y): difference(pictures[x], pictures[y % count]) if d is None else d for (x, y), d in now.items()}
    drawn, times = [pictures[place] for place in sorted(pictures)], [gaps[gap] for gap in sorted(gaps)]
    if count == 2:
        drawn, times = drawn + drawn[-2:0:-1], times + times[::-1]
    mean = sum(times) / len(times) or 1.0
    shown = [min(max(time / mean, 0.5), 2.0) for time in times]  # so that no frame is shown for long before a jump
    return drawn, [time * len(shown) / sum(shown) for time in shown]


def difference(a: Image.Image, b: Image.Image) -> float:
    """The root mean square between two pictures, of 0 … 255, at a size where noise does not count."""
    x, y = (np.asarray(one.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float64) for one in (a, b))
    return float(np.sqrt(((x - y) ** 2).mean()))


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
        raise SettingsError(f'"{path}": loops are written as WebP or GIF; give a name that ends in .webp or .gif.')


def save_animation(
    frames: Iterable[Image.Image], path: Path | str, fps: float, text: str = "", times: Sequence[float] = ()
) -> None:
    """Write an endless loop as .webp or .gif, whole or not at all. `text` says how the loop was made; `times` how
    long each frame is shown, in frames of `fps`; default 1."""
    check_animation(path)
    pictures, ending = list(frames), Path(path).suffix.lower()
    ends = [10 * round(100 * time / fps) for time in accumulate(times or [1.0] * len(pictures), initial=0.0)]  # ms, as in GIF
    options: dict[str, Any] = {"duration": [b - a for a, b in pairwise(ends)], "loop": 0}
    if ending == ".gif":
        some = np.concatenate([np.asarray(picture) for picture in pictures[:: len(pictures) // 16 + 1]])
        palette = Image.fromarray(some).quantize(256)  # one for all frames, without dithering: else still parts flicker
        pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        mark = f"Version: minidiff {__version__}"  # first: GIF cuts longer comments into pieces
        options |= {"optimize": False, "disposal": 1, "comment": f"{mark}\n{text}".encode()}
    else:
        exif = Image.Exif()
        exif[0x010E] = text  # ImageDescription
        options |= {"quality": 90, "exif": exif}
    file = io.BytesIO()
    try:
        pictures[0].save(file, ending[1:], save_all=True, append_images=pictures[1:], **options)
    except (ValueError, RuntimeError, OSError) as error:  # Pillow's, for example where a side is beyond the format's limit
        raise MinidiffError(f"{path}: cannot be written ({error}). Choose another format.") from error
    write_bytes(Path(path), file.getvalue())
