"""kill -9 at random moments of a real LoRA training, and the adapter still comes out the same to the byte.

pytest starts this file as a program of its own. That program prepares one tiny LoRA task, then forks a child for each
attempt, so that a kill costs milliseconds and not an import of torch. `pytest -m slow` kills 50 times instead of 12.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import tiny_folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(kills)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{kills} kills" in done.stdout
    print(done.stdout)


def in_child(what: "Attempt", after: float | None) -> int:
    """Run `what` in a fork; kill it `after` so many seconds. The wait status."""
    child = os.fork()
    if child == 0:
        try:
            what.run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


class Attempt:
    def __init__(self, home: Path) -> None:
        from minidiff.train.recipes import lora
        from minidiff.train.settings import LoRASettings

        pictures = home / "pictures"
        pictures.mkdir()
        for i, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (16, 16), colour).save(pictures / f"{i}.png")
        self.settings = LoRASettings(
            pretrained_model_name_or_path=str(tiny_folder(home)),
            instance_data_dir=str(pictures),
            instance_prompt="a sks dog",
            output_dir=str(home / "straight"),
            resume_from_checkpoint="latest",
            max_train_steps=12,
            checkpointing_steps=1,
            validation_steps=0,
            train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler="cosine",
            proportion_empty_prompts=0.2,
        )
        self.task = lora(self.settings)

    def to(self, folder: Path) -> "Attempt":
        self.settings = replace(self.settings, output_dir=str(folder))
        return self

    def run(self) -> None:
        import minidiff.train.loop as loop

        loop.loss_curve = lambda metrics, path: None  # matplotlib would be most of the time
        loop.fit(self.task, self.settings)


def check_whole(folder: Path) -> int:
    """Every visible checkpoint verifies; how many there are."""
    from minidiff.train import checkpoint

    visible = [checkpoint.verify(path) for path in checkpoint.checkpoints(folder)] if folder.exists() else []
    return len(visible)


def main(home: Path, kills: int) -> None:
    from minidiff.train.loop import read_metrics

    torch.set_num_threads(1)
    attempt = Attempt(home)
    began = time.perf_counter()
    assert in_child(attempt, None) == 0
    whole_run = time.perf_counter() - began
    straight = (home / "straight" / "pytorch_lora_weights.safetensors").read_bytes()

    draw, killed, finished, seen = random.Random(0), 0, 0, 0
    while killed < kills or finished == 0:
        run = home / f"run{finished}"
        last = killed >= kills  # enough: let this one come to its end
        status = in_child(attempt.to(run), None if last else draw.uniform(0, whole_run / 3))
        seen += check_whole(run)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert status == 0
        assert (run / "pytorch_lora_weights.safetensors").read_bytes() == straight
        assert [row["step"] for row in read_metrics(run)] == list(range(1, 13))
        finished += 1
    print(f"{killed} kills, {finished} runs finished, {seen} checkpoints verified, {whole_run:.2f} s a run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
