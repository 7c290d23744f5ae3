"""The recipes of core/recipes.py as jobs: base model, pictures and settings come in; files, cards and sheets come out.

The prior is a setting of every recipe that changes the model: LoRA with --with_prior_preservation is DreamBooth-LoRA.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidiff.core import recipes as core
from minidiff.core.config import ControlNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import AdapterError, DataError
from minidiff.core.inject import adapter_weights
from minidiff.core.ip_adapter import ImageProjection, IPAdapter
from minidiff.core.rng import hashed_seed
from minidiff.core.train import DTYPES
from minidiff.draw.control import check_family
from minidiff.draw.lora_tags import print_trainable_parameters
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import checkpoint_gradients, speed_up
from minidiff.files.controlnet import read_controlnet, write_controlnet
from minidiff.files.folder import local_folder
from minidiff.files.ip_adapter_file import load_image_tower
from minidiff.files.lora_file import save_lora
from minidiff.files.weights import save
from minidiff.files.word_file import check_word, save_embedding
from minidiff.trainer import settings as kinds
from minidiff.trainer.card import model_spec
from minidiff.trainer.latents import LatentData, model_fingerprint
from minidiff.trainer.task import Job, load_base, load_data, make_job


def full(settings: kinds.FullSettings) -> Job:
    """Full fine-tuning and DreamBooth. The result is a whole model folder."""
    pipe, base_hash = load_base(settings, unrounded=True)  # as trained weights start
    data = load_data(pipe, settings)
    trainable = read_by(pipe, core.full(trained_networks(pipe, settings)))
    tag = "dreambooth" if settings.with_prior_preservation else "full"
    return make_job(pipe, settings, base_hash, data, trainable, pipe.save_pretrained, tag)


def lora(settings: kinds.LoRASettings) -> Job:
    """LoRA or DoRA. The result is `pytorch_lora_weights.safetensors`, which minidiff and diffusers load."""
    pipe, base_hash = load_base(settings)
    trainable = new_adapters(pipe, settings)
    data = load_data(pipe, settings)
    spec = model_spec(settings, "lora", data, pipe, base_hash)
    return make_job(pipe, settings, base_hash, data, trainable, partial(write_adapters, pipe, spec), "lora")


def textual_inversion(settings: kinds.TextualInversionSettings) -> Job:
    """Textual inversion. The result is `learned_embeds.safetensors`, a few kilobytes."""
    pipe, base_hash = load_base(settings)
    trainable = new_word(pipe, settings)
    data = load_word_data(pipe, settings)
    spec = model_spec(settings, "textual-inversion", data, pipe, base_hash)

    def export(folder: Path) -> None:
        save_embedding(folder, settings.placeholder_token, trainable["word"], metadata=spec, second=trainable.get("word_2"))

    return make_job(pipe, settings, base_hash, data, trainable, export, "textual_inversion")


def pivotal(settings: kinds.PivotalSettings) -> Job:
    """Pivotal tuning: a word and a LoRA, each with its own learning rate. The result is the files of both."""
    pipe, base_hash = load_base(settings)
    adapters, word = new_adapters(pipe, settings), new_word(pipe, settings)
    data = load_word_data(pipe, settings)
    spec = model_spec(settings, "lora", data, pipe, base_hash)

    def export(folder: Path) -> None:
        write_adapters(pipe, spec, folder)
        save_embedding(folder, settings.placeholder_token, word["word"], metadata=spec, second=word.get("word_2"))

    return make_job(pipe, settings, base_hash, data, adapters | word, export, "pivotal")


def controlnet(settings: kinds.ControlNetSettings) -> Job:
    """A ControlNet. The result is a folder of diffusers' form."""
    pipe, base_hash = load_base(settings, unrounded=True)  # as the copy starts
    widths = ControlNetConfig.conditioning_embedding_out_channels[: len(pipe.vae.config.block_out_channels)]
    kept = settings.controlnet_model_name_or_path
    torch.manual_seed(hashed_seed(settings.seed, "controlnet"))
    net = read_controlnet(kept, like=pipe.unet.config) if kept else ControlNetModel.from_unet(pipe.unet, widths).float()
    check_family([net], pipe.unet.config)
    checkpoint_gradients(net, settings.gradient_checkpointing)
    if settings.mixed_precision != "no":
        pipe.to(DTYPES[settings.mixed_precision])
    pipe.controlnet = net
    data, trainable = load_data(pipe, settings), core.full({"controlnet": net})
    return make_job(pipe, settings, base_hash, data, trainable, partial(write_controlnet, net), "controlnet")


def ip_adapter(settings: kinds.IPAdapterSettings) -> Job:
    """An IP-Adapter of the base form. The result is `ip_adapter.safetensors`."""
    pipe, base_hash = load_base(settings, unrounded=True)  # one number format for the U-Net and what is trained
    home = Path(settings.image_encoder or local_folder(settings.pretrained_model_name_or_path) / "image_encoder")
    tower, pixels = load_image_tower(home)
    torch.manual_seed(hashed_seed(settings.seed, "ip_adapter"))
    projection = ImageProjection(tower.config.projection_dim, pipe.unet.config.cross_attention_dim)
    adapter = IPAdapter(projection, pipe.unet).float()
    pipe.attach_ip_adapter(adapter, tower, pixels)
    data = load_data(pipe, settings)
    spec = model_spec(settings, "ip-adapter", data, pipe, base_hash)

    def export(folder: Path) -> None:
        save(adapter.state_dict(), folder / "ip_adapter.safetensors", spec)

    trainable = dict(adapter.named_parameters())
    return make_job(pipe, settings, base_hash + model_fingerprint(tower), data, trainable, export, "ip_adapter")


RECIPES: dict[type, Callable[[Any], Job]] = {
    kinds.FullSettings: full,
    kinds.DreamBoothSettings: full,
    kinds.LoRASettings: lora,
    kinds.TextualInversionSettings: textual_inversion,
    kinds.PivotalSettings: pivotal,
    kinds.ControlNetSettings: controlnet,
    kinds.IPAdapterSettings: ip_adapter,
}

# --- adapters ------------------------------------------------------------------------------------------------------------


def new_adapters(pipe: StableDiffusionPipeline, settings: kinds.AdapterSettings) -> core.Trainable:
    """The new adapters, with their fast classes. Prints how much is trained, as peft does."""
    s, networks = settings, trained_networks(pipe, settings)
    shape = core.Adapter(s.rank, s.lora_alpha, s.lora_targets, s.rank_of, s.use_rslora, s.use_dora, s.lora_dropout, s.seed)
    adapters = read_by(pipe, core.lora(networks, shape))
    speed_up(pipe)
    for network in networks.values():
        print_trainable_parameters(network)
    return adapters


def trained_networks(pipe: StableDiffusionPipeline, s: kinds.FullSettings | kinds.AdapterSettings) -> dict[str, nn.Module]:
    return {"unet": pipe.unet} | (pipe.parts.towers if s.train_text_encoder else {})


def read_by(pipe: StableDiffusionPipeline, trainable: core.Trainable) -> core.Trainable:
    """Without what never gets a gradient: SDXL does not read the last layer of its first text encoder."""
    last = pipe.text_encoder.config.num_hidden_layers - 1
    unread = re.compile(rf"text_encoder\.(text_model\.)?(encoder\.layers\.{last}|final_layer_norm)\.")
    return {name: p for name, p in trainable.items() if pipe.text_encoder_2 is None or not unread.match(name)}


def write_adapters(pipe: StableDiffusionPipeline, metadata: dict[str, str], folder: Path) -> None:
    """The adapters of all networks in one file. (A network without one adds nothing.)"""
    networks = pipe.parts.adaptable
    modules = {f"{part}.{name}": w for part, model in networks.items() for name, w in adapter_weights(model).items()}
    save_lora(modules, folder, metadata=metadata)


# --- words ---------------------------------------------------------------------------------------------------------------

# Sentences to train a new word {} with, if there are no captions; by --learnable_property. As in the appendix of arXiv
# 2208.01618: many neutral sentences, true of any picture, so that the word learns what the pictures have in common. They use
# only words that the pocket checkpoint knows, too: those of the captions in pocket/world.py.
TEMPLATES = {
    "object": (
        *("a photo of {}", "a photo of a {}", "a photo of the {}", "the photo of {}", "the photo of a {}"),
        *("the photo of the {}", "photo of {}", "photo of a {}", "photo of the {}", "a picture of {}", "a picture of a {}"),
        *("a picture of the {}", "the picture of {}", "the picture of a {}", "the picture of the {}", "picture of a {}"),
        *("picture of the {}", "{}", "a {}", "the {}"),
    ),
    "style": (
        *("a picture in {}", "the picture in {}", "picture in {}", "art in {}", "a picture in the style of {}"),
        *("the picture in the style of {}", "a picture in {} style", "art in the style of {}", "a picture in {} art"),
        *("the picture in {} art", "a picture of {} art", "the picture of {} art", "{} art", "the {} art", "a {} picture"),
        *("the {} picture", "{} picture", "{}", "a {}", "the {}"),
    ),
}


def new_word(pipe: StableDiffusionPipeline, settings: kinds.WordSettings) -> core.Trainable:
    """The new word with its first vectors, "word"; in SDXL also "word_2", for the second text encoder."""
    word, like = settings.placeholder_token, settings.initializer_token
    try:
        check_word(pipe.tokenizer, word, pipe.placeholders)
    except AdapterError as error:
        raise AdapterError(f"--placeholder_token: {error}") from error
    learn = partial(core.textual_inversion, pipe.tokenizer, word=word, like=like, count=settings.num_vectors)
    return {name.replace("text_encoder", "word"): learn(tower)["word"] for name, tower in pipe.parts.towers.items()}


def load_word_data(pipe: StableDiffusionPipeline, settings: kinds.WordSettings) -> LatentData:
    """The pictures, and the word in sentences: the captions or the prompt, or else the paper's kind of neutral ones."""
    word, neutral = settings.placeholder_token, TEMPLATES[settings.learnable_property]
    data = load_data(pipe, settings, ("{}",) if settings.instance_prompt else neutral)
    if settings.train_data_dir and (few := [e for e in data.examples if len(e.templates) > 1]):
        some = f"{len(few)} of {len(data.examples)} pictures have no caption"
        print(f"Note: {some}, so neutral sentences are trained for them (--learnable_property).", file=sys.stderr)
    first, last = pipe.placeholders[word][0], pipe.placeholders[word][-1]  # of its vectors
    if cut := [prompt for prompt, row in data.prompts.items() if first in row["ids"] and last not in row["ids"]]:
        raise DataError(
            f'--num_vectors {settings.num_vectors}: in "{cut[0]:.80}" the new word itself is cut off, as CLIP reads 75 tokens. '
            "Give fewer vectors, or write less before the word."
        )
    without = [e.path.name for e in data.examples if first not in data.prompts[e.prompts[0]]["ids"]]
    if len(without) == len(data.examples):
        hint = "Write it in, or leave the captions out with --no_captions."
        raise DataError(f"no caption holds the new word, {word}, as a word of its own: nothing would teach it. {hint}")
    if without:
        some = ", ".join(without[:3]) + " …" * (len(without) > 3)
        print(f"Note: {len(without)} of {len(data.examples)} captions are without {word} ({some}).", file=sys.stderr)
    return data
