"""The denoiser: the U-Net of the pocket checkpoint, its stage, and what all stages that train on latents share.

B samples   4 h w a latent, 4 x 16 x 16
"""

import random

import torch
from PIL import Image

from minidiff.core.config import NoiseConfig, UNetConfig
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.rng import generator, hashed_seed
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import TextEncoders, tokenize
from minidiff.core.train import Batch
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import speed_up_network
from minidiff.files import weights
from minidiff.pocket.autoencoder import load_vae
from minidiff.pocket.muon import Muon, split
from minidiff.pocket.settings import PretrainSettings, Stage
from minidiff.pocket.stage import begun, chosen, first_of, load_world, run
from minidiff.pocket.towers import load_towers
from minidiff.pocket.world import caption, held_out, random_caption
from minidiff.trainer.task import Job

# SD 1.5's parts, three levels, one layer a block. The finest level has no attention, which would cost
# as much there as everything else together: a picture of 16 x 16 cells is composed at 8 x 8 and 4 x 4.
POCKET_UNET = UNetConfig(
    sample_size=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=4,
    norm_num_groups=32,
)
LATENT = (4, 16, 16)
CAPTION_DROPOUT = 0.1  # classifier-free guidance (arXiv 2207.12598), algorithm 1


def noise_config(settings: PretrainSettings) -> NoiseConfig:
    """SD 1.5's noise; what the network predicts is a setting."""
    return NoiseConfig(prediction_type=settings.prediction_type)


class Denoising:
    """The start of a stage on latents: the world of N pictures, encoded, the frozen towers, the noise schedule."""

    def __init__(self, settings: PretrainSettings, stage: Stage) -> None:
        self.settings, self.stage, self.device = settings, stage, chosen_device(settings.device)
        self.world, posteriors = load_world(settings), weights.read_header(settings.home / "latents.safetensors").read()
        self.mean, self.std = posteriors["mean"], posteriors["std"]  # (N, 4, h, w)
        self.towers, self.tokenizer = load_towers(settings)
        self.text = TextEncoders([self.towers.to(self.device).text])
        self.schedule = NoiseSchedule.from_config(noise_config(settings))

    def draws(self, step: int, batch: int) -> tuple[list[int], torch.Generator, random.Random]:
        """The pictures of one update, the randomness of their noise, and that of their captions."""
        seed, stage = self.settings.seed, self.stage
        words = random.Random(hashed_seed(seed, f"{stage} captions", step))
        return chosen(self.settings, stage, step, batch), generator(seed, f"{stage} noise", step), words

    def noised(self, indices: list[int], draws: torch.Generator) -> Batch:
        """`latents` and `noise` (B, 4, h, w), and `t` (B,)."""
        noise = torch.randn(2, len(indices), *LATENT, generator=draws)
        t = torch.randint(1000, (len(indices),), generator=draws)
        return {"latents": self.latents(indices, noise[0]), "noise": noise[1], "t": t}

    def latents(self, indices: list[int], noise: torch.Tensor) -> torch.Tensor:
        """Draws (B, 4, h, w) from the posteriors of some pictures."""
        return self.mean[indices].float() + self.std[indices].float() * noise

    def captions(self, indices: list[int], words: random.Random) -> torch.Tensor:
        """The ids (B, L) of captions; one in ten is empty."""
        said = [self.caption(i, words) if words.random() > CAPTION_DROPOUT else "" for i in indices]
        return tokenize(self.tokenizer, said)

    def caption(self, index: int, words: random.Random) -> str:
        return random_caption(self.world.pictures[index], words)


def train_unet(settings: PretrainSettings) -> None:
    """Stage 4: the denoiser, on the frozen text tower."""
    base, batch = Denoising(settings, "unet"), settings.sizes.unet_batch
    torch.manual_seed(hashed_seed(settings.seed, "unet"))
    unet = begun(UNet2DConditionModel(POCKET_UNET), settings, "unet")
    speed_up_network(unet)

    def data(step: int, micro: int) -> Batch:
        indices, draws, words = base.draws(step, batch)
        z = base.latents(indices, torch.randn(batch, *LATENT, generator=draws))
        t = torch.randint(1000, (batch,), generator=draws)
        noise = torch.randn(batch, *LATENT, generator=draws)
        return {"latents": z, "noise": noise, "t": t, "ids": base.captions(indices, words)}

    task = Job(
        trainable=dict(unet.named_parameters()),
        batch=data,
        loss=DiffusionLoss(unet, base.schedule, base.text, snr_gamma=5.0),
        export=lambda folder: weights.save(unet.state_dict(), folder / "model.safetensors"),
        preview=lambda done: sample_sheet(unet, settings),
        optimizer=Muon(*split(unet, ("conv_in", "conv_out", "time_emb")), lr=2e-3, adam_lr=1e-3),
        ema_decay=0.998,
    )
    run(task, settings, "unet", settings.sizes.unet_steps, batch)


def finished_unet(settings: PretrainSettings) -> UNet2DConditionModel:
    """The U-Net of its stage, or else that of `init_from`: what is trained beside it comes after it."""
    unet = UNet2DConditionModel(POCKET_UNET)
    weights.load_into(unet, first_of(settings, "unet", "unet/model.safetensors"), torch.float32)
    return unet


def pocket_pipeline(unet: UNet2DConditionModel, settings: PretrainSettings) -> StableDiffusionPipeline:
    """All parts as they are now."""
    towers, tokenizer = load_towers(settings)
    pipe = StableDiffusionPipeline(unet, load_vae(settings), towers.text, tokenizer, noise_config(settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_sheet(unet: UNet2DConditionModel, settings: PretrainSettings) -> Image.Image:
    """Sixteen held-out prompts, at guidance 5."""
    prompts = [caption(picture) for picture in held_out(16, seed=1)]
    pipe = pocket_pipeline(unet, settings).to(unet.conv_in.weight.device)
    images = pipe(prompts, guidance_scale=5.0, num_inference_steps=25, seed=0).images
    return contact_sheet([images[:8], images[8:]], tile=192)
