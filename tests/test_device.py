"""In what memory things run."""

import subprocess
import sys

import torch

from minidiff.device import keep_memory, peak_memory

MIB = 2**20


def test_the_peak_is_this_process_s_own() -> None:
    """And not that of the one that started it, which is here a large one."""
    large = torch.ones(100 * MIB)  # 400 MiB
    ours = peak_memory("cpu")
    said = subprocess.run(
        [sys.executable, "-c", "from minidiff.device import peak_memory; print(peak_memory('cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ours is not None and ours > large.nbytes
    assert 20 * MIB < int(said) < ours - 300 * MIB


def test_kept_memory_changes_no_number() -> None:
    before = torch.arange(5 * MIB).float().mean()
    keep_memory()
    assert torch.equal(torch.arange(5 * MIB).float().mean(), before)
