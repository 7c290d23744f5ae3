"""--device on a Mac, with a fake GPU: a CPU under the name mps that refuses fp64, as Metal does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError
from minidiff.draw.device import chosen_device
from minidiff.draw.images import read_png_text
from minidiff.draw.pipeline import StableDiffusionPipeline


class FakeMetal(TorchFunctionMode):
    """Runs on the CPU what asks for mps, and counts."""

    moved = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            apple = isinstance(value, str | torch.device) and str(value).startswith("mps")
            self.moved += apple
            return "cpu" if apple else value

        if function.__name__ == "_parse_to":  # of nn.Module.to, which then moves each tensor
            return function(*args, **(kwargs or {}))
        before = self.moved
        out = function(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})
        if self.moved > before and isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return out


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def test_a_mac_s_gpu_is_chosen_by_itself(a_mac: None) -> None:
    assert [chosen_device(name) for name in (None, "mps", "cpu")] == ["mps", "mps", "cpu"]
    with pytest.raises(SettingsError, match="no GPU"):
        chosen_device("cuda")


def test_elsewhere_it_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert chosen_device(None) == "cpu"
    with pytest.raises(SettingsError, match="--device mps is no device; it can be cpu"):
        chosen_device("mps")


def test_the_fake_refuses_fp64() -> None:
    with FakeMetal(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64).to("mps")


@pytest.mark.parametrize("dtype", ["float32", None])
def test_drawing_on_a_mac(
    dtype: str | None, a_mac: None, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 the CPU's picture; by default in fp16. From a picture, too."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save("start.png")
    flags = ["--pretrained_model_name_or_path", str(tiny_folder), "--num_inference_steps", "2"]
    flags += ["--torch_dtype", dtype] if dtype else []
    for more in ([], ["--image", "start.png"], ["--sampler", "unipc", "--use_karras_sigmas", "True"]):
        main(["sample", "a dog", *flags, *more, "--device", "cpu", "--output", "cpu.png"])
        with FakeMetal() as metal:
            main(["sample", "a dog", *flags, *more, "--output", "mps.png"])
        assert metal.moved > 100
        if dtype:
            assert Image.open("cpu.png").tobytes() == Image.open("mps.png").tobytes()
        else:
            assert '"dtype":"float16"' in read_png_text("mps.png")["minidiff"]


def test_training_on_a_mac(a_mac: None, tiny_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    files = []
    for device in ("cpu", None):
        flags = [
            "--instance_data_dir",
            str(tmp_path),
            "--instance_prompt",
            "a dog",
            "--output_dir",
            str(tmp_path / f"{device}"),
        ]
        flags += ["--pretrained_model_name_or_path", str(tiny_folder), "--max_train_steps", "2", "--validation_steps", "0"]
        with FakeMetal() as metal:
            main(["train", "lora", *flags, *(["--device", device] if device else [])])
        files.append(tmp_path / f"{device}" / "pytorch_lora_weights.safetensors")
        assert (metal.moved > 100) == (device is None)
    cpu, mps = map(load_file, files)
    assert cpu.keys() == mps.keys() and all(torch.equal(cpu[key], mps[key]) for key in cpu)


def test_what_metal_lacks_falls_back() -> None:
    """The variable has to be there before torch is imported."""
    code = (
        "import os; from minidiff.cli.main import main; main(['--version']); print(os.environ['PYTORCH_ENABLE_MPS_FALLBACK'])"
    )
    clean = {key: value for key, value in os.environ.items() if "MPS" not in key}
    for environment, wanted in ((clean, "1"), (clean | {"PYTORCH_ENABLE_MPS_FALLBACK": "0"}, "0")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == wanted


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    with pytest.raises(SettingsError, match=r'to\("cuda"\): there is no GPU'):
        pipe.to("cuda")
