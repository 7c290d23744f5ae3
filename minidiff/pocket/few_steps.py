"""A student that draws in few steps: a LoRA on the U-Net, trained by consistency distillation, as LCM-LoRA is.

Sampling follows a curve from noise to a picture. The teacher, the U-Net itself with guidance, knows the direction at each
point; so it needs many small steps. The student learns to jump from any point to the end of the curve. It is never shown the
end: it is enough that two neighbours on a curve must have the same end.

    z latents   x_t noised latents   t, s neighbours on the grid, s < t   f(x, t) the end of the curve, as the student sees it
    B samples   4 h w a latent       L tokens, D width of the text

Papers: consistency models arXiv 2303.01469, LCM 2310.04378, LCM-LoRA 2311.05556.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minidiff.core.inject import adapter_weights, inject, set_adapters, trainable
from minidiff.core.samplers import lcm_boundary
from minidiff.core.schedule import NoiseSchedule, a_bar_of, add_noise, read_output
from minidiff.core.text import tokenize
from minidiff.core.train import Batch
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.speed import speed_up_network
from minidiff.files.lora_file import save_lora
from minidiff.pocket.denoiser import Denoising, finished_unet
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import run
from minidiff.trainer.task import Job

TARGETS = ("attention", "feed_forward", "projections", "resnets", "samplers")  # every layer that LCM-LoRA adapts
RANK = 32
GRID = 20  # timesteps from t to s: 50 points, as in LCM, section 4.3
GUIDANCE = (3.0, 9.0)  # the teacher's scale is drawn from here; the student draws without guidance
HUBER = 1e-3  # c of the pseudo-Huber loss

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, text) -> eps or v


def consistency_loss(
    student: Network, teacher: Network, schedule: NoiseSchedule, data: Batch, text: Tensor, no_text: Tensor
) -> Tensor:
    """The distance of the student's two ends: from x_t, and from where the teacher's step leads from there.

    `data` has latents and noise (B, 4, h, w), t (B,) on the grid, and guidance (B,); text and no_text are (B, L, D).
    """
    z, t = data["latents"], data["t"]
    s = (t - GRID).clamp(min=0)
    x_t = add_noise(schedule, z, data["noise"], t)
    with torch.no_grad():
        x_s = teacher_step(teacher, schedule, x_t, t, s, torch.cat([no_text, text]), data["guidance"])
        target = end_of_curve(student, schedule, x_s, s, text)  # the student itself, as in LCM-LoRA
    error = (end_of_curve(student, schedule, x_t, t, text) - target).float()
    return ((error.square() + HUBER**2).sqrt() - HUBER).mean()  # pseudo-Huber, 2310.14189, section 3.3; for each number


def teacher_step(
    teacher: Network, schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, texts: Tensor, guidance: Tensor
) -> Tensor:
    """One step of DDIM with guidance, from t to s. `texts` (2B, L, D) are without and with the prompt."""
    without, with_prompt = teacher(torch.cat([x, x]), torch.cat([t, t]), texts).float().chunk(2)
    output = without + guidance.view(-1, 1, 1, 1) * (with_prompt - without)  # LCM, section 4.2; its w is guidance - 1
    x0, eps = read_output(output, x, a_bar_of(schedule, t, x), schedule.config.prediction_type)
    a_bar = a_bar_of(schedule, s, x)
    return a_bar.sqrt() * x0 + (1 - a_bar).sqrt() * eps  # DDIM (2010.02502), eq. 12 with sigma = 0


def end_of_curve(student: Network, schedule: NoiseSchedule, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """f(x, t) (B, 4, h, w). At t = 0 it is x, whatever the network says: the curve ends there."""
    output = student(x, t, text).float()
    x0, _ = read_output(output, x, a_bar_of(schedule, t, x), schedule.config.prediction_type)
    c_skip, c_out = lcm_boundary(t.view(-1, 1, 1, 1))
    return c_skip * x + c_out * x0  # LCM eq. 9


def train_student(settings: PretrainSettings) -> None:
    """The stage `student`: writes `student/pytorch_lora_weights.safetensors`, with kohya's names, as LCM-LoRA has them."""
    base, unet, batch = Denoising(settings, "student"), finished_unet(settings), settings.sizes.student_batch
    inject(unet, RANK, targets=TARGETS, seed=settings.seed)
    speed_up_network(unet.to(base.device))

    def data(step: int, micro: int) -> Batch:
        indices, draws, words = base.draws(step, batch)
        data = base.noised(indices, draws)
        data["t"] = GRID * (1 + data["t"] % (1000 // GRID)) - 1  # on the grid: 19, 39, … 999
        data["guidance"] = torch.empty(batch).uniform_(*GUIDANCE, generator=draws)
        data["ids"] = tokenize(base.tokenizer, ["", *(base.caption(i, words) for i in indices)])
        return data

    def ask(adapters: list[str], *inputs: Tensor) -> Tensor:
        set_adapters(unet, adapters)
        return unet(*inputs)

    def loss(data: Batch, step: int, micro: int) -> Tensor:
        with torch.no_grad():
            text = base.towers.text(input_ids=data["ids"]).last_hidden_state
        student, teacher = partial(ask, ["default"]), partial(ask, [])
        return consistency_loss(student, teacher, base.schedule, data, text[1:], text[:1].expand_as(text[1:]))

    task = Job(
        trainable=trainable(unet),
        batch=data,
        loss=loss,
        export=lambda folder: save(unet, folder),
        optimizer=torch.optim.AdamW(trainable(unet).values(), 1e-4, weight_decay=0.0),
    )
    # In bf16, rounding is as large as the difference of two neighbours, and the student learns to leave noise.
    run(task, replace(settings, mixed_precision="no"), "student", settings.sizes.student_steps, batch, warmup=30)


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """The student's file, in fp16."""
    modules = {f"unet.{name}": adapter for name, adapter in adapter_weights(unet).items()}
    about = {"ss_sd_model_name": "pocket", "modelspec.usage_hint": "sampler lcm, 4 steps, guidance 1"}
    save_lora(modules, folder, "kohya", torch.float16, about)
