"""In what memory things run."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from minidiff.core.errors import SettingsError
from minidiff.draw.device import chosen_device
from minidiff.fast.memory import keep_memory, machine_memory, peak_memory
from minidiff.trainer.run import deterministic

MIB = 2**20


def test_the_peak_is_this_process_s_own() -> None:
    """And not that of the one that started it, which is here a large one."""
    large = torch.ones(100 * MIB)  # 400 MiB
    ours = peak_memory("cpu")
    said = subprocess.run(
        [sys.executable, "-c", "from minidiff.fast.memory import peak_memory; print(peak_memory('cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ours is not None and ours > large.nbytes
    assert 20 * MIB < int(said) < ours - 300 * MIB


def test_the_machine_has_more_than_this_process() -> None:
    there, ours = machine_memory(), peak_memory("cpu")
    assert there is None or (ours is not None and ours < there)


def test_kept_memory_changes_no_number() -> None:
    before = torch.arange(5 * MIB).float().mean()
    keep_memory()
    assert torch.equal(torch.arange(5 * MIB).float().mean(), before)


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert [chosen_device(name) for name in (None, "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert current == ["cuda:1"]
    with pytest.raises(SettingsError, match="cuda:2 is no device; it can be cpu, cuda, cuda:0, cuda:1"):
        chosen_device("cuda:2")


@pytest.mark.parametrize("in_use", [False, True])
def test_a_gpu_repeats_itself(monkeypatch: pytest.MonkeyPatch, in_use: bool) -> None:
    """Strictly, where cuBLAS could still be set up for it: attention's backward looks at nothing less. And back again."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: in_use)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: nullcontext())

    def modes() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    assert chosen_device("cuda") == "cuda" and modes() == (False, False)
    with deterministic("cuda"):
        assert modes() == (True, in_use)
    assert modes() == (False, False) and ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is not in_use


LEFT = """
import re, torch
from minidiff.fast import memory
memory.keep_memory({})
def resident():
    with open("/proc/self/status") as status:
        return int(re.search("VmRSS: *(.*) kB", status.read().replace("\\t", " "))[1]) // 1024
before = resident()
tensors = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
peak = resident()
pins = [torch.ones(2**10) for _ in range(50)]  # which may lie behind them
del tensors
print(peak - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize("keep, left", [(True, range(150, 300)), (False, range(50))])
def test_what_tensors_leave(keep: bool, left: range) -> None:
    """Kept for the next ones, or given back."""
    command = [sys.executable, "-c", LEFT.format(keep)]
    peak, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 150 < peak < 300 and after in left
