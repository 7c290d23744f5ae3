"""Ways of fine-tuning, side by side: each makes a `Task` for the loop out of settings.

    base model, pictures -> what is trained, how, what comes out                       -> loop.py trains it

All of them take the same batches to the same loss (common.py). They differ in what moves:

    full                  every weight of the U-Net, perhaps of the text encoder     W
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

from minidiff.adapters.inject import adapter_weights, adapters_off, inject, print_trainable_parameters
from minidiff.adapters.textual_inversion import add_word, initial_vectors
from minidiff.errors import AdapterError, DataError
from minidiff.files.embeddings import save_embedding
from minidiff.files.lora import save_lora
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.train.common import (
    base_answer,
    diffusion_loss,
    load_base,
    load_data,
    make_task,
    named,
    sample_sheets,
    with_prior,
)
from minidiff.train.data import LatentData
from minidiff.train.loop import Task
from minidiff.train.methods import (
    AdapterSettings,
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
    WordSettings,
)
from minidiff.train.optim import adamw
from minidiff.train.publish import model_spec, write_card
from minidiff.train.templates import TEMPLATES


def full(settings: FullSettings) -> Task:
    """Full fine-tuning: every weight moves. Comes out: a whole model folder."""
    pipe, base = load_base(replace(settings, mixed_precision="no"))  # what moves is fp32, and starts unrounded
    live = settings.train_text_encoder
    data = load_data(pipe, settings, live)
    batches, sheets = with_prior(pipe, data, live), sample_sheets(pipe, settings, data)
    untuned = copy.deepcopy(pipe.unet) if settings.prior_from_base else pipe.unet
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, untuned))

    networks: dict[str, nn.Module] = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if live else {})
    for network in networks.values():
        network.requires_grad_(True)

    def export(folder: Path) -> None:
        pipe.save_pretrained(folder)
        method, tag = ("DreamBooth", "dreambooth") if settings.with_prior_preservation else ("Full fine-tune", "full")
        write_card(folder, settings, data, method, tag, {"trained": " and ".join(networks)})

    return make_task(pipe, settings, base, data, batches, named(networks), loss, export, sheets)


def dreambooth(settings: DreamBoothSettings) -> Task:
    """DreamBooth (arXiv 2208.12242): full fine-tuning whose batches hold the subject and its class, half and half.

    The prior is a setting that every recipe has: LoRA with --with_prior_preservation is DreamBooth-LoRA.
    """
    return full(settings)


def lora(settings: LoRASettings) -> Task:
    """LoRA (arXiv 2106.09685) or DoRA (2402.09353): the base stays frozen, and learns a detour beside some layers.

    Comes out: `pytorch_lora_weights.safetensors`, which minidiff and diffusers load.
    """
    pipe, base = load_base(settings)
    networks = put_on(pipe, settings)  # first, because a target may be wrong; it changes nothing yet, to the bit
    live = settings.train_text_encoder
    data = load_data(pipe, settings, live)
    batches, sheets = with_prior(pipe, data, live), sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, pipe.unet, lambda: adapters_off(pipe.unet)))

    def export(folder: Path) -> None:
        write_adapter(folder, networks, model_spec(settings, "lora", data, pipe.schedule, base))
        write_card(folder, settings, data, "DoRA" if settings.use_dora else "LoRA", "lora", shape_of(settings))

    return make_task(pipe, settings, base, data, batches, named(networks), loss, export, sheets)


def textual_inversion(settings: TextualInversionSettings) -> Task:
    """Textual inversion (arXiv 2208.01618): nothing of the model moves; one new word gets its meaning.

    Comes out: `learned_embeds.safetensors`, a few kilobytes.
    """
    pipe, base = load_base(settings)
    word = new_word(pipe, settings)
    data = practice(pipe, settings)
    batches, sheets = with_prior(pipe, data, True), sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, pipe.unet))

    def export(folder: Path) -> None:
        spec = model_spec(settings, "textual-inversion", data, pipe.schedule, base)
        save_embedding(folder, settings.placeholder_token, word["word"], metadata=spec)
        facts = {"new word": f"`{settings.placeholder_token}`", "vectors": settings.num_vectors}
        write_card(folder, settings, data, "Textual inversion", "textual_inversion", facts)

    return make_task(pipe, settings, base, data, batches, word, loss, export, sheets)


def pivotal(settings: PivotalSettings) -> Task:
    """Pivotal tuning, after Roich et al. (arXiv 2106.05744): a word for the subject, and a LoRA for what no word can say.

    Both learn from the first step on, each at its own rate. Comes out: the files of the two recipes above.
    """
    pipe, base = load_base(settings)
    networks = put_on(pipe, settings)  # before the new word: it freezes what is there
    word = new_word(pipe, settings)
    data = practice(pipe, settings)
    batches, sheets = with_prior(pipe, data, True), sample_sheets(pipe, settings, data)
    loss = diffusion_loss(pipe, settings, base_answer(pipe, settings, pipe.unet, lambda: adapters_off(pipe.unet)))

    detours = {name: p for name, p in named(networks).items() if ".lora_" in name}
    optimizer = adamw(list(detours.values()), settings)
    optimizer.add_param_group({"params": list(word.values()), "lr": settings.learning_rate_embedding})

    def export(folder: Path) -> None:
        spec = model_spec(settings, "lora", data, pipe.schedule, base)
        write_adapter(folder, networks, spec)
        save_embedding(folder, settings.placeholder_token, word["word"], metadata=spec)
        facts = {"new word": f"`{settings.placeholder_token}`", "vectors": settings.num_vectors, **shape_of(settings)}
        write_card(folder, settings, data, "Pivotal tuning", "pivotal", facts)

    return make_task(pipe, settings, base, data, batches, detours | word, loss, export, sheets, optimizer)


RECIPES: dict[type, Callable[[Any], Task]] = {
    FullSettings: full,
    DreamBoothSettings: dreambooth,
    LoRASettings: lora,
    TextualInversionSettings: textual_inversion,
    PivotalSettings: pivotal,
}

# --- what they put on ------------------------------------------------------------------------------------------------


def put_on(pipe: StableDiffusionPipeline, settings: AdapterSettings) -> dict[str, nn.Module]:
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


def write_adapter(folder: Path, networks: dict[str, nn.Module], metadata: dict[str, str]) -> None:
    """The adapters of all networks in one file."""
    modules = {f"{part}.{name}": w for part, model in networks.items() for name, w in adapter_weights(model).items()}
    save_lora(modules, folder, metadata=metadata)


def shape_of(settings: AdapterSettings) -> dict[str, object]:
    """An adapter's rows in the model card."""
    alpha = settings.rank if settings.lora_alpha is None else settings.lora_alpha
    return {"rank, alpha": f"{settings.rank}, {alpha:g}", "layers": ", ".join(settings.lora_targets)}


def new_word(pipe: StableDiffusionPipeline, settings: WordSettings) -> dict[str, nn.Parameter]:
    """The new word, as it begins."""
    vectors = initial_vectors(pipe.tokenizer, pipe.text_encoder, settings.initializer_token, settings.num_vectors)
    try:
        return {"word": add_word(pipe.tokenizer, pipe.text_encoder, settings.placeholder_token, vectors)}
    except AdapterError as error:
        raise AdapterError(f"--placeholder_token: {error}") from error


def practice(pipe: StableDiffusionPipeline, settings: WordSettings) -> LatentData:
    """The pictures, and the word in sentences: the captions or the prompt, or else the paper's kind of neutral ones."""
    given, word = settings.train_data_dir or settings.instance_prompt, settings.placeholder_token
    data = load_data(pipe, settings, True, ("{}",) if given else TEMPLATES[settings.learnable_property])
    first = pipe.placeholders[word][0]
    without = [e.path.name for e in data.examples if first not in data.prompts[data.templates[0].replace("{}", e.caption)]]
    if len(without) == len(data.examples):
        raise DataError(f"no caption holds the new word, {word}, as a word of its own: nothing would teach it. Write it in.")
    if without:
        some = ", ".join(without[:3]) + " …" * (len(without) > 3)
        print(f"Note: {len(without)} of {len(data.examples)} captions are without {word} ({some}).", file=sys.stderr)
    return data
