"""Models around SD 1.5 on tiny folders: what a call warns of, and what a folder of another family says; SDXL's conditioning."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import sd2_folder, xl_folder

from minidiff.core import textual_inversion
from minidiff.core.errors import AdapterError, SettingsError, WeightsError
from minidiff.core.text import embed_sizes, tokenize
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header, save


def pipe_of(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_turbo_draws_in_one_step_without_guidance_and_warns_of_guidance(tmp_path: Path) -> None:
    pipe = pipe_of(sd2_folder(tmp_path, "SD-Turbo"))
    call = {"seed": 0, "num_inference_steps": 1, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = pipe("a red dog", guidance_scale=0.0, **call).images
    with pytest.warns(UserWarning, match="guidance_scale is 7.5; .* a turbo model, .* guidance_scale 0"):
        assert not torch.equal(pipe("a red dog", **call).images, plain)


@pytest.mark.parametrize("model", ["SD 2", "SD 2 v"])
def test_the_others_are_guided_without_a_warning(model: str, tmp_path: Path) -> None:
    pipe = pipe_of(sd2_folder(tmp_path, model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("a red dog", seed=0, num_inference_steps=2, timestep_spacing="trailing", output_type="latent").images.any()


def test_a_scheduler_that_is_set_later_makes_no_turbo_model(tmp_path: Path) -> None:
    from minidiff import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(sd2_folder(tmp_path))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("a red dog", num_inference_steps=2, output_type="latent").images.any()


def test_the_lightest_text_tower_leaves_sd2_to_transformers(tmp_path: Path) -> None:
    """fast/clip.py has quick_gelu alone; its tokenizer pads as the folder says."""
    from minidiff.fast import clip
    from minidiff.files.model import read_model

    folder = sd2_folder(tmp_path)
    model = read_model(folder, light=clip)
    expected = pipe_of(folder)
    parts = (model.unet, model.vae, model.text_encoder, model.tokenizer, model.noise_config, model.sampler)
    assert torch.equal(StableDiffusionPipeline(*parts).encode_prompt("a red dog!"), expected.encode_prompt("a red dog!"))


def test_a_u_net_of_sdxl_in_a_folder_with_one_text_encoder(tmp_path: Path) -> None:
    import json

    folder = sd2_folder(tmp_path)
    path = folder / "unet" / "config.json"
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shapes = {"linear_1.weight": (64, 40), "linear_1.bias": (64,), "linear_2.weight": (64, 64), "linear_2.bias": (64,)}
    save(read_header(weights).read() | {f"add_embedding.{k}": torch.ones(v) for k, v in shapes.items()}, weights)
    with pytest.raises(WeightsError, match="the U-Net reads a vector of 40 numbers, as SDXL's do, .* make 24"):
        pipe_of(folder)


# --- SDXL ----------------------------------------------------------------------------------------------------------------

LATENTS: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipe_of(xl_folder(tmp_path_factory.mktemp("xl")))


def test_a_batch_is_its_pictures_one_by_one_with_sizes(xl: Any) -> None:
    sizes = {"original_size": (20, 30), "crops_coords_top_left": (2, 3), "negative_target_size": (9, 9)}
    both = xl(["a red dog", "a cat"], negative_prompt="snow", **LATENTS | sizes).images
    one_by_one = enumerate(("a red dog", "a cat"))
    alone = [xl(prompt, negative_prompt="snow", **LATENTS | sizes | {"seed": i}).images for i, prompt in one_by_one]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    for name, value in sizes.items():  # each one tells
        other = xl("a red dog", negative_prompt="snow", **LATENTS | sizes | {name: (1, value[1])}).images
        assert not torch.allclose(other, alone[0], atol=1e-3), name
    with pytest.raises(SettingsError, match="target_size has two numbers"):
        xl("a red dog", target_size=(1, 2, 3))


def test_a_missing_negative_prompt_is_zeros_where_the_folder_says_so(xl: Any) -> None:
    missing, empty = (xl("a red dog", negative_prompt=n, **LATENTS).images for n in (None, ""))
    zeros = {"negative_prompt_embeds": torch.zeros(1, 77, 40), "negative_pooled_prompt_embeds": torch.zeros(1, 24)}
    assert torch.equal(xl("a red dog", **LATENTS | zeros).images, missing) and not torch.allclose(missing, empty, atol=1e-3)
    xl.force_zeros_for_empty_prompt = False
    try:
        assert torch.equal(xl("a red dog", **LATENTS).images, empty)
    finally:
        xl.force_zeros_for_empty_prompt = True


def test_encoded_prompts_draw_what_their_texts_draw(xl: Any) -> None:
    states, pooled = xl.encode_prompt("a (red:1.3) dog BREAK on the beach")
    assert states.shape == (1, 154, 40) and pooled.shape == (1, 24)
    expected = xl("a (red:1.3) dog BREAK on the beach", **LATENTS).images
    assert torch.equal(xl(prompt_embeds=states, pooled_prompt_embeds=pooled, **LATENTS).images, expected)
    with pytest.raises(SettingsError, match=r"must be \(B, 154, 40\) and \(B, 24\), .*it is \(1, 154, 40\)\."):
        xl(prompt_embeds=states, **LATENTS)


def test_weights_act_on_each_encoder_alone_and_not_on_the_pooled_vector_of_the_first_chunk(xl: Any) -> None:
    (plain, pooled), (weighted, same) = xl.encode_prompt("a red dog"), xl.encode_prompt("a (red:1.5) dog BREAK in the snow")
    torch.testing.assert_close(pooled, same)
    for tower in (slice(16), slice(16, 40)):
        z, w = plain[0, :, tower], weighted[0, :77, tower]
        torch.testing.assert_close(w.mean(), z.mean())  # A1111's rule, for each tower
        torch.testing.assert_close(w[2] / w[1], 1.5 * z[2] / z[1], rtol=1e-3, atol=1e-3)


def test_the_pooled_vector_stands_at_the_first_end_mark(xl: Any) -> None:
    """A new word has a larger id than the end mark, and is not taken for it."""
    for tower in (xl.text_encoder, xl.text_encoder_2):
        textual_inversion.inject(tower).add("<new>", torch.ones(1, tower.config.hidden_size))
    try:
        _, pooled = xl.encode_prompt("a <new> dog")
        ids = tokenize(xl.tokenizer, ["a <new> dog"], xl.placeholders)
        hidden = xl.text_encoder_2(input_ids=ids).last_hidden_state  # what stands behind the end mark is not seen from it
        each = xl.text_encoder_2.text_projection(hidden)[0]  # (77, P)
    finally:
        for tower in (xl.text_encoder, xl.text_encoder_2):
            textual_inversion.eject(tower)
    assert ids.argmax() == 2
    torch.testing.assert_close(pooled[0], each[4])
    assert not torch.allclose(pooled[0], each[2], atol=1e-3)


def test_a_folder_without_its_second_half(xl: Any, tmp_path: Path) -> None:
    for part, message in (("tokenizer_2", "tokenizer_2: no CLIP tokenizer"), ("text_encoder_2", "text_encoder_2.* complete")):
        shutil.copytree(xl.name_or_path, tmp_path / part)
        shutil.rmtree(tmp_path / part / part)
        with pytest.raises(WeightsError, match=message):
            pipe_of(tmp_path / part)


def test_inpainting_and_a_picture_to_start_from(xl: Any) -> None:
    from PIL import Image

    image = Image.effect_noise((16, 16), 80).convert("RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    drawn = xl("a red dog", image=image, mask_image=mask, num_inference_steps=2, seed=0).images[0]
    assert drawn.crop((8, 0, 16, 16)).tobytes() == image.crop((8, 0, 16, 16)).tobytes() and drawn.tobytes() != image.tobytes()


def test_the_fields_call_of_the_unet(xl: Any) -> None:
    from minidiff.draw.habits import adopt

    adopt(xl.unet)
    x, (states, pooled) = torch.ones(1, 4, 8, 8), xl.encode_prompt("a red dog")
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        output = xl.unet(x, 500, encoder_hidden_states=states, added_cond_kwargs=added).sample
        vector = torch.cat([pooled, embed_sizes(added["time_ids"], 8)], dim=1)
        assert torch.equal(output, xl.unet(x, 500, states, vector))


def test_what_is_for_another_family_is_called_by_its_name(xl: Any, tmp_path: Path) -> None:
    from minidiff.files.inspect import inspect

    assert len(inspect(xl.name_or_path)) == 5
    to_k = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn{}_to_k.lora_{}.weight"
    for width, says in ((2048, "for SDXL (cross-attention width 2048)"), (None, "for SDXL")):
        shapes = {to_k.format(1, 1, "down"): (2, 640), to_k.format(1, 1, "up"): (640, 2)}
        shapes |= {to_k.format(0, 2, "down"): (2, width), to_k.format(0, 2, "up"): (640, 2)} if width else {}
        save({name: torch.ones(shape) for name, shape in shapes.items()}, path := tmp_path / "lora.safetensors")
        assert inspect(path)[0]["is"] == f"a LoRA in the kohya style {says}"
        with pytest.raises(AdapterError, match=f"a LoRA in the kohya style {re.escape(says)}"):
            xl.load_lora_weights(path)
    save({"<cat>": torch.ones(1, 768)}, path := tmp_path / "word.safetensors")
    with pytest.raises(AdapterError, match="vectors are 768 wide, as in SD 1.x; this text encoder is 16 and 24 wide"):
        xl.load_textual_inversion(path)
    assert inspect(path)[0]["is"] == "a textual inversion embedding of width 768, for SD 1.x"
