"""The parts that all recipes share: the base model, the pictures, the loss, the sheets, and how they make a `Job`.

Shapes: B samples, C h w a latent, L tokens, D width of the text.
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.losses import squared_error
from minidiff.core.recipes import Answer, DiffusionLoss
from minidiff.core.text import tokenize
from minidiff.core.train import DTYPES, Batch
from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import checkpoint_gradients
from minidiff.files import names as keymaps
from minidiff.trainer.checkpoint import check_folder
from minidiff.trainer.dataset import bucket_sizes, check_pictures, read_folder
from minidiff.trainer.distributed import world
from minidiff.trainer.job import Job, check_precision
from minidiff.trainer.latents import Cache, LatentData
from minidiff.trainer.memory import HALF, is_on, may_cast
from minidiff.trainer.priors import BasePrior, PairedData, class_examples, class_settings
from minidiff.trainer.settings import FineTuneSettings, FullSettings
from minidiff.trainer.validation import check_prediction_type, validation_set

# --- the base and the pictures ---------------------------------------------------------------------------------------


def load_base(settings: FineTuneSettings) -> tuple[StableDiffusionPipeline, str]:
    """The frozen base model on its device, after the checks that take no time; and its hash, which tells it from others.

    The U-Net and the text encoder have the dtype of --mixed_precision (but see `may_cast`), the VAE stays fp32.
    """
    settings.check()
    check_folder(settings)
    device = chosen_device(settings.device)
    check_precision(settings.mixed_precision, device)
    dtype = DTYPES[settings.mixed_precision]
    name, casts = settings.pretrained_model_name_or_path, may_cast(settings)
    pipe = StableDiffusionPipeline.from_pretrained(name, dtype, casts, settings.plain)
    pipe.set_progress_bar_config(disable=True)
    if is_on(settings, "layerwise_casting") and not any(p.dtype in HALF for p in pipe.unet.parameters()):
        print("Note: --layerwise_casting changes nothing: the U-Net's file is not in half precision.", file=sys.stderr)
    if settings.gradient_checkpointing:
        checkpoint_gradients(pipe.unet)
    return pipe.to(device), model_fingerprint(pipe.unet, pipe.vae, pipe.text_encoder)


def load_data(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, live_text: bool = False, templates: Sequence[str] = ("{}",)
) -> LatentData:
    """The training pictures and their prompts, checked and encoded.

    With `live_text` a batch holds token ids, for a text encoder that changes in training.
    """
    folder = settings.instance_data_dir or settings.train_data_dir or ""
    return encoded(pipe, settings, Path(folder), settings.prompt, live_text, templates)


def encoded(
    pipe: StableDiffusionPipeline,
    settings: FineTuneSettings,
    folder: Path,
    prompt: str | None,
    live_text: bool,
    templates: Sequence[str] = ("{}",),
) -> LatentData:
    """A folder of pictures as latents."""
    side, stride = training_side(pipe, settings)
    sizes = bucket_sizes(side, stride) if settings.aspect_ratio_buckets else [(side, side)]
    examples = read_folder(folder, prompt, settings.caption_column, settings.masked_loss)
    examples = check_pictures(examples, sizes, settings.skip_bad)
    encode = text_of(pipe, settings, live_text)
    return LatentData(examples, settings, side, pipe.vae, encode, len(pipe.schedule.alphas_cumprod), templates)


def text_of(pipe: StableDiffusionPipeline, settings: FineTuneSettings, live_text: bool) -> Callable[[list[str]], Tensor]:
    """Prompts -> (B, L, D) from the text encoder as it is now; or ids (B, L), to be encoded in each step."""

    def ids(prompts: list[str]) -> Tensor:
        return tokenize(pipe.tokenizer, prompts, pipe.placeholders)

    if live_text or not settings.cache_dir:
        return ids if live_text else pipe.encode_captions
    disk = Cache(settings.cache_dir, pipe.text_encoder)

    def kept(prompt: str) -> Tensor:
        origin = {"ids": ids([prompt])[0].tolist()}
        return disk.kept(origin, lambda: {"text": pipe.encode_captions([prompt])[0]})["text"]

    return lambda prompts: torch.stack([kept(prompt) for prompt in prompts])


def training_side(pipe: StableDiffusionPipeline, settings: FineTuneSettings) -> tuple[int, int]:
    """The side of the pictures in pixels, and what it must be a multiple of."""
    side, factor = settings.resolution, pipe.vae.config.downscale
    side = pipe.unet.config.sample_size * factor if side is None else side
    stride = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if side % stride:
        near = max(side // stride, 1) * stride
        raise SettingsError(f"--resolution {side}: this model needs a multiple of {stride}, such as {near} or {near + stride}.")
    return side, stride


def with_prior(pipe: StableDiffusionPipeline, data: LatentData) -> LatentData | PairedData | BasePrior:
    """The data with its class half, if --with_prior_preservation asks for one. The model must still be the base."""
    settings = data.settings
    if not has_prior(settings):
        return data
    encode = text_of(pipe, settings, data.live_text)
    if settings.prior_from_base:
        return BasePrior(data, encode([settings.class_prompt or ""])[0])
    side = data.resolution
    examples = check_pictures(class_examples(pipe, settings, side), [(side, side)], settings.skip_bad)
    prior = LatentData(examples, class_settings(settings), data.resolution, pipe.vae, encode, data.timesteps)
    return PairedData(data, prior)


def has_prior(settings: FineTuneSettings) -> bool:
    """Weight 0 is the plain loss: then the class half is not computed at all."""
    return settings.with_prior_preservation and settings.prior_loss_weight > 0


# --- the loss --------------------------------------------------------------------------------------------------------


def diffusion_loss(pipe: StableDiffusionPipeline, settings: FineTuneSettings, base: Answer | None = None) -> DiffusionLoss:
    """The loss with what the settings add to it. `base` predicts the target of the class half: --prior_from_base."""
    weight = settings.prior_loss_weight if has_prior(settings) else 0.0
    return DiffusionLoss(pipe.unet, pipe.schedule, pipe.text_encoder, settings.snr_gamma, weight, base)


def base_answer(
    pipe: StableDiffusionPipeline,
    settings: FineTuneSettings,
    unet: nn.Module,
    as_base: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Answer | None:
    """For --prior_from_base: what the base answers under the class prompt, which is what `unet` answers inside `as_base()`.

    Made while the text encoder still is the base's.
    """
    if not (settings.prior_from_base and has_prior(settings)):
        return None
    words = text_of(pipe, settings, live_text=False)([settings.class_prompt or ""]).to(pipe.device)  # (1, L, D)

    def base(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with as_base():
            answer: Tensor = unet(x_t, t, words.expand(len(x_t), -1, -1))
            return answer

    return base


# --- sheets, and the task --------------------------------------------------------------------------------------------


def sample_sheets(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, data: LatentData
) -> Callable[[int], Image.Image | None]:
    """Sheets of the validation prompts on fixed seeds: the base in the first row, the model as it is now in the second.

    Call this while the model still is the base: the first row is drawn here.
    """
    prompts = settings.validation_prompt or (data.templates[0].replace("{}", data.examples[0].caption),)
    seeds = [settings.seed + i for i in range(settings.num_validation_images)]

    def draw(prompt: str, seed: int) -> Image.Image:
        image: Image.Image = pipe(
            prompt,
            seed=seed,
            guidance_scale=settings.validation_guidance_scale,
            num_inference_steps=settings.validation_inference_steps,
            width=data.resolution,
            height=data.resolution,
        ).images[0]
        return image

    def row() -> list[Image.Image]:
        with without_dropout(pipe):
            return [draw(prompt, seed) for prompt in prompts for seed in seeds]  # one at a time, to spare memory

    base = row() if settings.validation_steps else []
    shown = prompts if settings.validation_prompt or settings.prompt else ("the first caption",)  # captions are not published
    columns = [f"{prompt}, seed {seed}" for prompt in shown for seed in seeds]

    def sheet(done: int) -> Image.Image:
        with on_device(idle_networks(pipe, data), pipe.device):
            drawn = row()
        return contact_sheet([base, drawn], row_labels=["base", f"step {done}"], column_labels=columns)

    return sheet


@dataclass
class Prepared:
    """The model, which is still the base, and its data: all that a recipe needs before training."""

    pipe: StableDiffusionPipeline
    settings: FineTuneSettings
    base_hash: str
    data: LatentData
    batches: LatentData | PairedData | BasePrior
    loss: DiffusionLoss
    sheets: Callable[[int], Image.Image | None]
    untuned: nn.Module | None = None  # a copy of the U-Net as it was, if one is kept


def prepared(
    pipe: StableDiffusionPipeline,
    settings: FineTuneSettings,
    base_hash: str,
    data: LatentData,
    as_base: Callable[[], AbstractContextManager[None]] | None = None,
) -> Prepared:
    """Class pictures and the first row of the sheets are drawn here, by the base.

    Inside `as_base()` the U-Net in training predicts what the base did. Without it --prior_from_base keeps a copy.
    """
    batches = with_prior(pipe, data)
    sheets = sample_sheets(pipe, settings, data)
    untuned = copy.deepcopy(pipe.unet) if as_base is None and settings.prior_from_base and has_prior(settings) else None
    base = base_answer(pipe, settings, untuned or pipe.unet, as_base or nullcontext)
    return Prepared(pipe, settings, base_hash, data, batches, diffusion_loss(pipe, settings, base), sheets, untuned)


def make_job(
    ready: Prepared,
    trainable: dict[str, nn.Parameter],
    export: Callable[[Path], None],
    card: Callable[[Path], None],
    optimizer: torch.optim.Optimizer | None = None,
) -> Job:
    """The job, with the validation loss on fixed noise, and a first look at whether the base predicts what it says.

    Networks that no step needs leave the GPU or the memory.
    """
    pipe, settings, data = ready.pipe, ready.settings, ready.data
    validation, networks = data, {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    if settings.validation_data_dir:
        folder, plain = Path(settings.validation_data_dir), replace(settings, masked_loss=False)
        validation = encoded(pipe, plain, folder, settings.prompt, data.live_text, data.templates)
    fixed = validation_set(validation)
    whole_model = isinstance(settings, FullSettings)  # is the result
    offload(idle_networks(pipe, data), needed_again=bool(settings.validation_steps) or whole_model)
    check_prediction_type(pipe.schedule, fixed, lambda batch: outputs_of(ready, batch))

    def validate() -> dict[str, float]:
        with without_dropout(pipe):
            return fixed.loss(lambda batch: errors_of(ready, batch))

    for network in networks.values():
        network.train()  # with dropout, where there is some
    beside: dict[str, nn.Module] = {"VAE": pipe.vae} | ({} if ready.untuned is None else {"untuned U-Net": ready.untuned})
    return Job(
        trainable=trainable,
        batch=ready.batches.batch,
        loss=ready.loss,
        export=export,
        card=card,
        preview=ready.sheets,
        validate=validate,
        facts={"base": ready.base_hash} | ready.batches.facts,
        samples_per_epoch=data.samples_per_epoch,
        optimizer=optimizer,
        modules=networks,
        beside=beside,
        used_vae=ready.batches.used_vae or validation.used_vae or not settings.cache_latents,
        describe=data.describe,
    )


def outputs_of(ready: Prepared, batch: Batch) -> Tensor:
    """The U-Net's output for a batch; of as many samples at once as in training, for which there is memory."""
    at_once = max(1, ready.settings.train_batch_size // world().size)
    pieces = zip(*(rows.to(ready.pipe.device).split(at_once) for rows in batch.values()))
    return torch.cat([ready.loss.predict(dict(zip(batch, piece)))[0] for piece in pieces])


def errors_of(ready: Prepared, batch: Batch) -> Tensor:
    """The squared error of each sample of a batch, (B,)."""
    batch = {name: rows.to(ready.pipe.device) for name, rows in batch.items()}
    return squared_error(outputs_of(ready, batch), ready.loss.target(batch), batch.get("mask"))


def offload(networks: Sequence[nn.Module], needed_again: bool) -> None:
    """Into the CPU's memory, where they can wait; or out of any: on `meta` they keep their shapes, and no numbers."""
    for network in networks:
        network.to("cpu" if needed_again else "meta")


@contextmanager
def on_device(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with`, the networks are on the device; afterwards in the CPU's memory again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        offload(networks, needed_again=True)


def idle_networks(pipe: StableDiffusionPipeline, data: LatentData) -> list[nn.Module]:
    """Those that no training step runs through."""
    return [pipe.vae] * bool(data.cache) + [pipe.text_encoder] * (not data.live_text)


@contextmanager
def without_dropout(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Inside the `with`, the networks are as they are for drawing."""
    modes = [(network, network.training) for network in (pipe.unet, pipe.text_encoder)]
    for network, _ in modes:
        network.eval()
    try:
        yield
    finally:
        for network, training in modes:
            network.train(training)


def model_fingerprint(*models: nn.Module) -> str:
    """Tells base models apart, wherever they lie: a hash of the first numbers of each tensor.

    Of the tensors as they are here: the same model in another number format has another fingerprint.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():  # modern: transformers 4 and 5 call the text encoder's differently
            digest.update(f"{keymaps.modern(name)} {tuple(tensor.shape)} {tensor.flatten()[:16].tolist()}".encode())
    return digest.hexdigest()[:16]
