"""diffusers and peft, used as their training scripts use them (version 0.36: train_text_to_image_lora.py, train_dreambooth.py,
textual_inversion.py). This is the only file of the benchmark that imports them.

    P0    as the scripts stand: pictures and prompts are encoded at every step, torch.optim.AdamW
    P1    what they can keep is kept: latents, and embeddings of prompts whose encoder does not learn
    P2    P1 at its best: channels_last, torch.compile where it works, fused AdamW

In favour of the peers, their steps are without accelerate, data loader and logging; only P0 reads pictures. Models share
the weights of minidiff's own where these are not trained, so that two of SD 1.5's size fit into the memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidiff.files.folder import config_values

LEVELS = ("P0", "P1", "P2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = {"P0": "P0 diffusers + peft", "P1": "P1 cached latents", "P2": "P2 at its best"}
Batch = dict[str, Tensor]


def missing() -> str:
    """Why there are no peers; empty if there are. Nothing is imported yet: that takes seconds."""
    absent = [name for name in ("diffusers", "peft") if find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported; pip install -e '.[bench]' brings them." if absent else ""


def load(folder: str | Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Their pipeline."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def unet_beside(ours: Any) -> Any:
    """Their U-Net with the very weights of ours: in the memory there is one set of numbers."""
    import diffusers

    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config_values(ours.config, "UNet2DConditionModel"))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.requires_grad_(False).eval()


def lora_unet_on_meta(ours: Any, rank: int = 8, dtype: torch.dtype = torch.float16) -> Any:
    """Shapes alone: their U-Net in half precision with peft's LoRA in fp32."""
    import diffusers
    import peft

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config_values(ours.config, "UNet2DConditionModel"))
        unet.requires_grad_(False)
        for p in unet.parameters():
            p.data = p.data.to(dtype)
        unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
    for p in unet.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return unet


def at_best(module: nn.Module, compiled: bool) -> Any:
    """channels_last, and compiled if asked."""
    module = module.to(memory_format=torch.channels_last)
    return torch.compile(module) if compiled else module


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """One peer in training; a call is what the body of the script's loop does."""

    loss: Callable[[Batch], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: bool = True
    after: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()
        return loss.detach()


@dataclass(frozen=True)
class Plan:
    """What is trained, and on what."""

    method: str  # lora, dora, dreambooth, textual_inversion
    folder: str  # the model
    prompts: tuple[str, ...]  # of each row of a batch; a DreamBooth batch has the class behind the instance
    pictures: tuple[Path, ...]
    side: int  # in pixels
    rank: int
    learning_rate: float
    word: str = ""  # that textual inversion learns, and whence it begins
    initializer: str = ""
    device: str = "cpu"
    half: torch.dtype | None = None  # of autocast; None: all is fp32


def trainee(plan: Plan, level: str, compiled: bool, start: dict[str, Tensor] | None = None) -> Trainee:
    """A peer at `level`, ready for its first step. `start`: LoRA's A by module, which is drawn differently there and here."""
    pipe = load(plan.folder, plan.device, torch.float32)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    for network in networks:
        network.requires_grad_(False)
    if plan.half and plan.method != "dreambooth":
        pipe.unet.to(plan.half)
    if plan.half:  # the scripts' weight_dtype: for all that is frozen
        pipe.vae.to(plan.half)
        pipe.text_encoder.to(torch.float32 if plan.method == "textual_inversion" else plan.half)
    clip, after = True, lambda: None
    if plan.method in ("lora", "dora"):
        add_adapter(pipe.unet, plan, start or {})
    elif plan.method == "dreambooth":
        pipe.unet.requires_grad_(True)
    else:
        clip, after = False, add_word(pipe, plan)
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    unet = at_best(pipe.unet, compiled) if level == "P2" else pipe.unet
    fast: dict[str, Any] = {"fused": True} if level == "P2" else {}
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=1e-2, **fast)
    return Trainee(loss_of(pipe, unet, plan, level), parameters, optimizer, clip, after)


def add_adapter(unet: Any, plan: Plan, start: dict[str, Tensor]) -> None:
    import peft

    r, dora = plan.rank, plan.method == "dora"
    unet.add_adapter(peft.LoraConfig(r=r, lora_alpha=r, target_modules=ATTENTION, use_dora=dora))
    for name, module in unet.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for p in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                p.data = p.data.float()  # cast_training_params: what is trained is fp32
            if name in start:
                module.lora_A["default"].weight.data.copy_(start[name])


def add_word(pipe: Any, plan: Plan) -> Callable[[], None]:
    """A new row in the table of words, which the script trains as a whole; afterwards the old rows are put back."""
    (from_id,) = pipe.tokenizer(plan.initializer, add_special_tokens=False).input_ids
    pipe.tokenizer.add_tokens([plan.word])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    table.data = table.data.float()
    table.data[-1] = table.data[from_id]
    table.requires_grad_(True)
    old, keep = table.detach().clone(), torch.arange(len(table), device=table.device) < len(table) - 1

    def put_back() -> None:
        with torch.no_grad():
            table[keep] = old[keep]

    return put_back


def loss_of(pipe: Any, unet: Any, plan: Plan, level: str) -> Callable[[Batch], Tensor]:
    """The scripts' forward pass.

    All contenders are given the same latents, noise and timesteps, so that their losses can be compared: P0 encodes its
    pictures, and then goes on with the latents that it is given.
    """
    import diffusers

    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    ids = pipe.tokenizer(
        list(plan.prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    ids, files = ids.to(plan.device), [plan.pictures[i % len(plan.pictures)] for i in range(len(ids))]
    learns_words, paired = plan.method == "textual_inversion", plan.method == "dreambooth"
    with torch.no_grad():
        kept = None if level == "P0" or learns_words else pipe.text_encoder(ids).last_hidden_state
    autocast = torch.autocast(plan.device, plan.half or torch.bfloat16, enabled=plan.half is not None)

    def loss(batch: Batch) -> Tensor:
        x0, noise, t = (batch[name].to(plan.device) for name in ("latents", "noise", "t"))
        with autocast:
            if level == "P0":
                with torch.no_grad():
                    pipe.vae.encode(pixels(files, plan.side).to(plan.device)).latent_dist.sample()
            if kept is None:
                with torch.set_grad_enabled(learns_words):
                    text = pipe.text_encoder(ids).last_hidden_state
            else:
                text = kept
            x_t = scheduler.add_noise(x0, noise, t).to(pipe.unet.dtype)
            output = unet(x_t, t, text.to(pipe.unet.dtype), return_dict=False)[0].float()
            if not paired:
                return F.mse_loss(output, noise)
            (own, prior), (own_noise, prior_noise) = output.chunk(2), noise.chunk(2)
            return F.mse_loss(own, own_noise) + F.mse_loss(prior, prior_noise)

    return loss


def pixels(files: Iterable[Path], side: int) -> Tensor:
    """The scripts' transforms: read, resize, crop the middle, [-1, 1]. (B, 3, H, W)."""
    rows = []
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
            scale = side / min(image.size)
            width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - side) // 2, (height - side) // 2
            rows.append(np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1
