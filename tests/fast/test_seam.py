"""Fast classes are plugged in from outside: they can be removed again, and the whole folder can be deleted."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import EVERYWHERE, answer, digest, shake, tiny_unet
from tiny_recipes import draw_pictures

from minidiff import StableDiffusionPipeline, fast
from minidiff.cli.main import main
from minidiff.core.inject import inject

HIDE = """
# minidiff.fast cannot be imported
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("minidiff.fast"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
"""
# Draws with the pocket checkpoint and saves the picture; then the command line has its turn.
HIDDEN = f"""{HIDE}
import torch
from minidiff import StableDiffusionPipeline, attention
from minidiff.cli.main import main
assert attention.__module__ == "minidiff.core.attention"
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
torch.save(pipe("a photo of a red dog", seed=0, num_inference_steps=3, output_type="pt").images, "picture")
main(sys.argv[2:])
"""


@pytest.mark.parametrize("table", [fast.FAST, fast.ADAPTERS])
def test_install_then_remove_is_the_identity(table: fast.Classes) -> None:
    unet = tiny_unet()
    inject(unet, 2, targets=EVERYWHERE)
    shake(unet)
    types, bits, before = [type(m) for m in unet.modules()], digest(unet), answer(unet)
    fast.install(unet, table)
    assert [type(m) for m in unet.modules()] != types and digest(unet) == bits
    torch.testing.assert_close(answer(unet), before, atol=1e-5, rtol=1e-5)
    fast.remove(unet, table)
    assert [type(m) for m in unet.modules()] == types and digest(unet) == bits and torch.equal(answer(unet), before)


def test_every_fast_class_is_a_subclass_of_its_plain_one() -> None:
    for plain, quick in {**fast.FAST, **fast.CHECKPOINTED}.items():
        assert issubclass(quick, plain) and quick.__doc__


def test_installing_twice_and_copies() -> None:
    unet = tiny_unet()
    fast.install(unet)
    types = [type(m) for m in unet.modules()]
    fast.install(unet)
    assert [type(m) for m in copy.deepcopy(unet).modules()] == types


def test_plain_installs_nothing(tiny_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, plain=True)
    assert not [m for network in (pipe.unet, pipe.vae) for m in network.modules() if "fast" in type(m).__module__]


def test_without_the_folder_fast_pictures_and_lora_are_the_same(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture to 2e-4 in [-1, 1], which is 1e-4 in [0, 1]; a LoRA from the command line to 1e-5, and with --plain to the
    bit of the one without the folder."""
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    pocket = Path(__file__).parents[2] / "checkpoints" / "pocket"
    flags = ["train", "lora", "--pretrained_model_name_or_path", str(tiny_folder), "--instance_data_dir", "pictures"]
    flags += ["--instance_prompt", "a photo of a red dog", "--max_train_steps", "3", "--validation_steps", "0"]
    command = [sys.executable, "-c", HIDDEN, str(pocket), *flags, "--output_dir", "hidden"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    pipe = StableDiffusionPipeline.from_pretrained(pocket)
    there = pipe("a photo of a red dog", seed=0, num_inference_steps=3, output_type="pt").images
    assert float((torch.load("picture") - there).abs().max()) < 1e-4

    main([*flags, "--output_dir", "there"])
    main([*flags, "--output_dir", "plain", "--plain"])
    file = "pytorch_lora_weights.safetensors"
    weights, hidden, plain = (load_file(tmp_path / how / file) for how in ("there", "hidden", "plain"))
    for name, tensor in weights.items():
        torch.testing.assert_close(hidden[name], tensor, atol=1e-5, rtol=0)
        assert torch.equal(hidden[name], plain[name])
