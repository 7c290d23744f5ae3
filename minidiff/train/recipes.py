"""Ways of fine-tuning, side by side: each makes a `Task` for the loop out of settings.

    base model, pictures -> what is trained, how, what comes out                       -> loop.py trains it

What recipes share comes first: the base, the pictures as latents, the loss, the sample sheet.

Shapes: B samples, C h w a latent, L tokens, D width of the text.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from minidiff.adapters.lora import inject, print_trainable_parameters, trainable
from minidiff.device import chosen_device
from minidiff.diffusion.losses import min_snr_weights, mse
from minidiff.diffusion.schedule import add_noise, training_target
from minidiff.errors import SettingsError
from minidiff.images import contact_sheet
from minidiff.lora_files import save_lora
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.train.checkpoint import check_folder
from minidiff.train.data import LatentData, check_pictures
from minidiff.train.folders import read_folder
from minidiff.train.loop import DTYPES, Batch, Task
from minidiff.train.settings import FineTuneSettings, LoRASettings

# --- what recipes share ----------------------------------------------------------------------------------------------


def load_base(settings: FineTuneSettings) -> StableDiffusionPipeline:
    """The frozen base model on its device. The U-Net has the dtype of --mixed_precision; the VAE stays fp32."""
    device = chosen_device(settings.device)
    pipe = StableDiffusionPipeline.from_pretrained(
        settings.pretrained_model_name_or_path, torch_dtype=DTYPES[settings.mixed_precision]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_data(pipe: StableDiffusionPipeline, settings: FineTuneSettings) -> LatentData:
    """Pictures and captions, checked, and encoded by the base's VAE and text encoder."""
    folder = Path(settings.instance_data_dir or settings.train_data_dir or "")
    size, stride = settings.resolution, pipe.vae.config.downscale
    size = pipe.unet.config.sample_size * stride if size is None else size
    stride *= 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if size % stride:
        near = max(size // stride, 1) * stride
        raise SettingsError(f"--resolution {size}: this model needs a multiple of {stride}, such as {near} or {near + stride}.")
    examples = read_folder(folder, settings.instance_prompt, settings.caption_column)
    examples = check_pictures(examples, size, settings.skip_bad)
    return LatentData(examples, settings, size, pipe.vae, pipe.encode_prompt, len(pipe.schedule.alphas_cumprod))


def diffusion_loss(pipe: StableDiffusionPipeline, settings: FineTuneSettings) -> Callable[[Batch, int, int], Tensor]:
    """The simple loss of DDPM (arXiv 2006.11239, eq. 14) on latents, for eps or v, with min-SNR weights if asked."""
    unet, schedule, gamma = pipe.unet, pipe.schedule, settings.snr_gamma

    def loss(batch: Batch, step: int, micro: int) -> Tensor:
        x0, noise, t, text = (batch[key].to(pipe.device) for key in ("latents", "noise", "t", "text"))
        output = unet(add_noise(schedule, x0, noise, t), t, text)  # (B, C, h, w)
        weights = None if gamma is None else min_snr_weights(schedule, t, gamma)  # (B,)
        return mse(output, training_target(schedule, x0, noise, t), weights)

    return loss


def sample_sheets(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, data: LatentData
) -> Callable[[int], Image.Image | None]:
    """Sheets of the validation prompts on fixed seeds: the base in the first row, the model as it is now in the second.

    Call this while the model still is the base: the first row is drawn here.
    """
    prompts = settings.validation_prompt or (data.examples[0].caption,)
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
        return [draw(prompt, seed) for prompt in prompts for seed in seeds]  # one at a time, to spare memory

    base = row() if settings.validation_steps else []
    columns = [f"{prompt}, seed {seed}" for prompt in prompts for seed in seeds]

    def sheet(done: int) -> Image.Image:
        return contact_sheet([base, row()], row_labels=["base", f"step {done}"], column_labels=columns)

    return sheet


def fingerprint(*models: nn.Module) -> str:
    """Tells base models apart, wherever they lie: a hash of the first numbers of each tensor."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:16].tolist()}".encode())
    return digest.hexdigest()[:16]


# --- the recipes -----------------------------------------------------------------------------------------------------


def lora(settings: LoRASettings) -> Task:
    """LoRA (arXiv 2106.09685): the base stays frozen, and learns W + (alpha / r) B A in its attention layers.

    Comes out: `pytorch_lora_weights.safetensors`, which minidiff and diffusers load.
    """
    settings.check()
    check_folder(settings)  # before anything takes time
    pipe = load_base(settings)
    data = load_data(pipe, settings)
    base = fingerprint(pipe.unet, pipe.vae, pipe.text_encoder)
    sheets = sample_sheets(pipe, settings, data)

    inject(pipe.unet, settings.rank, settings.lora_alpha, settings.lora_targets, settings.seed)
    print_trainable_parameters(pipe.unet)

    def export(folder: Path) -> None:
        prompt = settings.instance_prompt or ""
        about = {"base_fingerprint": base, "instance_prompt": prompt}
        save_lora(pipe.unet, folder, base_model=settings.pretrained_model_name_or_path, metadata=about)

    return Task(
        trainable=trainable(pipe.unet),
        batch=data.batch,
        loss=diffusion_loss(pipe, settings),
        export=export,
        preview=sheets,
        facts={"base": base, **data.facts},
    )
