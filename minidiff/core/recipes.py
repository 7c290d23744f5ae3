"""The ways of fine-tuning, side by side. They have the same batches and the same loss, and differ in what moves.

    full                           every weight of the U-Net, perhaps of the text encoder too       W
    full, as DreamBooth            the same weights; half of each batch shows the subject's class   W
    lora (LoRA, DoRA)              two thin matrices beside each of some layers                     W + (alpha / r) B A
    textual_inversion              the vectors of one new word                                      v*
    lora, then textual_inversion   pivotal tuning, after Roich et al. (arXiv 2106.05744)            v*, B A
    full, of a ControlNet          every weight of the copy (controlnet.py); the U-Net is frozen
    of an IP-Adapter               its projection, K' and V' (ip_adapter.py); the U-Net is frozen

Each function changes the networks and returns what is trained, by name. `DiffusionLoss` is the loss of all:

    task = Task(lora({"unet": unet}, Adapter(rank=4)), batch, DiffusionLoss(unet, schedule))
    for update in train(task, LoopSettings()): ...

    B samples   C h w one latent   L tokens   D width of the text   P of SDXL's pooled vector   V of the vector for its U-Net
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.core import textual_inversion as words
from minidiff.core.inject import inject, trainable
from minidiff.core.losses import min_snr_weights, prior_preservation, squared_error
from minidiff.core.schedule import NoiseSchedule, add_noise, training_target

Trainable = dict[str, nn.Parameter]


def full(networks: dict[str, nn.Module]) -> Trainable:
    """Full fine-tuning: every weight of the `networks` moves, {"unet": …} and perhaps {"text_encoder": …}.

    DreamBooth (arXiv 2208.12242) is the same, but half of each batch shows the subject, the other half its class; its loss has
    a `prior_weight`. DreamBooth with LoRA instead of all weights is called DreamBooth-LoRA.
    """
    return trainable(nn.ModuleDict(networks).requires_grad_(True))


@dataclass(frozen=True)
class Adapter:
    """The shape of a LoRA (arXiv 2106.09685), or with `dora` of a DoRA (2402.09353)."""

    rank: int = 4
    alpha: float | None = None  # None: the rank, so that the scale alpha / rank is 1
    targets: tuple[str, ...] = ("attention",)  # layers of the U-Net
    rank_of: Mapping[str, int] = field(default_factory=dict)  # other ranks of some of them
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    seed: int = 0


def lora(networks: dict[str, nn.Module], adapter: Adapter) -> Trainable:
    """LoRA: the weights are frozen; A and B beside some layers move, and in DoRA the lengths m too."""
    a = adapter
    for name, network in networks.items():
        targets, rank_of = (a.targets, a.rank_of) if name == "unet" else (("text",), {})
        inject(network, a.rank, a.alpha, targets, a.seed, rank_of=rank_of, rslora=a.rslora, dora=a.dora, dropout=a.dropout)
    return trainable(nn.ModuleDict(networks))


def textual_inversion(tokenizer: Any, text_encoder: Any, word: str, like: str, count: int = 1) -> Trainable:
    """Textual inversion (arXiv 2208.01618): only the `count` vectors of a new word move. They start at the word `like`."""
    vectors = words.initial_vectors(tokenizer, text_encoder, like, count)
    return {"word": words.inject(text_encoder).add(word, vectors)}


@dataclass(frozen=True)
class DiffusionLoss:
    """The simple loss of DDPM (arXiv 2006.11239, eq. 14) on latents: || target - unet(x_t, t, *text) ||².

    A batch holds latents and noise (B, C, h, w), t (B,), and text (B, L, D) or token ids (B, L); for SDXL also pooled (B, P)
    beside text, and embedded sizes (B, 6 width); perhaps a mask (B, 1, h, w); for an IP-Adapter `e` (B, M, E).
    """

    unet: Any
    schedule: NoiseSchedule
    text_encoder: Any = None  # `TextEncoders`, for batches with token ids: trained, or with a word that is
    snr_gamma: float | None = None  # min-SNR weights
    prior_weight: float = 0.0  # above 0: the second half of a batch is the class
    base: Callable[..., Tensor] | None = None  # (x_t, t, *text) -> the base model's prediction: the target of the class half
    ip_adapter: Callable[[Tensor, Tensor], Tensor] | None = None  # (text, e) -> the U-Net's context
    controlnet: Any = None  # to be trained: with it, a batch also holds hints (B, 3, H, W) in [0, 1]

    def __call__(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        device = next(self.unet.parameters()).device
        batch = {name: rows.to(device) for name, rows in batch.items()}
        target = self.target(batch)
        output, x_t, text = self.predict(batch)
        if self.base is not None:
            half = len(target) // 2
            with torch.no_grad():
                own = self.base(x_t[half:], batch["t"][half:], *(part[half:] for part in text))
            target = torch.cat([target[:half], own.to(target.dtype)])
        losses = squared_error(output, target, batch.get("mask"))  # (B,)
        if self.snr_gamma is not None:
            losses = losses * min_snr_weights(self.schedule, batch["t"], self.snr_gamma)
        return prior_preservation(losses, self.prior_weight) if self.prior_weight > 0 else losses.mean()

    def target(self, batch: dict[str, Tensor]) -> Tensor:
        """The right prediction (B, C, h, w): eps, or v."""
        return training_target(self.schedule, batch["latents"], batch["noise"], batch["t"])

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The prediction of the U-Net, and its inputs x_t and text: (B, C, h, w) twice, (B, L, D), in SDXL also (B, V)."""
        dtype = self.unet.conv_norm_out.weight.dtype  # in which the U-Net computes
        x_t = add_noise(self.schedule, batch["latents"], batch["noise"], batch["t"]).to(dtype)
        text = self.text_encoder(batch["ids"]) if "ids" in batch else [batch[k] for k in ("text", "pooled") if k in batch]
        text = [part.to(dtype) for part in text]
        if "sizes" in batch:
            text[1] = torch.cat([text[1], batch["sizes"].to(dtype)], dim=1)
        net, control = self.controlnet, {}
        if net is not None:
            control = {"control": net(x_t, batch["t"], *text, hint=net.encode_hint(batch["hint"]))}
        if self.ip_adapter is not None:
            text[0] = self.ip_adapter(text[0], batch["e"])
        return self.unet(x_t, batch["t"], *text, **control), x_t, text
