"""SDXL beside diffusers' pipelines: a tiny folder with its layout, unequal heads, depths and text towers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families_parity import compare
from tiny_families import XL_TURBO, set_scheduler, xl_folder
from tiny_recipes import draw_pictures, tiny

from minidiff.core.inject import inject, lora_layers
from minidiff.core.train import Batch
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import read_lora, save_lora
from minidiff.trainer.recipes import RECIPES, write_adapters

diffusers = pytest.importorskip("diffusers")
training = pytest.importorskip("test_training_parity")

START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a red dog on the beach", "a blue cat"]  # without "!": for diffusers' second tokenizer it is a padding mark
CALL: dict[str, Any] = {"latents": START, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
SIZES = {"original_size": (32, 40), "crops_coords_top_left": (3, 5), "target_size": (16, 16)}
NEGATIVE_SIZES = {"negative_original_size": (8, 8), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (16, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return xl_folder(tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path, name: str = "StableDiffusionXLPipeline") -> tuple[Any, Any]:
    theirs = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, add_watermarker=False)
    ours = StableDiffusionPipeline.from_pretrained(folder)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    return loaded(folder)


@pytest.mark.parametrize("skip", [0, 1])
def test_both_encoders_and_the_pooled_vector(pipes: tuple[Any, Any], skip: int) -> None:
    ours, theirs = pipes
    states, pooled = ours.encode_prompt(PROMPTS, clip_skip=skip)
    expected, _, expected_pooled, _ = theirs.encode_prompt(PROMPTS, device="cpu", clip_skip=skip or None)
    assert torch.equal(states, expected) and torch.equal(pooled, expected_pooled)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"negative_prompt": ""},
        {"negative_prompt": "snow"},
        {"negative_prompt": "snow", **SIZES},
        {"guidance_scale": 0.0, **SIZES},
        {"guidance_rescale": 0.5},
    ],
    ids=str,
)
def test_latents(pipes: tuple[Any, Any], call: dict[str, Any]) -> None:
    ours, theirs = pipes
    given = CALL | call
    negative = {"negative_prompt": [call["negative_prompt"]] * 2} if "negative_prompt" in call else {}
    compare(ours(PROMPTS, **given).images, theirs(PROMPTS, **given | negative).images)


def test_the_negative_sizes_of_one_picture(pipes: tuple[Any, Any]) -> None:
    """Of one alone: with several, diffusers 0.42 gives the sizes of the negative half to every second picture."""
    ours, theirs = pipes
    call = CALL | {"latents": START[:1], "negative_prompt": "snow", **SIZES, **NEGATIVE_SIZES}
    compare(ours(PROMPTS[0], **call).images, theirs(PROMPTS[0], **call).images)
    alone = [ours(p, **call | {"latents": START[i : i + 1]}).images for i, p in enumerate(PROMPTS)]
    compare(ours(PROMPTS, **call | {"latents": START}).images, torch.cat(alone))


@pytest.mark.parametrize("steps", [1, 2])
def test_turbo(folder: Path, tmp_path: Path, steps: int) -> None:
    """SDXL-Turbo's scheduler. Euler ancestral draws fresh noise between two steps: from the same generator."""
    set_scheduler(shutil.copytree(folder, tmp_path / "turbo"), XL_TURBO)
    call = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "latent", "height": 16, "width": 16}
    pipes = loaded(tmp_path / "turbo")
    compare(*(pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).images for pipe in pipes))


def test_from_a_picture(folder: Path) -> None:
    from PIL import Image

    image = Image.effect_noise((16, 16), 80).convert("RGB")
    call = {"image": image, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    pipes = loaded(folder, "StableDiffusionXLImg2ImgPipeline")
    compare(*(pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).images for pipe in pipes))


def test_a_folder_of_ours_in_diffusers(folder: Path, tmp_path: Path) -> None:
    ours, theirs = loaded(folder)
    ours.save_pretrained(tmp_path)
    again, others = loaded(tmp_path)
    assert torch.equal(again(PROMPTS, **CALL).images, ours(PROMPTS, **CALL).images)
    compare(again(PROMPTS, **CALL).images, others(PROMPTS, **CALL).images)
    assert others.tokenizer_2.pad_token_id == 0 and others.config.force_zeros_for_empty_prompt


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_lora_files(folder: Path, tmp_path: Path, dialect: str) -> None:
    """Every layer of the U-Net and of both text encoders that a LoRA can have, by kohya's and by diffusers' names."""
    ours, theirs = loaded(folder)
    before = ours(PROMPTS, **CALL).images
    groups = ("attention", "feed_forward", "projections", "resnets", "samplers")
    for name, network in ours.adaptable.items():
        for layer in inject(network, 2, 1.0, groups if name == "unet" else ("text", "text_mlp")).values():
            torch.nn.init.normal_(layer.lora_B["default"], std=0.05)
    write_adapters(ours, {}, tmp_path)
    modules = read_lora(tmp_path).modules
    assert len(modules) == sum(len(lora_layers(network)) for network in ours.adaptable.values())
    path = save_lora(modules, tmp_path / f"{dialect}.safetensors", dialect)
    theirs.load_lora_weights(path)
    expected = theirs(PROMPTS, **CALL).images
    compare(ours(PROMPTS, **CALL).images, expected)
    again, _ = loaded(folder)
    again.load_lora_weights(path)
    compare(again(PROMPTS, **CALL).images, expected)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_five_steps_of_lora_equal_pefts(folder: Path, tmp_path: Path) -> None:
    often = {"max_train_steps": training.STEPS, "max_grad_norm": training.NORM, "adam_epsilon": training.EPSILON}
    often |= {"adam_weight_decay": 0.1, "learning_rate": 1e-2, "lora_alpha": 3, "center_crop": True}
    pictures = draw_pictures(tmp_path / "pictures")
    settings = tiny("lora, text encoder too", folder, pictures, tmp_path / "out", **often)
    untrained, (_, theirs) = RECIPES[type(settings)](settings).modules, loaded(folder)
    for name, model in untrained.items():
        targets = training.ATTENTION if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        getattr(theirs, name).requires_grad_(False)
        training.add_adapter(getattr(theirs, name), model, targets, False)
    _, batches = training.train_ours(settings)
    sizes = torch.tensor([32.0, 40, 0, 2, 16, 16])  # 40 x 32 pixels became 20 x 16, of which the middle 16 are seen
    torch.testing.assert_close(batches[0]["sizes"], theirs.unet.add_time_proj(sizes).reshape(1, -1).expand(2, -1))

    def loss_of(batch: Batch) -> torch.Tensor:
        """As in train_text_to_image_lora_sdxl.py."""
        said = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        ids = [tokenizer([training.INSTANCE] * 2, **said).input_ids for tokenizer in (theirs.tokenizer, theirs.tokenizer_2)]
        towers = zip((theirs.text_encoder, theirs.text_encoder_2), ids)
        one, two = (tower(own, output_hidden_states=True) for tower, own in towers)
        text = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        added = {"text_embeds": two.text_embeds, "time_ids": sizes.expand(2, -1)}
        scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
        x_t = scheduler.add_noise(batch["latents"], batch["noise"], batch["t"])
        output = theirs.unet(x_t, batch["t"], text, added_cond_kwargs=added).sample
        return torch.nn.functional.mse_loss(output, batch["noise"])

    trained = [p for name in untrained for p in training.trained_in(getattr(theirs, name))]
    training.train_by_hand([{"params": trained, "lr": 1e-2}], batches, loss_of)
    result, count = read_lora(settings.output_dir).modules, 0
    for part in untrained:
        for name, layer in training.peft_layers(getattr(theirs, part)).items():
            weights, (A, B) = result[f"{part}.{name.removeprefix('text_model.')}"], training.numbers_of(layer)
            torch.testing.assert_close(weights.A, A, atol=1e-5, rtol=0)
            torch.testing.assert_close(weights.B, B, atol=1e-5, rtol=0)
            count += bool(B.abs().max() > 1e-3)
    assert len(result) == count + 4  # the last layer of the first text encoder is not read


def test_a_single_file_through_diffusers_converters(folder: Path, tmp_path: Path) -> None:
    """Tensor by tensor; the text encoder's one map is that of SD 1.x."""
    from diffusers.loaders import single_file_utils as theirs_from
    from safetensors.torch import load_file

    from minidiff.files.model import ldm_tensors
    from minidiff.files.weights import save

    (ours, theirs), prefix = loaded(folder), "conditioner.embedders.1.model."
    save(ldm_tensors(ours.unet, ours.vae, ours.text_encoder, ours.text_encoder_2), tmp_path / "xl.safetensors")
    unet, vae, one, two = (load_file(tmp_path / "xl.safetensors") for _ in range(4))
    back = {
        "unet": theirs_from.convert_ldm_unet_checkpoint(unet, dict(theirs.unet.config)),
        "vae": theirs_from.convert_ldm_vae_checkpoint(vae, dict(theirs.vae.config)),
        "text_encoder": theirs_from.convert_ldm_clip_checkpoint(one),
        "text_encoder_2": theirs_from.convert_open_clip_checkpoint(theirs.text_encoder_2, two, prefix),
    }
    for part, tensors in back.items():
        state = {key.removeprefix("text_model."): tensor for key, tensor in getattr(theirs, part).state_dict().items()}
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
        assert tensors.keys() == state.keys() - {"embeddings.position_ids"}, part
        assert all(torch.equal(tensors[key].reshape(state[key].shape), state[key]) for key in tensors), part
