"""The way between latents, the loop, and the files it is written to."""

import math
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.rng import normal
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.studio.morph import Keyframe, check_loop, keyframe_tensors, morph, save_animation, slerp

DOG, CAT = "a photo of a red dog on the beach", "a drawing of a blue cat in the snow"


# ----------------------------------------------------------------------------------------------------- interpolation


def unit(*shape: int, seed: int) -> torch.Tensor:
    x = normal(shape, seed, "test").double()
    return x / x.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_slerp_shoemake_section_3_3(t: float) -> None:
    """The formula, in one plane: from the x axis towards the y axis by t times the angle."""
    a, angle = torch.tensor([[1.0, 0.0]]), 2.0
    b = torch.tensor([[math.cos(angle), math.sin(angle)]])
    wanted = torch.tensor([[math.cos(t * angle), math.sin(t * angle)]])
    torch.testing.assert_close(slerp(a, b, t), wanted, atol=1e-6, rtol=0)


def test_slerp_stays_on_the_sphere_at_an_even_speed() -> None:
    a, b = unit(3, 4, 8, 8, seed=0), unit(3, 4, 8, 8, seed=1)
    way = [slerp(a, b, i / 10) for i in range(11)]
    for x in way:
        torch.testing.assert_close(x.flatten(1).norm(dim=1), torch.ones(3).double(), atol=1e-12, rtol=0)
    cosines = [torch.cosine_similarity(x.flatten(1), y.flatten(1)) for x, y in pairwise(way)]
    torch.testing.assert_close(torch.stack(cosines), cosines[0].expand(10, -1), atol=1e-12, rtol=0)
    assert float(a.lerp(b, 0.5).flatten(1).norm(dim=1).max()) < 0.8  # the straight way would be too short: about √½


def test_each_picture_has_its_own_angle() -> None:
    a, b = unit(2, 4, 4, 4, seed=0), unit(2, 4, 4, 4, seed=1)
    alone = torch.cat([slerp(a[i : i + 1], b[i : i + 1], 0.3) for i in range(2)])
    assert slerp(a, b, 0.3).equal(alone)


def test_the_ends_are_exact() -> None:
    a, b = normal((1, 4, 8, 8), 0, "a"), 3 * normal((1, 4, 8, 8), 0, "b")
    assert slerp(a, b, 0.0).equal(a) and slerp(a, b, 1.0).equal(b)
    assert slerp(a, a, 0.5).allclose(a)


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-6, 1e-3])
def test_near_vectors_are_no_trouble(apart: float) -> None:
    a, side = unit(1, 64, seed=0), unit(1, 64, seed=1)
    b = a + apart * side
    torch.testing.assert_close(slerp(a, b, 0.25), a + 0.25 * apart * side, atol=1e-7, rtol=0)


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "keys",
    [
        [("a (red:1.3) dog", 0), (CAT, 5), (DOG, 9)],
        [(DOG, 0), (DOG, 1)],
        [(DOG, 3), (CAT, 3)],
    ],
    ids=["both", "seeds", "prompts"],
)
def test_keyframes_are_exactly_what_the_pipeline_draws(pipe: StableDiffusionPipeline, keys: list[Keyframe]) -> None:
    def draw(noise: torch.Tensor, text: tuple[torch.Tensor]) -> Image.Image:
        image: Image.Image = pipe(prompt_embeds=text[0], latents=noise, num_inference_steps=3).images[0]
        return image

    frames, times = morph(*keyframe_tensors(pipe, keys), 2, draw)
    assert len(frames) == len(times) == 2 * len(keys)
    shown = [frame.tobytes() for frame in frames]
    places = [shown.index(pipe(prompt, seed=seed, num_inference_steps=3).images[0].tobytes()) for prompt, seed in keys]
    assert places == sorted(places) and places[0] == 0
    assert len({frame.tobytes() for frame in frames}) >= len(keys) + 1  # between them is something else


def loop(count: int, frames: int, brightness: Callable[[float], float]) -> tuple[list[float], list[float], int]:
    """The brightness of each frame of a loop over `count` keyframes, how long each is shown, and how many were drawn."""
    drawn: list[float] = []

    def draw(noise: torch.Tensor, text: tuple[torch.Tensor]) -> Image.Image:
        drawn.append(float(text[0]))
        return Image.new("RGB", (4, 4), (round(brightness(float(text[0]))),) * 3)

    noises, texts = [torch.ones(1, 1, 1, 1)] * count, [(torch.full((1, 1, 1), float(i)),) for i in range(count)]
    pictures, times = morph(noises, texts, frames, draw)
    assert len(set(drawn)) == len(drawn) or count > 2
    return [picture.getpixel((0, 0))[0] for picture in pictures], times, len(drawn)  # type: ignore[index]


def test_two_keyframes_are_drawn_forth_and_shown_back() -> None:
    shown, times, drawn = loop(2, 8, lambda t: 200 * t)
    assert drawn == 9 and shown == [25 * i for i in (*range(9), *range(7, 0, -1))]
    assert times == pytest.approx([1.0] * 16)


def test_the_picture_changes_at_an_even_speed() -> None:
    """Nothing happens until 0.7, and all of it before 0.8: that is where the frames are."""
    shown, times, drawn = loop(2, 32, lambda t: 250 * min(max((t - 0.7) / 0.1, 0), 1))
    steps = np.abs(np.diff([*shown, shown[0]]))
    assert drawn == 33 and steps.max() < 40  # evenly spaced in t, it would be 80
    assert np.corrcoef(steps, times)[0, 1] > 0.9 and np.mean(times) == pytest.approx(1) and max(times) / min(times) <= 4 + 1e-9


def test_three_keyframes_make_a_closed_way() -> None:
    shown, times, drawn = loop(3, 4, lambda t: 100 * t)
    assert drawn == len(shown) == len(times) == 12 and shown[0] == 0 and max(shown) == 200
    assert np.abs(np.diff([*shown, shown[0]])).max() <= 50  # the last step is none but the others are


def test_keyframes_that_are_the_same_are_no_trouble() -> None:
    shown, times, drawn = loop(2, 6, lambda t: 7)
    assert drawn == 7 and shown == [7] * 12 and times == pytest.approx([1.0] * 12)


def test_loops_that_cannot_be() -> None:
    with pytest.raises(SettingsError, match="1 keyframes x 24 frames: a loop needs two"):
        check_loop([(DOG, 0)], 24, "ddim", 0.0)
    with pytest.raises(SettingsError, match="at most 2000 frames in all"):
        check_loop([(DOG, 0)] * 3, 1000, "ddim", 0.0)


def test_keyframes_of_several_lengths(pipe: StableDiffusionPipeline) -> None:
    """All prompts get as many chunks as the longest."""
    _, texts = keyframe_tensors(pipe, [(DOG, 0), ("red " * 80, 0)])
    assert [text[0].shape[1] for text in texts] == [154, 154]


def test_keyframes_beside_a_long_negative_prompt(pipe: StableDiffusionPipeline) -> None:
    """Its chunks count for the prompt too; else the two halves of guidance would differ in length."""
    keys, negative = [(DOG, 0), (CAT, 1)], "red " * 80
    noises, texts = keyframe_tensors(pipe, keys, 16, 32, clip_skip=1, negative_prompt=negative)
    options = {"num_inference_steps": 2, "negative_prompt": negative, "height": 16, "width": 32, "clip_skip": 1}
    frame = pipe(prompt_embeds=texts[1][0], latents=noises[1], **options).images[0]
    assert frame.tobytes() == pipe(CAT, seed=1, **options).images[0].tobytes()


def test_keyframes_name_no_lora(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="names a LoRA"):
        keyframe_tensors(pipe, [("a dog <lora:x:1>", 0), (DOG, 0)])


def test_samplers_that_draw_fresh_noise_need_one_seed() -> None:
    apart, together = [(DOG, 0), (CAT, 1)], [(DOG, 0), (CAT, 0)]
    check_loop(together, 24, "euler_a", 0.0)
    check_loop(apart, 24, "ddim", 0.0)
    for name, eta in (("ddpm", 0.0), ("euler_a", 0.0), ("dpm++_2m_sde", 0.0), ("ddim", 0.5), ("lcm", 0.0)):
        with pytest.raises(SettingsError, match=f"{re.escape(name)}.*flicker"):
            check_loop(apart, 24, name, eta)
    with pytest.raises(SettingsError, match='"euler-a" is unknown'):
        check_loop(apart, 24, "euler-a", 0.0)


# --------------------------------------------------------------------------------------------------------- the files


def moving(count: int, size: tuple[int, int] = (40, 24)) -> list[Image.Image]:
    """A square that walks over a still gradient."""
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    still = np.stack(np.broadcast_arrays(ramp[None], 128, ramp[::-1][None]), -1).repeat(size[1], 0).astype(np.uint8)
    frames = []
    for i in range(count):
        picture = Image.fromarray(still)
        picture.paste((255, 40, 40), (3 * i, 8, 3 * i + 8, 16))
        frames.append(picture)
    return frames


@pytest.mark.parametrize(("suffix", "apart"), [("gif", 24), ("webp", 24)])
def test_every_frame_is_in_the_file_and_it_never_ends(tmp_path: Path, suffix: str, apart: int) -> None:
    frames = moving(7)
    save_animation(iter(frames), tmp_path / "new" / f"a.{suffix}", 12)
    with Image.open(tmp_path / "new" / f"a.{suffix}") as image:
        assert image.n_frames == 7 and image.info["loop"] == 0  # type: ignore[attr-defined]
        total = 0.0
        for i, frame in enumerate(frames):
            image.seek(i)
            image.load()
            total += image.info["duration"]
            difference = np.abs(np.asarray(image.convert("RGB"), dtype=int) - np.asarray(frame, dtype=int))
            assert difference.max() <= 4 * apart and difference.mean() <= apart / 2
        assert total == pytest.approx(7000 / 12, abs=5)
    assert os.listdir(tmp_path / "new") == [f"a.{suffix}"]


def test_still_parts_of_a_gif_stand_still(tmp_path: Path) -> None:
    sky = np.random.default_rng(0).integers(0, 60, (48, 64, 3)) + np.linspace(0, 195, 64)[:, None]  # more colours than 256
    frames = [Image.fromarray(sky.astype(np.uint8)) for _ in range(6)]
    for i, frame in enumerate(frames):
        frame.paste((255, 40, 40), (3 * i, 8, 3 * i + 8, 16))
    save_animation(frames, tmp_path / "a.gif", 12)
    with Image.open(tmp_path / "a.gif") as loop:
        below = {frame.convert("RGB").crop((0, 16, 64, 48)).tobytes() for frame in ImageSequence.Iterator(loop)}
    assert len(below) == 1  # a palette for each frame, or dithering, would let it flicker


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_a_wrong_ending_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="ends in .webp or .gif"):
        save_animation(moving(2), tmp_path / name, 12)
    assert not os.listdir(tmp_path)


def test_a_wrong_ending_is_told_before_a_frame_is_drawn(tmp_path: Path) -> None:
    def frames() -> object:
        raise AssertionError("drawn")
        yield

    with pytest.raises(SettingsError, match="WebP or GIF"):
        save_animation(frames(), tmp_path / "a.avi", 12)  # type: ignore[arg-type]


def test_a_failed_loop_leaves_the_old_file(tmp_path: Path) -> None:
    save_animation(moving(2), tmp_path / "a.gif", 12)
    before = (tmp_path / "a.gif").read_bytes()
    wide = [Image.new("RGB", (20_000, 1), colour) for colour in ("red", "blue")]
    with pytest.raises(MinidiffError, match=r"a\.webp: cannot be written"):
        save_animation(wide, tmp_path / "a.webp", 12)  # beyond WebP's 16383
    assert (tmp_path / "a.gif").read_bytes() == before and os.listdir(tmp_path) == ["a.gif"]
