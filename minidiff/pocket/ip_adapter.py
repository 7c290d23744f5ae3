"""An IP-Adapter for the pocket checkpoint: it draws what a picture shows, without a word.

The base form on the pocket's own image tower (towers.py): four tokens of its embedding of the whole picture. The picture to
denoise is the picture that is shown. Half of the captions are dropped, so that the adapter has to look; the paper drops 10 %,
in a million steps.

    B samples   4 h w a latent   E width of the image tower's embedding
"""

from pathlib import Path

import torch
from torch import Tensor

from minidiff.core.ip_adapter import ImageProjection, IPAdapter, inject
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.rng import hashed_seed
from minidiff.core.text import tokenize
from minidiff.core.train import Batch
from minidiff.draw.progress import progress
from minidiff.draw.speed import speed_up_network
from minidiff.files import weights
from minidiff.pocket.denoiser import Denoising, finished_unet
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import World, run
from minidiff.pocket.towers import WIDTH, Towers, save_image_tower
from minidiff.trainer.task import Job

DROP = {"image": 0.05, "caption": 0.45, "both": 0.05}  # shares of the samples


def train_ip_adapter(settings: PretrainSettings) -> None:
    """The stage `ip`: writes `ip/ip_adapter.safetensors`, in fp16, and the image tower beside it."""
    base, unet, batch = Denoising(settings, "ip"), finished_unet(settings), settings.sizes.ip_batch
    embeddings = load_embeddings(settings.home / "image_embeds.safetensors", base.world, base.towers)
    torch.manual_seed(hashed_seed(settings.seed, "ip"))
    adapter = IPAdapter(ImageProjection(WIDTH, WIDTH), unet).to(base.device)
    inject(unet, adapter)
    speed_up_network(unet.requires_grad_(False).to(base.device))

    def data(step: int, micro: int) -> Batch:
        indices, draws, words = base.draws(step, batch)
        dropped = words.choices([*DROP, "nothing"], [*DROP.values(), 1 - sum(DROP.values())], k=batch)
        said = [base.caption(i, words) if d in ("image", "nothing") else "" for i, d in zip(indices, dropped)]
        shown = torch.tensor([d in ("caption", "nothing") for d in dropped])
        e = embeddings[indices, None] * shown[:, None, None]  # (B, 1, E)
        return base.noised(indices, draws) | {"ids": tokenize(base.tokenizer, said), "e": e}

    task = Job(
        trainable=dict(adapter.named_parameters()),
        batch=data,
        loss=DiffusionLoss(unet, base.schedule, base.text, snr_gamma=5.0, ip_adapter=adapter),
        export=lambda folder: save(adapter, base.towers, folder),
        optimizer=torch.optim.AdamW(adapter.parameters(), 1e-3, weight_decay=1e-2),
    )
    run(task, settings, "ip", settings.sizes.ip_steps, batch, warmup=30)


@torch.no_grad()
def load_embeddings(path: Path, world: World, towers: Towers) -> Tensor:
    """The image tower's embedding of every picture (N, E), computed once."""
    if not path.exists():
        device = towers.log_scale.device
        bar = progress(torch.arange(len(world.pictures)).split(64), "batch", "looking")
        rows = [towers.image(pixel_values=world.batch(some.tolist()).to(device)).image_embeds.cpu() for some in bar]
        weights.save({"image_embeds": torch.cat(rows)}, path)
    return weights.read_header(path).read()["image_embeds"]


def save(adapter: IPAdapter, towers: Towers, folder: Path) -> None:
    """The file and the tower that it needs, as they are published."""
    weights.save({name: tensor.half() for name, tensor in adapter.state_dict().items()}, folder / "ip_adapter.safetensors")
    save_image_tower(towers.image, folder / "image_encoder")
