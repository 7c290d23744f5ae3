"""Image to image, inpainting and tiles, on a tiny model with drawn weights: what each promises; and bad input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sizes import TINY_UNET
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.grids import SAMPLERS
from minidiff.core.rng import normal
from minidiff.core.schedule import add_noise
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import sample_posterior
from minidiff.draw.canvas import as_mask, as_pictures, fitted, latent_mask, pasted, size_of
from minidiff.draw.images import to_pil, to_tensor
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.tiles import starts, tent, tiled

DOG = "a photo of a red dog"
FACTOR = 2  # pixels of the tiny model in one latent cell, either way; 16 x 16 pixels are its usual 8 x 8 cells


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inpainter(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same, with a U-Net of nine input channels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(replace(TINY_UNET, in_channels=9)).requires_grad_(False).eval()
    nine = StableDiffusionPipeline(unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, NoiseConfig(), name_or_path="nine")
    nine.set_progress_bar_config(disable=True)
    return nine


def picture(width: int = 16, height: int = 16) -> Image.Image:
    """Smooth and coloured, the same each time."""
    small = normal((1, 3, 4, 4), 0, "picture").clamp(-1, 1)
    return to_pil(torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1))[0]


def left_half(width: int = 16, height: int = 16) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def draw(pipe: StableDiffusionPipeline, **call: Any) -> Tensor:
    usual: dict[str, Any] = {"seed": 3, "num_inference_steps": 6, "output_type": "pt"}
    result: Tensor = pipe(DOG, **usual | call).images
    return result if call.get("output_type") == "latent" else result * 2 - 1  # as the network has pictures


# --- image to image --------------------------------------------------------------------------------------------------


def test_ddpm_eq4_is_where_image_to_image_starts(pipe: StableDiffusionPipeline) -> None:
    """Strength 0.5 of 6 DDIM steps: the picture's latents, noised to the fourth timestep, and three steps from there."""
    seen: list[Any] = []
    out = draw(pipe, image=picture(), strength=0.5, sampler="ddim", callback=seen.append, output_type="latent")
    x = to_tensor(picture())[None]
    mean, logvar = pipe.vae.encode(x)
    z = sample_posterior(mean, logvar, normal((4, 8, 8), 3, "posterior")[None]) * pipe.vae.config.scaling_factor
    assert [step.t for step in seen] == [333, 167, 1]
    noisy = add_noise(pipe.schedule, z, normal((4, 8, 8), 3, "latents")[None], torch.tensor([333]))
    text, none = pipe.encode_prompt([DOG]), pipe.encode_prompt([""])
    eps = [pipe.unet(noisy, torch.tensor([333.0]), words) for words in (text, none)]
    guided = eps[1] + 7.5 * (eps[0] - eps[1])
    a_bar = pipe.schedule.alphas_cumprod[333]
    torch.testing.assert_close(seen[0].x0, (noisy - (1 - a_bar).sqrt() * guided) / a_bar.sqrt(), rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[-1].x, out)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_less_strength_the_nearer_to_the_picture(pipe: StableDiffusionPipeline, sampler: str) -> None:
    z = pipe.encode_pictures(to_tensor(picture())[None], torch.zeros(1, 4, 8, 8))
    call: dict[str, Any] = {"image": picture(), "sampler": sampler, "num_inference_steps": 20, "output_type": "latent"}
    far = [(draw(pipe, strength=s, **call) - z).abs().mean().item() for s in (0.05, 0.4, 1.0)]
    assert far == sorted(far) and far[0] < 0.5 * far[2]


def test_sizes_of_a_picture(pipe: StableDiffusionPipeline) -> None:
    """Its own, brought down to whole latent cells; or what is asked for, the other side in proportion."""
    call: dict[str, Any] = {"image": picture(21, 17), "strength": 0.2, "num_inference_steps": 5}
    assert draw(pipe, **call).shape == (1, 3, 16, 20)
    assert draw(pipe, **call, width=32, height=16).shape == (1, 3, 16, 32)
    for asked, expected in (((None, None), (48, 64)), ((96, None), (96, 128)), ((None, 32), (16, 32)), ((8, 16), (8, 16))):
        assert size_of((50, 70), *asked, 8) == expected


def test_one_picture_for_many_prompts_or_one_each(pipe: StableDiffusionPipeline) -> None:
    call: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 4, "output_type": "pt", "seed": [3, 3]}
    two = pipe([DOG, "the snow"], image=[picture(), picture().rotate(90)], **call).images
    alone = pipe([DOG, DOG], image=picture(), **call).images
    torch.testing.assert_close(two[0], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[0], alone[1], rtol=1e-4, atol=1e-4)


def test_pictures_come_as_paths_and_tensors_too(tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    expected = to_tensor(picture())[None]
    for form in (picture(), str(tmp_path / "p.png"), tmp_path / "p.png", expected, expected[0], [picture()]):
        assert torch.equal(as_pictures(form, 1), expected)


def test_a_picture_is_covered_not_squeezed() -> None:
    x = torch.zeros(1, 3, 40, 80)
    x[..., 20:60] = 1  # a bright square in the middle
    assert fitted(x, 40, 40).min() > 0.95 and fitted(x, 40, 80) is x


# --- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_nothing_changes(pipe: StableDiffusionPipeline, sampler: str, strength: float | None) -> None:
    """Pixels to the bit; latents, which every sampler has to lead back to what is known, to rounding."""
    call: dict[str, Any] = {"image": picture(), "mask_image": left_half(), "sampler": sampler, "strength": strength}
    out, original = draw(pipe, **call), to_tensor(picture())[None]
    assert torch.equal(out[..., 8:], original[..., 8:])
    assert (out[..., :4] - original[..., :4]).abs().mean() > 0.05
    z = pipe.encode_pictures(original, normal((4, 8, 8), 3, "posterior")[None])
    left = 0.1 if sampler in ("ddim", "pndm", "tcd") else 0.02  # these stop at a_bar[0]: a last 3 % of noise stays
    torch.testing.assert_close(draw(pipe, **call, output_type="latent")[..., 4:], z[..., 4:], rtol=0, atol=left)


def test_nothing_of_what_is_masked_is_left_at_full_strength(pipe: StableDiffusionPipeline) -> None:
    other = picture()
    other.paste((255, 0, 0), (0, 0, 6, 16))
    a, b = (draw(pipe, image=p, mask_image=left_half(), output_type="latent") for p in (picture(), other))
    kept = [pipe.encode_pictures(to_tensor(p)[None], normal((4, 8, 8), 3, "posterior")[None]) for p in (picture(), other)]
    assert (a - b)[..., 4:].abs().max() < 1.5 * (kept[0] - kept[1])[..., 4:].abs().max() + 1e-3  # the encoder sees far
    assert (a - b)[..., :4].abs().mean() < 0.2 * (kept[0] - kept[1])[..., :4].abs().mean()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 32])
def test_pasted_draws_every_white_pixel_and_no_other(width: int) -> None:
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 8 : 8 + width, :] = 1
    out = pasted(torch.ones(1, 3, 48, 48), torch.zeros(1, 3, 48, 48), mask)
    assert torch.equal(out, mask.expand_as(out))


@pytest.mark.parametrize("side", [16, 40, 64, 100, 512])
def test_no_white_pixel_is_lost_when_a_mask_is_scaled(side: int) -> None:
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 101, 7:250] = mask[..., 30:33, 77] = 1  # a scratch of one pixel, and a dot
    small = fitted(mask, side, side)
    at = side / 256
    for y, x in ((101, 7), (101, 128), (101, 249), (30, 77), (32, 77)):
        assert small[..., int(y * at), int(x * at)] == 1
    assert small.mean() < 0.2 and set(small.unique().tolist()) == {0.0, 1.0}


def test_latent_mask() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 9, 3] = 1
    assert latent_mask(mask, 8, generous=True).flatten().tolist() == [0, 0, 1, 0]
    assert latent_mask(mask, 8, generous=False).sum() == 0  # as inpainting models were trained: the first pixel decides


def test_an_inpainting_model_sees_the_mask_and_the_surroundings(inpainter: StableDiffusionPipeline, monkeypatch: Any) -> None:
    seen: list[Tensor] = []
    forward = UNet2DConditionModel.forward

    def spy(self: UNet2DConditionModel, x: Tensor, *rest: Tensor) -> Tensor:
        seen.append(x)
        return forward(self, x, *rest)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    out = draw(inpainter, image=picture(), mask_image=left_half(), num_inference_steps=2)
    x = seen[0]
    assert x.shape == (2, 9, 8, 8) and x[:, 4, :, :4].min() == 1 and x[:, 4, :, 4:].max() == 0
    hidden = to_tensor(picture())[None] * (torch.arange(16) >= 8)
    around = inpainter.encode_pictures(hidden, normal((4, 8, 8), 3, "surroundings")[None])
    torch.testing.assert_close(x[:, 5:], around.expand(2, -1, -1, -1))
    assert torch.equal(out[..., 8:], to_tensor(picture())[None][..., 8:])


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_starts_cover_everything() -> None:
    for length in range(1, 60):
        for tile in range(1, 20):
            for overlap in range(tile):
                begins = starts(length, tile, overlap)
                assert begins[0] == 0 and begins[-1] + tile >= length and (length <= tile or begins[-1] + tile == length)
                assert all(0 < b - a <= tile - overlap for a, b in zip(begins, begins[1:]))


def test_multidiffusion_eq5_of_a_local_function_is_the_whole() -> None:
    """A function without surroundings comes out as if there were no tiles; scaled up, down, or neither."""
    x = normal((2, 3, 40, 56), 0)
    for call, unit in (
        (torch.tanh, 1),
        (lambda y: torch.nn.functional.interpolate(y, scale_factor=8.0), 1),
        (lambda y: torch.nn.functional.avg_pool2d(y, 8), 8),
    ):
        torch.testing.assert_close(tiled(call, 24, 8, unit)(x), call(x))
    assert torch.equal(tiled(torch.tanh, 56, 8)(x), x.tanh())
    assert tent(6, 2).tolist() == [0.25, 0.75, 1, 1, 0.75, 0.25] and tent(3, 0).tolist() == [0.5, 1, 0.5]


def test_tiles_of_the_autoencoder_meet_without_a_seam(pipe: StableDiffusionPipeline) -> None:
    """No column or row at which tiles begin or end steps further than its neighbours do."""
    z = torch.nn.functional.interpolate(normal((1, 4, 5, 5), 1), (24, 24), mode="bicubic")
    whole = pipe.decode(z)
    pipe.set_tile_size(16)
    try:
        parts = pipe.decode(z)
        x = pipe.encode_pictures(whole, torch.zeros(1, 4, 24, 24))
    finally:
        pipe.set_tile_size(None)
    assert parts.shape == whole.shape and x.shape == (1, 4, 24, 24)
    steps = parts.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    seams = [FACTOR * at - 1 for begin in starts(24, 8, 2) for at in (begin, begin + 8) if 0 < at < 24]
    assert max(steps[i].item() for i in seams) < 2 * steps.median().item()


def test_a_large_picture_in_tiles(pipe: StableDiffusionPipeline, monkeypatch: Any) -> None:
    """The U-Net never sees more than a tile; where the whole is one tile, the picture is the same to the bit."""
    widths: list[int] = []
    forward = UNet2DConditionModel.forward

    def spy(self: UNet2DConditionModel, x: Tensor, *rest: Tensor) -> Tensor:
        widths.append(x.shape[-1])
        return forward(self, x, *rest)

    plain = draw(pipe, image=picture(), strength=0.4)
    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    pipe.set_tile_size(16)
    try:
        assert torch.equal(draw(pipe, image=picture(), strength=0.4), plain)
        assert draw(pipe, image=picture(), strength=0.4, width=40).shape == (1, 3, 40, 40)
    finally:
        pipe.set_tile_size(None)
    assert set(widths) == {8}


# --- numbers that break ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name", "path"),
    [
        ("unet", "U-Net", "mid_block.resnets.0.conv1"),
        ("vae", "VAE", "decoder.conv_in"),
        ("text_encoder", "text encoder", "final_layer_norm"),
    ],
)
def test_a_black_picture_is_an_error(tiny_folder: Path, part: str, name: str, path: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.nn.init.constant_(getattr(pipe, part).get_submodule(path).weight, torch.inf)
    with pytest.raises(MinidiffError, match=rf"NaN or infinity comes out of the {name}, .* run in float32"):
        draw(pipe)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strength 0": ({"image": picture(), "strength": 0.0}, "strength is 0.0; it can be above 0"),
    "strength 2": ({"image": picture(), "strength": 2.0}, "strength is 2.0; it can be above 0"),
    "strength NaN": ({"image": picture(), "strength": float("nan")}, "strength is nan"),
    "too little": ({"image": picture(), "strength": 0.1}, "0 denoising steps: 6 steps at strength 0.1"),
    "strength alone": ({"strength": 0.5}, "strength was given and there is no image"),
    "mask alone": ({"mask_image": left_half()}, "mask_image was given and there is no image"),
    "mask of another size": (
        {"image": picture(), "mask_image": left_half(8, 16)},
        "mask_image is 8 x 16 and the picture 16 x 16; make the mask as large",
    ),
    "black mask": ({"image": picture(), "mask_image": Image.new("L", (16, 16))}, "nowhere brighter than middle grey"),
    "two pictures": ({"image": [picture(), picture()]}, "image holds pictures of 16 x 16, 16 x 16; give one, or 1 of one size"),
    "two sizes": ({"image": [picture(), picture(20)], "num_images_per_prompt": 2}, "image holds pictures of 16 x 16, 20 x 16"),
    "a number": ({"image": 3}, "image must be a PIL picture, a path, a tensor"),
    "no such file": ({"image": "nowhere.png"}, "nowhere.png: no such file"),
    "bytes": ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}, r"a tensor \(3, H, W\) of floats"),
    "in 0..255": ({"image": torch.full((3, 16, 16), 200.0)}, r"in \[0, 1\]"),
    "NaN": ({"image": torch.full((3, 16, 16), float("nan"))}, r"in \[0, 1\]"),
    "width 21": ({"image": picture(), "width": 21}, "width is 21; it must be a multiple of 2"),
    "width 0": ({"image": picture(), "width": 0}, "width is 0; it must be a multiple of 2"),
    "height 0": ({"image": picture(), "height": 0}, "height is 0; it must be a multiple of 2"),
    "nothing in it": ({"image": torch.zeros(3, 0, 0)}, r"a tensor \(3, H, W\)"),
    "an address": ({"image": "https://example.org/a.png"}, "no such file"),
    "a device": ({"image": "/dev/null"}, "/dev/null: is no picture file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(pipe: StableDiffusionPipeline, case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(MinidiffError, match=message):
        draw(pipe, **call)


def test_bad_tile_size(pipe: StableDiffusionPipeline) -> None:
    for size in (0, -64, 14, 31):
        with pytest.raises(SettingsError, match=rf"tile_size is {size}; it must be a multiple of 2, at least 16"):
            pipe.set_tile_size(size)


def test_an_inpainting_model_without_picture_or_mask(inpainter: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="nine: an inpainting model needs an image and a mask_image"):
        draw(inpainter)
    with pytest.raises(SettingsError, match="nine: an inpainting model needs an image and a mask_image"):
        draw(inpainter, image=picture())


def test_pictures_are_taken_as_they_are_given(pipe: StableDiffusionPipeline) -> None:
    """[0, 1] or [-1, 1], tensor or array, as everywhere in the field."""
    x = to_tensor(picture())
    forms = [picture(), x, x / 2 + 0.5, (x / 2 + 0.5)[None], np.array(picture()) / np.float32(255)]
    assert x.min() < 0
    for form in forms:
        torch.testing.assert_close(as_pictures(form, 1), x[None], rtol=0, atol=1e-6)
    as_np, as_pt = (pipe(DOG, seed=1, num_inference_steps=2, output_type=kind).images for kind in ("np", "pt"))
    assert torch.equal(as_pictures(as_np, 1), as_pictures(as_pt, 1))


ROW = torch.zeros(1, 3, 1, 4)  # a picture of four pixels


def test_a_mask_is_white_where_it_is_brighter_than_middle_grey() -> None:
    grey = Image.new("L", (4, 1))
    grey.putdata([0, 127, 128, 255])
    assert as_mask(grey, ROW, 1, 4).flatten().tolist() == [0, 0, 1, 1]


def layer(*pixels: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (len(pixels), 1))
    image.putdata(pixels)
    return image


WHITE, BLACK, NOTHING = (255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 0)
PICTURE = [(200, 90, 40, 255), (90, 160, 30, 255)]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("pixels", "white"),
    [
        ((NOTHING, NOTHING, WHITE, NOTHING), [0, 0, 1, 0]),  # white paint on an empty layer
        ((NOTHING, (250, 250, 250, 90), (250, 250, 250, 200), WHITE), [0, 0, 1, 1]),  # by a soft brush
        ((*PICTURE, NOTHING, NOTHING), [0, 0, 1, 1]),  # the picture with a hole
        ((*PICTURE, BLACK, (0, 0, 0, 0)), [0, 0, 0, 1]),
    ],
)
def test_a_mask_with_transparent_parts(pixels: tuple[Any, ...], white: list[int], as_file: bool, tmp_path: Path) -> None:
    """White paint is what to draw; of a picture with a hole, the hole is."""
    layer(*pixels).save(tmp_path / "mask.png")
    assert as_mask(tmp_path / "mask.png" if as_file else layer(*pixels), ROW, 1, 4).flatten().tolist() == white


@pytest.mark.parametrize("pixels", [(BLACK, NOTHING), (BLACK, WHITE, NOTHING), (NOTHING, NOTHING)])
def test_a_mask_with_transparent_parts_that_says_nothing(pixels: tuple[Any, ...]) -> None:
    with pytest.raises(SettingsError, match="neither all white nor a picture"):
        as_mask(layer(*pixels), ROW[..., : len(pixels)], 1, len(pixels))


def test_a_mask_that_is_white_everywhere_is_reported() -> None:
    with pytest.warns(UserWarning, match="white everywhere"):
        as_mask(Image.new("L", (4, 1), 255), ROW, 1, 4)


def test_a_mask_whose_white_part_is_cropped_away() -> None:
    wide = Image.new("L", (64, 16))
    wide.paste(255, (0, 0, 4, 16))
    with pytest.raises(SettingsError, match="outside the 16 x 16 pixels"):
        as_mask(wide, torch.zeros(1, 3, 16, 64), 16, 16)


def test_extreme_strengths_and_steps(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="are too few; use more of either.$"):
        draw(pipe, image=picture(), strength=1e-300)
    with pytest.raises(SettingsError, match="it can be 1 to 1000"):
        draw(pipe, image=picture(), strength=0.5, num_inference_steps=10**400)
