"""Ways of fine-tuning, side by side: each makes a `Task` for the loop out of settings.

    base model, pictures -> what is trained, how, what comes out                       -> loop.py trains it

All of them take the same batches to the same loss (common.py). They differ in what moves:

    full                  every weight of the U-Net, perhaps the text encoder's too  W
    dreambooth            the same, and half of each batch is the subject's class    W
    lora (LoRA, DoRA)     thin matrices beside some layers                           W + (alpha / r) B A
    textual_inversion     the vectors of one new word                                v*
    pivotal               a new word and a LoRA                                      v*, B A
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from minidiff.core.errors import AdapterError, DataError
from minidiff.core.inject import adapter_weights, adapters_off, inject, trainable
from minidiff.core.textual_inversion import add_word, initial_vectors
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import save_lora
from minidiff.files.word_file import save_embedding
from minidiff.trainer.card import model_spec, write_card
from minidiff.trainer.job import Job
from minidiff.trainer.latents import LatentData
from minidiff.trainer.methods import (
    TEMPLATES,
    AdapterSettings,
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
    WordSettings,
)
from minidiff.trainer.optimizers import adamw
from minidiff.trainer.task import (
    base_answer,
    diffusion_loss,
    has_prior,
    load_base,
    load_data,
    make_task,
    named,
    sample_sheets,
    with_prior,
)


def full(settings: FullSettings) -> Job:
    """Full fine-tuning: every weight of the U-Net moves, and with --train_text_encoder of the text encoder.

    Comes out: a whole model folder.
    """
    settings.check()
    pipe, base_hash = load_base(replace(settings, mixed_precision="no", bf16_weights=False))  # what moves starts unrounded
    live = settings.train_text_encoder
    data = load_data(pipe, settings, live)
    # From here to make_task the model still answers as the base does: class pictures and first sheets are drawn by it.
    batches = with_prior(pipe, data)
    sheets = sample_sheets(pipe, settings, data)
    untuned = copy.deepcopy(pipe.unet) if settings.prior_from_base and has_prior(settings) else None
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, untuned or pipe.unet))

    networks: dict[str, nn.Module] = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if live else {})
    for network in networks.values():
        network.requires_grad_(True)

    def card(folder: Path) -> None:
        method, tag = ("DreamBooth", "dreambooth") if settings.with_prior_preservation else ("Full fine-tune", "full")
        write_card(folder, settings, data, method, tag, {"trained": " and ".join(networks)})

    return make_task(
        pipe,
        settings,
        data,
        base_hash=base_hash,
        batches=batches,
        trainable=named(networks),
        loss=loss,
        export=pipe.save_pretrained,
        card=card,
        preview=sheets,
        untuned=untuned,
    )


def dreambooth(settings: DreamBoothSettings) -> Job:
    """DreamBooth (arXiv 2208.12242): full fine-tuning whose batches hold the subject and its class, half and half.

    The prior is a setting of every recipe that changes the model: LoRA with --with_prior_preservation is DreamBooth-LoRA.
    """
    return full(settings)


def lora(settings: LoRASettings) -> Job:
    """LoRA (arXiv 2106.09685) or DoRA (2402.09353): the base stays frozen, and learns a detour beside some layers.

    Comes out: `pytorch_lora_weights.safetensors`, which minidiff and diffusers load.
    """
    pipe, base_hash = load_base(settings)
    networks = add_adapters(pipe, settings)  # first, because a target may be wrong; it changes nothing yet, to the bit
    live = settings.train_text_encoder
    data = load_data(pipe, settings, live)
    # From here to make_task the model still answers as the base does: class pictures and first sheets are drawn by it.
    batches = with_prior(pipe, data)
    sheets = sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, pipe.unet, lambda: adapters_off(pipe.unet)))

    def export(folder: Path) -> None:
        write_adapter(folder, networks, model_spec(settings, "lora", data, pipe.schedule, base_hash))

    def card(folder: Path) -> None:
        write_card(folder, settings, data, "DoRA" if settings.use_dora else "LoRA", "lora", shape_of(settings))

    return make_task(
        pipe,
        settings,
        data,
        base_hash=base_hash,
        batches=batches,
        trainable=named(networks),
        loss=loss,
        export=export,
        card=card,
        preview=sheets,
    )


def textual_inversion(settings: TextualInversionSettings) -> Job:
    """Textual inversion (arXiv 2208.01618): nothing of the model moves; one new word gets its meaning.

    Comes out: `learned_embeds.safetensors`, a few kilobytes.
    """
    pipe, base_hash = load_base(settings)
    word = new_word(pipe, settings)
    data = load_word_data(pipe, settings)
    sheets = sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings)

    def export(folder: Path) -> None:
        spec = model_spec(settings, "textual-inversion", data, pipe.schedule, base_hash)
        save_embedding(folder, settings.placeholder_token, word["word"], metadata=spec)

    def card(folder: Path) -> None:
        facts = {"new word": f"`{settings.placeholder_token}`", "vectors": settings.num_vectors}
        write_card(folder, settings, data, "Textual inversion", "textual_inversion", facts)

    return make_task(
        pipe,
        settings,
        data,
        base_hash=base_hash,
        batches=data,
        trainable=word,
        loss=loss,
        export=export,
        card=card,
        preview=sheets,
    )


def pivotal(settings: PivotalSettings) -> Job:
    """Pivotal tuning, after Roich et al. (arXiv 2106.05744): a word for the subject, and a LoRA for what no word can say.

    The paper first finds the word (the pivot), then holds it still and tunes the model around it. Here, as is usual for
    Stable Diffusion, both learn from the first step on, each at its own rate. Comes out: the files of the two recipes above.
    """
    pipe, base_hash = load_base(settings)
    networks = add_adapters(pipe, settings)
    detours = named(networks)  # now, while they alone are trainable: the new word will be a part of the text encoder
    word = new_word(pipe, settings)
    data = load_word_data(pipe, settings)
    # From here to make_task the model still answers as the base does: class pictures and first sheets are drawn by it.
    batches = with_prior(pipe, data)
    sheets = sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, pipe.unet, lambda: adapters_off(pipe.unet)))
    optimizer = adamw(list(detours.values()), settings)
    optimizer.add_param_group({"params": list(word.values()), "lr": settings.learning_rate_embedding})

    def export(folder: Path) -> None:
        spec = model_spec(settings, "lora", data, pipe.schedule, base_hash)
        write_adapter(folder, networks, spec)
        save_embedding(folder, settings.placeholder_token, word["word"], metadata=spec)

    def card(folder: Path) -> None:
        facts = {"new word": f"`{settings.placeholder_token}`", "vectors": settings.num_vectors, **shape_of(settings)}
        facts["learning rate of the word"] = f"{settings.learning_rate_embedding:g}"
        write_card(folder, settings, data, "Pivotal tuning", "pivotal", facts)

    return make_task(
        pipe,
        settings,
        data,
        base_hash=base_hash,
        batches=batches,
        trainable=detours | word,
        loss=loss,
        export=export,
        card=card,
        preview=sheets,
        optimizer=optimizer,
    )


RECIPES: dict[type, Callable[[Any], Job]] = {
    FullSettings: full,
    DreamBoothSettings: dreambooth,
    LoRASettings: lora,
    TextualInversionSettings: textual_inversion,
    PivotalSettings: pivotal,
}

# --- what they add -----------------------------------------------------------------------------------------------------


def add_adapters(pipe: StableDiffusionPipeline, settings: AdapterSettings) -> dict[str, nn.Module]:
    """Fresh adapters on the U-Net, and on the text encoder's attention if asked; the networks that have them."""
    s = settings
    targets: dict[str, tuple[nn.Module, tuple[str, ...]]] = {"unet": (pipe.unet, s.lora_targets)}
    if s.train_text_encoder:
        targets["text_encoder"] = (pipe.text_encoder, ("text",))
    for part, (network, layers) in targets.items():
        ranks = s.rank_of if part == "unet" else {}
        inject(
            network,
            s.rank,
            s.lora_alpha,
            layers,
            s.seed,
            rank_of=ranks,
            rslora=s.use_rslora,
            dora=s.use_dora,
            dropout=s.lora_dropout,
        )
        print_trainable_parameters(network)
    return {part: network for part, (network, _) in targets.items()}


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")


def write_adapter(folder: Path, networks: dict[str, nn.Module], metadata: dict[str, str]) -> None:
    """The adapters of all networks in one file."""
    modules = {f"{part}.{name}": w for part, model in networks.items() for name, w in adapter_weights(model).items()}
    save_lora(modules, folder, metadata=metadata)


def shape_of(settings: AdapterSettings) -> dict[str, object]:
    """An adapter's rows in the model card."""
    alpha = settings.rank if settings.lora_alpha is None else settings.lora_alpha
    scale = "alpha / √rank (rsLoRA)" if settings.use_rslora else "alpha / rank"
    facts: dict[str, object] = {"rank, alpha": f"{settings.rank}, {alpha:g}; the scale is {scale}"}
    if settings.rank_pattern:
        facts["other ranks"] = ", ".join(settings.rank_pattern)
    facts["layers"] = ", ".join(settings.lora_targets)
    return facts | ({"text encoder": "its attention"} if settings.train_text_encoder else {})


def new_word(pipe: StableDiffusionPipeline, settings: WordSettings) -> dict[str, nn.Parameter]:
    """The new word, as it begins."""
    vectors = initial_vectors(pipe.tokenizer, pipe.text_encoder, settings.initializer_token, settings.num_vectors)
    try:
        return {"word": add_word(pipe.tokenizer, pipe.text_encoder, settings.placeholder_token, vectors)}
    except AdapterError as error:
        raise AdapterError(f"--placeholder_token: {error}") from error


def load_word_data(pipe: StableDiffusionPipeline, settings: WordSettings) -> LatentData:
    """The pictures, and the word in sentences: the captions or the prompt, or else the paper's kind of neutral ones."""
    given, word = settings.train_data_dir or settings.instance_prompt, settings.placeholder_token
    data = load_data(pipe, settings, True, ("{}",) if given else TEMPLATES[settings.learnable_property])
    first, last = pipe.placeholders[word][0], pipe.placeholders[word][-1]  # of its vectors
    if cut := [prompt for prompt, ids in data.prompts.items() if first in ids and last not in ids]:
        raise DataError(
            f'--num_vectors {settings.num_vectors}: in "{cut[0]:.80}" the new word itself is cut off, as CLIP reads 75 tokens. '
            "Give fewer vectors, or write less before the word."
        )
    without = [e.path.name for e in data.examples if first not in data.prompts[data.templates[0].replace("{}", e.caption)]]
    if len(without) == len(data.examples):
        raise DataError(f"no caption holds the new word, {word}, as a word of its own: nothing would teach it. Write it in.")
    if without:
        some = ", ".join(without[:3]) + " …" * (len(without) > 3)
        print(f"Note: {len(without)} of {len(data.examples)} captions are without {word} ({some}).", file=sys.stderr)
    return data
