"""Pictures as prompts in the pipeline. tests/parity/test_ip_adapter_parity.py compares the pictures with diffusers'."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_ip_adapters import picture, tiny_ip_adapter, tiny_tower_folder
from tiny_model import tiny_folder

from minidiff.core.errors import AdapterError, SettingsError, WeightsError
from minidiff.draw.image_prompt import as_input
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.ip_adapter_file import CLIP_MEAN, CLIP_STD
from minidiff.files.weights import save

CALL = {"prompt": ["a red dog", "a photo"], "num_inference_steps": 2, "output_type": "latent", "seed": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tiny_folder(tmp_path_factory.mktemp("ip")).parent
    tiny_tower_folder(home)
    unet = StableDiffusionPipeline.from_pretrained(home / "base").unet
    for form in ("base", "plus"):
        save(tiny_ip_adapter(unet, form).state_dict(), home / f"{form}.safetensors")
    return home


@pytest.fixture
def pipe(home: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(home / "base")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("size", [(40, 31), (31, 77), (28, 28), (500, 29)])
def test_the_towers_input_is_clips_own_to_the_bit(size: tuple[int, int]) -> None:
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    expected = kind(size=28, crop_size=28)(picture(0, size), return_tensors="pt").pixel_values[0]
    assert torch.equal(as_input(picture(0, size), 28, CLIP_MEAN, CLIP_STD), expected)


@pytest.mark.parametrize("form", ["base", "plus"])
@pytest.mark.parametrize("plain", [True, False])
def test_scale_0_and_unloading_restore_the_base(home: Path, form: str, plain: bool) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(home / "base", plain=plain)
    pipe.set_progress_bar_config(disable=True)
    before = pipe(**CALL).images
    pipe.load_ip_adapter(home, weight_name=f"{form}.safetensors")
    shown = {"ip_adapter_image": [picture(0), picture(1)]}
    assert (pipe(**CALL, **shown).images - before).abs().max() > 0.01
    pipe.set_ip_adapter_scale(0)
    assert torch.equal(pipe(**CALL, **shown).images, before)
    pipe.set_ip_adapter_scale([0, 0, 0, 0.5])
    one = pipe(**CALL, **shown).images
    pipe.set_ip_adapter_scale([0, 0, 0.5, 0])
    assert (pipe(**CALL, **shown).images - one).abs().max() > 1e-3
    pipe.unload_ip_adapter()
    assert torch.equal(pipe(**CALL).images, before)


def test_with_a_picture_a_mask_and_other_samplers(home: Path, pipe: StableDiffusionPipeline) -> None:
    """Alone or in a batch, the picture is the same; what is shown counts."""
    pipe.load_ip_adapter(home / "base.safetensors")
    mask = torch.zeros(1, 32, 32).expand(3, -1, -1).clone()
    mask[:, :16] = 1
    call = CALL | {"image": picture(3, (32, 32)), "mask_image": mask, "strength": 0.7, "sampler": "euler_a"}
    both, other = (pipe(**call, ip_adapter_image=picture(seed)).images for seed in (0, 1))
    alone = pipe(**call | {"prompt": "a red dog"}, ip_adapter_image=picture(0)).images
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
    assert (both - other).abs().max() > 1e-3


def test_an_adapter_that_cannot_be_loaded_leaves_the_old_one(home: Path, pipe: StableDiffusionPipeline) -> None:
    pipe.load_ip_adapter(home / "base.safetensors")
    before = pipe(**CALL, ip_adapter_image=picture(0)).images
    with pytest.raises(WeightsError, match="no image encoder here"):
        pipe.load_ip_adapter(home / "plus.safetensors", image_encoder_folder="nowhere")
    assert torch.equal(pipe(**CALL, ip_adapter_image=picture(0)).images, before)
    pipe.load_ip_adapter(home / "plus.safetensors")
    assert (pipe(**CALL, ip_adapter_image=picture(0)).images - before).abs().max() > 1e-3
    pipe.unload_ip_adapter()
    pipe.load_ip_adapter(home / "base.safetensors")
    assert torch.equal(pipe(**CALL, ip_adapter_image=picture(0)).images, before)


def test_messages(home: Path, pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no IP-Adapter is loaded that looks at it; load_ip_adapter first"):
        pipe(**CALL, ip_adapter_image=picture(0))
    with pytest.raises(SettingsError, match="there is no IP-Adapter to scale"):
        pipe.set_ip_adapter_scale(1)
    with pytest.raises(WeightsError, match="no image encoder here"):
        pipe.load_ip_adapter(home / "base.safetensors", image_encoder_folder="nowhere")
    with pytest.raises(WeightsError, match="the IP-Adapter reads 32 numbers and the image tower gives 128"):
        pipe.load_ip_adapter(home / "base.safetensors", image_encoder_folder=Path("checkpoints/pocket/image_encoder").resolve())
    pipe.load_ip_adapter(home / "base.safetensors")
    with pytest.raises(SettingsError, match="there is no ip_adapter_image; give one, or unload_ip_adapter"):
        pipe(**CALL)
    for scale in ([1.0, 2.0], [], float("nan"), {"up": 1.0}):
        with pytest.raises(SettingsError, match="ip_adapter_scale is .*give one number, or 4, one for each layer"):
            pipe.set_ip_adapter_scale(scale)
    with pytest.raises(AdapterError, match="carries an IP-Adapter.*unload_ip_adapter first"):
        pipe.save_pretrained(tmp_path)
