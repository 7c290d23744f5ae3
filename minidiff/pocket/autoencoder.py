"""The first half of pretraining: pictures <-> latents (arXiv 2112.10752, section 3.1), and the world as latents.

B batch   H W picture side, 128   h w latent side, 16
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidiff.core.config import VAEConfig
from minidiff.core.rng import generator, hashed_seed
from minidiff.core.train import Batch
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet, to_pil, to_tensor
from minidiff.draw.progress import progress
from minidiff.draw.speed import speed_up_network
from minidiff.files import weights
from minidiff.files.folder import config_of, read_config
from minidiff.pocket.muon import Muon, split
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import World, begun, chosen, first_of, load_world, run
from minidiff.pocket.textures import texture
from minidiff.pocket.world import draw, held_out
from minidiff.trainer.task import Job

POCKET_VAE = VAEConfig(
    sample_size=128, block_out_channels=(16, 32, 96, 128), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
)
OUTSIDE = 0.4  # of the pictures come from textures.py and not from the world
KL_WEIGHT = 3e-5  # keeps the latents near a Gaussian, and the decoder used to a little noise in them


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, anchor: float) -> Tensor:
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


def train_vae(settings: PretrainSettings) -> None:
    """Stage 1: encoder and decoder together."""
    world = load_world(settings)
    torch.manual_seed(hashed_seed(settings.seed, "vae"))
    vae = begun(AutoencoderKL(POCKET_VAE), settings, "vae")
    speed_up_network(vae)

    def loss(data: Batch, step: int, micro: int) -> Tensor:
        anchor = 0.0 if settings.init_from else max(0.5 * (1 - step / 1200), 0.0)
        return vae_loss(vae, data["x"], data["noise"], anchor)

    task = Job(
        trainable=dict(vae.named_parameters()),
        batch=lambda step, micro: pictures(world, settings, "vae", step),
        loss=loss,
        export=lambda folder: weights.save(vae.state_dict(), folder / "model.safetensors"),
        preview=lambda done: reconstruction_sheet(vae),
        optimizer=Muon(*split(vae, ("conv_in", "conv_out", "quant_conv")), lr=1.5e-3, adam_lr=1.5e-3),
        ema_decay=0.999,
    )
    run(task, settings, "vae", settings.sizes.vae_steps, settings.sizes.vae_batch)


def pictures(world: World, settings: PretrainSettings, stage: str, step: int) -> Batch:
    """x (B, 3, H, W), three in five from the world, half of them mirrored; and noise (B, 4, h, w) for their posteriors."""
    batch, draws = settings.sizes.vae_batch, generator(settings.seed, f"{stage} noise", step)
    x = world.batch(chosen(settings, stage, step, batch))
    for i in range(batch):
        if torch.rand((), generator=draws) < OUTSIDE:
            x[i] = to_tensor(texture(hashed_seed(settings.seed, f"{stage} texture", step, i)))
    mirrored = torch.rand(batch, 1, 1, 1, generator=draws) < 0.5
    return {"x": torch.where(mirrored, x.flip(-1), x), "noise": torch.randn(batch, 4, 16, 16, generator=draws)}


@torch.no_grad()
def reconstruction_sheet(vae: AutoencoderKL, count: int = 8) -> Image.Image:
    """Held-out drawings above, what the autoencoder makes of them below."""
    drawings = [draw(picture, seed) for seed, picture in enumerate(held_out(count))]
    x = torch.stack([to_tensor(drawing) for drawing in drawings]).to(vae.post_quant_conv.weight.device)
    again = to_pil(vae.decode(vae.encode(x)[0]).clamp(-1, 1))
    return contact_sheet([drawings, again], row_labels=["drawn", "reconstructed"])


def load_vae(settings: PretrainSettings) -> AutoencoderKL:
    """The autoencoder as the last stage that worked on it left it; where none did, that of `init_from`."""
    config = POCKET_VAE
    if settings.init_from and not (settings.home / "vae" / "model.safetensors").exists():
        config = read_config(VAEConfig, *config_of(Path(settings.init_from) / "vae"))  # its norms may have other groups
    vae, files = AutoencoderKL(config), ("decoder/model.safetensors", "standard_vae.safetensors", "vae/model.safetensors")
    weights.load_into(vae, first_of(settings, "vae", *files), torch.float32)
    speed_up_network(vae)
    return vae.requires_grad_(False)


@torch.no_grad()
def encode_world(settings: PretrainSettings) -> None:
    """Means and standard deviations of all posteriors, fp16, in units in which a draw has mean 0 and variance 1."""
    if (path := settings.home / "latents.safetensors").exists():
        return
    world, parts, device = load_world(settings), [], chosen_device(settings.device)
    vae, half = load_vae(settings).to(device), settings.sizes.mixed_precision == "bf16"
    for some in progress(torch.arange(settings.pictures).split(16), "batch", "encoding"):
        with torch.autocast(device, torch.bfloat16, enabled=half):  # its error is smaller than the posteriors' deviation
            mean, logvar = vae.encode(world.batch(some.tolist()).to(device))
        parts.append((mean.float().cpu(), (0.5 * logvar.float()).exp().cpu()))
    mean, std = (torch.cat(part) for part in zip(*parts))
    centre, spread = mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    standardize(vae.cpu(), centre, spread)
    weights.save(vae.state_dict(), settings.home / "standard_vae.safetensors")
    centre, spread = centre.view(-1, 1, 1), spread.view(-1, 1, 1)
    weights.save({"mean": ((mean - centre) / spread).half(), "std": (std / spread).half()}, path)


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


def train_decoder(settings: PretrainSettings) -> None:
    """Stage 2: the encoder, and with it the latents, stay; the decoder goes on learning to read them."""
    world = load_world(settings)
    vae = load_vae(settings).to(chosen_device(settings.device))
    read = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss(data: Batch, step: int, micro: int) -> Tensor:
        with torch.no_grad():
            z = sample_posterior(*vae.encode(data["x"]), data["noise"])
        return reconstruction_loss(vae.decode(z), data["x"])

    task = Job(
        trainable=dict(read.named_parameters()),
        batch=lambda step, micro: pictures(world, settings, "decoder", step),
        loss=loss,
        export=lambda folder: weights.save(vae.state_dict(), folder / "model.safetensors"),
        preview=lambda done: reconstruction_sheet(vae),
        optimizer=Muon(*split(read, ("conv_in", "conv_out", "0.")), lr=5e-4, adam_lr=5e-4),
        ema_decay=0.998,
    )
    run(task, settings, "decoder", settings.sizes.decoder_steps, settings.sizes.vae_batch)
