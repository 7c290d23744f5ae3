"""Train the pocket checkpoint, in the stages in which Stable Diffusion was trained, on a world that is drawn here.

    world    draw captioned pictures                                                    minidiff/pocket/world.py
    vae      pictures <-> latents: reconstruction + a small KL                          arXiv 2112.10752, section 3.1
    latents  encode every picture once, in units in which latents have variance 1       arXiv 2112.10752, appendix G
    decoder  go on with the decoder alone, as for SD's own ft-mse autoencoder
    clip     a text and an image tower that tell captions apart                         arXiv 2103.00020
    unet     denoise latents, given the frozen text tower's view of the caption         arXiv 2112.10752, eq. 3

Each stage is a `Task` for the one training loop, in a folder of its own below `output_dir`: run the command again and it
goes on where it was stopped. The last stage assembles `output_dir/pocket`, in the file layout of SD 1.5.

    B batch   H W picture side, 128   h w latent side, 16   D text width
"""

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidiff import weights
from minidiff.config import POCKET_UNET, POCKET_VAE, NoiseConfig
from minidiff.diffusion.losses import min_snr_weights, mse
from minidiff.diffusion.schedule import NoiseSchedule, add_noise
from minidiff.errors import SettingsError
from minidiff.images import contact_sheet, to_pil
from minidiff.layout import read_json, write_json
from minidiff.models.text import load_tokenizer, tokenize
from minidiff.models.unet import UNet2DConditionModel
from minidiff.models.vae import AutoencoderKL, sample_posterior
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pocket.dataset import load_latents, load_world
from minidiff.pocket.judge import judge_checkpoint
from minidiff.pocket.settings import STAGES, PretrainSettings, Stage
from minidiff.pocket.tokenizer import build_tokenizer
from minidiff.pocket.towers import Towers, image_tower_config
from minidiff.pocket.world import caption, draw, held_out, random_caption
from minidiff.rng import generator, hashed_seed
from minidiff.train.loop import Batch, Task, fit
from minidiff.train.muon import Muon, split
from minidiff.train.settings import TrainSettings

KL_WEIGHT = 3e-5  # keeps the latents near a Gaussian, and the decoder used to a little noise in them
CAPTION_DROPOUT = 0.1  # classifier-free guidance (arXiv 2207.12598), algorithm 1


def pretrain(settings: PretrainSettings) -> Path:
    """Run the stages; returns the folder with the finished checkpoint."""
    home = Path(settings.output_dir)
    if unknown := set(settings.stages) - set(STAGES):
        raise SettingsError(f"--stages: {', '.join(sorted(unknown))} unknown; there are {', '.join(STAGES)}.")
    for stage in settings.stages:
        print(f"== {stage}", file=sys.stderr)
        RUN[stage](home, settings)
    return home / "pocket"


def run(task: Task, home: Path, stage: Stage, settings: PretrainSettings, steps: int, batch: int, warmup: int) -> None:
    """One stage on the training loop; picks up its latest checkpoint."""
    loop = TrainSettings(
        output_dir=str(home / stage),
        resume_from_checkpoint="latest",
        seed=settings.seed,
        train_batch_size=batch,
        max_train_steps=steps,
        lr_scheduler="linear",
        lr_warmup_steps=min(warmup, steps // 2),
        checkpointing_steps=200,
        validation_steps=400,
    )
    if not fit(task, loop).finished:
        raise KeyboardInterrupt  # asked to stop: the stages after this one need its result


def chosen(settings: PretrainSettings, stage: str, step: int, batch: int) -> list[int]:
    """The pictures of one update: a function of the seed, the stage and the step."""
    return torch.randint(settings.pictures, (batch,), generator=generator(settings.seed, stage, step)).tolist()


# --- the autoencoder -----------------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, anchor: Tensor) -> Tensor:
    """Reconstruction and KL, both as means: arXiv 2112.10752, appendix G, without its discriminator.

    Left alone, a small encoder finds light and dark at once, and red and green only after many thousand pictures. So
    the first three channels begin as the colour of their cell; `anchor`, a number that falls to 0, then lets them go.
    """
    mean, logvar = vae.encode(x)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()  # arXiv 1312.6114, appendix B
    off_colour = (mean[:, :3] - 2 * F.avg_pool2d(x, 8)).square().mean()
    reconstruction = reconstruction_loss(vae.decode(sample_posterior(mean, logvar, noise)), x)
    return reconstruction + KL_WEIGHT * kl + anchor * off_colour


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + L2 + half the L1 of the image gradients, so that edges count: eyes are all edge."""
    error = y - x
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def train_vae(home: Path, settings: PretrainSettings) -> None:
    """Stage 1: encoder and decoder together."""
    batch, world = 4, load_world(home, settings.pictures)
    torch.manual_seed(hashed_seed(settings.seed, "vae"))
    vae = channels_last(AutoencoderKL(POCKET_VAE))
    loss = fused(partial(vae_loss, vae))

    def data(step: int, micro: int) -> Batch:
        draws = generator(settings.seed, "vae noise", step)
        x = world.batch(chosen(settings, "vae", step, batch))
        mirrored = torch.rand(batch, 1, 1, 1, generator=draws) < 0.5
        noise, anchor = torch.randn(batch, 4, 16, 16, generator=draws), torch.tensor(max(0.5 * (1 - step / 1200), 0.0))
        return {"x": torch.where(mirrored, x.flip(-1), x), "noise": noise, "anchor": anchor}

    task = Task(
        trainable=dict(vae.named_parameters()),
        batch=data,
        loss=lambda data, step, micro: loss(data["x"], data["noise"], data["anchor"]),
        export=lambda folder: weights.save(vae.state_dict(), folder / "model.safetensors"),
        preview=lambda done: reconstruction_sheet(vae),
        optimizer=Muon(*split(vae, ("conv_in", "conv_out", "quant_conv")), lr=2e-3, adam_lr=2e-3),
        ema_decay=0.998,
    )
    run(task, home, "vae", settings, settings.vae_steps, batch, warmup=100)


@torch.no_grad()
def reconstruction_sheet(vae: AutoencoderKL, count: int = 8) -> Image.Image:
    """Held-out drawings above, what the autoencoder makes of them below."""
    drawings = [draw(picture, seed) for seed, picture in enumerate(held_out(count))]
    x = torch.stack([torch.from_numpy(np.asarray(d).copy()) for d in drawings]).permute(0, 3, 1, 2) / 127.5 - 1
    again = to_pil(vae.decode(vae.encode(x)[0]).clamp(-1, 1))
    return contact_sheet([drawings, again], row_labels=["drawn", "reconstructed"])


def load_vae(home: Path) -> AutoencoderKL:
    """The autoencoder as the last stage that worked on it left it."""
    vae = AutoencoderKL(POCKET_VAE)
    files = [home / "decoder" / "model.safetensors", home / "standard_vae.safetensors", home / "vae" / "model.safetensors"]
    weights.load_into(vae, next(path for path in files if path.exists()))
    return channels_last(vae.requires_grad_(False))


@torch.no_grad()
def encode_world(home: Path, settings: PretrainSettings) -> None:
    """Means and standard deviations of all posteriors, fp16, in units in which a draw has mean 0 and variance 1."""
    from tqdm import tqdm

    path = home / "latents.safetensors"
    if path.exists():
        return
    vae, world, parts = load_vae(home), load_world(home, settings.pictures), []
    for start in tqdm(range(0, settings.pictures, 16), unit="batch", desc="encoding"):
        mean, logvar = vae.encode(world.batch(list(range(start, min(start + 16, settings.pictures)))))
        parts.append((mean, (0.5 * logvar).exp()))
    mean, std = (torch.cat(part) for part in zip(*parts))
    centre, spread = mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    standardize(vae, centre, spread)
    weights.save(vae.state_dict(), home / "standard_vae.safetensors")
    shape = (1, -1, 1, 1)
    mean, std = (mean - centre.view(shape)) / spread.view(shape), std / spread.view(shape)
    weights.save({"mean": mean.half(), "std": std.half()}, path)


def standardize(vae: AutoencoderKL, centre: Tensor, spread: Tensor) -> None:
    """Change the units of each latent channel to (z - centre) / spread; centre, spread (4,). The pictures stay the same.

    The 1x1 convolutions on both sides of the latent take it in: z' = (W x + b - c) / s, and back, V (s z' + c) + b.
    """
    quant, back, n = vae.quant_conv, vae.post_quant_conv, len(spread)
    assert quant.bias is not None and back.bias is not None
    back.bias += back.weight[:, :, 0, 0] @ centre
    back.weight *= spread.view(1, -1, 1, 1)
    quant.weight[:n] /= spread.view(-1, 1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - centre) / spread
    quant.bias[n:] -= 2 * spread.log()  # the other half is ln σ²


def train_decoder(home: Path, settings: PretrainSettings) -> None:
    """Stage 2: the encoder, and with it the latents, stay; the decoder goes on learning to read them."""
    batch, world, latents = 4, load_world(home, settings.pictures), load_latents(home)
    vae = load_vae(home)
    read = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    loss = fused(lambda z, x: reconstruction_loss(vae.decode(z), x))

    def data(step: int, micro: int) -> Batch:
        indices = chosen(settings, "decoder", step, batch)
        noise = torch.randn(batch, 4, 16, 16, generator=generator(settings.seed, "decoder noise", step))
        return {"z": latents.draw(indices, noise), "x": world.batch(indices)}

    task = Task(
        trainable=dict(read.named_parameters()),
        batch=data,
        loss=lambda data, step, micro: loss(data["z"], data["x"]),
        export=lambda folder: weights.save(vae.state_dict(), folder / "model.safetensors"),
        preview=lambda done: reconstruction_sheet(vae),
        optimizer=Muon(*split(read, ("conv_in", "conv_out", "0.")), lr=1.5e-3, adam_lr=1.5e-3),
        ema_decay=0.998,
    )
    run(task, home, "decoder", settings, settings.decoder_steps, batch, warmup=100)


# --- CLIP ----------------------------------------------------------------------------------------------------------------


def train_clip(home: Path, settings: PretrainSettings) -> None:
    """Stage 3: a tokenizer for the world's words, then the two towers."""
    batch, world = 96, load_world(home, settings.pictures)
    build_tokenizer(home / "tokenizer", sorted({caption(p) for p in world.pictures} | {"a picture of an"}))
    tokenizer = load_tokenizer(home / "tokenizer")
    torch.manual_seed(hashed_seed(settings.seed, "clip"))
    towers = Towers(len(tokenizer))

    def data(step: int, micro: int) -> Batch:
        indices = chosen(settings, "clip", step, batch)
        words = random.Random(hashed_seed(settings.seed, "clip captions", step))
        ids = tokenize(tokenizer, [random_caption(world.pictures[i], words) for i in indices])
        return {"ids": ids, "pixels": world.batch(indices)}

    task = Task(
        trainable={name: p for name, p in towers.named_parameters()},
        batch=data,
        loss=lambda data, step, micro: towers(data["ids"], data["pixels"]),
        export=lambda folder: weights.save(towers.state_dict(), folder / "model.safetensors"),
        optimizer=Muon(*split(towers, ("embedding", "projection")), lr=2e-3, adam_lr=1e-3),
    )
    run(task, home, "clip", settings, settings.clip_steps, batch, warmup=50)


def load_towers(home: Path) -> Towers:
    towers = Towers(len(load_tokenizer(home / "tokenizer")))
    weights.load_into(towers, home / "clip" / "model.safetensors")
    return towers.eval().requires_grad_(False)


# --- the denoiser --------------------------------------------------------------------------------------------------------


def unet_loss(unet: UNet2DConditionModel, schedule: NoiseSchedule, data: Batch, text: Tensor) -> Tensor:
    """|| ε - ε_θ(z_t, t, τ(y)) ||²: arXiv 2112.10752, eq. 3, weighted by min-SNR."""
    z_t = add_noise(schedule, data["z"], data["noise"], data["t"])
    return mse(unet(z_t, data["t"], text), data["noise"], min_snr_weights(schedule, data["t"], gamma=5.0))


def train_unet(home: Path, settings: PretrainSettings) -> None:
    """Stage 4: the denoiser, on the frozen text tower."""
    batch, latents = 32, load_latents(home)
    pictures = load_world(home, settings.pictures).pictures
    towers, tokenizer = load_towers(home), load_tokenizer(home / "tokenizer")
    schedule = NoiseSchedule.from_config(NoiseConfig())
    torch.manual_seed(hashed_seed(settings.seed, "unet"))
    unet = UNet2DConditionModel(POCKET_UNET)
    loss = fused(partial(unet_loss, unet, schedule))

    def data(step: int, micro: int) -> Batch:
        indices, draws = chosen(settings, "unet", step, batch), generator(settings.seed, "unet noise", step)
        shape = (batch, 4, 16, 16)
        z = latents.draw(indices, torch.randn(shape, generator=draws))
        t = torch.randint(1000, (batch,), generator=draws)
        words = random.Random(hashed_seed(settings.seed, "unet captions", step))
        said = [random_caption(pictures[i], words) if words.random() > CAPTION_DROPOUT else "" for i in indices]
        return {"z": z, "noise": torch.randn(shape, generator=draws), "t": t, "ids": tokenize(tokenizer, said)}

    def with_text(data: Batch, step: int, micro: int) -> Tensor:
        with torch.no_grad():
            text = towers.text(input_ids=data["ids"]).last_hidden_state
        return loss(data, text)

    task = Task(
        trainable=dict(unet.named_parameters()),
        batch=data,
        loss=with_text,
        export=lambda folder: weights.save(unet.state_dict(), folder / "model.safetensors"),
        preview=lambda done: sample_sheet(home, unet),
        optimizer=Muon(*split(unet, ("conv_in", "conv_out", "time_emb")), lr=2e-3, adam_lr=1e-3),
        ema_decay=0.998,
    )
    run(task, home, "unet", settings, settings.unet_steps, batch, warmup=100)


def pocket_pipeline(home: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """All parts as they are now. The default sampler is DDIM."""
    towers, tokenizer = load_towers(home), load_tokenizer(home / "tokenizer")
    pipe = StableDiffusionPipeline(unet, load_vae(home), towers.text, tokenizer, NoiseConfig(), sampler="ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_sheet(home: Path, unet: UNet2DConditionModel) -> Image.Image:
    """Sixteen held-out prompts, at guidance 5."""
    prompts = [caption(picture) for picture in held_out(16, seed=1)]
    images = pocket_pipeline(home, unet)(prompts, guidance_scale=5.0, num_inference_steps=25, seed=0).images
    rows = [images[i : i + 8] for i in (0, 8)]
    return contact_sheet(rows, tile=192)


# --- the folder ----------------------------------------------------------------------------------------------------------


def assemble(home: Path, settings: PretrainSettings) -> None:
    """`home/pocket`: SD 1.5's layout, fp16, with CLIP's image tower beside it."""
    unet, towers, folder = UNet2DConditionModel(POCKET_UNET), load_towers(home), home / "pocket"
    weights.load_into(unet, home / "unet" / "model.safetensors")
    pocket_pipeline(home, unet).save_pretrained(folder, torch.float16)
    shutil.copytree(home / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    image = folder / "image_encoder"
    weights.save(
        {k: v.half() for k, v in towers.image.state_dict().items() if "position_ids" not in k},
        image / "model.safetensors",
    )
    write_json(image / "config.json", image_tower_config())
    index = read_json(folder / "model_index.json", "it was written just now")
    write_json(folder / "model_index.json", index | {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]})


def judge_pocket(home: Path, settings: PretrainSettings) -> None:
    """The figures of the model card, printed and kept in `scores.json`."""
    scores = judge_checkpoint(home / "pocket", home / "judge.safetensors")
    write_json(home / "scores.json", scores)
    print(json.dumps(scores, indent=2))


def channels_last(vae: AutoencoderKL) -> AutoencoderKL:
    """The order of memory in which convolutions of large pictures are quickest on a CPU."""
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fused(function: Any) -> Any:
    """Compiled where a C++ compiler is at hand (2.4 times as fast on two cores), else as it is."""
    return torch.compile(function) if shutil.which("g++") or shutil.which("clang++") else function


RUN: dict[Stage, Any] = {
    "world": lambda home, settings: load_world(home, settings.pictures),
    "vae": train_vae,
    "latents": encode_world,
    "decoder": train_decoder,
    "clip": train_clip,
    "unet": train_unet,
    "assemble": assemble,
    "judge": judge_pocket,
}
