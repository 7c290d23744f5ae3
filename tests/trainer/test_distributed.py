"""Two processes train as one, on CPUs. pytest starts this file as a program: everyday with forks, if slow with torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from resume_harness import NUMBERS, Case, check_whole, fingerprint, numbers, rows
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.files.weights import read_header
from minidiff.trainer import distributed
from minidiff.trainer.distributed import World
from minidiff.trainer.settings import TrainSettings
from minidiff.trainer.task import Job

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's gloo is tested on Linux and macOS")
SLOW_STEP = 0.05  # seconds, where a test wants to come in between


def linear(settings: TrainSettings) -> Job:
    """`numbers` without dropout, which each process draws for itself."""
    task = numbers(settings)
    task.modules["model"].eval()
    return task


def with_incident(settings: TrainSettings, incident: str) -> Job:
    """`linear`, slowly, and with something that happens to one process in the fourth update."""
    task = linear(settings)
    plain, world = task.loss, distributed.world()

    def loss(batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        time.sleep(SLOW_STEP)
        assert len(batch["x"]) == settings.train_batch_size // world.size
        if (step, world.rank) == (3, 1) and incident == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if (step, world.rank) == (3, 1) and incident == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if (step, world.rank) == (3, 1) and incident == "error":
            raise SettingsError("process 1 has had enough")
        return plain(batch, step, micro) * (float("nan") if (incident, world.rank) == ("nan", 1) else 1.0)

    return replace(task, loss=loss)


CASE = Case(linear, replace(NUMBERS.settings, lr_scheduler="cosine", gradient_accumulation_steps=2))


def one_process(folder: Path, incident: str) -> int:
    """One of the two; its exit code."""
    import minidiff.trainer.run as run

    run.loss_curve = lambda metrics, path: None  # matplotlib would be most of the time
    try:
        with distributed.joined("cpu") as world:
            print(f"I am process {world.rank}")
            report = Case(lambda settings: with_incident(settings, incident), CASE.settings).run(folder)
    except MinidiffError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        return 2
    return 0 if report.finished else 130


def two_forks(home: Path, incident: str) -> list[int]:
    """Two processes in the environment that torchrun gives; quicker, as torch is imported once. Their exit codes."""
    children, environment = [], {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    home.mkdir()
    for rank in ("0", "1"):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {**environment, "RANK": rank, "LOCAL_RANK": rank}
            sys.stdout, sys.stderr = (open(home / f"{name}{rank}", "w", buffering=1) for name in ("out", "err"))
            code = 1
            try:
                code = one_process(home / "run", incident)
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def program(*command: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """This file, run with Python's arguments `command` before and after it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert expect is None or done.returncode == expect, done.stderr[-4000:]
    return done


@dataclass(frozen=True)
class Ended:
    """How two processes ended, and what they said."""

    folder: Path
    codes: list[int]
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All incidents."""
    home = tmp_path_factory.mktemp("two")
    codes = json.loads(program(__file__, str(home)).stdout)

    def said(incident: str, name: str) -> str:
        return "".join((home / incident / f"{name}{rank}").read_text() for rank in "01")

    return {i: Ended(home / i / "run", codes[i], said(i, "out"), said(i, "err")) for i in codes}


def result(folder: Path) -> dict[str, Tensor]:
    return read_header(folder / "model.safetensors").read()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert CASE.run(folder).finished
    return folder


def check_same_run(folder: Path, straight: Path) -> None:
    """The same files; weights to 1e-6, and all other numbers with them."""
    assert fingerprint(folder).keys() == fingerprint(straight).keys()
    for name, tensor in result(straight).items():
        assert torch.allclose(result(folder)[name], tensor, rtol=0, atol=1e-6)
    for mine, theirs in zip(rows(folder), rows(straight), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_two_processes_are_one(ended: dict[str, Ended], straight: Path) -> None:
    two = ended["none"]
    assert two.codes == [0, 0], two.err
    check_same_run(two.folder, straight)
    assert two.out == "I am process 0\n" and two.err.count("no checkpoint yet") == 1  # the other one keeps quiet
    manifest = json.loads((two.folder / "checkpoint-6" / "manifest.json").read_text())
    assert manifest["environment"]["processes"] == 2


INCIDENTS = [
    ("signal", [130, 130], "Stopped after 4 updates"),
    ("kill", [2, -signal.SIGKILL], "Process 0 of 2 stops, as another process of this run has ended"),
    ("error", [2, 2], "process 1 has had enough"),
]


@pytest.mark.parametrize("incident, codes, message", INCIDENTS)
def test_what_happens_to_one_happens_to_all(
    ended: dict[str, Ended], straight: Path, incident: str, codes: list[int], message: str
) -> None:
    """None hangs; what is saved is whole; one process alone goes on from there, to the result of one that never stopped."""
    two = ended[incident]
    assert two.codes == codes and message in two.err
    assert check_whole(two.folder) == (2 if incident == "signal" else 1)
    assert CASE.run(two.folder).finished
    check_same_run(two.folder, straight)


def test_a_share_that_is_not_finite(ended: dict[str, Ended]) -> None:
    """Both skip the same updates, and both end."""
    two = ended["nan"]
    assert two.codes == [2, 2] and two.err.count("3 updates in a row without a finite loss") == 2


@pytest.mark.slow
@pytest.mark.parametrize("incident, message", [("none", ""), *((name, message) for name, _, message in INCIDENTS)])
def test_torchrun(tmp_path: Path, straight: Path, incident: str, message: str) -> None:
    folder = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = program(*launch, __file__, str(folder), incident, expect=0 if incident == "none" else 1)
    assert message in done.stderr
    assert check_whole(folder) >= 1
    if incident == "none":
        check_same_run(folder, straight)


# --- in this process -------------------------------------------------------------------------------------------------


def test_shares_put_together_are_the_batch() -> None:
    batch = {"x": torch.arange(8.0).view(4, 2), "pairs": torch.arange(8), "anchor": torch.tensor(3.0)}
    shares = [World(rank, 2).share(batch, 4) for rank in (0, 1)]
    assert torch.equal(torch.cat([s["x"] for s in shares]), batch["x"])
    assert [s["pairs"].tolist() for s in shares] == [[0, 1, 4, 5], [2, 3, 6, 7]]  # half of each half
    assert all(s["anchor"].item() == 3 for s in shares)
    assert torch.equal(World().share(batch, 4)["x"], batch["x"])


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(SettingsError, match="--train_batch_size 5 is for all 2 processes together; give a multiple of 2"):
        World(0, 2).check(TrainSettings(train_batch_size=5))
    with pytest.raises(SettingsError, match="give a multiple of 4"):
        World(3, 4).check(TrainSettings(train_batch_size=1))
    World(0, 2).check(TrainSettings(train_batch_size=4))


def test_alone_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.joined(None) as world:
        assert world == distributed.world() == World(0, 1)
        assert world.any(True) and not world.any(False)


@pytest.mark.parametrize(
    "device, together, message",
    [(None, "3", "3 processes, and there are 2 GPUs: --nproc_per_node 2"), ("cuda:1", "2", "--device cuda:1: torchrun")],
)
def test_processes_and_gpus(monkeypatch: pytest.MonkeyPatch, device: str | None, together: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", together), ("LOCAL_WORLD_SIZE", together), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message), distributed.joined(device):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun
        sys.exit(one_process(Path(sys.argv[1]), sys.argv[2]))
    incidents = ("none", "signal", "kill", "error", "nan")
    NUMBERS.run(Path(sys.argv[1]) / "warm")  # what torch imports late is then there in every fork
    print(json.dumps({incident: two_forks(Path(sys.argv[1]) / incident, incident) for incident in incidents}))
