"""kill -9 at random moments of real trainings, and the results still come out the same to the byte.

pytest starts this file as a program of its own. That program prepares each task once, then forks a child for each attempt,
so that a kill costs milliseconds and not an import of torch. `pytest -m slow` kills every method, 200 times in all.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_harness import NUMBERS, Case, check_whole, draw_pictures, fingerprint, memory_path, picture_case, rows  # noqa: F401
from tiny_model import tiny_folder
from tiny_recipes import METHODS, tiny
from tqdm import tqdm

from minidiff.trainer.recipes import RECIPES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(memory_path: Path, kills: int) -> None:  # noqa: F811
    command = [sys.executable, __file__, str(memory_path), str(kills)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"in all {kills} kills" in done.stdout
    print(done.stdout)


def cases(home: Path, every: bool) -> dict[str, Case]:
    """What is killed: a task without pictures, one that reads them at every step, and recipes on the tiny model.

    All go without threads: OpenMP, as a fork finds it, does not always let a new thread compute.
    """
    folder, base = draw_pictures(home / "data"), tiny_folder(home)
    from_pictures = picture_case(folder).changed(gradient_accumulation_steps=3, use_ema=True)
    todo = {"numbers": NUMBERS.changed(max_train_steps=30), "pictures": from_pictures} if every else {}
    often = {
        "max_train_steps": 8 if every else 4,
        "checkpointing_steps": 1,
        "lr_scheduler": "cosine",
        "proportion_empty_prompts": 0.2,
    }
    for i, method in enumerate(METHODS if every else ["pivotal"]):
        settings = tiny(method, base, folder, home / "unused", **often)
        case = Case(RECIPES[type(settings)], settings)
        todo[method] = case.changed(gradient_accumulation_steps=1 + i % 2, use_ema=i % 3 == 0)
    return todo


def in_child(case: Case, folder: Path, after: float | None) -> int:
    """One session in a fork, killed `after` so many seconds; the wait status."""
    child = os.fork()
    if child == 0:
        try:
            tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and stays locked if its holder is killed
            sys.stderr = open(folder.parent / "log.txt", "a")
            case.run(folder)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def kill_often(case: Case, home: Path, kills: int, draw: random.Random) -> str:
    """Run after run, each killed and gone on with until it comes to its end."""
    (home / "straight").mkdir(parents=True)
    began = time.perf_counter()
    assert in_child(case, home / "straight" / "run", None) == 0
    whole_run = time.perf_counter() - began
    good, good_rows = fingerprint(home / "straight" / "run"), rows(home / "straight" / "run")

    killed, finished, seen = 0, 0, 0
    while killed < kills or finished == 0:
        folder = home / str(finished) / "run"
        folder.parent.mkdir(exist_ok=True)
        last = killed >= kills  # enough: let this one come to its end
        status = in_child(case, folder, None if last else draw.uniform(0, whole_run / 3))
        seen += check_whole(folder)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert status == 0
        assert fingerprint(folder) == good and rows(folder) == good_rows
        finished += 1
    return f"{killed} kills, {finished} runs finished, {seen} checkpoints verified, {whole_run:.2f} s a run"


def main(home: Path, kills: int) -> None:
    import minidiff.trainer.run as run

    torch.set_num_threads(1)
    run.loss_curve = lambda metrics, path: None  # matplotlib would be most of the time
    todo, draw = cases(home, every=kills >= 100), random.Random(0)
    NUMBERS.run(home / "warm")  # what torch imports late is then there in every fork
    for i, (name, case) in enumerate(todo.items()):
        share = kills // len(todo) + (i < kills % len(todo))
        task = case.make(replace(case.settings, output_dir=str(home / name)))  # once: loading takes longer than training
        prepared = replace(case, make=lambda settings, task=task: task)
        print(f"{name}: {kill_often(prepared, home / name, share, draw)}", flush=True)
    print(f"in all {kills} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
