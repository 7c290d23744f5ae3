"""The text-to-image lab of a textbook chapter, word for word against minidiff's names, on the pocket checkpoint.

Name the three stations, fix a seed, sweep guidance, add a negative prompt, swap the model, attach and detach a LoRA,
compose two, and put it all on one labelled sheet.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_adapters import shake

from minidiff import StableDiffusionPipeline
from minidiff.core.inject import adapter_weights, inject
from minidiff.draw.images import contact_sheet, to_tensor
from minidiff.files.lora_file import save_lora
from minidiff.pocket.judge import ImageTower

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"
PROMPT = "a watercolor of a blue house in the snow"
pytestmark = pytest.mark.skipif(not POCKET.exists(), reason="checkpoints/pocket is not there")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(str(POCKET), torch_dtype=torch.float32).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loras(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("dog", "style")):
        inject(pipe.unet, 4, seed=seed)
        shake(pipe.unet, size=0.05 + 0.05 * seed)
        save_lora(adapter_weights(pipe.adaptable), folder / f"{name}.safetensors")
        pipe.unload_lora_weights()
    return folder


def test_three_stations_and_a_seed(pipe: StableDiffusionPipeline) -> None:
    stations = [type(part).__name__ for part in (pipe.text_encoder, pipe.unet, pipe.vae)]
    assert stations == ["CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL"]
    generator = torch.Generator("cpu").manual_seed(42)
    first = pipe(PROMPT, guidance_scale=7.5, num_inference_steps=5, generator=generator).images[0]
    again = pipe(PROMPT, guidance_scale=7.5, num_inference_steps=5, generator=generator.manual_seed(42)).images[0]
    other = pipe(PROMPT, guidance_scale=7.5, num_inference_steps=5, generator=generator.manual_seed(43)).images[0]
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_guidance_grows_contrast_and_is_overdone_at_20(pipe: StableDiffusionPipeline) -> None:
    """Contrast grows all the way; CLIP's similarity to the prompt falls at last."""
    tower = ImageTower(POCKET / "image_encoder")
    ids = pipe.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        words = F.normalize(pipe.text_encoder(input_ids=ids).pooler_output, dim=-1)  # (1, D)
    contrast, similarity = [], []
    for scale in (1.5, 5, 20):
        drawn = pipe(PROMPT, seed=0, num_images_per_prompt=3, num_inference_steps=8, guidance_scale=scale).images
        contrast.append(torch.stack([to_tensor(image) for image in drawn]).std().item())
        similarity.append((tower.embed(drawn) @ words.mT).mean().item())
    assert contrast == sorted(contrast)
    assert min(similarity[:2]) > similarity[2] + 0.1


def test_a_negative_prompt_and_another_model(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    call = {"num_inference_steps": 4, "seed": 1}
    plain = pipe("a house in the snow", **call).images[0]
    without = pipe("a house in the snow", negative_prompt="a photo, red", **call).images[0]
    assert plain.tobytes() != without.tobytes()
    pipe.save_pretrained(tmp_path / "swapped", dtype=torch.bfloat16)
    swapped = StableDiffusionPipeline.from_pretrained(str(tmp_path / "swapped")).to("cpu")
    swapped.set_progress_bar_config(disable=True)
    other = swapped("a house in the snow", **call).images[0]
    difference = (to_tensor(other) - to_tensor(plain)).abs().mean().item()
    assert 0 < difference < 0.1  # rounded weights: nearly the same picture


def test_loras_on_a_contact_sheet(pipe: StableDiffusionPipeline, loras: Path) -> None:
    """Attach, weigh, compose, detach; the base is what it was, and the sheet says which is which."""

    def draw() -> Image.Image:
        image: Image.Image = pipe(PROMPT, num_inference_steps=4, seed=0).images[0]
        return image

    base = draw()
    pipe.load_lora_weights(str(loras), weight_name="dog.safetensors", adapter_name="dog")
    pipe.load_lora_weights(str(loras / "style.safetensors"), adapter_name="style")
    row = [base]
    for names, weights in ((["dog"], [1.0]), (["dog"], [0.5]), (["style"], [1.0]), (["dog", "style"], [0.8, 0.5])):
        pipe.set_adapters(names, adapter_weights=weights)
        row.append(draw())
    assert len({image.tobytes() for image in row}) == 5
    pipe.fuse_lora()
    fused = draw()
    pipe.unfuse_lora()
    assert (to_tensor(fused) - to_tensor(row[-1])).abs().max() < 0.05
    pipe.unload_lora_weights()
    assert draw().tobytes() == base.tobytes()
    sheet = contact_sheet([row], ["seed 0"], ["base", "dog", "dog at 0.5", "style", "dog 0.8 + style 0.5"], PROMPT, tile=96)
    assert sheet.width > 5 * 96
