"""`--compile`: the same numbers, names and adapters. On a CPU, by back ends that need no C++ compiler."""

from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from tiny_recipes import draw_pictures, tiny, train
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.fast import compiled
from minidiff.fast.compiled import CompiledUNet, compile_unet
from minidiff.files.lora_file import attach


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def loaded(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: StableDiffusionPipeline) -> Tensor:
    latents: Tensor = pipe("a red dog", seed=0, num_inference_steps=4, sampler="dpm++_2m", output_type="latent").images
    return latents


@pytest.mark.slow
def test_drawing(tiny_folder: Path) -> None:
    plain, pipe = loaded(tiny_folder), loaded(tiny_folder)
    compile_unet(pipe.unet)
    assert isinstance(pipe.unet, CompiledUNet) and pipe.unet._compiled_call_impl is not None
    assert list(pipe.unet.state_dict()) == list(plain.unet.state_dict())
    assert torch.allclose(drawn(pipe), drawn(plain), atol=1e-5)
    base, adapter = drawn(plain), random_adapter({"unet": loaded(tiny_folder).unet}, 0)
    for p in (plain, pipe):  # an adapter that is put on later is seen, and so is its strength
        attach(p.adaptable, adapter, "random")
    assert torch.allclose(drawn(pipe), drawn(plain), atol=1e-5)
    for p in (plain, pipe):
        p.set_adapters("random", [0.3])
    assert torch.allclose(drawn(pipe), drawn(plain), atol=1e-5)
    for p in (plain, pipe):
        p.unload_lora_weights()
    assert torch.allclose(drawn(pipe), base, atol=1e-5)


@pytest.mark.slow
def test_training(tiny_folder: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    runs = {on: tiny("lora", tiny_folder, pictures, tmp_path / str(on), compile=on) for on in (False, True)}
    tasks = {on: train(settings) for on, settings in runs.items()}
    assert isinstance(tasks[True].modules["unet"], CompiledUNet)
    for name, p in tasks[False].trainable.items():
        assert torch.allclose(tasks[True].trainable[name], p, atol=1e-5), name


def test_without_a_compiler(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingsError, match="--compile needs a C\\+\\+ compiler"):
        compile_unet(loaded(tiny_folder).unet)
