"""Train the pocket checkpoint, in the stages in which Stable Diffusion was trained, on a world that is drawn here.

    world    draw captioned pictures                                                    minidiff/pocket/world.py
    vae      pictures <-> latents: reconstruction + a small KL                          arXiv 2112.10752, section 3.1
    latents  encode every picture once, in units in which latents have variance 1       arXiv 2112.10752, appendix G
    decoder  go on with the decoder alone, as for SD's own ft-mse autoencoder
    clip     a text and an image tower that tell captions apart                         arXiv 2103.00020
    unet     denoise latents, given the frozen text tower's view of the caption         arXiv 2112.10752, eq. 3
    student  a LoRA with which four steps are enough, if asked for                      minidiff/pocket/few_steps.py
    ip       an IP-Adapter, which draws what a picture shows, if asked for              minidiff/pocket/ip_adapter.py
    canny    a ControlNet, which follows edges, if asked for                            minidiff/pocket/control.py

Each stage is a `Job` for the one training loop, in a folder of its own below `output_dir`: run the command again and it
goes on where it was stopped. The last stage assembles `output_dir/pocket`, in the file layout of SD 1.5.

    B batch   H W picture side, 128   h w latent side, 16   D text width
"""

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

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
from minidiff.files.folder import WORDS, read_json, write_json
from minidiff.files.text_files import load_tokenizer
from minidiff.pocket.autoencoder import encode_world, load_vae, train_decoder, train_vae
from minidiff.pocket.control import train_canny
from minidiff.pocket.dataset import hard_batch, load_latents, load_world, lookalikes
from minidiff.pocket.few_steps import train_student
from minidiff.pocket.ip_adapter import train_ip_adapter
from minidiff.pocket.judge import judge
from minidiff.pocket.muon import Muon, split
from minidiff.pocket.settings import JudgeSettings, PretrainSettings, Stage
from minidiff.pocket.stage import POCKET_UNET, begun, chosen, finished_unet, noise_config, run, tokenizer_folder
from minidiff.pocket.tokenizer import build_tokenizer
from minidiff.pocket.towers import Towers, load_towers, save_image_tower
from minidiff.pocket.world import caption, held_out, random_caption, word_list
from minidiff.trainer.task import Job

CAPTION_DROPOUT = 0.1  # classifier-free guidance (arXiv 2207.12598), algorithm 1


def pretrain(settings: PretrainSettings) -> Path:
    """Run the stages; returns the folder with the finished checkpoint."""
    home = Path(settings.output_dir)
    for stage in settings.stages:
        print(f"== {stage}", file=sys.stderr)
        RUN[stage](home, settings)
    return home / "pocket"


# --- CLIP ----------------------------------------------------------------------------------------------------------------


def train_clip(home: Path, settings: PretrainSettings) -> None:
    """Stage 3: a tokenizer for the world's words, then the two towers."""
    batch, world = 96, load_world(home, settings.pictures)
    if not settings.init_from:
        build_tokenizer(home / "tokenizer", sorted({caption(p) for p in world.pictures} | {"a picture of an"}))
    tokenizer = load_tokenizer(tokenizer_folder(home, settings))
    torch.manual_seed(hashed_seed(settings.seed, "clip"))
    towers = Towers(len(tokenizer))
    begun(towers.text, settings, "text_encoder")
    begun(towers.image, settings, "image_encoder")
    towers.to(chosen_device(settings.device))

    groups = lookalikes(world.pictures)

    def data(step: int, micro: int) -> Batch:
        words = random.Random(hashed_seed(settings.seed, "clip captions", step))
        indices = hard_batch(groups, batch, words)
        ids = tokenize(tokenizer, [random_caption(world.pictures[i], words) for i in indices])
        return {"ids": ids, "pixels": world.batch(indices)}

    task = Job(
        trainable={name: p for name, p in towers.named_parameters()},
        batch=data,
        loss=lambda data, step, micro: towers(data["ids"], data["pixels"]),
        export=lambda folder: weights.save(towers.state_dict(), folder / "model.safetensors"),
        optimizer=Muon(*split(towers, ("embedding", "projection")), lr=2e-3, adam_lr=1e-3),
    )
    run(task, settings, "clip", settings.sizes.clip_steps, batch, warmup=50)


# --- the denoiser --------------------------------------------------------------------------------------------------------


def train_unet(home: Path, settings: PretrainSettings) -> None:
    """Stage 4: the denoiser, on the frozen text tower."""
    batch, latents, device = settings.sizes.unet_batch, load_latents(home), chosen_device(settings.device)
    pictures = load_world(home, settings.pictures).pictures
    towers, tokenizer = load_towers(home, settings)
    towers.to(device)
    schedule = NoiseSchedule.from_config(noise_config(settings))
    torch.manual_seed(hashed_seed(settings.seed, "unet"))
    unet = begun(UNet2DConditionModel(POCKET_UNET), settings, "unet")
    speed_up_network(unet)

    def data(step: int, micro: int) -> Batch:
        indices, draws = chosen(settings, "unet", step, batch), generator(settings.seed, "unet noise", step)
        shape = (batch, 4, 16, 16)
        z = latents.draw(indices, torch.randn(shape, generator=draws))
        t = torch.randint(1000, (batch,), generator=draws)
        words = random.Random(hashed_seed(settings.seed, "unet captions", step))
        said = [random_caption(pictures[i], words) if words.random() > CAPTION_DROPOUT else "" for i in indices]
        return {"latents": z, "noise": torch.randn(shape, generator=draws), "t": t, "ids": tokenize(tokenizer, said)}

    task = Job(
        trainable=dict(unet.named_parameters()),
        batch=data,
        loss=DiffusionLoss(unet, schedule, TextEncoders([towers.text]), snr_gamma=5.0),
        export=lambda folder: weights.save(unet.state_dict(), folder / "model.safetensors"),
        preview=lambda done: sample_sheet(home, unet, settings),
        optimizer=Muon(*split(unet, ("conv_in", "conv_out", "time_emb")), lr=2e-3, adam_lr=1e-3),
        ema_decay=0.998,
    )
    run(task, settings, "unet", settings.sizes.unet_steps, batch)


def pocket_pipeline(home: Path, unet: UNet2DConditionModel, settings: PretrainSettings) -> StableDiffusionPipeline:
    """All parts as they are now. The default sampler is DDIM."""
    towers, tokenizer = load_towers(home, settings)
    vae = load_vae(home, settings)
    pipe = StableDiffusionPipeline(unet, vae, towers.text, tokenizer, noise_config(settings), sampler="ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_sheet(home: Path, unet: UNet2DConditionModel, settings: PretrainSettings) -> Image.Image:
    """Sixteen held-out prompts, at guidance 5."""
    prompts = [caption(picture) for picture in held_out(16, seed=1)]
    pipe = pocket_pipeline(home, unet, settings).to(unet.conv_in.weight.device)
    images = pipe(prompts, guidance_scale=5.0, num_inference_steps=25, seed=0).images
    return contact_sheet([images[:8], images[8:]], tile=192)


# --- the folder ----------------------------------------------------------------------------------------------------------


def assemble(home: Path, settings: PretrainSettings) -> None:
    """`home/pocket`: SD 1.5's layout, fp16, with CLIP's image tower beside it."""
    folder = home / "pocket"
    pipe = pocket_pipeline(home, finished_unet(home, settings), settings)
    pipe.save_pretrained(folder, torch.float16)
    shutil.copytree(tokenizer_folder(home, settings), folder / "tokenizer", dirs_exist_ok=True)
    save_image_tower(load_towers(home, settings)[0].image, folder / "image_encoder")
    index = read_json(folder / "model_index.json", "it was written just now")
    write_json(folder / WORDS, word_list())
    write_json(folder / "model_index.json", index | {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]})


def judge_pocket(home: Path, settings: PretrainSettings) -> None:
    """The figures of the model card, printed and kept in `scores.json`."""
    half, path = settings.sizes.mixed_precision, str(home / "judge.safetensors")
    write_json(home / "scores.json", judge(JudgeSettings(str(home / "pocket"), judge=path, mixed_precision=half)))


RUN: dict[Stage, Any] = {
    "world": lambda home, settings: load_world(home, settings.pictures),
    "vae": train_vae,
    "latents": encode_world,
    "decoder": train_decoder,
    "clip": train_clip,
    "unet": train_unet,
    "assemble": assemble,
    "judge": judge_pocket,
    "student": train_student,
    "ip": train_ip_adapter,
    "canny": train_canny,
}
