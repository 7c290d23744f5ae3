"""How far a reader has to walk: the files and functions of minidiff that one call passes through.

    python tests/draw/test_trace.py     prints the walk of one picture

On one thread, with the pocket checkpoint. Functions and methods with a name count; lambdas and comprehensions are part of the
function around them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.trainer.recipes import lora
from minidiff.trainer.run import fit
from minidiff.trainer.settings import LoRASettings

PACKAGE = str(Path(minidiff.__file__).parent) + "/"
POCKET = Path(PACKAGE).parent / "checkpoints" / "pocket"
INSIDE = {"<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}  # part of the function around them


@dataclass
class Walk:
    """The functions that were entered, in the order of their first call: core/unet.py, UNet2DConditionModel.forward, ..."""

    places: list[tuple[str, str]] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.places))

    def before(self, file: str) -> "Walk":
        """The part before the first function of `file`."""
        return Walk(self.places[: [name for name, _ in self.places].index(file)])

    def without_fast(self) -> "Walk":
        """The walk without fast/, and without the file that plugs it in."""
        return Walk([place for place in self.places if not place[0].startswith(("fast/", "draw/speed"))])

    def __str__(self) -> str:
        lines = [f"{name}: {', '.join(f for file, f in self.places if file == name)}" for name in self.files]
        return "\n".join([*lines, f"{len(self.files)} files, {len(self.places)} functions"])


@contextmanager
def traced() -> Iterator[Walk]:
    """Records which functions under minidiff/ are entered inside the `with`."""
    walk, seen = Walk(), set[CodeType]()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in seen and code.co_filename.startswith(PACKAGE) and code.co_name not in INSIDE:
            seen.add(code)
            walk.places.append((code.co_filename.removeprefix(PACKAGE), code.co_qualname))

    sys.setprofile(look)
    try:
        yield walk
    finally:
        sys.setprofile(None)


def walk_of(call: Callable[[], object]) -> Walk:
    """The walk of a call that was made once before: what only the first call does, such as imports, is left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        with traced() as walk:
            call()
    finally:
        torch.set_num_threads(threads)
    return walk


def one_picture() -> Walk:
    """Two steps of dpm++_2m, with the progress bar, as `core` computes them."""
    pipe = StableDiffusionPipeline.from_pretrained(POCKET, plain=True)
    return walk_of(lambda: pipe("a photo of a red car", seed=0, num_inference_steps=2, sampler="dpm++_2m"))


def test_one_picture_passes_through_few_files() -> None:
    walk = one_picture()
    before = walk.before("core/unet.py")
    assert len(before.files) <= 8 and len(before.places) <= 40, f"before the U-Net:\n{before}"
    assert len(walk.files) <= 14, str(walk)


def one_lora_update(home: Path) -> Walk:
    """The second of three updates: the loop, the loss, the U-Net with its adapters, the optimizer, and what is written down."""
    dog = str(POCKET.parents[1] / "lessons" / "data" / "dog")
    given = {"instance_data_dir": dog, "instance_prompt": "a photo of a sks dog", "device": "cpu"}
    settings = LoRASettings(str(home / "run"), max_train_steps=3, validation_steps=0, train_batch_size=1, **given)
    job, tracing, found = lora(settings), ExitStack(), []
    plain = job.batch

    def batch(step: int, micro: int) -> dict[str, torch.Tensor]:
        if step == 1:
            found.append(tracing.enter_context(traced()))
        tracing.close() if step == 2 else None
        return plain(step, micro)

    job.batch = batch
    fit(job, settings)
    return found[0]


def test_one_lora_update_passes_through_few_files(tmp_path: Path) -> None:
    walk = one_lora_update(tmp_path).without_fast()
    assert len(walk.files) <= 20, str(walk)
    assert {"core/train.py", "core/recipes.py", "core/losses.py", "core/lora.py", "core/unet.py"} <= set(walk.files)


if __name__ == "__main__":
    walk = one_picture()
    print(walk, f"\nbefore the U-Net:\n{walk.before('core/unet.py')}", sep="\n")
