"""A lab as textbooks have it, from the first picture to an adapter of one's own: only the import line says minidiff."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from minidiff import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LoraConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    get_peft_model,
)

POCKET = "checkpoints/pocket"
DOG = "a photo of a red dog on the beach"


def pixels(image: Any) -> Any:
    return np.asarray(image).astype(int)


def load(kind: Any = StableDiffusionPipeline, folder: Any = POCKET, **options: Any) -> Any:
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True, **options)
    pipe = pipe.to("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    """For reading only."""
    return load()


def test_the_first_picture_and_its_seed(pipe: Any) -> None:
    pictures = [pipe(DOG, num_inference_steps=3, generator=torch.manual_seed(seed)).images[0] for seed in (7, 7, 8)]
    assert pictures[0].size == (128, 128) and pixels(pictures[0]).std() > 10
    assert np.array_equal(*map(pixels, pictures[:2])) and (pixels(pictures[0]) != pixels(pictures[2])).any()


def test_another_scheduler() -> None:
    """The swap of SD 2's card: before loading, and after."""
    first = load(scheduler=EulerDiscreteScheduler.from_pretrained(POCKET, subfolder="scheduler"))
    second = load()
    second.scheduler = EulerDiscreteScheduler.from_config(second.scheduler.config)
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "output_type": "latent"}
    plain = load()(DOG, sampler="euler", **call).images
    assert first.sampler == second.sampler == "euler"
    assert torch.equal(first(DOG, **call).images, plain) and torch.equal(second(DOG, **call).images, plain)


def test_another_model(pipe: Any, tiny_folder: Path) -> None:
    """Any second folder, in the same lines."""
    for folder, side in ((POCKET, 128), (tiny_folder, 16)):
        pipe = load(DiffusionPipeline, folder, variant="fp16", low_cpu_mem_usage=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        image = pipe(prompt=DOG, num_inference_steps=2, guidance_scale=7.5).images[0]
        assert image.size == (side, side) == (pipe.unet.config.sample_size * pipe.downscale,) * 2


def test_from_picture_to_picture(pipe: Any) -> None:
    start = pipe(DOG, num_inference_steps=4, seed=3).images[0]
    changer = StableDiffusionImg2ImgPipeline(**pipe.components)
    changer.set_progress_bar_config(disable=True)
    little, much = (
        changer(prompt="a photo of a blue dog", image=start, strength=share, num_inference_steps=10, seed=3).images[0]
        for share in (0.2, 0.9)
    )
    assert np.abs(pixels(little) - pixels(start)).mean() < np.abs(pixels(much) - pixels(start)).mean()
    by_position = changer("a photo of a blue dog", start, 0.2, 10, seed=3).images[0]
    assert np.array_equal(pixels(by_position), pixels(little))


def test_a_part_drawn_anew(pipe: Any) -> None:
    start, mask = pipe(DOG, num_inference_steps=4, seed=3).images[0], Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((64, 0, 127, 127), fill=255)
    painter = StableDiffusionInpaintPipeline(**pipe.components)
    painter.set_progress_bar_config(disable=True)
    drawn = painter(prompt="a photo of the snow", image=start, mask_image=mask, num_inference_steps=3, seed=0).images[0]
    assert np.array_equal(pixels(drawn)[:, :64], pixels(start)[:, :64])
    assert np.abs(pixels(drawn)[:, 64:] - pixels(start)[:, 64:]).mean() > 5
    by_position = painter("a photo of the snow", start, mask, num_inference_steps=3, seed=0).images[0]
    assert np.array_equal(pixels(by_position), pixels(drawn))


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "add_adapter"])
def test_a_lora_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrapped: bool) -> None:
    """Encode a picture, add noise, predict it, descend; save the adapter, and load it into a new pipeline."""
    pipe = load(AutoPipelineForText2Image)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    unet.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    if wrapped:
        unet = get_peft_model(unet, config)
    else:
        unet.add_adapter(config)
    unet.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 71,680 || all params: ")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 71_680

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    length = tokenizer.model_max_length
    ids = tokenizer(
        ["a photo of a dog"] * 2, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.sample(generator) * vae.config.scaling_factor
        text = text_encoder(ids)[0]
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (2,), generator=generator)
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    unet.train()
    for _ in range(6):
        loss = torch.nn.functional.mse_loss(unet(noisy, t, encoder_hidden_states=text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    unet.eval()
    unet.save_pretrained(tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = load()
    again.load_lora_weights(tmp_path / "lora")
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    assert torch.equal(again("a photo of a dog", **call).images, pipe("a photo of a dog", **call).images)
    again.unload_lora_weights()
    assert not torch.equal(again("a photo of a dog", **call).images, pipe("a photo of a dog", **call).images)


def test_the_ancestral_swap_of_the_second_model(pipe: Any) -> None:
    pipe = load()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.sampler == "euler_a" and type(pipe.scheduler) is EulerAncestralDiscreteScheduler
    assert pipe.scheduler.config.beta_end == pipe.scheduler.config["beta_end"] == 0.012
