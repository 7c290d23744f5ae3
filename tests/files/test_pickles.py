"""Pickles: only a child process opens them, and what comes out is safetensors or one message."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.core.errors import WeightsError
from minidiff.files import pickles
from minidiff.files.pickles import content, rewrite, unpickle
from minidiff.files.weights import read_header


class Evil:
    """What an attacker writes: a pickle that runs a command when it is opened."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


def pickled(folder: Path, value: Any, name: str = "model.ckpt") -> Path:
    torch.save(value, folder / name)
    return folder / name


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype


# --- through the child -----------------------------------------------------------------------------------------------


def test_the_child_reads_and_this_process_never_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened in the main process")

    state = {"a.weight": torch.randn(2, 3), "b": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}
    path = pickled(tmp_path, {"state_dict": state, "optimizer_states": [{"x": torch.zeros(9)}], "epoch": 3})
    (tmp_path / "out").mkdir()
    for where, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(where, name, never)
    file = unpickle(path, tmp_path / "out")
    assert file == tmp_path / "out" / "model.safetensors" and read_header(file).tensors.keys() == state.keys()
    assert same(content(file), state)
    with pytest.raises(WeightsError, match="exists already; nothing is overwritten"):
        unpickle(path, tmp_path / "out")


def test_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": torch.zeros(2), "b": Evil(tmp_path / "victim")})
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match=r"model.ckpt was refused: it asks for posix.system, and no file's code is run") as e:
        unpickle(path, tmp_path / "out")
    assert "Get the .safetensors version" in str(e.value) and "weights_only" not in str(e.value)
    assert not (tmp_path / "victim").exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory limits are Linux's")
def test_a_small_file_that_wants_much_memory_is_given_up(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": torch.zeros(1).expand(10**11)})  # 400 GB, from a file of a few hundred bytes
    with pytest.raises(WeightsError, match="was given up: reading it took more memory or time than its size justifies"):
        unpickle(path, tmp_path)


# --- what the child does, looked at from near ------------------------------------------------------------------------

NESTED = {
    "flat": ({"x": torch.ones(2)}, {"x": torch.ones(2)}),
    "bare": (torch.ones(2), torch.ones(2)),
    "list": ([torch.ones(1), torch.zeros(1)], {"0": torch.ones(1), "1": torch.zeros(1)}),
    "A1111": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 3)}, "name": "dog", "step": 9},
        {"string_to_param": {"*": torch.ones(2, 3)}},
    ),
    "A1111, old": (
        {"string_to_param": torch.nn.ParameterDict({"x": torch.ones(2, 3)})},
        {"string_to_param": {"x": torch.ones(2, 3)}},
    ),
    "slashes": ({"a/b": {"c/d": torch.ones(1)}}, {"a/b": {"c/d": torch.ones(1)}}),
}


@pytest.mark.parametrize("kind", NESTED)
def test_tables_within_tables_come_back(tmp_path: Path, kind: str) -> None:
    given, wanted = NESTED[kind]
    rewrite(pickled(tmp_path, given), tmp_path / "x.safetensors")
    assert same(content(tmp_path / "x.safetensors"), wanted)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "there is no tensor in it"),
        ({"a": 3}, "there is no tensor in it"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "has two tensors of one name: 1"),
        ({1: torch.ones(1), "1": {"x": torch.ones(1)}}, "has a tensor and a table of one name: 1"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "a is a tensor of an odd kind"),
        ({"a": torch.eye(2).to_sparse()}, "a is a tensor of an odd kind|damaged"),
        (torch.nn.Linear(2, 2), "was refused: it asks for torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        rewrite(pickled(tmp_path, value), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("raw", [b"PK\x03\x04 cut off", b"\x80\x02 cut off", pickle.dumps({"a": 1})])
def test_damaged_pickles(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(raw)
    with pytest.raises(WeightsError, match="x.ckpt cannot be read: it is damaged, or holds no weights of PyTorch"):
        rewrite(tmp_path / "x.ckpt", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x10\0\0\0\0\0\0\0{}              ", "is a safetensors file under another name; rename it to x.safetensors"),
    ],
)
def test_what_is_no_pickle_starts_no_child(tmp_path: Path, raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pickles.subprocess, "run")
    (tmp_path / "x.ckpt").write_bytes(raw)
    with pytest.raises(WeightsError, match=message):
        unpickle(tmp_path / "x.ckpt", tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        unpickle(tmp_path / "y.ckpt", tmp_path)
