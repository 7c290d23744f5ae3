"""--cache_dir: what was encoded once is not encoded again, and is the same to the bit; and what leaves the memory then."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_harness import fingerprint, memory_path, rows  # noqa: F401
from test_latents import encode, noisy
from tiny_recipes import draw_pictures, tiny, train
from tiny_sizes import TINY_VAE
from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import load_image
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header, save
from minidiff.trainer import memory
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import Cache, LatentData
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.settings import FineTuneSettings
from minidiff.trainer.validation import offload, on_device


class CountingVAE(AutoencoderKL):
    """How many pictures went through it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(TINY_VAE)
        self.calls = 0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += len(x)
        return super().encode(x)


@pytest.fixture
def vae() -> CountingVAE:
    return CountingVAE()


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return [Example(noisy(tmp_path / f"{i}.png", (40 + i, 32)), f"{i}") for i in range(3)]


def data(vae: AutoencoderKL, examples: list[Example], folder: Path | None, **changes: Any) -> LatentData:
    settings = replace(FineTuneSettings(seed=3, cache_dir=str(folder) if folder else None), **changes)
    return LatentData(examples, settings, changes.get("resolution", 32), vae, encode, 1000)


def latents(found: LatentData) -> list[Tensor]:
    return [tensor for encoded in found.cache.values() for _, tensor in sorted(encoded.items())]


def same(a: LatentData, b: LatentData) -> bool:
    pairs = list(zip(latents(a), latents(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs) and a.cache.keys() == b.cache.keys()


def test_the_second_run_encodes_nothing(vae: CountingVAE, examples: list[Example], tmp_path: Path) -> None:
    plain = data(vae, examples, None)
    assert vae.calls == 3
    first = data(vae, examples, tmp_path / "cache")
    assert vae.calls == 6
    again = data(vae, examples, tmp_path / "cache")
    assert vae.calls == 6
    assert same(plain, first) and same(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    data(vae, examples, tmp_path / "cache", random_flip=True)  # the mirror images are new
    assert vae.calls == 9
    moved = [replace(e, path=e.path.rename(e.path.with_suffix(".PNG"))) for e in examples]  # what it holds counts, not the name
    assert same(again, data(vae, moved, tmp_path / "cache")) and vae.calls == 9


def test_what_is_encoded_anew(vae: CountingVAE, examples: list[Example], tmp_path: Path) -> None:
    folder, mask = tmp_path / "cache", noisy(tmp_path / "mask.png", (40, 32))
    data(vae, examples, folder)

    def new(given: list[Example], **changes: Any) -> int:
        """How many were not there; then they are."""
        before = vae.calls
        now, made = data(vae, given, folder, **changes), vae.calls - before
        assert same(now, data(vae, given, folder, **changes)) and vae.calls - before == made
        return made

    assert new([replace(examples[0], caption="another"), *examples[1:]]) == 0  # a caption is not in the picture
    load_image(examples[0].path).transpose(0).save(examples[0].path)
    assert new(examples) == 1
    assert new(examples, resolution=24) == 3
    assert new([replace(e, size=(32, 24)) for e in examples]) == 3
    assert new(examples, masked_loss=True) == 3
    assert new([replace(examples[0], mask=mask), *examples[1:]], masked_loss=True) == 1
    noisy(mask, (40, 31))
    assert new([replace(examples[0], mask=mask)], masked_loss=True) == 1
    with torch.no_grad():
        vae.decoder.conv_out.bias[-1] += 1e-3  # a single number, and one that encoding does not read: better safe
    assert new(examples) == 3


def test_surroundings_are_part_of_the_key(vae: CountingVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Cache(tmp_path, vae).path({"picture": "a"})
    assert path == Cache(tmp_path, vae).path({"picture": "a"}) != Cache(tmp_path, vae).path({"picture": "b"})
    assert path != Cache(tmp_path, vae.to(torch.bfloat16)).path({"picture": "a"})
    vae.to(torch.float32)
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert path != Cache(tmp_path, CountingVAE()).path({"picture": "a"})


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(whole[:-5])
    elif how == "a bit":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif how == "header":
        path.write_bytes(whole[:20] + b"#" + whole[21:])
    elif how == "text":
        path.write_text("version https://git-lfs")
    elif how == "foreign":
        save({"mean": torch.zeros(4, 16, 16), "logvar": torch.zeros(4, 16, 16)}, path)
    elif how == "another's":
        other = next(p for p in path.parent.iterdir() if p != path)
        path.write_bytes(other.read_bytes())
    elif how == "NaN":
        save({"mean": torch.full((4, 16, 16), torch.nan), "logvar": torch.zeros(4, 16, 16)}, path, {"key": path.stem})
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["empty", "cut", "a bit", "header", "text", "foreign", "another's", "NaN", "a folder"])
def test_what_is_damaged_is_encoded_anew(
    how: str, vae: CountingVAE, examples: list[Example], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = data(vae, examples, tmp_path / "cache")
    spoil(sorted((tmp_path / "cache").iterdir())[1], how)
    assert same(first, data(vae, examples, tmp_path / "cache")) and vae.calls == 4
    mended = same(first, data(vae, examples, tmp_path / "cache")) and vae.calls == 4
    assert mended == (how != "a folder")  # that stays in the way, and is named
    assert ("could not be written" in capsys.readouterr().err) == (how == "a folder")


def test_a_cache_that_cannot_be(vae: CountingVAE, examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--cache_dir .*file cannot be a folder for the cache: File exists"):
        data(vae, examples, tmp_path / "file")
    given: dict[str, Any] = {"instance_data_dir": "x", "instance_prompt": "y"}
    with pytest.raises(SettingsError, match="--cache_dir lies in --output_dir"):
        FineTuneSettings(**given, output_dir="out", cache_dir="out/cache").check()
    for blank in ("", "  "):
        with pytest.raises(SettingsError, match="--cache_dir must name a folder"):
            FineTuneSettings(**given, cache_dir=blank).check()
    with pytest.raises(SettingsError, match="--cache_dir is the folder of the training pictures"):
        FineTuneSettings(**given, cache_dir=f"{given['instance_data_dir']}/.").check()
    with pytest.raises(SettingsError, match="--cache_dir cannot be joined with --no-cache_latents"):
        FineTuneSettings(**given, cache_dir="cache", cache_latents=False).check()


def test_a_full_disk_is_said_once(
    vae: CountingVAE,
    examples: list[Example],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minidiff.trainer.latents.save", full)
    assert same(data(vae, examples, None), data(vae, examples, tmp_path / "cache"))
    assert capsys.readouterr().err.count("could not be written (No space left on device)") == 1


WRITER = """
import sys, torch
from torch import nn
from minidiff.trainer.latents import Cache
cache, number = Cache(sys.argv[1], nn.Linear(1, 1)), 0
while True:
    cache.get({"number": number % 40}, lambda: {"mean": torch.full((200, 200), float(number))})
    if number % 7 == 6:  # so that there is always something to write, and never nothing to read
        next(cache.folder.glob("*.safetensors")).unlink(missing_ok=True)
    if number == 40:
        print("ready", flush=True)
    number += 1
"""


def test_killed_writers_leave_nothing_broken(tmp_path: Path) -> None:
    """Two processes write into one folder, and are killed: whatever bears a name is whole."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.5)
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
    there = list(tmp_path.glob("*.safetensors"))
    assert there and all(read_header(path).read()["mean"].unique().numel() == 1 for path in there)


# --- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora, text encoder too", "lora", "textual inversion"])
def test_training_is_the_same_with_and_without(
    method: str,
    tiny_folder: Path,
    memory_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit: results, checkpoints, metrics. The second run with a cache encodes no picture."""
    pictures, encoded = draw_pictures(memory_path / "pictures"), []
    plain, words = AutoencoderKL.encode, StableDiffusionPipeline.encode_captions
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: encoded.append("picture") or plain(self, x))
    monkeypatch.setattr(
        StableDiffusionPipeline, "encode_captions", lambda self, texts: encoded.append("prompt") or words(self, texts)
    )
    often = {"random_flip": True, "proportion_empty_prompts": 0.3, "checkpointing_steps": 2}

    def run(name: str, **changes: Any) -> list[str]:
        encoded.clear()
        train(tiny(method, tiny_folder, pictures, memory_path / name / "run", **often, **changes))
        return list(encoded)

    without, cold, warm = run("a"), run("b", cache_dir=str(memory_path / "c")), run("d", cache_dir=str(memory_path / "c"))
    assert without.count("picture") == cold.count("picture") == 6 and without == cold and "picture" not in warm
    assert ("prompt" in without) == (method in ("full", "lora"))  # else the text encoder is trained itself
    for name in ("b", "d"):
        assert fingerprint(memory_path / name) == fingerprint(memory_path / "a")
        assert rows(memory_path / name / "run") == rows(memory_path / "a" / "run")
    assert "cache_dir" not in (memory_path / "b" / "run" / "train_config.toml").read_text()


# --- what leaves the memory ----------------------------------------------------------------------------------------------


def on_meta(network: nn.Module) -> bool:
    return all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize(
    "method, changes, vae_stays, words_stay",
    [
        ("lora", {}, False, False),
        ("lora", {"validation_steps": 2}, True, True),  # sheets are drawn
        ("lora", {"cache_latents": False}, True, False),
        ("lora, text encoder too", {}, False, True),
        ("textual inversion", {}, False, True),
        ("full", {}, True, True),  # a whole model comes out
    ],
)
def test_what_is_not_needed_leaves(
    method: str,
    changes: dict[str, Any],
    vae_stays: bool,
    words_stay: bool,
    tiny_folder: Path,
    memory_path: Path,  # noqa: F811
) -> None:
    pictures = draw_pictures(memory_path / "pictures")
    settings = tiny(method, tiny_folder, pictures, memory_path / "run", **changes)
    task = RECIPES[type(settings)](settings)
    assert on_meta(task.beside["VAE"]) != vae_stays and on_meta(task.modules["text_encoder"]) != words_stay
    need = memory.budget(task, settings)
    assert "unet" in need.held and ("VAE" in need.held) == vae_stays and ("text_encoder" in need.held) == words_stay
    assert "pictures, sheets" in need.moments


class Traveller(nn.Module):
    """Where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, place: Any) -> "Traveller":  # type: ignore[override]
        self.places.append(str(place))
        return self


def test_networks_come_back_for_drawing_alone() -> None:
    network = Traveller()
    offload([network], needed_again=True)
    with pytest.raises(KeyError), on_device([network], torch.device("cuda:0")):
        assert network.places == ["cpu", "cuda:0"]
        raise KeyError
    assert network.places == ["cpu", "cuda:0", "cpu"]
    offload([network], needed_again=False)
    assert network.places[-1] == "meta"


def test_sheets_after_networks_were_offloaded(
    tiny_folder: Path,
    memory_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first update a LoRA is nothing: what is drawn after they waited is what the base drew."""
    pictures, drawn = draw_pictures(memory_path / "pictures"), []
    monkeypatch.setattr("minidiff.trainer.validation.contact_sheet", lambda rows, **_: drawn.extend(rows))
    settings = tiny("lora", tiny_folder, pictures, memory_path / "run", validation_steps=1, cache_dir=str(memory_path / "c"))
    RECIPES[type(settings)](settings).preview(0)
    _, _, (base,), (now,) = drawn
    assert base is not now and base.tobytes() == now.tobytes()
