"""Layerwise casting: half-precision weights that each layer widens for itself. Half the memory, and the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from living import fullest_bytes
from resume_harness import Case, fingerprint, memory_path, rows  # noqa: F401
from tiny_adapters import random
from tiny_recipes import draw_pictures, tiny
from torch import Tensor, nn

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.fast.conv import HALF
from minidiff.fast.frozen import FastConv2d, FastLinear, cast_layerwise
from minidiff.trainer import memory
from minidiff.trainer.memory import chosen
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit
from minidiff.trainer.task import Job


@pytest.fixture(scope="module")
def half_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as most people have theirs: a download in fp16."""
    folder = tmp_path_factory.mktemp("half")
    StableDiffusionPipeline.from_pretrained(tiny_folder).save_pretrained(folder, torch.float16)
    return folder


@pytest.fixture
def home(memory_path: Path) -> Path:  # noqa: F811
    draw_pictures(memory_path / "pictures")
    return memory_path


LAYERS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "linear": (FastLinear, {"in_features": 6, "out_features": 5}, (2, 3, 6)),
    "linear without bias": (FastLinear, {"in_features": 6, "out_features": 5, "bias": False}, (2, 3, 6)),
    "direct": (FastConv2d, {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "padding": 1}, (2, 4, 8, 6)),
    "in strides": (FastConv2d, {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2}, (2, 4, 9, 9)),
    "of one cell": (FastConv2d, {"in_channels": 4, "out_channels": 3, "kernel_size": 1}, (2, 4, 8, 6)),
    "winograd": (FastConv2d, {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1}, (1, 64, 32, 32)),
    "product": (FastConv2d, {"in_channels": 352, "out_channels": 352, "kernel_size": 3, "padding": 1}, (1, 352, 4, 4)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_widens_its_weight_there_and_back(name: str, dtype: torch.dtype) -> None:
    """Equal to the bit to a layer whose weight was widened when it was loaded; the weight itself stays as it is."""
    kind, how, shape = LAYERS[name]
    layer, twin = (kind(**how).requires_grad_(False) for _ in range(2))
    for i, p in enumerate(layer.parameters()):
        p.data = random(*p.shape, seed=i).to(dtype)
    twin.load_state_dict(layer.state_dict())
    cast_layerwise(layer, torch.float32)
    assert layer.weight.dtype == dtype and twin.weight.dtype == torch.float32
    assert layer.bias is None or layer.bias.dtype == torch.float32

    def there_and_back(module: nn.Module, grad: bool) -> list[Tensor]:
        x = random(*shape, seed=9).requires_grad_(grad)
        y = module(x)
        return [y, *torch.autograd.grad(y.sin().sum(), x)] if grad else [y]

    for grad in (False, True):
        ours, theirs = there_and_back(layer, grad), there_and_back(twin, grad)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(ours, theirs, strict=True))
    assert layer.weight.dtype == dtype and torch.equal(layer.weight.float(), twin.weight)


def test_nothing_widened_is_kept_for_the_backward() -> None:
    """On meta: eight layers of 4 MiB each (2 in fp16) never have more than one of them wide at a time."""
    with torch.device("meta"):
        model = nn.Sequential(*(FastLinear(1024, 1024, bias=False) for _ in range(8))).half().requires_grad_(False)
        x = torch.empty(1, 1024, requires_grad=True)
    cast_layerwise(model, torch.float32)
    fullest = fullest_bytes(lambda: model(x).sum().backward(), [*model.parameters(), x])
    assert 4 * 2**20 < fullest < 5 * 2**20


def run(settings: Any, folder: Path) -> Job:
    settings = replace(settings, output_dir=str(folder))
    task = RECIPES[type(settings)](settings)
    fit(task, settings)
    return task


def layer_dtypes(task: Job) -> set[torch.dtype]:
    """Of the weights of the U-Net's own convolutions and linears."""
    return {m.weight.dtype for m in task.modules["unet"].modules() if isinstance(m, (FastConv2d, FastLinear))}


@pytest.mark.parametrize("method", ["lora", "dora", "textual inversion", "pivotal"])
def test_a_run_gives_the_same_bytes(method: str, half_folder: Path, home: Path) -> None:
    """Weights, optimizer and losses; LoRA's sheets, too."""
    sheets = {"validation_steps": 2 if method == "lora" else 0}
    settings = tiny(method, half_folder, home / "pictures", home, max_train_steps=2, **sheets)
    plain = run(settings, home / "plain" / "run")
    cast = run(replace(settings, layerwise_casting=True), home / "cast" / "run")
    assert layer_dtypes(plain) == {torch.float32} and layer_dtypes(cast) == {torch.float16}
    others = [p for name, p in cast.modules["unet"].named_parameters() if p.dtype != torch.float16]
    assert {p.dtype for p in others} == {torch.float32} and others
    assert fingerprint(home / "cast" / "run") == fingerprint(home / "plain" / "run")
    assert rows(home / "cast" / "run") == rows(home / "plain" / "run")


def test_what_was_begun_the_one_way_goes_on_the_other(half_folder: Path, home: Path) -> None:
    settings = tiny("lora", half_folder, home / "pictures", home, checkpointing_steps=1, max_train_steps=2)
    case = Case(lambda s: RECIPES[type(s)](s), settings)
    case.run(home / "straight" / "run")
    case.broken_run(home / "broken" / "run", 1)
    case.changed(layerwise_casting=True).run(home / "broken" / "run")
    assert fingerprint(home / "broken" / "run") == fingerprint(home / "straight" / "run")


def test_fit_leaves_weights_as_stored_only_where_it_must(half_folder: Path, home: Path) -> None:
    settings = tiny("lora", half_folder, home / "pictures", home / "run", fit="100TB")
    task = RECIPES[type(settings)](settings)
    assert layer_dtypes(task) == {torch.float16}  # until it is settled
    wide, narrow = (memory.budget(task, replace(settings, layerwise_casting=on)) for on in (False, True))
    layers = [m.weight for m in task.modules["unet"].modules() if isinstance(m, (FastConv2d, FastLinear))]
    saved = sum(2 * w.numel() for w in layers)
    assert wide.held["unet"] - narrow.held["unet"] == saved and narrow.together < wide.together
    tight = replace(settings, fit=f"{(wide.together - 1000) / 1000:.3f}KB")
    now, need, note = chosen(task, tight)
    assert now.layerwise_casting and need.together == narrow.together and layer_dtypes(task) == {torch.float16}
    assert "--layerwise_casting: about a tenth more time, the same result" in note
    now, need, _ = chosen(task, settings)
    assert not now.layerwise_casting and need.together == wide.together and layer_dtypes(task) == {torch.float32}
    assert memory.budget(task, now).together == wide.together  # in numbers as in memory


def test_a_file_in_fp32_has_nothing_to_leave(tiny_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny("lora", tiny_folder, home / "pictures", home / "run", layerwise_casting=True)
    task = run(settings, home / "run")
    assert layer_dtypes(task) == {torch.float32}
    assert "Note: --layerwise_casting changes nothing: the U-Net's file is not in half precision." in capsys.readouterr().err
    settings = replace(settings, fit="100TB", layerwise_casting=False, output_dir=str(home / "other"))
    assert "layerwise_casting" not in memory.possible(RECIPES[type(settings)](settings), settings)


def test_where_it_does_not_go(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="--layerwise_casting needs --mixed_precision no"):
        tiny("lora", home, home, home / "run", layerwise_casting=True, mixed_precision="bf16").check()
    flags = ["--instance_data_dir", "x", "--instance_prompt", "y", "--layerwise_casting"]
    with pytest.raises(SystemExit) as leave:
        main(["train", "full", *flags])
    assert leave.value.code == 2 and "--layerwise_casting" in capsys.readouterr().err
