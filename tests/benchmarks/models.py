"""Models of SD 1.5's size with random weights, for a machine that has no download; and what a step of ours is made of."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minidiff.core.config import SD15_UNET, SD15_VAE, NoiseConfig, UNetConfig
from minidiff.core.inject import inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import speed_up_network
from minidiff.files.folder import SD15_TEXT
from minidiff.files.text_files import build_text_encoder, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "checkpoints" / "pocket"
DOG, CHALK = ROOT / "lessons" / "data" / "dog", ROOT / "lessons" / "data" / "chalk"
SD15_BYTES = 4 * 859_520_964  # of the U-Net in fp32


@contextmanager
def without_init() -> Iterator[None]:
    """Inside the `with`, modules are made on meta: no time is lost on weights that `fill` draws anyway."""
    with torch.device("meta"):
        yield


def fill(module: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights that keep variances, so that what comes out is about 1 and a difference shows."""
    module = module.to(dtype).to_empty(device=device)
    draw = torch.Generator(device).manual_seed(0)
    for p in module.parameters():
        if p.ndim == 1:
            p.data.fill_(1.0)
        else:
            p.data.normal_(0, (p.numel() / len(p)) ** -0.5, generator=draw)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return module.requires_grad_(False).eval()


def random_unet(
    config: UNetConfig = SD15_UNET, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    with without_init():
        unet = UNet2DConditionModel(config)
    fill(unet, device, dtype)
    return unet


def sd15_folder(folder: Path) -> Path:
    """A whole model of SD 1.5's size, 4 GB in fp32, made once; the tokenizer, and so the table of words, is the pocket's."""
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = load_tokenizer(POCKET / "tokenizer")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with without_init():
        vae = AutoencoderKL(SD15_VAE)
    text_encoder = build_text_encoder(SD15_TEXT | {"vocab_size": len(tokenizer), **ids}, "SD 1.5")
    fill(vae)
    pipe = StableDiffusionPipeline(random_unet(), vae, text_encoder, tokenizer, NoiseConfig())
    pipe.save_pretrained(folder)
    return folder


def in_fp16(folder: Path) -> Path:
    """The same model as most people download it, made once; beside `folder`."""
    half = folder.with_name(f"{folder.name}-fp16")
    if not (half / "model_index.json").is_file():
        shutil.rmtree(half, ignore_errors=True)
        StableDiffusionPipeline.from_pretrained(folder).save_pretrained(half, torch.float16)
    return half


def lora_unet_on_meta(rank: int = 8, dtype: torch.dtype = torch.float16) -> UNet2DConditionModel:
    """Shapes alone: the frozen U-Net in half precision and its adapters, as `minidiff train lora` has them."""
    with without_init():
        unet = UNet2DConditionModel(SD15_UNET).to(dtype)
        inject(unet, rank)
    speed_up_network(unet)
    return unet
