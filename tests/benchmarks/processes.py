"""What needs a process of its own: peak memory of a training step, loading a model, importing, `--help`.

    python -m benchmarks.processes '{"task": "lora", "contender": "P0", "folder": "checkpoints/pocket", …}'

does one such task and prints one line of JSON.
"""

import contextlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.timing import Seconds

TESTS = Path(__file__).resolve().parents[1]
P0 = "P0 diffusers + peft"

# --- the parent's side -----------------------------------------------------------------------------------------------


def python(words: Sequence[str]) -> tuple[Seconds, str]:
    """Run Python to its end: its time from start to end, its processor time with that of all its threads, and its output."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled already: minidiff after its first run
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], capture_output=True, text=True, env=environment, check=False
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), done.stdout


def child(**task: Any) -> dict[str, Any]:
    """One task, done elsewhere."""
    found: dict[str, Any] = json.loads(python(["-m", "benchmarks.processes", json.dumps(task)])[1].splitlines()[-1])
    return found


IMPORTS = {
    "minidiff": "from minidiff import StableDiffusionPipeline",
    "torch alone": "import torch",
    P0: "import peft; from diffusers import StableDiffusionPipeline",
}
HELP = {"minidiff": ["-m", "minidiff", "--help"], "Python alone": ["-c", "pass"]}


def imports(with_peers: bool) -> dict[str, Callable[[], Seconds]]:
    """What stands between a person and the first line of work."""
    chosen = {name: code for name, code in IMPORTS.items() if with_peers or name != P0}
    return {name: lambda code=code: python(["-c", code])[0] for name, code in chosen.items()}  # type: ignore[misc]


def helps() -> dict[str, Callable[[], Seconds]]:
    """`minidiff --help`, beside a Python that does nothing."""
    return {name: lambda words=words: python(words)[0] for name, words in HELP.items()}  # type: ignore[misc]


def loads(folder: str, with_peers: bool) -> dict[str, Callable[[], Seconds]]:
    """From a folder to a pipeline that is ready; imports are not counted, nor those of transformers'."""

    def load(contender: str) -> Seconds:
        found = child(task="load", contender=contender, folder=folder)
        return Seconds(found["wall"], found["cpu"])

    return {name: lambda name=name: load(name) for name in ("minidiff", P0) if with_peers or name != P0}  # type: ignore[misc]


# --- the child's side ------------------------------------------------------------------------------------------------


def load(task: dict[str, Any]) -> dict[str, float]:
    """Seconds until the pipeline is there."""
    if task["contender"] == "minidiff":
        import transformers

        from minidiff import StableDiffusionPipeline

        read: Callable[[str], Any] = StableDiffusionPipeline.from_pretrained
        _ = transformers.CLIPTextModel, transformers.CLIPTokenizer
    else:
        import diffusers
        import peft  # noqa: F401
        import transformers

        _ = transformers.CLIPTextModel, transformers.CLIPTokenizer
        diffusers.utils.logging.disable_progress_bar()
        theirs = diffusers.StableDiffusionPipeline
        read = lambda folder: theirs.from_pretrained(folder, local_files_only=True)  # noqa: E731
    wall, cpu = time.perf_counter(), time.process_time()
    read(task["folder"])
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


LEAN = "minidiff, savings that change no number"  # and memory used as under --fit


def training_peak(task: dict[str, Any]) -> dict[str, float | None]:
    """The peak of three steps of one contender: of the whole process, and of what it holds in the steps."""
    from benchmarks import peers, training
    from minidiff.fast.memory import keep_memory, peak_memory

    device, level = task["device"], task["contender"]
    if level.startswith("minidiff"):  # as the command does
        keep_memory(level != LEAN)
    size = training.Size("", Path(task["folder"]), task["side"], task["batch"])
    with tempfile.TemporaryDirectory() as folder:
        settings = training.settings_of(task["task"], size, Path(folder) / "run", device, task["precision"])
        if level.startswith("minidiff"):
            lean = {"gradient_checkpointing": True, "layerwise_casting": True} if level == LEAN else {}
            held = steps_of_ours(replace(settings, **lean))
        else:
            peer = peers.trainee(training.plan_of(task["task"], settings, size.side), level, compiled=False)
            with Held() as held:
                for step in range(3):
                    peer(random_batch(task["side"] // 8, task["batch"] * (2 if task["task"] == "dreambooth" else 1), step))
        return {"peak": peak_memory(device), "held": held.most if device == "cpu" else None}


def steps_of_ours(settings: Any) -> "Held":
    """Three steps of the real loop."""
    from benchmarks import training
    from minidiff.trainer.recipes import RECIPES
    from minidiff.trainer.run import fit

    made = RECIPES[type(settings)](settings)
    steps = iter(range(4))

    def batch(step: int, micro: int) -> Any:
        if next(steps) == 3:
            raise training.Enough
        return made.batch(step, micro)

    with Held() as held, contextlib.suppress(training.Enough):
        fit(replace(made, batch=batch), settings)
    return held


class Held:
    """The most that this process holds inside the `with`: of pages that the system cannot take back.

    Not counted are those of files, as of weights that are mapped and not changed: where memory is short they go, and are read
    again. Looked up a hundred times a second, on Linux; `most` is None elsewhere.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        status = Path("/proc/self/status")
        while status.exists() and not self.over.wait(0.01):
            found = re.search(r"^RssAnon:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
            if found:
                self.most = max(self.most or 0, int(found[1]) * 1024)

    def __enter__(self) -> "Held":
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watch.join()


def random_batch(side: int, count: int, seed: int) -> Any:
    """Latents, noise and timesteps: how much memory a step takes does not depend on what they are."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, 4, side, side, generator=draw)
    return {"latents": x[0], "noise": x[1], "t": torch.randint(1000, (count,), generator=draw)}


def main(task: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        found = load(task) if task["task"] == "load" else training_peak(task)
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
