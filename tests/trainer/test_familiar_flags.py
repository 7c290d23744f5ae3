"""Flags that people know from the diffusers training scripts do here what they do there, or are left out with a note."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_recipes import PRIOR, draw_pictures, tiny

from minidiff.cli.words import NOT_NEEDED, values_of
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.train import LoopSettings, lr_factor
from minidiff.files.folder import local_folder
from minidiff.trainer import distributed
from minidiff.trainer.card import upload
from minidiff.trainer.priors import class_examples
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import Run, fit, read_metrics
from minidiff.trainer.settings import DreamBoothSettings, LoRASettings, TextualInversionSettings
from minidiff.trainer.task import load_base, load_data


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Any:
    pictures = draw_pictures(tmp_path / "pictures")
    return lambda method="lora", **changes: tiny(method, tiny_folder, pictures, tmp_path / "out", **changes)


# --- the learning rate -------------------------------------------------------------------------------------------------


def test_cosine_with_restarts_and_polynomial() -> None:
    """diffusers' get_cosine_with_hard_restarts_schedule_with_warmup and get_polynomial_decay_schedule_with_warmup."""
    restarts = LoopSettings(8, lr_scheduler="cosine", lr_num_cycles=2)
    expected = [0.5 * (1 + math.cos(math.pi * (2 * k / 8 % 1))) for k in range(8)]
    assert [lr_factor(k, restarts) for k in range(9)] == pytest.approx([*expected, 0.0])
    power = LoopSettings(8, lr_scheduler="linear", lr_power=2.0, lr_warmup_steps=4)
    assert [lr_factor(k, power) for k in range(4, 9)] == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16, 0])


@pytest.mark.parametrize("flags, steps", [
    ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3}, [1, 1, 1]),  # a cycle is one update
    ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1, 4 / 9, 1 / 9]),
])  # fmt: skip
def test_they_arrive_in_the_run(make: Any, flags: dict[str, Any], steps: list[float]) -> None:
    settings = make(**flags)
    fit(RECIPES[LoRASettings](settings), settings)
    assert [row["lr"] for row in read_metrics(Path(settings.output_dir))] == pytest.approx([1e-2 * step for step in steps])


def test_flags_of_a_schedule_go_with_it() -> None:
    known = {"instance_data_dir": "d", "instance_prompt": "p"}
    for wrong in (
        {"lr_num_cycles": 2},
        {"lr_power": 2.0},
        {"lr_scheduler": "cosine", "lr_num_cycles": 2},
        {"text_encoder_lr": 1e-5},
    ):
        with pytest.raises(SettingsError, match=list(wrong)[-1] + ".* goes with"):
            LoRASettings(**known, **wrong).check()
    assert "lr_power" not in LoRASettings().identity(3) and LoRASettings(lr_power=2.0).identity(3)["lr_power"] == 2


def test_scale_lr() -> None:
    scaled = LoRASettings(learning_rate=1e-4, scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3)
    assert scaled.learning_rate == pytest.approx(6e-4) and replace(scaled, seed=1).learning_rate == scaled.learning_rate


def test_text_encoder_lr(make: Any) -> None:
    settings = make("lora, text encoder too", text_encoder_lr=5e-3)
    task = RECIPES[LoRASettings](settings)
    groups = Run(task, settings, 3, distributed.World()).optimizer.param_groups
    own = sum(name.startswith("text_encoder.") for name in task.trainable)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1e-2, len(task.trainable) - own), (5e-3, own)] and own


# --- the pictures ------------------------------------------------------------------------------------------------------


def test_image_column_and_max_train_samples(make: Any, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "table")
    rows = [{"image": f"picture-{i}.png", "file_name": "of something else", "text": f"a dog {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = make(instance_data_dir=None, instance_prompt=None, train_data_dir=str(folder), image_column="image")
    assert len(load_data(load_base(settings)[0], settings).examples) == 3
    chosen = {
        tuple(e.path.name for e in load_data(load_base(s)[0], s).examples)
        for s in (replace(settings, max_train_samples=2, seed=seed) for seed in (0, 5))
    }
    assert len(chosen) > 1 and all(len(names) == 2 and list(names) == sorted(names) for names in chosen)


def test_repeats_make_an_epoch_longer(make: Any) -> None:
    settings = make("textual inversion", repeats=5)
    assert load_data(load_base(settings)[0], settings).samples_per_epoch == 15
    assert TextualInversionSettings(repeats=5).identity(1) == TextualInversionSettings().identity(1)  # the data says it


def test_validation_epochs(make: Any) -> None:
    """Three pictures by two: an epoch is 1.5 updates."""
    settings = make(validation_epochs=2, validation_steps=100, max_train_steps=5)
    fit(RECIPES[LoRASettings](settings), settings)
    assert [row["step"] for row in read_metrics(Path(settings.output_dir)) if "val_loss" in row] == [0, 3, 5]
    assert sorted(path.name for path in Path(settings.output_dir, "samples").iterdir()) == [
        "step-000003.png",
        "step-000005.png",
    ]


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_prior_generation_precision(make: Any, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    prior = PRIOR | {
        "prior_from_base": False,
        "class_data_dir": str(tmp_path / precision),
        "prior_generation_precision": precision,
    }
    settings, seen = make("dreambooth", **prior), set[torch.dtype]()
    pipe = load_base(settings)[0]
    pipe.unet.conv_out.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    assert len(class_examples(pipe, settings, 16)) == 3 and seen == {dtype}


def test_tensorboard(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(report_to="tensorboard", logging_dir="boards")
    monkeypatch.setattr("minidiff.trainer.loop_settings.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="--report_to needs a package: pip install tensorboard"):
        settings.check()
    monkeypatch.setattr("minidiff.trainer.loop_settings.find_spec", lambda name: name)
    written: list[Any] = []

    def writer(folder: Path, purge_step: int) -> Any:
        written.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda name, value, step: written.append((name, step)))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    fit(RECIPES[LoRASettings](settings), settings)
    assert written[0] == (Path(settings.output_dir) / "boards", 1) and {("loss", 3), ("lr", 1)} <= set(written[1:])


class Hub:
    """Stands in for huggingface_hub's HfApi."""

    sent: dict[str, Any] = {}
    fails = False

    def create_repo(self, name: str, exist_ok: bool) -> Any:
        if self.fails:
            raise ConnectionError("no network")
        return SimpleNamespace(repo_id=f"me/{name}", __str__=lambda: "url")

    def upload_folder(self, **what: Any) -> None:
        from huggingface_hub.utils import filter_repo_objects

        files = [str(p.relative_to(what["folder_path"])) for p in Path(what["folder_path"]).rglob("*") if p.is_file()]
        self.sent[what["repo_id"]] = set(filter_repo_objects(files, ignore_patterns=what["ignore_patterns"]))


def test_push_to_hub(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(validation_steps=3)
    fit(RECIPES[LoRASettings](settings), settings)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    upload(settings), upload(replace(settings, hub_model_id="my-dog"))
    files = {".gitignore", "README.md", "pytorch_lora_weights.safetensors", "sheet.png", "train_config.toml"}
    assert Hub.sent == {"me/out": files, "me/my-dog": files}  # no training pictures, no checkpoints, no metrics
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(MinidiffError, match="is whole, but --push_to_hub failed: no network"):
        upload(settings)


# --- the command line --------------------------------------------------------------------------------------------------


def test_flags_that_nothing_needs(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--rank 8 --allow_tf32 --tokenizer-name some/where --variant=fp16 --save_steps=7 --validation_prompt a b".split()
    kept = values_of("train lora", LoRASettings, words)
    assert kept == {"rank": 8, "validation_prompt": ("a", "b"), "checkpointing_steps": 7}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--allow_tf32 (PyTorch decides), --tokenizer_name (the model has its own), --var" in said
    assert values_of("train lora", LoRASettings, ["--rank", "8"]) == {"rank": 8} and not capsys.readouterr().err
    fields = set(DreamBoothSettings.__dataclass_fields__) | set(TextualInversionSettings.__dataclass_fields__)
    assert not fields & NOT_NEEDED.keys()


def test_dataset_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder; a data set in the hub's cache; else a name that there is no folder for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "datasets--me--dogs" / "snapshots" / ("0" * 40)
    draw_pictures(snapshot / "train")
    (tmp_path / "hub" / "datasets--me--dogs" / "refs").mkdir()
    (tmp_path / "hub" / "datasets--me--dogs" / "refs" / "main").write_text("0" * 40)

    def read(*words: str) -> dict[str, Any]:
        return values_of("train lora", LoRASettings, [*words])

    assert read("--dataset_name", "me/dogs") == {"train_data_dir": str(snapshot / "train")}
    assert read("--dataset_name", str(tmp_path)) == {"train_data_dir": str(tmp_path)}
    assert read("--dataset-name=me/dogs") == {"train_data_dir": str(snapshot / "train")}
    with pytest.raises(SettingsError, match="--dataset_name me/cats: .* Give the folder of the pictures as --train_data_dir"):
        read("--dataset_name", "me/cats")


def test_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--me--model"
    for name, commit in (("main", "0" * 40), ("other", "1" * 40)):
        (home / "snapshots" / commit).mkdir(parents=True), (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / name).write_text(commit), (home / "snapshots" / commit / "x").write_text("")
    assert local_folder("me/model").name == "0" * 40 and local_folder("me/model", revision="other").name == "1" * 40
