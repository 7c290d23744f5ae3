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


CHILD = """
import re, torch
from minidiff.fast import memory

def resident():
    with open("/proc/self/status") as status:
        return int(re.search("VmRSS: *(.*) kB", status.read().replace("\\t", " "))[1]) // 1024

print(memory.peak_memory("cpu") // 2**20)
for keep in (False, True):
    memory.keep_memory(keep)
    before = resident()
    tensors = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
    peak = resident()
    pins = [torch.ones(2**10) for _ in range(50)]  # which may lie behind them
    del tensors
    print(peak - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_peak_is_this_process_s_own_and_what_tensors_leave() -> None:
    """Not that of the process that started it, here a large one. Memory is given back, or kept for the next tensors."""
    large = torch.ones(100 * MIB)  # 400 MiB
    ours = peak_memory("cpu")
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    own, peak, left, peak_again, kept = map(int, said.split())
    assert ours is not None and ours > large.nbytes and 20 < own < ours // MIB - 300
    assert 150 < peak < 300 and left < 50
    assert 150 < peak_again < 300 and 150 < kept < 300
