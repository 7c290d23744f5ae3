"""The names in adapter files: every program's find their layer, and none is guessed."""

import pytest
import torch
from tiny_sizes import TINY_UNET

from minidiff.core.config import SD15_UNET, SDXL_UNET, UNetConfig
from minidiff.core.inject import adaptable_layers
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files import names
from minidiff.files.lora_names import Place, bundled_words, key_of, lora_dialect, place_of
from minidiff.pocket.denoiser import POCKET_UNET

DOWN = "down_blocks.0.attentions.0"
TO_Q, TO_OUT = f"{DOWN}.transformer_blocks.0.attn1.to_q", f"{DOWN}.transformer_blocks.0.attn1.to_out.0"
TEXT_Q = "encoder.layers.0.self_attn.q_proj"
WRITTEN = ("diffusers", "kohya", "peft")
NAMES = {
    # a1
    f"unet.{TO_Q}.lora_A.weight": (f"unet.{TO_Q}", "down"),
    f"unet.{TO_OUT}.lora_B.weight": (f"unet.{TO_OUT}", "up"),
    "unet.conv_in.lora_A.weight": ("unet.conv_in", "down"),
    f"unet.{TO_Q}.lora_magnitude_vector": (f"unet.{TO_Q}", "magnitude"),
    f"text_encoder.text_model.{TEXT_Q}.lora_A.weight": (f"text_encoder.{TEXT_Q}", "down"),
    f"text_encoder.{TEXT_Q}.lora_A.weight": (f"text_encoder.{TEXT_Q}", "down"),
    # a2
    f"unet.{TO_Q}.lora.down.weight": (f"unet.{TO_Q}", "down"),
    f"text_encoder.text_model.{TEXT_Q}.lora_linear_layer.up.weight": (f"text_encoder.{TEXT_Q}", "up"),
    # b
    f"unet.{DOWN}.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (f"unet.{TO_Q}", "down"),
    f"{DOWN}.transformer_blocks.0.attn1.processor.to_out_lora.up.weight": (f"unet.{TO_OUT}", "up"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": (f"text_encoder.{TEXT_Q}", "down"),
    "text_model.encoder.layers.3.self_attn.to_out_lora.up.weight": ("text_encoder.encoder.layers.3.self_attn.out_proj", "up"),
    # c
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (f"unet.{TO_Q}", "down"),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha": (f"unet.{TO_OUT}", "alpha"),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight": (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up",
    ),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": ("unet.mid_block.attentions.0.proj_in", "up"),
    "lora_unet_up_blocks_3_resnets_2_time_emb_proj.lora_mid.weight": ("unet.up_blocks.3.resnets.2.time_emb_proj", "mid"),
    "lora_unet_down_blocks_2_downsamplers_0_conv.dora_scale": ("unet.down_blocks.2.downsamplers.0.conv", "dora_scale"),
    "lycoris_mid_block_resnets_0_conv1.lora_down.weight": ("unet.mid_block.resnets.0.conv1", "down"),
    "lora_unet_time_embedding_linear_1.alpha": ("unet.time_embedding.linear_1", "alpha"),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (f"text_encoder.{TEXT_Q}", "down"),
    "lora_te1_text_model_encoder_layers_11_mlp_fc2.alpha": ("text_encoder.encoder.layers.11.mlp.fc2", "alpha"),
    "lora_te_encoder_layers_0_self_attn_q_proj.lora_down.weight": (f"text_encoder.{TEXT_Q}", "down"),
    # d
    f"base_model.model.{TO_Q}.lora_A.weight": (f"unet.{TO_Q}", "down"),
    f"base_model.model.text_model.{TEXT_Q}.lora_B.weight": (f"text_encoder.{TEXT_Q}", "up"),
    # diffusers' save_lora_adapter, and peft with the adapter's own name inside
    f"{TO_Q}.lora_A.weight": (f"unet.{TO_Q}", "down"),
    f"{TEXT_Q}.lora_B.weight": (f"text_encoder.{TEXT_Q}", "up"),
    f"base_model.model.{TO_Q}.lora_B.default.weight": (f"unet.{TO_Q}", "up"),
    f"base_model.model.{TO_Q}.lora_magnitude_vector.default.weight": (f"unet.{TO_Q}", "magnitude"),
    # OneTrainer: kohya's, with dots
    f"lora_unet.{TO_Q}.lora_down.weight": (f"unet.{TO_Q}", "down"),
    f"lora_te.text_model.{TEXT_Q}.lora_up.weight": (f"text_encoder.{TEXT_Q}", "up"),
    f"unet.{TO_OUT}.dora_scale": (f"unet.{TO_OUT}", "dora_scale"),
    "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.alpha": (f"unet.{TO_Q}", "alpha"),
    f"clip_l.text_model.{TEXT_Q}.alpha": (f"text_encoder.{TEXT_Q}", "alpha"),
    # ComfyUI: LDM's names
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight": (f"unet.{TO_Q}", "down"),
    "diffusion_model.output_blocks.2.1.conv.lora_up.weight": ("unet.up_blocks.0.upsamplers.0.conv", "up"),
    f"text_encoders.clip_l.transformer.text_model.{TEXT_Q}.lora_up.weight": (f"text_encoder.{TEXT_Q}", "up"),
    # f: SD 1.5 has three of LDM's blocks to a level
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": (f"unet.{TO_Q}", "down"),
    "lora_unet_input_blocks_4_0_in_layers_2.alpha": ("unet.down_blocks.1.resnets.0.conv1", "alpha"),
    "lora_unet_input_blocks_3_0_op.alpha": ("unet.down_blocks.0.downsamplers.0.conv", "alpha"),
    "lora_unet_middle_block_1_proj_out.alpha": ("unet.mid_block.attentions.0.proj_out", "alpha"),
    "lora_unet_output_blocks_2_1_conv.alpha": ("unet.up_blocks.0.upsamplers.0.conv", "alpha"),
    "lora_unet_output_blocks_11_0_skip_connection.alpha": ("unet.up_blocks.3.resnets.2.conv_shortcut", "alpha"),
    "lora_unet_time_embed_0.alpha": ("unet.time_embedding.linear_1", "alpha"),
    "lora_unet_out_2.alpha": ("unet.conv_out", "alpha"),
}


@pytest.mark.parametrize("key", NAMES)
def test_names_of_every_dialect(key: str) -> None:
    assert place_of(key, SD15_UNET) == NAMES[key]


@pytest.mark.parametrize(
    "key",
    [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",  # Flux
        f"unet.{TEXT_Q}.lora_A.weight",
        f"text_encoder.{TO_Q}.lora_A.weight",
        f"unet.{TO_Q}.lora_A.bias",
        "bundle_emb.dog.emb_params",
        f"unet.{TO_Q}.weight",
        "unet:0:down",
        "unet.lora_A.weight",
        ".lora_A.weight",
        "",
    ],
)
def test_other_names_have_no_place(key: str) -> None:
    assert place_of(key, SD15_UNET) is None


XL_NAMES = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha": f"text_encoder.{TEXT_Q}",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha": f"text_encoder_2.{TEXT_Q}",
    f"text_encoder_2.text_model.{TEXT_Q}.lora_A.weight": f"text_encoder_2.{TEXT_Q}",
    f"text_encoders.clip_g.transformer.text_model.{TEXT_Q}.lora_up.weight": f"text_encoder_2.{TEXT_Q}",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    ),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.alpha": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    ),
    "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2.alpha": (
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2"
    ),
    "lora_unet_output_blocks_2_2_conv.alpha": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_input_blocks_3_0_op.alpha": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_skip_connection.alpha": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_label_emb_0_0.alpha": "unet.add_embedding.linear_1",
}


@pytest.mark.parametrize("key", XL_NAMES)
def test_names_of_sdxl(key: str) -> None:
    place = place_of(key, SDXL_UNET)
    assert place is not None and place.module == XL_NAMES[key]
    if key.startswith("lora_") and "down_blocks" not in key:  # kohya's own form
        assert key_of(place, "kohya", xl=True) == key


@pytest.mark.parametrize(
    ("key", "dialect"),
    [
        (f"{TO_Q}.lora_A.weight", "diffusers"),
        ("lycoris_mid_block_resnets_0_conv1.lora_down.weight", "kohya"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", "ComfyUI"),
        ("diffusion_model.input_blocks.1.1.proj_in.lokr_w1", "ComfyUI"),
        (f"clip_l.text_model.{TEXT_Q}.lora_up.weight", "OneTrainer"),
        (f"unet.{TO_Q}.lora_down.weight", "OneTrainer"),
        (f"unet.{TO_Q}.lora.down.weight", "diffusers down/up"),
        (f"unet.{TO_Q}.weight", None),
        ("bundle_emb.dog.emb_params", None),
    ],
)
def test_whose_names_these_are(key: str, dialect: str | None) -> None:
    assert lora_dialect([key]) == dialect


def test_words_that_a_lora_brings_along() -> None:
    keys = ["bundle_emb.v1.5.emb_params", "bundle_emb.<dog>.clip_l", "bundle_emb.cat.string_to_param.*", "bundle_emb.x.clip_g"]
    assert bundled_words(keys) == {"v1.5": keys[0], "<dog>": keys[1], "cat": keys[2]}


def modules_of(config: UNetConfig) -> list[str]:
    """Every layer of a U-Net and of a text encoder."""
    with torch.device("meta"):
        unet = adaptable_layers(UNet2DConditionModel(config))
    last = [*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    return [f"unet.{path}" for path in unet] + [f"text_encoder.encoder.layers.{i}.{x}" for i in (0, 11, 31) for x in last]


@pytest.mark.parametrize("path", ["conv_in.\x1b[2J", "conv_in.a b", "conv_in.\n"])
def test_letters_that_no_module_has(path: str) -> None:
    assert place_of(f"unet.{path}.lora_A.weight", SD15_UNET) is None


CONFIGS = pytest.mark.parametrize("config", [SD15_UNET, POCKET_UNET, TINY_UNET], ids=["sd15", "pocket", "tiny"])


@CONFIGS
def test_ldm_names_of_every_layer_are_read(config: UNetConfig) -> None:
    modules = [name for name in modules_of(config) if name.startswith("unet.")]
    assert config != SD15_UNET or len(modules) == 282
    for name in modules:
        ldm = names.rename(name.removeprefix("unet."), names.unet_table(config)).replace(".", "_")
        assert place_of(f"lora_unet_{ldm}.alpha", config) == (name, "alpha")


@CONFIGS
@pytest.mark.parametrize("dialect", WRITTEN)
def test_written_names_are_read_back(dialect: str, config: UNetConfig) -> None:
    magnitude = "dora_scale" if dialect == "kohya" else "magnitude"
    keys = set()
    for module in modules_of(config):
        for part in ("down", "up", magnitude):
            keys.add(key := key_of(Place(module, part), dialect))
            assert place_of(key, config) == (module, part)
    assert len(keys) == 3 * len(modules_of(config))


def test_written_names() -> None:
    """To the letter, as in FORMATS: other programs look for these."""
    q, text = Place(f"unet.{TO_Q}", "down"), Place(f"text_encoder.{TEXT_Q}", "up")
    assert key_of(q, "diffusers") == f"unet.{TO_Q}.lora_A.weight"
    assert key_of(text, "diffusers") == f"text_encoder.text_model.{TEXT_Q}.lora_B.weight"
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert key_of(q, "kohya") == kohya
    assert key_of(text, "kohya") == "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    assert key_of(q, "peft") == f"base_model.model.{TO_Q}.lora_A.weight"
