"""The way between latents, the loop, and the files it is written to."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.rng import normal
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.studio.morph import (
    Keyframe,
    Loop,
    angle_between,
    check_sampler,
    durations,
    keyframe_tensors,
    lerp,
    morph,
    one_palette,
    save_animation,
    slerp,
)

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
    torch.testing.assert_close(angle_between(a, way[3]), 0.3 * angle_between(a, b), atol=1e-12, rtol=0)
    assert float(lerp(a, b, 0.5).flatten(1).norm(dim=1).max()) < 0.8  # the straight way would be too short: about √½


def test_each_picture_has_its_own_angle() -> None:
    a, b = unit(2, 4, 4, 4, seed=0), unit(2, 4, 4, 4, seed=1)
    alone = torch.cat([slerp(a[i : i + 1], b[i : i + 1], 0.3) for i in range(2)])
    assert slerp(a, b, 0.3).equal(alone)


@pytest.mark.parametrize("way", [lerp, slerp])
def test_the_ends_are_exact(way: type(lerp)) -> None:  # type: ignore[valid-type]
    a, b = normal((1, 4, 8, 8), 0, "a"), 3 * normal((1, 4, 8, 8), 0, "b")
    assert way(a, b, 0.0).equal(a) and way(a, b, 1.0).equal(b)
    assert way(a, a, 0.5).allclose(a)


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-6, 1e-3])
def test_near_vectors_are_no_trouble(apart: float) -> None:
    a, side = unit(1, 64, seed=0), unit(1, 64, seed=1)
    b = a + apart * side
    torch.testing.assert_close(slerp(a, b, 0.25), a + 0.25 * apart * side, atol=1e-7, rtol=0)


def test_kahan_angle_is_right_where_the_arc_cosine_is_not() -> None:
    """Section 12. At 1e-9 the cosine is 1 to all of its digits."""
    tiny = torch.tensor([[math.cos(1e-9), math.sin(1e-9)]], dtype=torch.float64)
    assert float(angle_between(torch.tensor([[1.0, 0.0]]), tiny)) == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([[1.0, 2.0]], [[-2.0, -4.0]], "opposite ways"),
        ([[0.0, 0.0]], [[1.0, 0.0]], "zero or not finite"),
        ([[1.0, math.nan]], [[1.0, 0.0]], "zero or not finite"),
    ],
)
def test_no_way_leads_there(a: list[list[float]], b: list[list[float]], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        slerp(torch.tensor(a), torch.tensor(b), 0.5)


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "keys",
    [
        [Keyframe("a (red:1.3) dog", 0), Keyframe(CAT, 5), Keyframe(DOG, 9)],
        [Keyframe(DOG, 0), Keyframe(DOG, 1)],
        [Keyframe(DOG, 3), Keyframe(CAT, 3)],
    ],
    ids=["both", "seeds", "prompts"],
)
def test_keyframes_are_exactly_what_the_pipeline_draws(pipe: StableDiffusionPipeline, keys: list[Keyframe]) -> None:
    def draw(noise: torch.Tensor, text: torch.Tensor) -> Image.Image:
        image: Image.Image = pipe(prompt_embeds=text, latents=noise, num_inference_steps=3).images[0]
        return image

    loop = Loop(len(keys), frames=2)
    frames = list(morph(loop, *keyframe_tensors(pipe, keys), draw, show=False))
    assert len(frames) == loop.total == 2 * len(keys)
    for key, frame in zip(keys, frames[::2]):
        assert frame.tobytes() == pipe(key.prompt, seed=key.seed, num_inference_steps=3).images[0].tobytes()
    assert len({frame.tobytes() for frame in frames}) >= len(keys) + 1  # between them is something else


def test_the_loop_is_closed_and_its_steps_are_even() -> None:
    """As many frames lead from the last keyframe back to the first as from any other to its next."""
    places = list(Loop(3, frames=4).places())
    assert [(start, end) for start, end, _ in places[::4]] == [(0, 1), (1, 2), (2, 0)]
    assert [t for *_, t in places] == [0, 0.25, 0.5, 0.75] * 3


def test_the_smooth_loop_rests_at_its_keyframes() -> None:
    t = np.array([t for *_, t in Loop(2, frames=100, ease="smooth").places()][:100])
    speed = np.diff(t)
    assert t[0] == 0 and speed.min() > 0 and max(speed[0], speed[-1]) < 0.1 * speed.max()
    assert t[50] == 0.5


def test_the_loop_says_how_long_it_is() -> None:
    said = str(Loop(3, frames=24, fps=12))
    assert said == "3 keyframes x 24 frames = 72 frames, at 12 frames a second: a loop of 6.0 s"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1,), "1 keyframes make no loop"),
        ((2, 0), "2 keyframes x 0 frames"),
        ((3, 1000), "1 … 2000 in all"),
        ((2, 8, 0.0), "fps is 0"),
        ((2, 8, math.nan), "fps is nan"),
        ((2, 8, 12.0, "smoth"), 'Did you mean "smooth"'),
    ],
)
def test_loops_that_cannot_be(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Loop(*values)  # type: ignore[arg-type]


def test_keyframes_that_do_not_fit_are_told_before_anything_is_drawn() -> None:
    def never(noise: torch.Tensor, text: torch.Tensor) -> Image.Image:
        raise AssertionError("drawn")

    noise, text = torch.ones(1, 4, 8, 8), torch.ones(1, 77, 24)
    for noises, texts, message in (
        ([noise], [text, text], "1 noises and 2 texts"),
        ([noise, noise], [text, torch.ones(1, 154, 24)], "1, 2 chunks"),
        ([noise, torch.ones(1, 4, 8, 16)], [text, text], "differ in size"),
    ):
        with pytest.raises(SettingsError, match=message):
            morph(Loop(2), noises, texts, never)


def test_keyframes_beside_a_long_negative_prompt(pipe: StableDiffusionPipeline) -> None:
    """Its chunks count for the prompt too; else the two halves of guidance would differ in length."""
    keys, negative = [Keyframe(DOG, 0), Keyframe(CAT, 1)], "red " * 80
    noises, texts = keyframe_tensors(pipe, keys, 16, 32, clip_skip=1, negative_prompt=negative)
    options = {"num_inference_steps": 2, "negative_prompt": negative, "height": 16, "width": 32, "clip_skip": 1}
    frame = pipe(prompt_embeds=texts[1], latents=noises[1], **options).images[0]
    assert frame.tobytes() == pipe(CAT, seed=1, **options).images[0].tobytes()


def test_keyframes_name_no_lora(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="names a LoRA"):
        keyframe_tensors(pipe, [Keyframe("a dog <lora:x:1>", 0), Keyframe(DOG, 0)])


def test_samplers_that_draw_fresh_noise_need_one_seed() -> None:
    apart, together = [Keyframe(DOG, 0), Keyframe(CAT, 1)], [Keyframe(DOG, 0), Keyframe(CAT, 0)]
    check_sampler("euler_a", 0.0, together)
    check_sampler("ddim", 0.0, apart)
    for name, eta in (("ddpm", 0.0), ("euler_a", 0.0), ("dpm++_2m_sde", 0.0), ("ddim", 0.5), ("lcm", 0.0)):
        with pytest.raises(SettingsError, match=f"{re.escape(name)}.*flicker"):
            check_sampler(name, eta, apart)
    with pytest.raises(SettingsError, match='"euler-a" is unknown'):
        check_sampler("euler-a", 0.0, apart)


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


@pytest.mark.parametrize(("suffix", "apart"), [("gif", 24), ("webp", 24), ("png", 0)])
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


def test_still_parts_of_a_gif_stand_still() -> None:
    sky = np.random.default_rng(0).integers(0, 60, (48, 64, 3)) + np.linspace(0, 195, 64)[:, None]  # more colours than 256
    frames = [Image.fromarray(sky.astype(np.uint8)) for _ in range(6)]
    for i, frame in enumerate(frames):
        frame.paste((255, 40, 40), (3 * i, 8, 3 * i + 8, 16))
    few = one_palette(frames)
    assert len({tuple(frame.getpalette() or ()) for frame in few}) == 1
    below = {frame.crop((0, 16, 64, 48)).tobytes() for frame in few}
    assert len(below) == 1  # a palette for each frame, or dithering, would let it flicker


def test_frames_keep_their_time() -> None:
    """At 12 a second a frame is 83.3 ms; GIF counts hundredths. No frame is half of one early or late."""
    times = np.cumsum([0, *durations(120, 12, 10)])
    assert np.abs(times - np.arange(121) * 1000 / 12).max() <= 5 and times[-1] == 10_000
    assert min(durations(50, 50, 10)) == 20


@pytest.mark.parametrize(
    ("name", "count", "fps", "message"),
    [
        ("a.mp4", 2, 12, "GIF, WebP or APNG"),
        ("a", 2, 12, "ends in .gif, .webp or .png"),
        ("a.gif", 2, 60, "GIF goes up to 50"),
        ("a.gif", 0, 12, "no frames"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path: Path, name: str, count: int, fps: float, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        save_animation(moving(count), tmp_path / name, fps)
    assert not os.listdir(tmp_path)


def test_a_wrong_ending_is_told_before_a_frame_is_drawn(tmp_path: Path) -> None:
    def frames() -> object:
        raise AssertionError("drawn")
        yield

    with pytest.raises(SettingsError, match="GIF, WebP or APNG"):
        save_animation(frames(), tmp_path / "a.avi", 12)  # type: ignore[arg-type]


def test_an_interrupted_loop_leaves_the_old_file(tmp_path: Path) -> None:
    save_animation(moving(2), tmp_path / "a.gif", 12)
    before = (tmp_path / "a.gif").read_bytes()
    with pytest.raises(SettingsError, match="differ in size"):
        save_animation([*moving(1), Image.new("RGB", (3, 3))], tmp_path / "a.gif", 12)
    wide = [Image.new("RGB", (20_000, 1), colour) for colour in ("red", "blue")]
    with pytest.raises(MinidiffError, match=r"a\.webp: cannot be written"):
        save_animation(wide, tmp_path / "a.webp", 12)  # beyond WebP's 16383
    assert (tmp_path / "a.gif").read_bytes() == before and os.listdir(tmp_path) == ["a.gif"]
