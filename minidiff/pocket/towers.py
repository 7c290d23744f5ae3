"""CLIP at pocket size: a text tower and an image tower that agree on what belongs together.

Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020). Stable Diffusion keeps only the
text tower, frozen. The image tower is kept here too: it scores pictures, and is what an IP-Adapter would read.

    B pairs   L = 77 text tokens   D width of the text tower, and of the space that both towers share

There is no text projection: pictures are projected into the space of the text tower's pooled vector, so that the text
tower is exactly the `text_encoder` of SD's folder and the pair needs no third file.
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.rng import hashed_seed
from minidiff.core.text import tokenize
from minidiff.core.train import Batch
from minidiff.draw.device import chosen_device
from minidiff.files import weights
from minidiff.files.folder import write_json
from minidiff.files.text_files import load_tokenizer
from minidiff.pocket.muon import Muon, split
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import begun, first_of, load_world, run, tokenizer_folder
from minidiff.pocket.tokenizer import build_tokenizer
from minidiff.pocket.world import Picture, caption, random_caption
from minidiff.trainer.task import Job

WIDTH = 128
SHARED: dict[str, Any] = {  # of both configurations
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
IMAGE_TOWER: dict[str, Any] = {  # `image_encoder/config.json`: a vision transformer that reads 128 x 128 pixels as 64 patches
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    **SHARED,
    "image_size": 128,
    "patch_size": 16,
    "num_hidden_layers": 4,
}


def save_image_tower(tower: nn.Module, folder: Path) -> None:
    """`image_encoder`, in fp16, and how a picture becomes its input: 128 x 128 pixels in [-1, 1]."""
    state = {name: tensor.half() for name, tensor in tower.state_dict().items() if "position_ids" not in name}
    weights.save(state, folder / "model.safetensors")
    write_json(folder / "config.json", IMAGE_TOWER)
    sizes = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"} | sizes | pixels)


class Towers(nn.Module):
    """Both towers and the temperature of their comparison."""

    def __init__(self, vocab_size: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        start, end = vocab_size - 2, vocab_size - 1  # the last two ids, as in CLIP's own vocabulary
        text: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end, "num_hidden_layers": 3}
        self.text = CLIPTextModel(CLIPTextConfig(vocab_size=vocab_size, **SHARED, **text))
        self.image = CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_TOWER))
        self.log_scale = nn.Parameter(torch.tensor(2.659))  # ln(1 / 0.07): arXiv 2103.00020, section 2.5

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """ids (B, L), pixels (B, 3, 128, 128) in [-1, 1] -> the loss of telling the pairs apart."""
        text = F.normalize(self.text(input_ids=ids).pooler_output, dim=-1)  # (B, D)
        image = F.normalize(self.image(pixel_values=pixels).image_embeds, dim=-1)  # (B, D)
        same = (ids[:, None] == ids[None]).all(-1).float()  # two pictures may have the same caption
        return contrastive_loss(image, text, self.log_scale.clamp(max=4.605).exp(), same)  # scale at most 100


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross-entropy of arXiv 2103.00020, figure 3.

    image, text (B, D) of length 1; `same` (B, B) is 1 where a caption is right for a picture. CLIP takes the identity.
    """
    logits = scale * image @ text.mT  # (B, B)
    target = same / same.sum(dim=-1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def lookalikes(pictures: list[Picture]) -> list[list[list[int]]]:
    """The pictures of each colour, place and style together, and in these groups those of each object."""
    groups: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for i, p in enumerate(pictures):
        groups.setdefault((p.colour, p.scene, p.style), {}).setdefault(p.object, []).append(i)
    return [list(objects.values()) for objects in groups.values()]


def hard_batch(groups: list[list[list[int]]], count: int, draws: random.Random) -> list[int]:
    """`count` pictures from a few groups, one of each object: all that tells neighbours apart is their shape.

    Of random pictures hardly two share colour, place and style, so that CLIP could tell captions apart without ever
    looking at the object; and then its words for dog and fish would be all but the same to the U-Net.
    """
    indices: list[int] = []
    while len(indices) < count:
        indices += [draws.choice(objects) for objects in draws.choice(groups)]
    return indices[:count]


def train_clip(settings: PretrainSettings) -> None:
    """Stage 3: a tokenizer for the world's words, then the two towers."""
    batch, world = 96, load_world(settings)
    if not settings.init_from:
        build_tokenizer(settings.home / "tokenizer", sorted({caption(p) for p in world.pictures} | {"a picture of an"}))
    torch.manual_seed(hashed_seed(settings.seed, "clip"))
    towers, tokenizer = new_towers(settings)
    groups = lookalikes(world.pictures)

    def data(step: int, micro: int) -> Batch:
        words = random.Random(hashed_seed(settings.seed, "clip captions", step))
        indices = hard_batch(groups, batch, words)
        ids = tokenize(tokenizer, [random_caption(world.pictures[i], words) for i in indices])
        return {"ids": ids, "pixels": world.batch(indices)}

    task = Job(
        trainable=dict(towers.named_parameters()),
        batch=data,
        loss=lambda data, step, micro: towers(data["ids"], data["pixels"]),
        export=lambda folder: weights.save(towers.state_dict(), folder / "model.safetensors"),
        optimizer=Muon(*split(towers, ("embedding", "projection")), lr=2e-3, adam_lr=1e-3),
    )
    run(task, settings, "clip", settings.sizes.clip_steps, batch, warmup=50)


def new_towers(settings: PretrainSettings) -> tuple[Towers, Any]:
    """The towers with random weights or those of `init_from`, on the device; and the tokenizer."""
    tokenizer = load_tokenizer(tokenizer_folder(settings))
    towers = Towers(len(tokenizer))
    begun(towers.text, settings, "text_encoder")
    begun(towers.image, settings, "image_encoder")
    return towers.to(chosen_device(settings.device)), tokenizer


def load_towers(settings: PretrainSettings) -> tuple[Towers, Any]:
    """The towers and the tokenizer as the CLIP stage left them, frozen; where it did not run, those of `init_from`."""
    towers, tokenizer = new_towers(settings)
    if not settings.init_from or (settings.home / "clip" / "model.safetensors").exists():
        weights.load_into(towers, first_of(settings, "clip", "clip/model.safetensors"))
    return towers.cpu().eval().requires_grad_(False), tokenizer
