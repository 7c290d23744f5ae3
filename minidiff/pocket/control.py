"""A ControlNet for the pocket world, whose hints are edges, trained as published ones are, but in half an hour.

The U-Net has to be finished: that of `init_from`, or of the stage `unet`. Watch edge_f1 in metrics.jsonl. The loss hardly
moves when the net begins to obey its hints, rather suddenly, after some hundred updates.

    B batch   H W picture side, 128
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from minidiff.core.controlnet import ControlNetModel
from minidiff.core.recipes import DiffusionLoss, full
from minidiff.core.rng import hashed_seed
from minidiff.core.train import Batch
from minidiff.draw.canny import canny
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.speed import speed_up_network
from minidiff.files.controlnet import write_controlnet
from minidiff.pocket.denoiser import Denoising, finished_unet, pocket_pipeline
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import World, run
from minidiff.pocket.world import caption, draw, held_out
from minidiff.trainer.task import Job

WIDTHS = (8, 16, 32, 64)  # of the hint encoder
UNSEEN = 10_000_000  # seeds from here on are of drawings that no training has seen


def train_canny(settings: PretrainSettings) -> None:
    """The stage `canny`: writes `canny`, a folder of diffusers' form, in fp16."""
    base, unet, batch = Denoising(settings, "canny"), finished_unet(settings), settings.sizes.control_batch
    hints = edges(base.world)
    torch.manual_seed(hashed_seed(settings.seed, "canny"))
    net = ControlNetModel.from_unet(unet, WIDTHS)
    for network in (unet.requires_grad_(False), net):
        speed_up_network(network.to(base.device))

    def data(step: int, micro: int) -> Batch:
        indices, draws, words = base.draws(step, batch)
        return base.noised(indices, draws) | {"ids": base.captions(indices, words), "hint": hints(indices)}

    pipe = pocket_pipeline(unet, settings).to(base.device)
    pipe.controlnet = net
    task = Job(
        trainable=full({"controlnet": net}),
        batch=data,
        loss=DiffusionLoss(unet, base.schedule, base.text, snr_gamma=5.0, controlnet=net),
        export=lambda folder: write_controlnet(net, folder, torch.float16),
        optimizer=torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2),
        modules={"unet": unet, "controlnet": net},
        validate=lambda: {"edge_f1": edge_f1(pipe)},
    )
    run(task, settings, "canny", settings.sizes.control_steps, batch, warmup=30)


@torch.no_grad()
def edge_f1(pipe: StableDiffusionPipeline, count: int = 12, scale: float = 1.0, steps: int = 15) -> float:
    """How well pictures of held-out captions follow the edges of other drawings of the same. `scale` 0: without them.

    F1 of precision and recall of edge pixels, which count as right up to one pixel beside; the mean over the pictures.
    """
    scores = []
    for i, picture in enumerate(held_out(count, seed=2)):
        wanted = canny(np.asarray(draw(picture, UNSEEN + i)))
        call = partial(pipe, seed=i, num_inference_steps=steps, guidance_scale=4.0, controlnet_conditioning_scale=scale)
        drawn = call(caption(picture), control_image=Image.fromarray(wanted).convert("RGB")).images[0]
        a, b = (torch.from_numpy(one)[None].float() / 255 for one in (canny(np.asarray(drawn)), wanted))
        precision, recall = ((x * max_pool2d(y, 3, 1, 1)).sum() / x.sum().clamp(min=1) for x, y in ((a, b), (b, a)))
        scores.append(float(2 * precision * recall / (precision + recall).clamp(min=1e-6)))
    return sum(scores) / count


def edges(world: World) -> Callable[[list[int]], Tensor]:
    """Pictures -> their edges, (B, 3, H, W) of 0 and 1. Those of a picture are found once."""

    @cache
    def found(index: int) -> np.ndarray:
        return canny(np.asarray(world.pixels[index]))

    return lambda some: torch.from_numpy(np.stack([found(i) for i in some])).float()[:, None].repeat(1, 3, 1, 1) / 255
