"""A whole model in SD 1.5's layout, of a few thousand random numbers, for tests that need a folder to load."""

from pathlib import Path

import torch
from tiny_sizes import TINY_UNET, TINY_VAE

from minidiff.core.config import NoiseConfig
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.text_files import build_text_encoder, load_tokenizer
from minidiff.pocket.tokenizer import build_tokenizer


def tiny_folder(home: Path) -> Path:
    """Write the model into `home/base`: 16-pixel latents for 32-pixel pictures, text 24 wide."""
    torch.manual_seed(0)
    build_tokenizer(home / "words", ["a photo of a red dog"])
    tokenizer = load_tokenizer(home / "words")
    text = {"hidden_size": TINY_UNET.cross_attention_dim, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    encoder = build_text_encoder({"vocab_size": len(tokenizer), "num_hidden_layers": 1, **text, **ids}, "tiny")
    unet, vae = UNet2DConditionModel(TINY_UNET), AutoencoderKL(TINY_VAE)
    StableDiffusionPipeline(unet, vae, encoder, tokenizer, NoiseConfig()).save_pretrained(home / "base")
    return home / "base"
