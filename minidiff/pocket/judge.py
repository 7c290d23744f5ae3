"""Scores for the pocket checkpoint: does a picture show what its prompt says, is the thing whole, how sharp is the VAE?

The judge is a small convolutional classifier with one answer for each question: which object, colour, scene, style? And is
the object whole, with one head and all its legs? It learns from drawings and from spoiled drawings (anatomy.py) only, and
nothing that is scored was ever trained against it. It sees them blurred, noisy and shifted in colour, and some through the
autoencoder, so that it looks at shapes and not at the exact pixels of the drawing program.

A second judge, CLIP's image tower, says how like two pictures are: for what a fine-tuned model has learned and forgotten.

    B pictures   128 x 128 pixels   D width of the tower's embedding
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from minidiff.core.errors import WeightsError
from minidiff.core.rng import generator, hashed_seed
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import to_tensor
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.progress import progress
from minidiff.files import weights
from minidiff.files.ip_adapter_file import load_image_tower
from minidiff.pocket.anatomy import whole_and_spoiled
from minidiff.pocket.muon import Muon, split
from minidiff.pocket.settings import JudgeSettings
from minidiff.pocket.textures import KEPT_OUT, texture
from minidiff.pocket.world import COLOURS, OBJECTS, SCENES, STYLES, Picture, any_picture, caption, draw, held_out
from minidiff.trainer.pictures import psnr

QUESTIONS: dict[str, tuple[str, ...]] = {"object": OBJECTS, "colour": COLOURS, "scene": SCENES, "style": STYLES}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry", "brick",
               "grass", "gravel")  # fmt: skip


class Judge(nn.Module):
    """Seven convolutions, five of which halve the side, then one linear layer for each question.

    A whole dog and a whole cup have little in common, so each object has an answer of its own to "is it whole?": 0 or 1.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, strides, layers = (3, 32, 64, 64, 96, 96, 128, 128), (2, 2, 1, 2, 1, 2, 2), []
        for c_in, c_out, stride in zip(widths, widths[1:], strides):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.SiLU())
        answers = {question: len(words) for question, words in QUESTIONS.items()} | {"whole": len(OBJECTS) * 2}
        self.heads = nn.ModuleDict({question: nn.Linear(256, count) for question, count in answers.items()})

    def forward(self, x: Tensor, objects: Tensor) -> dict[str, Tensor]:
        """x (B, 3, 128, 128) in [-1, 1], the objects that should be on it (B,) -> logits (B, words) for each question."""
        features = self.body(x)
        logits = {question: head(features) for question, head in self.heads.items()}
        logits["whole"] = logits["whole"].unflatten(1, (len(OBJECTS), 2))[torch.arange(len(x)), objects]
        return logits


def answers(pictures: list[Picture]) -> dict[str, Tensor]:
    """The right word's number, (B,), for each question."""
    return {q: torch.tensor([words.index(getattr(p, q)) for p in pictures]) for q, words in QUESTIONS.items()}


def to_batch(images: Iterable[Image.Image]) -> Tensor:
    """Pictures -> (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def blurred(x: Tensor, draws: torch.Generator) -> Tensor:
    """Blur, noise and a tint, each by a random amount, as a network's pictures have them."""
    size = int(torch.randint(80, 129, (), generator=draws))
    small = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    x = F.interpolate(small, size=128, mode="bilinear")
    tint = 0.06 * torch.randn(len(x), 3, 1, 1, generator=draws)
    noise = 0.08 * torch.rand(len(x), 1, 1, 1, generator=draws) * torch.randn(x.shape, generator=draws)
    return (x + tint + noise).clamp(-1, 1)


def pairs(count: int, step: int, vae: AutoencoderKL | None) -> tuple[list[Picture], Tensor]:
    """`count` drawings and then the same ones spoiled, (2 · count, 3, 128, 128)."""
    words = random.Random(hashed_seed(0, "judge pictures", step))
    pictures = [any_picture(words) for _ in range(count)]
    both = [whole_and_spoiled(p, hashed_seed(0, "judge drawing", step, i), vae) for i, p in enumerate(pictures)]
    return pictures * 2, torch.stack(both, dim=1).flatten(0, 1)


def train_judge(steps: int = 2000, batch: int = 48, vae: AutoencoderKL | None = None, half: bool = False) -> Judge:
    """About three quarters of an hour on one core in bf16 (`half`). All pictures are drawn anew, half of them spoiled."""
    torch.manual_seed(hashed_seed(0, "judge"))
    judge = Judge()
    optimizer = Muon(*split(judge, ("body.0.", "heads")), lr=2e-3, adam_lr=2e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, 20 * (done + 1) / steps) * (1 - done / steps))
    for step in progress(range(steps), "step", "training the judge"):
        (pictures, x), draws = pairs(batch // 2, step, vae), generator(0, "judge blur", step)
        truth = answers(pictures)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if vae is not None:
                some = torch.randperm(len(x), generator=draws)[: batch // 5]
                x[some] = reconstruction(vae, x[some]).float()
            logits = judge(blurred(x, draws), truth["object"])
        truth["whole"] = 1 - torch.arange(len(x)) // (batch // 2)
        losses = {q: F.cross_entropy(logits[q].float(), truth[q]) for q in truth}
        loss = sum(losses.values()) + 2 * losses["whole"]  # the hard question
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
    return judge.eval()


def load_or_train_judge(path: Path, vae: AutoencoderKL | None = None, half: bool = False) -> Judge:
    """The judge of a file; trained first, and kept there, if there is none."""
    judge = Judge()
    if path.exists():
        weights.load_into(judge, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)  # now, and not after some minutes: perhaps it cannot be
        judge = train_judge(vae=vae, half=half)
        weights.save(judge.state_dict(), path)
    return judge.eval()


@torch.no_grad()
def score(judge: Judge, pictures: list[Picture], show: Callable[[list[Picture]], Tensor], batch: int = 20) -> dict[str, float]:
    """Shares of right answers: does the judge read from `show(pictures)`, (B, 3, 128, 128), what the pictures should show?

    `all` is all of QUESTIONS at once; `whole` stands beside it.
    """
    hits = []
    for start in progress(range(0, len(pictures), batch), "batch", "judging"):
        part = pictures[start : start + batch]
        truth = answers(part)
        logits = judge(show(part), truth["object"])
        right = torch.stack([logits[question].argmax(-1) == truth[question] for question in QUESTIONS])
        hits.append(torch.stack([*right, right.all(0), logits["whole"].argmax(-1) == 1]))
    return dict(zip((*QUESTIONS, "all", "whole"), torch.cat(hits, dim=1).float().mean(1).tolist()))


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, x: Tensor, batch: int = 10) -> Tensor:
    """Pictures (B, 3, H, W) through the autoencoder and back."""
    return torch.cat([vae.decode(vae.encode(part)[0]).clamp(-1, 1) for part in x.split(batch)])


def flat_colours() -> Tensor:
    """The 27 colours whose red, green and blue are 0, 127.5 or 255."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3).view(27, 3, 1, 1).repeat(1, 1, 128, 128)


def photographs() -> Tensor | None:
    """Twelve that scikit-image and scikit-learn bring along, their middle at 128 pixels; None without these libraries."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    arrays = [getattr(data, name)() for name in PHOTOGRAPHS] + list(load_sample_images().images)
    images = [ImageOps.fit(Image.fromarray(a).convert("RGB"), (128, 128), Image.Resampling.LANCZOS) for a in arrays]
    return to_batch(images)


def sharpness(vae: AutoencoderKL, drawings: int = 200) -> dict[str, float]:
    """How well the autoencoder keeps pictures that it never saw: PSNR in dB; and its worst flat pixel of 255."""
    some = {
        "the world": to_batch(draw(p, 10**6 + i) for i, p in enumerate(held_out(drawings))),
        "patterns kept out": to_batch(texture(10**6 + i, kind) for kind in KEPT_OUT for i in range(16)),
        "flat colours": flat_colours(),
    }
    if (photos := photographs()) is not None:
        some["photographs"] = photos
    again = {name: reconstruction(vae, x) for name, x in some.items()}
    worst = (again["flat colours"] - some["flat colours"]).abs().max().item() * 127.5
    return {name: psnr(x, again[name]) for name, x in some.items()} | {"worst pixel of a flat colour, of 255": worst}


def judge(s: JudgeSettings) -> dict[str, Any]:
    """All that the model card says, from held-out prompts at 25 DDIM steps; printed as JSON, too."""
    pipe = StableDiffusionPipeline.from_pretrained(s.folder)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae.config.downscale
    if side != 128:
        raise WeightsError(f"{s.folder} draws {side} x {side} pixels; the judge knows the pocket checkpoint's 128 x 128 alone.")
    net, pictures = load_or_train_judge(Path(s.judge), pipe.vae, s.mixed_precision == "bf16"), held_out(s.count)

    def generated(part: list[Picture]) -> Tensor:
        how: dict[str, Any] = dict(guidance_scale=s.guidance_scale, num_inference_steps=25, sampler="ddim", output_type="pt")
        x: Tensor = pipe([caption(p) for p in part], seed=[pictures.index(p) for p in part], **how).images
        return x.mul(2).sub(1)

    def drawn(part: list[Picture]) -> Tensor:
        return to_batch([draw(p, 10**6 + i) for i, p in enumerate(part)])

    def ruined(part: list[Picture]) -> Tensor:
        return torch.stack([whole_and_spoiled(p, 10**6 + pictures.index(p), pipe.vae)[1] for p in part])

    scores = {
        "held-out drawings (what the judge knows)": score(net, pictures, drawn),
        "held-out drawings through the autoencoder": score(net, pictures, lambda part: reconstruction(pipe.vae, drawn(part))),
        "pictures from held-out prompts": score(net, pictures, generated),
        "spoiled drawings taken for whole ones": score(net, pictures, ruined)["whole"],
        "reconstruction, PSNR in dB": sharpness(pipe.vae),
    }
    print(json.dumps(scores, indent=2))
    return scores


# --- how like are two pictures? -----------------------------------------------------------------------------------------


class ImageTower:
    """CLIP's image tower, `image_encoder/` of a model folder: pictures -> points on a sphere, like pictures close together."""

    def __init__(self, folder: Path) -> None:
        self.model, (self.side, _, _) = load_image_tower(folder)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D), rows of length 1. The tower reads [-1, 1], as it was trained (pocket/towers.py)."""
        x = to_batch(image.resize((self.side, self.side), Image.Resampling.LANCZOS) for image in images)
        return F.normalize(self.model(pixel_values=x).image_embeds, dim=-1)


def drawings(pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Image.Image]:
    """Each prompt's pictures, one from each seed: the same for every model, so that only the model differs."""
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = dict(seed=list(seeds), guidance_scale=5.0, num_inference_steps=steps)
    bar = progress(prompts, "prompt", "drawing")
    return [image for prompt in bar for image in pipe([prompt] * len(seeds), **how).images]


def subject_score(drawn: Tensor, real: Tensor) -> float:
    """CLIP-I: embeddings (N, D) and (M, D) -> the mean cosine similarity of all pairs (2208.12242, section 5.2)."""
    return (drawn @ real.mT).mean().item()


def forgetting_score(tuned: Tensor, base: Tensor) -> float:
    """1 - the mean cosine similarity of row i of one, (N, D), and row i of the other."""
    return 1 - (tuned * base).sum(-1).mean().item()
