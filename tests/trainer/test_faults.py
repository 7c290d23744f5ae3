"""Every single file-system call of a run fails, or is the last thing that the process does. Then: what is visible is whole,
and the run goes on to the same bytes.

In "error" one call raises; in "full" that call and every later write raise, as on a full disk; in "death" the process ends
there, in the middle of a write if it is one. pytest starts this file as a program, which forks for each attempt: everyday
one call in 61, with `pytest -m slow` each.
"""

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_harness import NUMBERS, check_whole, fingerprint, memory_path, rows  # noqa: F401

from minidiff.core.errors import MinidiffError
from minidiff.trainer import checkpoint

WRITES = {"open", "write", "mkdir", "fsync"}  # what a full disk refuses; unlink and rename still work
DIED, REFUSED = 9, 2  # exit codes


class Fault:
    """Counts file-system calls, and breaks at number `k`. `install` replaces Python's calls by ones that count."""

    def __init__(self, k: int, mode: str) -> None:
        self.k, self.mode, self.calls, self.on = k, mode, 0, False

    def install(self, patch: Callable[[Any, str, Any], None]) -> None:
        for name in "fsync rename replace mkdir unlink rmdir".split():
            patch(os, name, self.counted(name, getattr(os, name)))
        opens = self.opened(io.open)
        patch(io, "open", opens), patch(builtins, "open", opens)
        patch(os, "open", self.counted("open for reading", os.open))
        patch(shutil, "rmtree", self.counted("rmtree", shutil.rmtree))

    def call(self, name: str, before_death: Callable[[], object] = lambda: None) -> None:
        self.calls += self.on
        if not self.on or self.calls < self.k:
            return
        if self.mode == "death":
            before_death()
            os._exit(DIED)
        if self.calls == self.k or (self.mode == "full" and name in WRITES):
            raise OSError(28, "No space left on device")

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.call(name)
            return real(*args, **kwargs)

        return call

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            self.call("open" if writes else "open for reading")
            opened = real(file, mode, *args, **kwargs)
            return Written(opened, self) if writes else opened

        return call


class Written:
    """A file of which each write is a call that can break, half of it done."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self.file, self.fault = file, fault

    def write(self, data: Any) -> Any:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.fault.call("write", half)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


# --- one save, in this process ---------------------------------------------------------------------------------------


def save(folder: Path, step: int, keep: int | None = None) -> Path:
    tensors = {"weights": {"w": torch.full((3,), float(step))}, "optimizer": {"0.step": torch.tensor(float(step))}}
    export: Callable[[Path], object] = lambda folder: (folder / "adapter.bin").write_bytes(b"the result")  # noqa: E731
    return checkpoint.save(folder, step, tensors, {"seed": 1}, export, keep)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["error", "full"])
def test_a_save_that_fails_leaves_the_old_ones(tmp_path: Path, mode: str) -> None:
    before, folder = tmp_path / "before", tmp_path / "run"
    for step in (1, 2):
        save(before, step)
    k, failed = 0, 0
    while True:
        k += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(k, mode)
            fault.install(patch.setattr)
            fault.on = True
            try:
                save(folder, 3, keep=2)
            except OSError:
                failed += 1
            fault.on = False
        left = checkpoint.checkpoints(folder)
        assert check_whole(folder) >= 2 and left[-1].name in ("checkpoint-2", "checkpoint-3")
        checkpoint.prune(folder, 2, 3)  # whatever comes next sweeps up
        assert sorted(folder.iterdir()) == sorted(left[-2:])
        if fault.calls < k:
            break
    assert failed > 40


# --- a whole run, in a fork ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_every_call_of_a_run(memory_path: Path, stride: int) -> None:  # noqa: F811
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(memory_path), str(stride)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = json.loads(done.stdout)
    assert told["calls"] > 150 and min(told["ends"].values()) >= told["calls"] // stride // 2
    print(done.stdout)


def in_child(folder: Path, fault: Fault | None, report: Path) -> int:
    """One session; its exit code: 0 finished, 2 refused with a message, 9 died, 1 a bug."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stderr = open(os.devnull, "w")
    try:
        if fault:
            fault.install(setattr)
            fault.on = True
        NUMBERS.run(folder)
        if fault:
            fault.on = False
            report.write_text(str(fault.calls))
    except (MinidiffError, OSError):  # which the command line puts into words
        os._exit(REFUSED)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        os._exit(1)
    os._exit(0)


def main(home: Path, stride: int) -> None:
    import minidiff.trainer.run as run

    torch.set_num_threads(1)
    run.loss_curve = lambda metrics, path: None  # matplotlib would be most of the time
    report, straight = home / "calls", home / "straight" / "run"
    NUMBERS.run(home / "warm")  # what torch imports late is then there in every fork
    assert in_child(straight, Fault(10**9, "error"), report) == 0
    calls, good, good_rows = int(report.read_text()), fingerprint(straight), rows(straight)
    ends = dict.fromkeys(("error", "full", "death"), 0)
    for mode in ends:
        for k in range(1, calls + 1, stride):
            folder = home / mode / str(k) / "run"
            code = in_child(folder, Fault(k, mode), report)
            assert code in (0, DIED if mode == "death" else REFUSED), f"call {k} of {calls}, {mode}: exit code {code}"
            ends[mode] += code != 0
            check_whole(folder)
            assert in_child(folder, None, report) == 0, f"call {k}, {mode}: could not be resumed"
            differ = fingerprint(folder).items() ^ good.items()
            assert not differ and rows(folder) == good_rows, f"call {k}, {mode}: another result {differ}"
            shutil.rmtree(folder.parent)
    print(json.dumps({"calls": calls, "ends": ends}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
