"""ControlNets in the pipeline: what must be equal to the bit, how tiles and batches see hints, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_folder
from tiny_sizes import TINY_SD2, TINY_UNET

from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import SettingsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.canny import canny
from minidiff.draw.control import pictures_of, scaled
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.tiles import starts
from minidiff.files.controlnet import read_controlnet

HINTS = [Image.effect_noise((32, 32), 90 + i).convert("RGB") for i in range(2)]
CALL: dict[str, Any] = {"prompt": "a dog", "seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
SQUARE = CALL | {"width": 32, "height": 32}


def net_of(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet with connections."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, (8, 16)).requires_grad_(False)
    for p in net.parameters():
        p += 0.05 * torch.randn(p.shape)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.controlnet = net_of(pipe.unet)
    return pipe


def test_without_a_hint_or_at_scale_0_it_is_the_base(pipe: StableDiffusionPipeline) -> None:
    base = pipe(**SQUARE).images
    with_hint = pipe(**CALL, control_image=HINTS[0]).images
    assert torch.equal(pipe(**CALL, control_image=HINTS[0], controlnet_conditioning_scale=0).images, base)
    assert not torch.allclose(with_hint, base, atol=1e-2)
    assert not torch.allclose(pipe(**CALL, control_image=HINTS[1]).images, with_hint, atol=1e-3)
    assert torch.equal(pipe(**CALL, control_image=HINTS[0], control_guidance_start=0.5, control_guidance_end=0.6).images, base)


def test_a_batch_is_its_pictures(pipe: StableDiffusionPipeline) -> None:
    both = pipe(**CALL | {"prompt": ["a dog"] * 2}, control_image=HINTS).images
    for i, hint in enumerate(HINTS):
        torch.testing.assert_close(
            both[i : i + 1], pipe(**CALL | {"seed": 3 + i}, control_image=hint).images, atol=1e-4, rtol=1e-4
        )


def test_tiles_cut_the_hint(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile sees its own part of the encoded hint, which is found once for the whole picture."""
    seen, encoded = [], []
    forward, encode = ControlNetModel.forward, ControlNetModel.encode_hint

    def watched(net: ControlNetModel, *inputs: Any, hint: torch.Tensor, **more: Any) -> Any:
        seen.append(hint[:1])
        return forward(net, *inputs, hint=hint, **more)

    def encoding(net: ControlNetModel, hint: torch.Tensor) -> torch.Tensor:
        encoded.append(encode(net, hint))
        return encoded[-1]

    monkeypatch.setattr(ControlNetModel, "forward", watched)
    monkeypatch.setattr(ControlNetModel, "encode_hint", encoding)
    pipe.set_tile_size(32)
    pipe(**CALL, control_image=HINTS[0].resize((48, 32)), width=48, height=32)
    assert len(encoded) == 1 and [part.shape[-1] for part in seen] == [16] * 6
    assert torch.equal(seen[0], encoded[0][..., :16]) and torch.equal(seen[1], encoded[0][..., 8:])


def test_seams_of_an_enlarged_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 -> 256 pixels in nine tiles with a ControlNet: steps at seams are like those beside them. Hard edges are not."""
    pocket = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    pocket.set_progress_bar_config(disable=True)
    small = Image.open("lessons/data/dog/01.png").convert("RGB")
    edges = canny(np.array(small.resize((256, 256), Image.Resampling.BICUBIC)))
    pocket.controlnet = read_controlnet(Path("checkpoints/pocket-canny"))
    pocket.set_tile_size(128)
    begins = starts(32, 16, 4)
    seams = [8 * at - 1 for begin in begins for at in (begin, begin + 16) if 0 < at < 32]

    def worst_seam() -> float:
        call = {"image": small, "strength": 0.4, "num_inference_steps": 5, "seed": 1, "output_type": "pt"}
        drawn = pocket("", control_image=Image.fromarray(edges).convert("RGB"), width=256, height=256, **call).images
        steps = [drawn.diff(dim=dim).abs().mean(dim=(0, 1, other)) for dim, other in ((-1, 2), (-2, 3))]
        return max((along[at] / along[at - 4 : at + 5].median()).item() for along in steps for at in seams)

    assert worst_seam() < 2
    monkeypatch.setattr("minidiff.draw.tiles.tent", lambda length, overlap: torch.ones(length))
    assert worst_seam() > 4


def test_the_size_is_that_of_the_hint(pipe: StableDiffusionPipeline) -> None:
    assert pipe(**CALL, control_image=HINTS[0].resize((64, 33))).images.shape[2:] == (16, 32)
    assert pipe(**CALL, image=HINTS[1], control_image=HINTS[0].resize((64, 32))).images.shape[2:] == (16, 16)


def test_in_an_inpainting_model(pipe: StableDiffusionPipeline) -> None:
    """Its U-Net has nine channels, the net four."""
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(replace(TINY_UNET, in_channels=9)).eval()
    mask = Image.fromarray(np.kron([[0, 255]], np.ones((32, 16))).astype(np.uint8))
    call = CALL | {"image": HINTS[1], "mask_image": mask}
    assert not torch.allclose(pipe(**call, control_image=HINTS[0]).images, pipe(**call).images, atol=1e-3)


def test_hints_of_other_sizes_and_modes() -> None:
    (gray,) = pictures_of(HINTS[0])
    with pytest.warns(UserWarning, match="mode L becomes RGB"):
        assert torch.equal(pictures_of(HINTS[0].convert("L"))[0], gray)
    with pytest.warns(UserWarning, match="32 x 32 pixels is scaled to 16 x 8"):
        small = scaled(gray, 8, 16)
    assert small.shape == (1, 3, 8, 16) and 0 <= small.min() and small.max() <= 1
    masked = torch.full((3, 8, 8), -1.0)  # a hint for inpainting
    assert torch.equal(scaled(pictures_of(masked)[0], 8, 8)[0], masked)


def test_what_is_refused(pipe: StableDiffusionPipeline) -> None:
    def refused(match: str, **given: Any) -> None:
        with pytest.raises(SettingsError, match=match):
            pipe(**CALL, **{"control_image": HINTS[0], **given})

    refused("control_guidance_start is 0.6 and control_guidance_end 0.5", control_guidance_start=0.6, control_guidance_end=0.5)
    refused("2 in controlnet_conditioning_scale for 1 ", controlnet_conditioning_scale=[0.5, 0.5])
    refused("2 hints", control_image=HINTS)
    refused("must be a picture", control_image=torch.full((3, 8, 8), 2.0))
    refused("guess_mode was given and there is no control_image", control_image=None, guess_mode=True)
    pipe.controlnet = [net_of(pipe.unet), net_of(pipe.unet, 1)]
    refused("1 in control_image for 2 ControlNets", control_image=HINTS[:1])
    pipe.controlnet = net_of(UNet2DConditionModel(replace(TINY_SD2, cross_attention_dim=1024)))
    refused("is for SD 2.x and the model is another kind: cross_attention_dim is 1024, not 24")
    pipe.controlnet = None
    refused("control_image was given and there is no ControlNet")
    refused("guess_mode was given and there is no ControlNet", control_image=None, guess_mode=True)
