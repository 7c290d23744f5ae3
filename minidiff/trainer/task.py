"""A `Job`: a task of the training loop and what surrounds it. The parts that all recipes share make one.

Shapes: B samples, C h w a latent, L tokens, D width of the text.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.losses import squared_error
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.rng import generator
from minidiff.core.text import tokenize
from minidiff.core.train import DTYPES, Batch, Task
from minidiff.draw.device import chosen_device
from minidiff.draw.images import save_png
from minidiff.draw.lora_tags import at_strengths
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import checkpoint_gradients
from minidiff.files.folder import local_folder
from minidiff.trainer import validation
from minidiff.trainer.card import SHEET, trigger_of, write_card
from minidiff.trainer.checkpoint import check_folder
from minidiff.trainer.dataset import Example, Scan
from minidiff.trainer.distributed import world
from minidiff.trainer.latents import LatentData, held_out, model_fingerprint
from minidiff.trainer.pictures import check_pictures, training_sizes, warnings_of
from minidiff.trainer.priors import has_prior, with_prior
from minidiff.trainer.settings import AdapterSettings, ControlNetSettings, FineTuneSettings, FullSettings, WordSettings


@dataclass
class Job(Task):
    """`batch` gives CPU tensors; `loss` moves them to its device.

    With prior preservation a batch has two halves, and the loss is the sum of two means.
    """

    export: Callable[[Path], None] = lambda folder: None  # writes the result into a folder: that of the run, or of a checkpoint
    card: Callable[[Path], None] = lambda folder: None  # writes the model card beside the result of the whole run
    preview: Callable[[int], Image.Image | None] = lambda done: None  # a sample sheet
    prompt: str = ""  # one to draw with it, as a person writes it
    validate: Callable[[], dict[str, float]] | None = None  # numbers for metrics.jsonl that tell how good the model is now
    facts: dict[str, Any] = field(default_factory=dict)  # JSON; a resumed run must agree with it (base, data, …)
    samples_per_epoch: int | None = None  # None: it has no epochs
    ema_decay: float | None = None  # None: as the settings say. With it, export, preview and validate see averaged weights
    modules: dict[str, nn.Module] = field(default_factory=dict)  # searched where the loss is not finite
    beside: dict[str, nn.Module] = field(default_factory=dict)  # other networks in memory, such as the VAE, by a readable name


def check_precision(precision: str, device: str) -> None:
    """SettingsError where the device cannot train in that --mixed_precision."""
    if precision == "fp16" and device == "cpu":
        raise SettingsError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported():
        raise SettingsError("--mixed_precision bf16 is more than this GPU can do; use fp16.")


# --- the base and the pictures ---------------------------------------------------------------------------------------

TURBO = (
    "by its scheduler the base is a turbo model. The usual loss teaches it many steps again, and few steps can get worse. A "
    "LoRA of the model that it was distilled from (of SD 2.1 base for SD-Turbo) fits it, too."
)


def load_base(settings: FineTuneSettings, unrounded: bool = False) -> tuple[StableDiffusionPipeline, str]:
    """The frozen base model on its device, after the checks that take no time; and its hash, which tells it from others.

    The U-Net and the text encoder have the dtype of --mixed_precision (but see `may_cast`), or all of their digits if they are
    to be `unrounded`; the VAE stays fp32.
    """
    settings.check()
    check_folder(settings)
    device = chosen_device(settings.device)
    check_precision(settings.mixed_precision, device)
    folder = local_folder(settings.pretrained_model_name_or_path, revision=settings.revision)
    dtype, casts = DTYPES["no" if unrounded else settings.mixed_precision], settings.may_cast
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype, layerwise_casting=casts, plain=settings.plain)
    pipe.set_progress_bar_config(disable=True)
    if casts and settings.fit is None and all(p.element_size() > 2 for p in pipe.unet.parameters()):
        print("Note: --layerwise_casting changes nothing: the U-Net's file is not in half precision.", file=sys.stderr)
    if pipe.is_turbo:
        print(f"Note: {TURBO}", file=sys.stderr)
    if settings.gradient_checkpointing:
        checkpoint_gradients(pipe.unet)
    return pipe.to(device), model_fingerprint(*pipe.parts.networks.values())


def examples_in(folder: str | None, s: FineTuneSettings) -> list[Example]:
    """The pictures of a folder, with captions, and masks or hints where the settings need them."""
    hints = (s.conditioning_image_column, s.conditioning_data_dir) if isinstance(s, ControlNetSettings) and not s.hint else ()
    scan = Scan(s.prompt, s.caption_column, s.masked_loss, s.captions, s.image_column, *hints)
    return scan.examples_of(Path(folder or ""))


def load_data(pipe: StableDiffusionPipeline, settings: FineTuneSettings, templates: Sequence[str] = ("{}",)) -> LatentData:
    """The training pictures and their prompts: checked and encoded.

    The `templates` are for pictures without a caption of their own.
    """
    s, examples = settings, examples_in(settings.instance_data_dir or settings.train_data_dir, settings)
    side, sizes = training_sizes(pipe.unet.config, pipe.vae.config, s.resolution, s.aspect_ratio_buckets)
    if s.max_train_samples:
        few = torch.randperm(len(examples), generator=generator(s.seed, "max_train_samples"))[: s.max_train_samples]
        examples = [examples[i] for i in sorted(few.tolist())]
    if s.instance_prompt and (own := sum(e.caption != s.prompt for e in examples)):
        some = f"{own} of {len(examples)} pictures have captions of their own"
        print(f"Note: {some}, which replace --instance_prompt; with --no_captions it is for all.", file=sys.stderr)
    examples = [replace(e, repeats=e.repeats * getattr(s, "repeats", 1)) for e in examples]
    examples = [replace(e, templates=tuple(templates)) if e.caption == s.prompt else e for e in examples]
    examples, kept = held_out(check_pictures(examples, sizes, s.skip_bad), s)

    def encode(prompts: list[str]) -> Batch:
        if isinstance(s, WordSettings) or getattr(s, "train_text_encoder", False):  # it changes in training
            return {"ids": tokenize(pipe.tokenizer, prompts, pipe.placeholders)}
        return dict(zip(("text", "pooled"), pipe.encode_captions(prompts)))

    timesteps, width = len(pipe.schedule.alphas_cumprod), pipe.unet.config.addition_time_embed_dim
    look = pipe.image_prompt.look if pipe.image_prompt else None
    data = LatentData(examples, settings, side, pipe.vae, encode, timesteps, width, look)
    data.held_out = kept
    for warning in warnings_of(data, pipe.unet.config.sample_size * pipe.vae.config.downscale):
        print(f"Note: {warning}", file=sys.stderr)
    print(validation.explained(s, data))
    return data


def validation_data(pipe: StableDiffusionPipeline, settings: FineTuneSettings, data: LatentData) -> LatentData:
    """The pictures of the validation loss: another folder's, or those that are held out, or else the training pictures."""
    s = replace(settings, masked_loss=False, random_flip=False)
    if s.validation_data_dir:
        _, sizes = training_sizes(pipe.unet.config, pipe.vae.config, s.resolution, s.aspect_ratio_buckets)
        return data.of(check_pictures(examples_in(s.validation_data_dir, s), sizes, s.skip_bad), s)
    return data.of(data.held_out, s) if data.held_out else data


# --- the task -----------------------------------------------------------------------------------------------------------


def diffusion_loss(pipe: StableDiffusionPipeline, settings: FineTuneSettings) -> tuple[DiffusionLoss, nn.Module | None]:
    """The loss with what the settings add to it; and a copy of the untrained U-Net, if --prior_from_base needs one.

    Without its adapters the U-Net in training predicts what the base does: then no copy is needed. Call this while the model
    still is the base.
    """
    s, base, untuned = settings, None, None
    if has_prior(s) and s.prior_from_base:
        with torch.no_grad():
            words = [part.to(pipe.device) for part in pipe.encode_captions([s.class_prompt or ""])]  # (1, L, D), perhaps (1, P)
        untuned = None if isinstance(s, AdapterSettings) else copy.deepcopy(pipe.unet).requires_grad_(False)

        def base(x_t: Tensor, t: Tensor, *text: Tensor) -> Tensor:
            own = [part.expand(len(x_t), *part.shape[1:]) for part in words]
            if len(own) > 1:  # the sizes are the pictures' own
                own[1] = torch.cat([own[1], text[1][:, own[1].shape[1] :]], dim=1)
            if untuned is not None:
                return untuned(x_t, t, *own)
            with at_strengths(pipe.unet, {"default": 0.0}):
                return pipe.unet(x_t, t, *own)

    weight, net = s.prior_loss_weight if has_prior(s) else 0.0, pipe.controlnet[0] if pipe.controlnet else None
    ip = pipe.image_prompt.adapter if pipe.image_prompt else None
    more: dict[str, Any] = {"base": base, "controlnet": net, "ip_adapter": ip}
    return DiffusionLoss(pipe.unet, pipe.schedule, pipe.encoders, s.snr_gamma, weight, **more), untuned


def make_job(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, base_hash: str, data: LatentData,
    trainable: dict[str, nn.Parameter], export: Callable[[Path], None], tag: str,
) -> Job:  # fmt: skip
    """The job. The model still is the base here: it draws missing class pictures and the first row of the sheets.

    Then networks that no step needs leave the GPU or the memory. `tag` names the method in the model card.
    """
    (batch, facts), sheets = with_prior(pipe, data), validation.Sheets(pipe, settings, data)
    loss, untuned = diffusion_loss(pipe, settings)
    networks = pipe.parts.adaptable | dict(zip(["controlnet"], pipe.controlnet))
    beside: dict[str, nn.Module] = {"VAE": pipe.vae} | ({} if untuned is None else {"untuned U-Net": untuned})
    if pipe.image_prompt:
        networks["ip_adapter"], beside["image tower"] = pipe.image_prompt.adapter, pipe.image_prompt.tower
    dtype = DTYPES[settings.mixed_precision]
    fixed = validation.validation_set(validation_data(pipe, settings, data))
    at_once = max(1, settings.train_batch_size // world().size)

    def outputs(batch: Batch) -> Tensor:
        """The U-Net's output for a batch; of as many samples at once as in training, for which there is memory."""
        pieces = zip(*(rows.to(pipe.device).split(at_once) for rows in batch.values()))
        with torch.autocast(pipe.device.type, dtype, enabled=bool(pipe.controlnet) and dtype != torch.float32):
            return torch.cat([loss.predict(dict(zip(batch, piece)))[0] for piece in pieces]).float().cpu()

    def validate() -> dict[str, float]:
        with validation.without_dropout(pipe):
            return fixed.loss(lambda batch: squared_error(outputs(batch), loss.target(batch), mask=batch.get("mask")))

    def card(folder: Path) -> None:
        updates = settings.updates(data.samples_per_epoch)
        write_card(folder, settings, updates, tag, trigger_of(settings, data, pipe))
        if settings.validation_steps:
            save_png(sheets.public_sheet(updates), folder / SHEET)

    again = bool(settings.validation_steps) or isinstance(settings, FullSettings)
    validation.offload(validation.idle_networks(pipe, data), needed_again=again)
    validation.check_prediction_type(pipe.schedule, fixed, outputs)
    for network in networks.values():
        network.train()  # with dropout, where there is some
    return Job(
        trainable=trainable,
        batch=batch,
        loss=loss,
        export=export,
        card=card,
        preview=sheets.sheet,
        prompt=sheets.prompts[0],
        validate=validate,
        facts={"base": base_hash} | facts,
        samples_per_epoch=data.samples_per_epoch,
        modules=networks,
        beside=beside,
    )
