"""--fit: the cheapest savings that suffice, the same after a resume; and a run that runs out of memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_harness import fingerprint, memory_path, rows  # noqa: F401
from test_cli import pictures, refused, train  # noqa: F401
from tiny_recipes import draw_pictures, tiny

from minidiff.cli.main import main
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.files.values import from_toml
from minidiff.trainer import memory
from minidiff.trainer.memory import MIB, SAVINGS, budgeted, chosen, possible
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import Run, fit
from minidiff.trainer.settings import FineTuneSettings, size_in_bytes
from minidiff.trainer.task import Job

FLAGS = [*SAVINGS]
ALL_METHODS = [flag for flag in FLAGS if flag != "layerwise_casting"]  # which every method knows


@pytest.mark.parametrize(
    "text, size",
    [
        ("8GB", 8 * 10**9),
        ("2.3 GB", 2_300_000_000),
        ("6GiB", 6 * 2**30),
        (" 900mb ", 900 * 10**6),
        ("1.5TiB", 3 * 2**39),
        *[(bad, None) for bad in ("", "8", "GB", "8 G B", "-8GB", "0GB", "1KB", "999TB", "1e3GB", "8,5GB", "8GBs", "٨GB")],
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert size_in_bytes(text) == size
    settings = FineTuneSettings(instance_data_dir="x", instance_prompt="y", fit=text)
    if size is None:
        with pytest.raises(SettingsError, match="--fit must be a size from 1MB to 100TB, such as 8GB"):
            settings.check()
    else:
        settings.check()


@pytest.fixture
def home(memory_path: Path) -> Path:  # noqa: F811
    draw_pictures(memory_path / "pictures")
    return memory_path


def made(method: str, base: Path, home: Path, **changes: Any) -> tuple[Job, FineTuneSettings]:
    settings = tiny(method, base, home / "pictures", home / "run", **changes)
    return RECIPES[type(settings)](settings), settings


def on(settings: FineTuneSettings) -> list[str]:
    return [flag for flag in FLAGS if getattr(settings, flag, False)]


def test_the_list_is_walked_until_it_fits(tiny_folder: Path, home: Path) -> None:
    """Whatever the limit: the cheapest savings that suffice, in their order; the network is left as it is chosen."""
    task, settings = made("full", tiny_folder, home, resolution=32)
    assert possible(task, settings) == ALL_METHODS
    walk = [replace(settings, **dict.fromkeys(ALL_METHODS[:count], True), fit="1TB") for count in range(4)]  # type: ignore[arg-type]
    sizes = [memory.budget(task, trial).together for trial in walk]
    assert sizes == sorted(set(sizes), reverse=True)  # each saving makes it smaller
    for count, size in enumerate(sizes):
        now, need, note = chosen(task, replace(settings, fit=f"{size / 1000:.3f}KB"))
        assert on(now) == ALL_METHODS[:count] and need.together == size
        assert all(f"--{flag}: " in note for flag in on(now)) and (on(now) or "fit as it is" in note)
        checkpointed = type(task.modules["unet"].down_blocks[0]).__name__.startswith("Checkpointed")  # type: ignore[index]
        assert checkpointed == now.gradient_checkpointing
    with pytest.raises(SettingsError) as error:
        chosen(task, replace(settings, fit=f"{(sizes[-1] - 1000) / 1000:.3f}KB"))
    assert f"together            {sizes[-1] / MIB:9,.1f} MiB" in str(error.value)
    assert "--train_batch_size 1" in str(error.value) and "minidiff train lora" in str(error.value)


@pytest.mark.parametrize(
    "method, changes, without",
    [
        ("full", {}, set()),
        ("full", {"gradient_accumulation_steps": 2}, {"optimizer_in_backward"}),
        ("pivotal", {"mixed_precision": "bf16"}, set()),
    ],
)
def test_only_what_can_be(tiny_folder: Path, home: Path, method: str, changes: dict[str, Any], without: set[str]) -> None:
    """And what is offered, trains."""
    task, settings = made(method, tiny_folder, home, **changes, max_train_steps=1)
    free = possible(task, settings)
    assert set(FLAGS) - set(free) == without | {"layerwise_casting"}  # the file is in fp32
    assert fit(task, replace(settings, **dict.fromkeys(free, True))).finished


def test_8_bits_do_not_help_a_tiny_adapter(tiny_folder: Path, home: Path) -> None:
    task, settings = made("lora", tiny_folder, home)
    plain, eight = (memory.budget(task, replace(settings, use_8bit_adam=on)) for on in (False, True))
    assert {p.numel() < 4096 for p in task.trainable.values()} == {True}
    assert plain.held["optimizer"] == eight.held["optimizer"]


def least_of(task: Job, settings: FineTuneSettings, *flags: str) -> str:
    """A limit that these savings just meet."""
    trial = replace(settings, **dict.fromkeys(flags, True))
    return f"{memory.budget(task, trial).together / 1000 + 1:.3f}KB"


def test_a_resumed_run_keeps_what_it_began_with(tiny_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, and gone on with --fit under a limit that would choose otherwise: the bytes of a run that never stopped."""
    often = {"resolution": 32, "checkpointing_steps": 1, "max_train_steps": 4, "fit": "100TB"}
    task, settings = made("full", tiny_folder, home, **often)
    settings = replace(settings, fit=least_of(task, settings, "gradient_checkpointing", "use_8bit_adam"))
    began, _, _ = chosen(task, settings)
    assert on(began) == ["gradient_checkpointing", "use_8bit_adam"]

    def run(folder: Path, fits: str, crash: int | None = None) -> FineTuneSettings:
        now = replace(settings, output_dir=str(folder), fit=fits, resume_from_checkpoint="latest")
        task = RECIPES[type(now)](now)
        plain = task.batch

        def batch(step: int, micro: int) -> dict[str, torch.Tensor]:
            if step == crash:
                raise KeyError("crash")
            return plain(step, micro)

        with budgeted(task, now) as now:
            fit(replace(task, batch=batch), now)
        return now

    fits = settings.fit or ""
    run(home / "straight" / "run", fits)
    with pytest.raises(KeyError):
        run(home / "broken" / "run", fits, crash=2)
    capsys.readouterr()
    assert on(run(home / "broken" / "run", "100TB")) == ["use_8bit_adam"]  # checkpointing changes no number
    assert " MiB fit with\n  --use_8bit_adam: AdamW's running means" in capsys.readouterr().out
    assert fingerprint(home / "broken" / "run") == fingerprint(home / "straight" / "run")
    assert rows(home / "broken" / "run") == rows(home / "straight" / "run")
    saved = from_toml(type(settings), home / "straight" / "run" / "train_config.toml")
    assert on(saved) == ["gradient_checkpointing", "use_8bit_adam"] and saved.fit == fits
    with pytest.raises(SettingsError, match="--fit 1MB: it does not fit with all savings. It needs:\nMemory of the run"):
        run(home / "straight" / "run", "1MB")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_running_out_of_memory(
    error: Exception,
    tiny_folder: Path,
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the third update, after a checkpoint: the table, what helps, and from where to go on."""
    plain = Run._log

    def full(self: Run, **row: Any) -> None:
        if row.get("step") == 3:
            raise error
        plain(self, **row)

    monkeypatch.setattr(Run, "_log", full)
    flags = ("--max_train_steps", "4", "--checkpointing_steps", "2", "--gradient_checkpointing")
    with pytest.raises(SystemExit) as leave:
        train(tiny_folder, pictures, tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "minidiff: out of memory while training.\nMemory of the run" in said
    hints = [
        "What helps: --fit with the memory that there is",
        "--mixed_precision bf16",
        "a smaller --resolution",
        "--rank",
    ]
    assert [said.index(hint) for hint in hints] == sorted(said.index(hint) for hint in hints)
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}. --resume_from_checkpoint latest" in said


def test_other_errors_stay_what_they_are(tiny_folder: Path, home: Path) -> None:
    task, settings = made("lora", tiny_folder, home)
    with pytest.raises(RuntimeError, match="a bug"), budgeted(task, settings):
        raise RuntimeError("a bug")
    with pytest.raises(MinidiffError, match="No checkpoint had been saved yet"), budgeted(task, settings):
        raise MemoryError


def test_bad_sizes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--instance_data_dir", "x", "--instance_prompt", "y"]
    for bad in ("8", "0GB", "eight"):
        with pytest.raises(SystemExit) as leave:
            main(["train", "lora", *flags, "--fit", bad])
        assert leave.value.code == 2 and "--fit must be a size" in capsys.readouterr().err
