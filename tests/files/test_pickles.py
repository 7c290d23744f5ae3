"""Pickles: tensors come out by name, no code of theirs runs, and what is no file of weights gets one message."""

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from minidiff.core.errors import WeightsError
from minidiff.files.convert import read_pickle


class Evil:
    """What an attacker writes: a pickle that runs a command when it is opened."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


def pickled(folder: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, folder / "model.ckpt", _use_new_zipfile_serialization=zipped)
    return folder / "model.ckpt"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_of_a_training_checkpoint(tmp_path: Path, zipped: bool) -> None:
    state = {"a.weight": torch.randn(2, 3), "b": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}
    path = pickled(tmp_path, {"state_dict": state, "optimizer_states": [{"x": torch.zeros(9)}], "epoch": 3}, zipped)
    assert same(read_pickle(path), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path = pickled(tmp_path, {"a": torch.zeros(2), "b": Evil(tmp_path / "victim")}, zipped)
    with pytest.raises(WeightsError, match=r"model.ckpt is refused: it asks for posix.system, and no file's code is run") as e:
        read_pickle(path)
    assert "Get the .safetensors version" in str(e.value) and "weights_only" not in str(e.value)
    assert not (tmp_path / "victim").exists()


def test_a_small_file_that_wants_much_memory(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": torch.zeros(1).expand(10**11)})  # 400 GB, from a file of a few hundred bytes
    with pytest.raises(WeightsError, match="is refused: its tensors would have 400,000,000,000 bytes"):
        read_pickle(path)


def test_a_packed_file_that_would_grow(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "bomb.ckpt", "w", ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(WeightsError, match="is refused: it is packed, and would unpack to more than its"):
        read_pickle(tmp_path / "bomb.ckpt")


A1111_WORD = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 3)}, "name": "dog", "step": 9}
NESTED = {
    "flat": ({"x": torch.ones(2)}, {"x": torch.ones(2)}),
    "bare": (torch.ones(2), {"": torch.ones(2)}),
    "list": ([torch.ones(1), torch.zeros(1)], {"0": torch.ones(1), "1": torch.zeros(1)}),
    "A1111": (A1111_WORD, {"string_to_param/*": torch.ones(2, 3)}),
    "A1111, old": (
        {"string_to_param": torch.nn.ParameterDict({"x": torch.ones(2, 3)})},
        {"string_to_param/x": torch.ones(2, 3)},
    ),
    "numbers": ({1: {"x": torch.ones(1)}}, {"1/x": torch.ones(1)}),
}


@pytest.mark.parametrize("kind", NESTED)
def test_tables_within_tables(tmp_path: Path, kind: str) -> None:
    given, wanted = NESTED[kind]
    assert same(read_pickle(pickled(tmp_path, given)), wanted)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "there is no tensor in it"),
        ({"a": 3}, "there is no tensor in it"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "a is a tensor of an odd kind"),
        ({"a": torch.eye(2).to_sparse()}, "a is a tensor of an odd kind|damaged"),
        (torch.nn.Linear(2, 2), "is refused: it asks for torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_pickle(pickled(tmp_path, value))


@pytest.mark.parametrize("raw", [b"PK\x03\x04 cut off", b"\x80\x02 cut off", pickle.dumps({"a": 1})])
def test_damaged_pickles(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(raw)
    with pytest.raises(WeightsError, match="x.ckpt cannot be read: it is damaged, or holds no weights of PyTorch"):
        read_pickle(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x10\0\0\0\0\0\0\0{}              ", "is a safetensors file under another name; rename it to x.safetensors"),
        (b"hello", "Is it the right one?"),
    ],
)
def test_what_is_no_pickle_is_not_opened(tmp_path: Path, raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "load")
    (tmp_path / "x.ckpt").write_bytes(raw)
    with pytest.raises(WeightsError, match=message):
        read_pickle(tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="does not exist"):
        read_pickle(tmp_path / "y.ckpt")
