"""A checkpoint is whole or absent, whatever byte is damaged. (Whatever call fails: test_faults.py.)"""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.files.atomic import write_bytes
from minidiff.trainer import checkpoint
from minidiff.trainer.optimizers import load_optimizer_state, optimizer_state
from minidiff.trainer.settings import TrainSettings


def export(folder: Path) -> None:
    (folder / "adapter.bin").write_bytes(b"the result")


def save(folder: Path, step: int, keep: int | None = None) -> Path:
    tensors = {"weights": {"w": torch.full((3,), float(step))}, "optimizer": {"0.step": torch.tensor(float(step))}}
    return checkpoint.save(folder, step, tensors, {"seed": 1}, export, keep)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    manifest, tensors = checkpoint.load(path)
    assert path.name == "checkpoint-7" and manifest["step"] == 7 and manifest["made_of"] == {"seed": 1}
    assert torch.equal(tensors["weights"]["w"], torch.full((3,), 7.0))
    assert tensors["optimizer"]["0.step"].shape == ()
    assert manifest == json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter.bin", "state/optimizer.safetensors", "state/weights.safetensors"}
    assert manifest["environment"]["threads"] == torch.get_num_threads()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]


def test_latest_counts_and_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 100, 30):
        save(tmp_path, step)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-100"
    save(tmp_path, 101, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-101"]


@pytest.mark.parametrize("name", ["state/weights.safetensors", "adapter.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_seen(tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1 if name != "manifest.json" else 0x80
    (bad / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "remove":
        (bad / name).unlink()
    assert checkpoint.latest(tmp_path) == good
    assert "checkpoint-2" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="checkpoint-2"):
        checkpoint.load(bad)
    save(tmp_path, 2)  # a damaged one is replaced when its step comes round again
    assert checkpoint.latest(tmp_path) == bad


NONSENSE = ["[" * 100_000, '{"files": {}}', '{"files": {}, "step": "2"}', '{"step": 2}', "[]", "3", ""]


@pytest.mark.parametrize("manifest", NONSENSE)
def test_a_manifest_of_nonsense_is_passed_over(tmp_path: Path, manifest: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    (bad / "manifest.json").write_text(manifest)
    assert checkpoint.latest(tmp_path) == good


@pytest.mark.parametrize("value", [None, [], "", 7, -3, {}, {"state/weights.safetensors": 3}, "left out"])
@pytest.mark.parametrize("key", ["step", "made_of", "environment", "files"])
def test_a_manifest_with_a_wrong_value_is_passed_over(tmp_path: Path, key: str, value: object) -> None:
    if (key, type(value)) in (("made_of", dict), ("environment", dict)):
        return
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    manifest = json.loads((bad / "manifest.json").read_text()) | {key: value}
    if value == "left out":
        del manifest[key]
    (bad / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.latest(tmp_path) == good
    with pytest.raises(WeightsError, match="checkpoint-2 is no complete checkpoint"):
        checkpoint.load(bad)


def test_a_name_that_is_not_the_manifests_is_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mv checkpoint-2 checkpoint-9`: else step 2 would go on as the newest, and the steps after it be pruned."""
    save(tmp_path, 2).rename(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-²").mkdir()  # a digit to str.isdigit, and none to int
    good = save(tmp_path, 3)
    assert checkpoint.latest(tmp_path) == good
    said = capsys.readouterr().err
    assert "checkpoint-9 is no complete checkpoint (ValueError: by its manifest.json it is that of step 2)" in said
    good.rename(tmp_path / "kept")  # another kind of name says nothing
    assert checkpoint.verify(tmp_path / "kept")["step"] == 3
    text = (tmp_path / "kept" / "manifest.json").read_text().replace('"step": 3', '"step": -3')
    (tmp_path / "kept" / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match="makes no sense"):
        checkpoint.verify(tmp_path / "kept")


def test_prune_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-99").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    (save(tmp_path, 50) / "adapter.bin").write_bytes(b"The result")  # damaged, and its size is right
    (save(tmp_path, 4) / "manifest.json").unlink()
    save(tmp_path, 5, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (3, 4, 5, 9, 50, 99)]
    save(tmp_path, 6, keep=1)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (4, 6, 9, 50, 99)]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-6"


def test_starting_anew_over_damaged_checkpoints_takes_a_word(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").unlink()
    settings = TrainSettings(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    with pytest.raises(SettingsError, match="none is whole.*--overwrite_output_dir"):
        checkpoint.find(settings)


def test_a_file_size_limit_of_the_kernel(tmp_path: Path) -> None:
    """A real write that fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of 64 kB: needs the right to mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        save(disk, 1)
        (disk / "filler").write_bytes(bytes(disk_free(disk) - 6000))
        with pytest.raises(OSError, match="No space left"):
            save(disk, 2)
        assert checkpoint.latest(disk) == disk / "checkpoint-1" and not list(disk.glob(".tmp*"))
        (disk / "filler").unlink()
        assert checkpoint.latest(disk) == disk / "checkpoint-1"
        assert save(disk, 2) == checkpoint.latest(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def disk_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_files_and_results_are_replaced_in_one_go(tmp_path: Path) -> None:
    export(tmp_path)

    def failing(folder: Path) -> None:
        (folder / "adapter.bin").write_bytes(b"half of")
        raise OSError("disk full")

    with pytest.raises(OSError), checkpoint.put_in_place(tmp_path) as hidden:
        failing(hidden)
    assert (tmp_path / "adapter.bin").read_bytes() == b"the result"

    def folders(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(b"new")

    for _ in range(2):
        with checkpoint.put_in_place(tmp_path) as hidden:
            folders(hidden)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.bin", "unet"]
    write_bytes(tmp_path / "adapter.bin", b"x")
    assert (tmp_path / "adapter.bin").read_bytes() == b"x"


def test_write_bytes_does_not_go_through_a_link(tmp_path: Path) -> None:
    """Somebody laid it where the half-written file would be."""
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".tmp-minidiff-config").symlink_to(tmp_path / "thesis.tex")
    write_bytes(tmp_path / "config", b"x")
    assert (tmp_path / "config").read_bytes() == b"x" and (tmp_path / "thesis.tex").read_text() == "mine"


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """A clone of an empty repository may become a run's folder: it holds hidden files alone."""
    theirs = (".gitignore", ".tmp-mine", ".abc.part", "samples/.cat.png.part", "samples/mine.png")
    (tmp_path / "samples").mkdir()
    for name in theirs:
        (tmp_path / name).write_text("mine")
    write_bytes(tmp_path / checkpoint.CONFIG, b"")
    ours = (".tmp-minidiff-export", "samples/.tmp-minidiff-step-000003.png.7.tmp", "samples/step-000003.png")
    for name in ours:
        (tmp_path / name).write_text("ours")
    with checkpoint.claimed(settings(tmp_path, overwrite=True)):
        save(tmp_path, 1, keep=1)
        with checkpoint.put_in_place(tmp_path) as hidden:
            write_bytes(hidden / ".gitignore", b"ours")
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)
    assert not [name for name in ours if (tmp_path / name).exists()]


def test_differences_are_listed(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        checkpoint.check_same({"rank": 4, "seed": 0, "pictures": 5}, {"rank": 8, "seed": 0}, tmp_path)
    assert "rank: was 4, is now 8" in str(error.value) and "pictures: was 5" in str(error.value)
    assert "seed" not in str(error.value)


def test_a_run_with_a_flag_that_is_gone(tmp_path: Path) -> None:
    checkpoint.check_same({"seed": 0, "flag": False}, {"seed": 0}, tmp_path)


def test_what_is_off_is_no_difference(tmp_path: Path) -> None:
    """A checkpoint from before a flag existed still fits, as long as the flag is not used."""
    checkpoint.check_same({"seed": 0}, {"seed": 0, "use_ema": False, "snr_gamma": None, "noise_offset": 0.0}, tmp_path)
    with pytest.raises(SettingsError, match="use_ema: was null, is now true"):
        checkpoint.check_same({"seed": 0}, {"seed": 0, "use_ema": True}, tmp_path)


def settings(folder: Path, resume: str | None = None, overwrite: bool = False) -> TrainSettings:
    return TrainSettings(output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=overwrite)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with checkpoint.claimed(settings(tmp_path / "run")):
        with pytest.raises(SettingsError, match="another process"), checkpoint.claimed(settings(tmp_path / "run")):
            pass
    with checkpoint.claimed(settings(tmp_path / "run")):
        pass


def test_foreign_and_used_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for wish in (settings(tmp_path), settings(tmp_path, "latest"), settings(tmp_path, overwrite=True)):
        with pytest.raises(SettingsError, match="notes.txt"), checkpoint.claimed(wish):
            pass
    with pytest.raises(SettingsError, match="is a file"), checkpoint.claimed(settings(tmp_path / "notes.txt")):
        pass
    run = tmp_path / "run"
    with checkpoint.claimed(settings(run)):
        (run / checkpoint.CONFIG).touch()
        save(run, 1)
    with pytest.raises(SettingsError, match="earlier run"), checkpoint.claimed(settings(run)):
        pass
    (run / "holiday.jpg").write_bytes(b"not ours")
    with checkpoint.claimed(settings(run, overwrite=True)):
        assert checkpoint.checkpoints(run) == [] and (run / "holiday.jpg").exists()


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    run = settings(tmp_path)
    save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.find(run) is None
    assert checkpoint.find(replace(run, resume_from_checkpoint="latest")) == tmp_path / "checkpoint-2"
    assert checkpoint.find(replace(run, resume_from_checkpoint="checkpoint-2")) == tmp_path / "checkpoint-2"
    with pytest.raises(SettingsError, match="no such folder. Checkpoints in .*checkpoint-1, checkpoint-2"):
        checkpoint.find(replace(run, resume_from_checkpoint="checkpoint-3"))
    with pytest.raises(SettingsError, match="newer ones"):
        checkpoint.find(replace(run, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    elsewhere = replace(run, output_dir=str(tmp_path / "new"), resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert checkpoint.find(elsewhere) == tmp_path / "checkpoint-1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no complete checkpoint"):
        checkpoint.find(replace(run, resume_from_checkpoint=str(tmp_path / "empty")))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_state_through_tensors(kind: type[torch.optim.Optimizer]) -> None:
    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        ps = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))]
        return ps, kind([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:], "lr": 0.2}])  # type: ignore[call-arg]

    def step(ps: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for i, p in enumerate(ps):
            p.grad = torch.full_like(p, 0.3 + i) * p.detach()
        optimizer.step()

    ps, optimizer = fresh()
    step(ps, optimizer)
    tensors = optimizer_state(optimizer)
    qs, other = fresh()
    for p, q in zip(ps, qs, strict=True):
        q.data.copy_(p)
    tensors = {k: v.clone() for k, v in tensors.items()}  # as if from a file
    load_optimizer_state(other, tensors)
    step(ps, optimizer), step(qs, other)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize(
    "key, tensor",
    [
        ("0.exp_avg", torch.ones(3)),
        ("0.exp_avg", torch.ones(2, dtype=torch.int8)),
        ("2.step", torch.ones(())),
        ("\u0661.step", torch.ones(())),
        ("", torch.ones(())),
    ],
)
def test_moments_of_something_else(key: str, tensor: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(WeightsError, match="belongs to nothing that this task trains"):
        load_optimizer_state(optimizer, {"0.step": torch.ones(()), key: tensor})
