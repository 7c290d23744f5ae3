"""A tokenizer and a text tower of a few thousand random numbers, for tests of text and prompts."""

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff.files.text_files import build_text_encoder, load_tokenizer
from minidiff.pocket.tokenizer import build_tokenizer

PLACEHOLDERS = {"<dog>": [1001, 1002, 1003], "<long>": list(range(1100, 1160))}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a vocabulary into `folder`, and load it."""
    build_tokenizer(folder, ["a photo of a red dog on the beach"])
    return load_tokenizer(folder)


def config(tokenizer: CLIPTokenizer) -> dict[str, object]:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 77,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }


def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    return build_text_encoder(config(tokenizer), "config.json")


def final_norm(tower: CLIPTextModel) -> nn.LayerNorm:
    return next(module for name, module in tower.named_modules() if name.endswith("final_layer_norm"))


def with_mean(tower: CLIPTextModel, mean: float = -0.3) -> CLIPTextModel:
    """A tower as CLIP's own is: its states have a mean that stands out."""
    nn.init.constant_(final_norm(tower).bias, mean)
    return tower


def ids_of(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
