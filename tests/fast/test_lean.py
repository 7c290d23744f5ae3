"""Training that keeps little: the same numbers as the plain way, and how little, counted on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_adapters import EVERYWHERE, TEXT, random, shake, tiny_unet
from torch import Tensor, nn
from triton_tools import needs_gpu

from minidiff.core.config import SD15_UNET
from minidiff.core.inject import inject, trainable
from minidiff.core.lora import LoRALayer
from minidiff.core.train import Task
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast import lean
from minidiff.fast import lean_lora as lean_adapters
from minidiff.fast.frozen import Conv2d, standing_still
from minidiff.files.text_files import build_text_encoder
from minidiff.trainer import memory
from minidiff.trainer.metering import fullest_bytes, kept_bytes, ready_bytes, step_bytes
from minidiff.trainer.optimizers import adamw
from minidiff.trainer.settings import TrainSettings

MIB = 2**20
Grads = dict[str, Tensor]


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, everything is as it is for those who keep everything."""

    def switch() -> None:
        monkeypatch.setattr(lean, "saves", lambda *anything: False)
        monkeypatch.setattr(LoRALayer, "lean", lambda self: None)

    return switch


def double(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).double().requires_grad_()


def frozen(module: nn.Module) -> Any:
    """With numbers that are not those of a fresh norm, fp64."""
    for i, p in enumerate(module.parameters()):
        p.data = random(*p.shape, seed=20 + i)
    return module.double().requires_grad_(False)


# --- each function against its twin, and its gradient against differences --------------------------------------------------


def functions() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Name -> the lean way, its plain twin, and what they take."""
    group, layer = frozen(nn.GroupNorm(2, 4, eps=1e-5)), frozen(nn.LayerNorm(6))
    conv, stride = frozen(Conv2d(4, 3, 3, padding=1)), frozen(Conv2d(4, 3, 3, stride=2))
    image, tokens = double(2, 4, 5, 3), double(2, 3, 6)
    W, bias = random(5, 6, seed=3).double(), random(5, seed=4).double()
    A, B, g = double(2, 6, seed=5), double(5, 2, seed=6), double(5, seed=7)
    y, thin = double(2, 3, 5, seed=8), double(2, 3, 2, seed=9)
    how, A_conv = ((2, 1), (1, 0), (1, 2), 1), double(2, 4, 3, 2, seed=10)

    def dora_eq5(y: Tensor, thin: Tensor, B: Tensor, g: Tensor) -> Tensor:
        return y + 0.7 * ((g - 1) * (y - bias) + g * 1.5 * (thin @ B.mT))

    return {
        "GroupNorm and SiLU": (lambda x: lean.norm_silu(group, x), lambda x: F.silu(group(x)), (image,)),
        "GroupNorm": (lambda x: lean.group_norm(group, x), group, (image,)),
        "LayerNorm": (lambda x: lean.layer_norm(layer, x), layer, (tokens,)),
        "GEGLU": (lean.geglu, lambda x: x[..., :3] * F.gelu(x[..., 3:]), (tokens,)),
        "join": (
            lambda x, skip: lean.join(x, skip, group),
            lambda x, skip: torch.cat([x, skip], dim=1),
            (image, double(2, 3, 5, 3)),
        ),
        "convolution": (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1), (image,)),
        "strided convolution": (stride, lambda x: F.conv2d(x, stride.weight, stride.bias, 2), (image,)),
        "LoRA linear": (
            lambda x, A, B: lean_adapters.lora_linear(x, W, bias, A, B, 1.5),
            lambda x, A, B: F.linear(x, W, bias) + 1.5 * x @ A.mT @ B.mT,
            (tokens, A, B),
        ),
        "A of a linear": (lean_adapters.down, F.linear, (tokens, A)),
        "A of a convolution": (
            lambda x, A: lean_adapters.down(x, A, how),
            lambda x, A: F.conv2d(x, A, None, *how),
            (image, A_conv),
        ),
        "DoRA": (lambda *xs: lean_adapters.dora(*xs, bias, 1.5, 0.7), dora_eq5, (y, thin, B, g)),
    }


@pytest.mark.parametrize("name", functions())
def test_gradcheck(name: str) -> None:
    mine, _, inputs = functions()[name]
    assert type(mine(*inputs).grad_fn).__name__.startswith(("Lean", "Frozen"))
    assert torch.autograd.gradcheck(mine, inputs)


@pytest.mark.parametrize("name", functions())
def test_each_equals_its_plain_twin(name: str) -> None:
    mine, plain, inputs = functions()[name]
    direction = torch.randn_like(plain(*inputs))
    torch.testing.assert_close(mine(*inputs), plain(*inputs))
    pairs = zip(*(torch.autograd.grad(f(*inputs), inputs, direction) for f in (mine, plain)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_channels_last(device: str, silu: bool) -> None:
    """A GPU's kernel does not take that order: there the tensor is turned first."""
    norm = frozen(nn.GroupNorm(2, 4, eps=1e-5)).float().to(device)
    x, direction = (random(2, 4, 5, 3, seed=seed).to(device, memory_format=torch.channels_last) for seed in (0, 1))
    x.requires_grad_()
    mine, plain = (lean.norm_silu(norm, x), F.silu(norm(x))) if silu else (lean.group_norm(norm, x), norm(x))
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (mine, plain)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_are_computed_in_fp32(dtype: torch.dtype) -> None:
    norm = frozen(nn.GroupNorm(2, 4)).to(dtype)
    x = (100 + random(2, 4, 5, 3)).to(dtype).requires_grad_()
    y = lean.norm_silu(norm, x)
    wide = x.detach().float().requires_grad_()
    exact = F.silu(F.group_norm(wide, 2, norm.weight.float(), norm.bias.float(), norm.eps))
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    y.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("why", ["no gradients", "x needs none", "the weights are trained"])
def test_the_plain_way_where_nothing_is_saved(why: str) -> None:
    norm, x = nn.GroupNorm(2, 4).requires_grad_(why == "the weights are trained"), random(2, 4, 5, 3)
    x.requires_grad_(why != "x needs none")
    with torch.set_grad_enabled(why != "no gradients"):
        y = lean.norm_silu(norm, x)
    assert "Lean" not in type(y.grad_fn).__name__ and torch.equal(y, F.silu(norm(x)))


# --- the tiny U-Net, whole ---------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoCon": {"targets": EVERYWHERE},
    "DoRA": {"targets": EVERYWHERE, "dora": True},
    "dropout": {"targets": EVERYWHERE, "dropout": 0.3},
}
with_none = pytest.mark.parametrize("kind", [*ADAPTERS, "none"])  # as in textual inversion: gradients of the text alone


def tuned(kind: str) -> UNet2DConditionModel:
    unet = tiny_unet()
    if kind == "none":
        return unet.requires_grad_(False)
    inject(unet, 2, alpha=3, **ADAPTERS[kind])
    shake(unet)
    return unet.train()


def gradients(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> Grads:
    """The output, and every gradient: of the latents and the text as well, where a text encoder would be trained."""
    unet.zero_grad()
    torch.manual_seed(5)  # for dropout
    x, text = (t.to(dtype).requires_grad_() for t in (random(2, 4, 8, 8, seed=1), random(2, 7, 24, seed=2)))
    y = unet(x, torch.tensor([3, 900]), text)
    (y * random(*y.shape, seed=9)).sum().backward()
    return {"output": y.detach(), "x": x.grad, "text": text.grad} | {n: p.grad.clone() for n, p in trainable(unet).items()}


def apart(ours: Grads, theirs: Grads) -> float:
    """How far all tensors together are from each other, relative to their size."""
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([t.flatten() for t in grads.values()]) for grads in (ours, theirs))
    return float((a - b).norm() / b.norm())


@with_none
def test_outputs_and_gradients_are_those_of_the_plain_way(kind: str, plainly: Callable[[], None]) -> None:
    """In fp64 to 1e-13, but for DoRA's norms, which are fp32. In fp32 each way is 1e-6 from that, and so is the other's."""
    single, double = tuned(kind), tuned(kind).double()
    ours, ours64 = gradients(single), gradients(double, torch.float64)
    plainly()
    theirs, theirs64 = gradients(single), gradients(double, torch.float64)
    assert apart(ours64, theirs64) < (1e-6 if kind == "DoRA" else 1e-13)
    assert apart({"y": ours["output"]}, {"y": theirs["output"]}) < 1e-6 and apart(ours, theirs) < 2e-6
    assert apart({n: t.double() for n, t in ours.items()}, theirs64) < 2e-6


@with_none
def test_checkpointing_changes_no_bit(kind: str) -> None:
    unet = tuned(kind)
    kept = gradients(unet)
    unet.enable_gradient_checkpointing()
    made_again = gradients(unet)
    assert kept.keys() == made_again.keys() and all(torch.equal(kept[name], made_again[name]) for name in kept)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_five_steps_are_those_of_the_plain_way(kind: str, plainly: Callable[[], None]) -> None:
    def train() -> Grads:
        unet = tuned(kind)
        optimizer = torch.optim.AdamW(trainable(unet).values(), lr=1e-3, eps=1e-5)
        for step in range(5):
            torch.manual_seed(step)
            x, noise = random(2, 4, 8, 8, seed=step), random(2, 4, 8, 8, seed=100 + step)
            (unet(x, torch.tensor([3, 900]), random(2, 7, 24, seed=2)) - noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in trainable(unet).items()}

    ours = train()
    plainly()
    for name, theirs in train().items():
        torch.testing.assert_close(ours[name], theirs, atol=1e-6, rtol=0)


def test_nothing_made_again_outlives_the_backward() -> None:
    norm = frozen(nn.LayerNorm(6))
    y = lean.layer_norm(norm, double(2, 3, 6))
    node = y.grad_fn
    lean_adapters.down(y, double(2, 6)).sum().backward()
    assert node.kept is None and node.output is None


# --- how little, at SD 1.5's size ----------------------------------------------------------------------------------------


def sd15(**how: Any) -> tuple[UNet2DConditionModel, Tensor, Tensor, Tensor]:
    """The U-Net in fp16 with a LoRA of rank 8, and one sample of 512 x 512 pixels. On meta: shapes without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET).to(torch.float16)
        inject(unet, 8, **how)
        half = {"dtype": torch.float16}
        return unet.train(), torch.empty(1, 4, 64, 64, **half), torch.empty(1), torch.empty(1, 77, 768, **half)


def kept(unet: UNet2DConditionModel, *inputs: Tensor) -> float:
    return kept_bytes(lambda: unet(*inputs), unet.parameters()) / MIB


def test_kept_bytes_of_a_lora_step(plainly: Callable[[], None]) -> None:
    unet, *inputs = sd15()
    assert 400 < kept(unet, *inputs) < 456
    plainly()
    assert kept(unet, *inputs) > 990


def test_kept_bytes_with_checkpointing() -> None:
    unet, *inputs = sd15()
    unet.enable_gradient_checkpointing()
    assert 30 < kept(unet, *inputs) < 37


@pytest.mark.slow
@pytest.mark.parametrize("how, most", [({"targets": EVERYWHERE}, 498), ({"dora": True}, 593)])
def test_kept_bytes_of_other_adapters(how: dict[str, Any], most: float) -> None:
    unet, *inputs = sd15(**how)
    assert kept(unet, *inputs) < most


def test_kept_bytes_counts() -> None:
    """By hand: SiLU keeps its input; the second keeps the first's output; a weight is no activation."""
    x, linear = torch.empty(3, 5, requires_grad=True), nn.Linear(5, 5)
    assert kept_bytes(lambda: F.silu(F.silu(x)), []) == 2 * 15 * 4
    assert kept_bytes(lambda: linear(x), linear.parameters()) == 15 * 4
    linear.requires_grad_(False)
    assert kept_bytes(lambda: linear(x), linear.parameters()) == 0


# --- what a person is told -----------------------------------------------------------------------------------------------


def a_task(**batch: Tensor) -> Task:
    unet = tuned("LoRA")
    text_encoder = build_text_encoder({**TEXT, "hidden_size": 24, "bos_token_id": 38, "eos_token_id": 39}, "tiny")
    text_encoder.requires_grad_(False)
    given = {"latents": random(2, 4, 8, 8), "t": torch.tensor([3, 900]), "text": random(2, 7, 24), **batch}
    networks = {"unet": unet, "text_encoder": text_encoder}
    return Task(trainable(unet), lambda step, micro: given, loss=None, export=None, modules=networks)  # type: ignore[arg-type]


def test_the_table_before_a_run() -> None:
    task = a_task()
    unet = task.modules["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    need = memory.budget(task, TrainSettings())
    weights = sum(p.numel() for m in task.modules.values() for p in m.parameters())
    buffers = sum(b.numel() * b.element_size() for m in task.modules.values() for b in m.buffers())
    trained = 4 * sum(p.numel() for p in task.trainable.values())
    batch = task.batch(0, 0)
    activations = kept_bytes(lambda: unet(batch["latents"], batch["t"], batch["text"]), unet.parameters())
    assert step_bytes(task, TrainSettings()).kept == activations  # on meta as in memory
    held = {name: size for name, size, _ in need.held}
    assert held.pop("in order") > 0
    assert held == {"weights": 4 * weights + buffers, "optimizer": 2 * trained}
    moments = {name: size for name, size, _ in need.moments}
    assert moments["update"] == trained and moments["forward, backward"] > activations
    assert need.together == sum(size for _, size, _ in need.held) + max(moments.values()) + need.allowance[1]
    assert f"{need.together / MIB:,.1f} MiB" in str(need).splitlines()[-1]
    assert f"gradients {trained / MIB:,.1f}; kept for backward {activations / MIB:,.1f}" in str(need)
    assert all(p.device.type == "cpu" for p in unet.parameters())


@pytest.mark.parametrize(
    "changes, row",
    [
        ({"use_8bit_adam": True}, "optimizer"),
        ({"bf16_weights": True, "mixed_precision": "bf16"}, "weights"),
        ({"use_ema": True}, "averaged weights"),
    ],
)
def test_what_the_savings_say(changes: dict[str, Any], row: str) -> None:
    """A saving makes its row smaller; an average makes one."""
    task = a_task()
    task.modules["unet"].requires_grad_(True)
    task.trainable.update(trainable(task.modules["unet"]))  # large enough for 8 bits
    before, after = (
        {name: size for name, size, _ in [*need.held, *need.moments]}
        for need in (memory.budget(task, TrainSettings()), memory.budget(task, TrainSettings(**changes)))
    )
    assert (row not in before) if row == "averaged weights" else (0 < after[row] < before[row])


def test_the_fullest_moment_counts() -> None:
    """By hand: two tensors of 60 bytes live at once, a third comes when the first is gone; a view and a weight are none."""
    weight = torch.empty(3, 5, device="meta")

    def work() -> None:
        x = weight + 1
        x = (x + 1).view(15)
        x = x * 2

    assert fullest_bytes(work, [weight]) == 120
    assert fullest_bytes(lambda: weight.view(15), [weight]) == 0


def test_what_a_cpu_makes_of_frozen_weights_is_counted() -> None:
    """Against what is there after a step: the copies that convolutions hold, of both ways through them."""
    task = a_task()
    unet, batch = task.modules["unet"], task.batch(0, 0)
    with standing_still([unet], large=False):
        unet(batch["latents"], batch["t"], batch["text"]).square().mean().backward()
        made = [t for m in unet.modules() if isinstance(m, Conv2d) and m.ready for part in m.ready for t in part.values()]
        there = sum(t.numel() * t.element_size() for _, t in made)
    counted = ready_bytes(step_bytes(task, TrainSettings()).convolutions, drawing=False)
    assert 0.8 * there < counted < 1.25 * there
    unet.requires_grad_(True)
    assert ready_bytes(step_bytes(task, TrainSettings()).convolutions, drawing=False) == 0


def test_gradients_that_wait_and_that_do_not() -> None:
    """Full fine-tuning: in the backward pass each goes at once; accumulation has all those of the passes before."""
    task = a_task()
    task.modules["unet"].requires_grad_(True)
    gradients = sum(p.nbytes for p in task.modules["unet"].parameters())
    plain, early, gathered = (
        step_bytes(task, TrainSettings(**changes)).fullest
        for changes in ({}, {"optimizer_in_backward": True}, {"gradient_accumulation_steps": 2})  # type: ignore[arg-type]
    )
    assert gradients < plain <= gathered == early + gradients and early < plain


def test_autocast_keeps_copies_of_weights() -> None:
    """In bf16 activations are half as large, but what is trained in fp32 is there in bf16 too."""
    task = a_task()
    task.modules["unet"].requires_grad_(True)
    copies = sum(p.nbytes for name, p in task.modules["unet"].named_parameters() if name.endswith("weight")) / 2
    fp32 = step_bytes(task, TrainSettings()).kept
    assert step_bytes(task, TrainSettings(mixed_precision="bf16")).kept > fp32 / 2 + copies / 2
    unrounded = step_bytes(task, TrainSettings(mixed_precision="bf16")).fullest
    assert step_bytes(task, TrainSettings(mixed_precision="bf16", bf16_weights=True)).fullest < unrounded - copies


def test_the_optimizers_bytes_are_those_it_has() -> None:
    for eight_bit in (False, True):
        settings = TrainSettings(use_8bit_adam=eight_bit, optimizer_in_backward=True)
        parameters = [nn.Parameter(torch.zeros(n)) for n in (300, 4096, 5000)]
        optimizer = adamw(parameters, settings)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        there = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
        assert memory.optimizer_bytes([p.numel() for p in parameters], settings) == there


def test_the_table_knows_a_text_encoder_in_training() -> None:
    ids = torch.randint(0, 38, (2, 7), generator=torch.Generator().manual_seed(0))
    task = a_task(ids=ids)
    frozen_encoder = step_bytes(task, TrainSettings()).kept
    task.modules["text_encoder"].requires_grad_(True)
    assert step_bytes(task, TrainSettings()).kept > frozen_encoder


def test_full_fine_tuning_keeps_no_more_than_before(plainly: Callable[[], None]) -> None:
    unet, x, text = tiny_unet(), random(2, 4, 8, 8), random(2, 7, 24)

    def size() -> int:
        return kept_bytes(lambda: unet(x, torch.tensor([3, 900]), text), unet.parameters())

    ours = size()
    plainly()
    assert ours <= size()
