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

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minidiff.files.folder import WORDS, read_json, write_json
from minidiff.pocket.autoencoder import encode_world, train_decoder, train_vae
from minidiff.pocket.control import train_canny
from minidiff.pocket.denoiser import finished_unet, pocket_pipeline, train_unet
from minidiff.pocket.few_steps import train_student
from minidiff.pocket.ip_adapter import train_ip_adapter
from minidiff.pocket.judge import judge
from minidiff.pocket.settings import JudgeSettings, PretrainSettings, Stage
from minidiff.pocket.stage import load_world, tokenizer_folder
from minidiff.pocket.towers import load_towers, save_image_tower, train_clip
from minidiff.pocket.world import word_list


def pretrain(settings: PretrainSettings) -> Path:
    """Run the stages; returns the folder with the finished checkpoint."""
    for stage in settings.stages:
        print(f"== {stage}", file=sys.stderr)
        RUN[stage](settings)
    return settings.home / "pocket"


def assemble(settings: PretrainSettings) -> None:
    """`home/pocket`: SD 1.5's layout, fp16, with CLIP's image tower beside it."""
    folder = settings.home / "pocket"
    pipe = pocket_pipeline(finished_unet(settings), settings)
    pipe.save_pretrained(folder, torch.float16)
    shutil.copytree(tokenizer_folder(settings), folder / "tokenizer", dirs_exist_ok=True)
    save_image_tower(load_towers(settings)[0].image, folder / "image_encoder")
    index = read_json(folder / "model_index.json", "it was written just now")
    write_json(folder / WORDS, word_list())
    write_json(folder / "model_index.json", index | {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]})


def judge_pocket(settings: PretrainSettings) -> None:
    """The figures of the model card, printed and kept in `scores.json`."""
    folder, judge_file = settings.home / "pocket", settings.home / "judge.safetensors"
    scores = judge(JudgeSettings(str(folder), judge=str(judge_file), mixed_precision=settings.sizes.mixed_precision))
    write_json(settings.home / "scores.json", scores)


RUN: dict[Stage, Callable[[PretrainSettings], Any]] = {
    "world": load_world,
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
