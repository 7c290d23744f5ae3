"""CUDA graphs of training steps, without a GPU, on a stand-in (fake_cuda.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, put_in, recorded
from tiny_adapters import random, shake, tiny_unet
from tiny_recipes import METHODS, draw_pictures, tiny, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_tools import needs_gpu

from minidiff.core.errors import SettingsError
from minidiff.core.inject import inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast.graphs import TrainingGraphs
from minidiff.trainer import task as common

Call = Callable[..., Tensor]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return put_in(monkeypatch)


def adapted(dropout: float = 0.0, dora: bool = False, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A frozen tiny U-Net with a LoRA that does something, as in training."""
    unet = tiny_unet().requires_grad_(False).to(dtype)
    inject(unet, 2, targets=("attention", "resnets"), dropout=dropout, dora=dora)
    shake(unet)
    return unet.train()


def question(seed: int, pictures: int = 2, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and texts, which get gradients."""
    t = torch.tensor([3.0, 900.0, 40.0])[:pictures]
    return random(pictures, 4, side, side, seed=seed), t, random(pictures, 7, 24, seed=seed + 50).requires_grad_()


def grads(unet: nn.Module, call: Call, *questions: tuple[Tensor, Tensor, Tensor], device: str = "cpu") -> list[Tensor]:
    """Answers, and the gradients of all texts and trained weights after all the questions' backward passes."""
    unet.zero_grad()
    answers = []
    for i, asked in enumerate(questions):
        torch.manual_seed(i)
        inputs = [x.detach().to(device).requires_grad_(x.requires_grad) for x in asked]
        answer = call(*inputs)
        (answer.float() * random(*answer.shape, seed=9 + i).to(device)).sum().backward()
        assert inputs[2].grad is not None
        answers += [answer.detach(), inputs[2].grad]
    return answers + [p.grad.clone() for p in unet.parameters() if p.grad is not None]


def same(unet: nn.Module, graph: TrainingGraphs, *questions: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Are replays for these questions the calls, and their gradients theirs, to the bit?"""
    plain, replayed = grads(unet, unet, *questions), grads(unet, lambda *x: graph.call(unet, *x), *questions)
    return len(plain) == len(replayed) > 3 and all(map(torch.equal, plain, replayed))


@pytest.mark.parametrize("kind", ["lora", "dora", "dropout", "full"])
def test_a_replayed_step_is_the_step(fake: FakeCuda, kind: str) -> None:
    unet = tiny_unet().train() if kind == "full" else adapted(0.3 * (kind == "dropout"), kind == "dora")
    graph = TrainingGraphs()
    assert all(same(unet, graph, question(seed)) for seed in range(3))
    assert recorded(fake) == 2  # there and back


def test_gradients_of_several_passes_add_up(fake: FakeCuda) -> None:
    """The second replay must not change what the first has left in p.grad."""
    unet, graph = adapted(), TrainingGraphs()
    assert same(unet, graph, question(0), question(1), question(2)) and recorded(fake) == 2


def test_weights_that_learn_are_read_anew(fake: FakeCuda) -> None:
    unet, graph = adapted(), TrainingGraphs()
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        assert same(unet, graph, question(seed))
        optimizer.step()
    assert recorded(fake) == 2


def test_other_shapes_and_other_trained_weights_are_other_recordings(fake: FakeCuda) -> None:
    unet, graph = adapted(), TrainingGraphs()
    for sizes in ({}, {"side": 6}, {"pictures": 1}, {}, {"side": 6}):
        assert same(unet, graph, question(1, **sizes))
    assert recorded(fake) == 6 and fake.pools == 1
    next(p for p in unet.parameters() if p.requires_grad).requires_grad_(False)
    assert same(unet, graph, question(1)) and recorded(fake) == 8 and fake.pools == 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_under_autocast(fake: FakeCuda, kind: str) -> None:
    """What it casts is cast inside the recording, each time anew: a cast that was kept would be of the weights before."""
    half, graph = torch.bfloat16, TrainingGraphs()
    unet = adapted(dtype=half) if kind == "lora" else tiny_unet().train()
    dtype = next(unet.parameters()).dtype

    def cast(call: Call, cache: bool) -> Call:
        def asked(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            with torch.autocast("cpu", half, cache_enabled=cache):
                return call(x.to(dtype), t, text.to(dtype))

        return asked

    for seed in range(2):
        plain = grads(unet, cast(unet, False), question(seed))  # with it, the text would be cast once for all layers
        replayed = grads(unet, cast(lambda *x: graph.call(unet, *x), True), question(seed))
        assert plain[0].dtype == half and all(map(torch.equal, plain, replayed))
        for p in unet.parameters():
            if p.requires_grad:
                p.data.mul_(1.5)
    assert recorded(fake) == 2
    if kind == "full":
        assert same(unet, graph, question(0)) and recorded(fake) == 4  # off: another recording


def test_the_way_back_is_outside_of_autocast(fake: FakeCuda) -> None:
    """As in the loop, where backward() comes behind the `with`; a Function's products would be rounded otherwise."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Any:
            (weight,) = ctx.saved_tensors
            return d.float() @ weight.mT, None

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.weight)

    layer, x, found = Layer(5, 5).requires_grad_(False), random(3, 5), []
    for call in (layer, lambda x: TrainingGraphs().call(layer, x)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            answer = call(leaf)
        answer.backward(random(3, 5, seed=1).bfloat16())
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1]) and recorded(fake) == 2


def test_what_cannot_be_replayed_is_called(fake: FakeCuda) -> None:
    unet, graph, seen = adapted(), TrainingGraphs(), []
    with torch.no_grad():
        assert torch.equal(graph.call(unet, *question(0)), unet(*question(0)))
    hook = unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    assert same(unet, graph, question(0)) and len(seen) == 2
    hook.remove()
    assert recorded(fake) == 0


def test_one_step_at_a_time(fake: FakeCuda) -> None:
    """A second pass before the first went back would compute in the first one's memory."""
    unet, graph = adapted(), TrainingGraphs()
    first, second = (graph.call(unet, *question(seed)) for seed in (0, 1))
    with pytest.raises(RuntimeError, match="go back before the next one begins"):
        first.sum().backward()
    second.sum().backward()


def test_its_leaves_are_its_own(fake: FakeCuda) -> None:
    """The weights' own may hang in a graph of autograd's that is still there, and on another stream: CUDA refuses that."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight)
            return super().forward(x)

    layer, graph, seen = Layer(3, 3), TrainingGraphs(), []
    weight = layer.weight
    answers = [graph.call(layer, random(2 + i, 3)) for i in range(2)]  # the first is there when the second is recorded
    assert recorded(fake) == 4 and len(seen) >= 8 and layer.weight is weight
    assert all(own is not weight and own.data_ptr() == weight.data_ptr() and own.is_leaf for own in seen)
    answers[1].sum().backward()
    assert weight.grad is not None and all(own.grad is None for own in seen)


def test_what_cannot_be_recorded_leaves_nothing_behind(fake: FakeCuda) -> None:
    """A recording that broke off takes the others along, and the next call begins anew."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == broken:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(x)

    layer, graph, broken = Layer(3, 3), TrainingGraphs(), 2
    graph.call(layer, random(1, 3)).sum().backward()
    first = list(graph.recordings.values())
    with pytest.raises(torch.OutOfMemoryError):
        graph.call(layer, random(2, 3))
    assert not graph.recordings and first[0].graphs == ()
    broken = 0
    assert torch.equal(graph.call(layer, random(2, 3)), layer(random(2, 3))) and fake.pools == 2


def test_all_that_is_recorded_lies_on_the_gpu() -> None:
    """A copy from the CPU cannot be recorded; numbers can. With meta for the GPU, whose tensors mix with no others."""

    class Mixed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            assert all(x.is_meta for x in tensors), f"{func} has {[str(x.device) for x in tensors]}"
            return result

    for dora in (False, True):
        unet, asked = adapted(dora=dora).to("meta"), [x.detach().to("meta") for x in question(0)]
        asked[2].requires_grad_()
        with Mixed():
            unet(*asked).sum().backward()
        assert asked[2].grad is not None


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in METHODS),
        ("lora", {"gradient_accumulation_steps": 2, "aspect_ratio_buckets": True, "validation_steps": 1}),
        ("lora", {"mixed_precision": "bf16"}),
        ("lora", {"lora_dropout": 0.2}),
        ("lora", {"use_ema": True}),
    ],
)
def test_a_recorded_run_is_the_run(
    tiny_folder: Path, tmp_path: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, Any]
) -> None:
    """Every recipe, and previews, validation and averaged weights in between: the same weights, to the bit."""
    monkeypatch.setattr(common, "check_graph", lambda wanted, device: None)
    monkeypatch.setattr("minidiff.trainer.run.loss_curve", lambda metrics, path: None)
    pictures, results = draw_pictures(tmp_path / "pictures"), []
    for on in (False, True):
        settings = tiny(method, tiny_folder, pictures, tmp_path / str(on), cuda_graph=on, **changes)
        assert recorded(fake) == 0
        results.append(train(settings).trainable)
    assert recorded(fake) >= 2
    plain, replayed = results
    assert plain.keys() == replayed.keys() and all(torch.equal(plain[name], replayed[name]) for name in plain)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {}, "--cuda_graph is for a GPU, and this would run on the CPU"),
        ("lora", {"gradient_checkpointing": True}, "--gradient_checkpointing cannot be joined with --cuda_graph"),
        ("lora", {"fit": "8GB"}, "--fit cannot be joined with --cuda_graph"),
        ("lora", {"optimizer_in_backward": True}, "--optimizer_in_backward cannot be joined with --cuda_graph"),
        ("full", {"aspect_ratio_buckets": True}, "--aspect_ratio_buckets cannot be joined with --cuda_graph here"),
    ],
)
def test_where_it_cannot_be(tiny_folder: Path, tmp_path: Path, method: str, changes: dict[str, Any], message: str) -> None:
    settings = tiny(method, tiny_folder, draw_pictures(tmp_path / "pictures"), tmp_path / "out", cuda_graph=True, **changes)
    with pytest.raises(SettingsError, match=message):
        train(settings)
    assert not (tmp_path / "out").exists()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("kind", ["lora", "dora", "dropout", "full"])
def test_gpu_a_replayed_step_is_the_step(kind: str) -> None:
    unet = tiny_unet().train() if kind == "full" else adapted(0.3 * (kind == "dropout"), kind == "dora")
    unet, graph = unet.to("cuda"), TrainingGraphs()
    for asked in ([question(0)], [question(1), question(2)], [question(3), question(4, side=6)]):
        plain = grads(unet, unet, *asked, device="cuda")
        replayed = grads(unet, lambda *x: graph.call(unet, *x), *asked, device="cuda")
        for a, b in zip(plain, replayed, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_gpu_a_recorded_run_is_the_run(tiny_folder: Path, tmp_path: Path, method: str, precision: str) -> None:
    pictures, results = draw_pictures(tmp_path / "pictures"), []
    for on in (False, True):
        folder, changes = tmp_path / str(on), {"mixed_precision": precision, "device": "cuda"}
        results.append(train(tiny(method, tiny_folder, pictures, folder, cuda_graph=on, **changes)).trainable)
    for name, plain in results[0].items():
        assert torch.equal(plain, results[1][name]), name  # which is why a resumed run may take the flag or leave it
