"""CUDA graphs without a GPU, on a stand-in (fake_cuda.py)."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, put_in, recorded
from random_adapters import random_adapter
from torch import Tensor, nn
from triton_tools import needs_gpu

from minidiff.core import inject
from minidiff.core.errors import MinidiffError
from minidiff.core.lora import LoRAWeights
from minidiff.core.transformer import reading_once
from minidiff.draw import pipeline
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.fast import graphs
from minidiff.fast.graphs import WARM_UP, Graphs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return put_in(monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(seed: int, pictures: int = 2, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and texts for TINY_UNET."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(pictures, 77, 24, generator=random)
    return torch.randn(pictures, 4, side, side, generator=random), 999 * torch.rand(pictures, generator=random), text


def adapter(unet: nn.Module, seed: int) -> dict[str, LoRAWeights]:
    """Module name -> its change; the U-Net has none on afterwards."""
    found = random_adapter({"unet": unet}, seed)
    return {name.removeprefix("unet."): weights for name, weights in found.items()}


def same(unet: nn.Module, graph: Graphs, seed: int, **sizes: int) -> bool:
    """Is the replay for these inputs the call, to the bit?"""
    return torch.equal(graph.call(unet, *inputs(seed, **sizes)), unet(*inputs(seed, **sizes)))


# --- recording and replaying -----------------------------------------------------------------------------------------


def test_a_replay_is_the_call(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    graph = Graphs()
    assert all(same(pipe.unet, graph, seed) for seed in range(3))
    assert recorded(fake) == 1


def test_it_is_warmed_up_aside(fake: FakeCuda) -> None:
    """Three calls on another stream, after all that came before and before all that comes after; then the recording."""
    calls = []

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(fake.events))
            return 2 * x

    assert Graphs().call(Layer(), torch.ones(3)).tolist() == [2, 2, 2]
    expected = ["aside waits for main", "on aside", "on main", "main waits for aside", "recorded in pool 1 on aside"]
    assert fake.events == expected
    assert calls == [2] * WARM_UP + [4]


def test_inputs_are_copied_and_answers_are_the_callers_own(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    graph, given, before = Graphs(), inputs(0), inputs(0)
    first = graph.call(pipe.unet, *given)
    second = graph.call(pipe.unet, *inputs(1))
    assert torch.equal(first, pipe.unet(*before)) and not torch.equal(first, second)
    assert all(map(torch.equal, given, before))
    given[0].zero_()  # the caller's own, too
    assert same(pipe.unet, graph, 2)
    first.fill_(7.0)
    assert same(pipe.unet, graph, 1) and recorded(fake) == 1


def test_another_shape_or_dtype_is_another_recording(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    graph = Graphs()
    for sizes in ({}, {"pictures": 1}, {"side": 6}, {}, {"pictures": 1}):
        assert same(pipe.unet, graph, 0, **sizes)
    assert recorded(fake) == len(graph.recordings) == 3
    x, t, text = inputs(0)
    assert torch.equal(graph.call(pipe.unet, x, t.long(), text), pipe.unet(x, t.long(), text))
    assert recorded(fake) == 4 and fake.pools == 1


def test_adapters_are_recorded_anew(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    """In, at another strength, merged, unmerged, another scale, a second one, out: each time what the U-Net itself says."""
    unet, graph = pipe.unet, Graphs()
    dog, style = adapter(unet, seed=1), adapter(unet, seed=2)

    def scaled() -> None:
        for layer in inject.lora_layers(unet).values():
            layer.scale["dog"] *= 3

    changes = [
        lambda: None,
        lambda: inject.attach(unet, dog, "dog"),
        lambda: inject.set_adapters(unet, ["dog"], [0.5]),
        lambda: inject.merge(unet),
        lambda: inject.unmerge(unet),
        scaled,
        lambda: inject.attach(unet, style, "style"),
        lambda: inject.set_adapters(unet, ["style"]),
        lambda: inject.eject(unet),
    ]
    answers = []
    for count, change in enumerate(changes, 1):
        change()
        assert same(unet, graph, 0) and same(unet, graph, 1), count
        assert recorded(fake) == count and len(graph.recordings) == 1
        answers.append(graph.call(unet, *inputs(0)))
    distinct = {tuple(answer.flatten()[:20].tolist()) for answer in answers}
    assert len(distinct) == 7  # unmerged is at strength 0.5 again, and ejected is the base
    assert fake.events.count("all is done") == len(changes) - 1  # nothing is forgotten while it runs


def test_weights_that_moved_are_recorded_anew(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    unet, graph = pipe.unet, Graphs()
    assert same(unet, graph, 0)
    unet.conv_in.weight.data = 2 * unet.conv_in.weight.data
    assert same(unet, graph, 0) and recorded(fake) == 2
    unet.conv_in.weight.data.mul_(2)  # in place: a replay reads what is there now
    assert same(unet, graph, 0) and recorded(fake) == 2
    unet.train()
    assert same(unet, graph, 0) and recorded(fake) == 3
    unet.double()
    x, t, text = inputs(0)
    assert torch.equal(graph.call(unet, x.double(), t, text.double()), unet(x.double(), t, text.double()))
    assert recorded(fake) == 4


def test_what_python_looks_at_is_called(pipe: StableDiffusionPipeline, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks, gradients, a remembered prompt, autocast: recorded never."""
    unet, graph, seen = pipe.unet, Graphs(), []
    hook = unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    assert same(unet, graph, 0) and len(seen) == 2
    hook.remove()
    with torch.enable_grad():
        unet.requires_grad_()
        assert graph.call(unet, *inputs(0)).requires_grad
    with reading_once(unet):
        assert same(unet, graph, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert same(unet, graph, 0)
    assert recorded(fake) == 0
    assert same(unet, graph, 0) and recorded(fake) == 1


def test_a_cpu_is_called(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "cuda", None)
    graph = Graphs()
    assert same(pipe.unet, graph, 0) and not graph.recordings


def test_nothing_may_wait_for_the_gpu(fake: FakeCuda) -> None:
    """The stand-in's own test."""

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.isfinite().all() else x

    with pytest.raises(AssertionError, match="not permitted"):
        Graphs().call(Layer(), torch.ones(3))


# --- the pipeline ----------------------------------------------------------------------------------------------------


def latents(pipe: StableDiffusionPipeline, on: bool, prompt: str = "a photo of a red dog", **settings: Any) -> Tensor:
    pipe.set_cuda_graph(on)
    settings = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"} | settings
    return pipe(prompt, **settings).images


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 1),
        ({"guidance_scale": 1.0, "sampler": "euler_a"}, 1),
        ({"sampler": "heun", "num_images_per_prompt": 2}, 1),
        ({"prompt": "a photo of a red dog on the beach " * 20}, 1),  # three chunks
    ],
)
def test_pictures_are_the_same(pipe: StableDiffusionPipeline, fake: FakeCuda, settings: dict[str, Any], count: int) -> None:
    assert torch.equal(latents(pipe, True, **settings), latents(pipe, False, **settings))
    assert recorded(fake) == count


def test_strengths_in_prompts_and_tiles(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    """One pipeline, its recordings kept between pictures."""
    inject.attach(pipe.unet, adapter(pipe.unet, seed=1), "dog")
    asked: list[dict[str, Any]] = [
        {"prompt": "a dog <lora:dog:0.2>"},
        {"prompt": "a dog <lora:dog:0.9>"},
        {"prompt": "a cat <lora:dog:0.9>"},
        {"width": 48, "height": 32},
    ]
    plain = [latents(pipe, False, **settings) for settings in asked]
    graphed = [latents(pipe, True, **settings) for settings in asked]
    assert all(map(torch.equal, plain, graphed)) and not torch.equal(plain[0], plain[1])
    assert recorded(fake) == 3  # 0.2; 0.9; 1 again, for a wider picture
    pipe.set_tile_size(16)
    wide = {"width": 48, "height": 32}
    tiles = latents(pipe, True, **wide)
    assert recorded(fake) == 4 and torch.equal(tiles, latents(pipe, False, **wide))


def test_a_callback_that_changes_strengths(
    pipe: StableDiffusionPipeline, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Without graphs, the keys and values of the prompt would stay those of the first strength.)"""
    monkeypatch.setattr(pipeline, "reading_once", lambda model: nullcontext())
    inject.attach(pipe.unet, adapter(pipe.unet, seed=1), "dog")

    def fade(step: Any) -> None:
        pipe.set_adapters("dog", [1 / (2 + step.index)])

    drawn = []
    for on in (True, False):
        pipe.set_adapters("dog")
        drawn.append(latents(pipe, on, callback=fade))
    assert torch.equal(*drawn)


def test_nan_is_found_where_it_is_made(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    """What looks for NaN is outside of the recording, and finds its way in with hooks."""
    pipe.unet.down_blocks[1].resnets[0].conv1.weight.data.fill_(float("inf"))
    messages = []
    for on in (True, False):
        with pytest.raises(MinidiffError) as error:
            latents(pipe, on)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "unet.down_blocks.1.resnets.0.conv1" in messages[0]
    assert recorded(fake) == 1


def test_off_is_off(pipe: StableDiffusionPipeline, fake: FakeCuda) -> None:
    latents(pipe, True)
    kept = pipe.graphs
    pipe.set_cuda_graph(True)
    assert pipe.graphs is kept and kept is not None and kept.recordings
    latents(pipe, False)
    assert pipe.graphs is None and recorded(fake) == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
def test_gpu_pictures_are_the_same(pipe: StableDiffusionPipeline) -> None:
    """The same kernels in the same order: the same bits. And through everything that is recorded anew."""
    pipe.to("cuda")
    inject.attach(pipe.unet, adapter(pipe.unet, seed=1), "dog")
    for strength in (1.0, 0.3):
        for settings in ({}, {"width": 48, "height": 32}, {"guidance_scale": 1.0}, {}):
            pipe.set_adapters("dog", [strength])
            assert torch.equal(latents(pipe, True, **settings), latents(pipe, True, **settings))
            graphed = latents(pipe, True, **settings)
            assert len(pipe.graphs.recordings) >= 1
            assert torch.allclose(graphed, latents(pipe, False, **settings), rtol=1e-5, atol=1e-5)
