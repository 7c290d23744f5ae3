"""`minidiff inspect`: what it says of every kind of file, sound or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from random_adapters import EVERY, random_adapter
from torch import Tensor

from minidiff.cli.main import main
from minidiff.core.errors import WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.draw.images import save_png
from minidiff.files.inspect import as_text, inspect, trigger_words
from minidiff.files.lora_file import save_lora
from minidiff.files.model import ModelParts, ldm_tensors, read_model
from minidiff.files.weights import is_pickle, save
from minidiff.files.word_file import save_embedding

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> ModelParts:
    """For reading only."""
    return read_model(tiny_folder)


@pytest.fixture(scope="module")
def modules(model: ModelParts) -> dict[str, LoRAWeights]:
    return random_adapter(model.adaptable, 1, targets=EVERY)


def facts(path: Path) -> dict[str, Any]:
    (report,) = inspect(path)
    return report


def tensor_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save(tensors, path, metadata)
    return path


# --- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_lora(modules: dict[str, LoRAWeights], model: ModelParts, tmp_path: Path, style: str) -> None:
    about = {"modelspec.trigger_phrase": "a photo of a sks dog", "trigger": "sks"}
    path = save_lora(modules, tmp_path / "a.safetensors", style, torch.float16, about)
    found, text = facts(path), as_text(inspect(path)[0])
    assert found["is"] == f"a LoRA in the {style} style for an unknown model (cross-attention width 24)"
    count = sum(name.startswith("unet.") for name in modules)
    assert found["layers"][0].startswith(f"{count} of the U-Net: rank 2, alpha 3 (conv, conv1, conv2, ")
    assert found["layers"][1].startswith("12 of the text encoder: rank 2, alpha 3 (fc1, fc2, k_proj, ")
    tensors = len(modules) * (3 if style == "kohya" else 2)
    assert "problem" not in found
    assert found["trigger words"] == ["sks"] and found["prompt"] == "a photo of a sks dog" and "never trained" not in found
    assert f"{path.stat().st_size:,} bytes; {tensors} tensors of" in found["size"] and "float16" in found["size"]
    lines = text.splitlines()
    assert lines[0] == str(path) and len({line.find(line.split("  ", 2)[2].strip()) for line in lines[1:3]}) == 1


def test_lora_for_sd15_by_its_width(tmp_path: Path) -> None:
    key = NAME.replace("attn1.to_q", "attn2.to_k")
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 768), f"{key}.lora_B.weight": torch.ones(8, 2)}
    assert facts(tensor_file(tmp_path / "a.safetensors", tensors))["is"] == (
        "a LoRA in the diffusers style for SD 1.x (cross-attention width 768)"
    )


PAIR = {f"{NAME}.lora_A.weight": torch.ones(2, 32), f"{NAME}.lora_B.weight": torch.ones(32, 2)}
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_PAIR = {f"{STEM}.lora_down.weight": torch.ones(2, 32), f"{STEM}.lora_up.weight": torch.ones(32, 2)}
OTHER = NAME.replace("to_q", "to_k")


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (PAIR | {f"{NAME}.lora_A.weight": torch.full((2, 32), torch.nan)}, f"{NAME}.lora_A.weight has NaN or infinite values"),
        (PAIR | {"strange": torch.ones(2)}, "2 of 3 tensors have the names of an SD adapter"),
        (PAIR | {f"{OTHER}.lora_A.weight": torch.ones(2, 32)}, "and not the other half"),
        (PAIR | {f"{OTHER}.lora_{x}.weight": torch.ones(2, 16) for x in "AB"}, "the shapes do not fit each other"),
        (KOHYA_PAIR | {f"{STEM}.alpha": torch.tensor(-1.0)}, "it must be a positive number"),
        (KOHYA_PAIR | {f"{STEM}.alpha": torch.tensor(torch.nan)}, f"{STEM}.alpha has NaN"),
    ],
)
def test_a_damaged_file_is_described_too(tmp_path: Path, tensors: dict[str, Tensor], problem: str) -> None:
    found = facts(tensor_file(tmp_path / "a.safetensors", tensors))
    assert problem in found["problem"] and found["is"].startswith("a LoRA") and "tensors of" in found["size"]


def test_a_layer_that_was_never_trained_and_an_alpha_that_is_not_said(tmp_path: Path) -> None:
    zero = {f"{OTHER}.lora_A.weight": torch.ones(2, 32), f"{OTHER}.lora_B.weight": torch.zeros(32, 2)}
    found = facts(tensor_file(tmp_path / "a.safetensors", PAIR | zero))
    assert found["never trained"] == f"1 layers, where B is 0: {OTHER}"
    assert found["layers"] == ["2 of the U-Net: rank 2, alpha 2 (to_k, to_q)"]
    assert found["alpha"] == "not in the file; then it is the rank"


def test_dora_is_named(tmp_path: Path) -> None:
    weights = LoRAWeights(torch.ones(2, 32), torch.ones(32, 2), 1.0, torch.ones(32, 1))
    found = facts(save_lora({NAME: weights}, tmp_path / "a.safetensors"))
    assert found["is"].startswith("a DoRA in the diffusers style")
    assert found["layers"] == ["1 of the U-Net: rank 2, alpha 2, DoRA (to_q)"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (
            "lora_unet_mid_block_attentions_0_proj_in.lokr_w1",
            "unsupported adapter type LoKr; minidiff reads LoRA, LoCon and DoRA",
        ),
        ("unet:0:down", "0 of 1 tensors have the names of an SD adapter"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", ""),
    ],
)
def test_adapters_that_cannot_be_used(tmp_path: Path, key: str, problem: str) -> None:
    assert problem in facts(tensor_file(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}))["problem"]


def test_a_damaged_configuration_is_a_problem(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    save_lora({NAME: modules[NAME]}, tmp_path / "a", "peft")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in facts(tmp_path / "a")["problem"]


def test_trigger_words() -> None:
    tags = json.dumps({"10_dog": {"sks dog": 10, "grass": 4}, "5_dog": {"grass": 3}})
    assert trigger_words({"instance_prompt": "a sks dog", "ss_tag_frequency": tags}) == [
        "a sks dog",
        "most frequent in the captions: sks dog (10), grass (7)",
    ]
    for broken in ("{", "[]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 100_000):
        assert trigger_words({"ss_tag_frequency": broken}) == []


def test_names_and_texts_cannot_write_over_the_terminal(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {"\x1b[2Jfirst": torch.ones(2, 2, 2)}, {"title": "\x1b]0;owned\x07\x9b2J"})
    text = as_text(inspect(path)[0])
    assert r"\x1b[2Jfirst" in text and r"\x1b]0;owned\x07\x9b2J" in text and text.replace("\n", "").isprintable()


def test_long_metadata_is_not_printed(tmp_path: Path) -> None:
    about = {"ss_seed": "7", "ss_datasets": "x" * 5000}
    path = tensor_file(tmp_path / "a.safetensors", {"<dog>": torch.ones(1, 768)}, about)
    text = as_text(inspect(path)[0])
    assert "ss_datasets  (5,000 letters)" in text and "ss_seed      7" in text
    assert facts(path)["metadata"] == about


# --- textual inversion -------------------------------------------------------------------------------------------------


def test_textual_inversion(tmp_path: Path) -> None:
    path = save_embedding(tmp_path / "a.safetensors", "<dog>", torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "kohya")
    found = facts(path)
    assert found["is"] == "a textual inversion embedding of width 2"
    assert found["vectors"] == ["<dog>: 2 of width 2"]
    fitting = tensor_file(tmp_path / "b.safetensors", {"<a>": torch.ones(24), "<b>": torch.zeros(1, 24)})
    assert facts(fitting)["never trained"] == "1 words, whose vectors are 0: <b>"
    nan = tensor_file(tmp_path / "c.safetensors", {"<a>": torch.full((2, 24), torch.inf)})
    assert "<a> has NaN or infinite values" in facts(nan)["problem"]


@pytest.mark.parametrize("shape", [(0,), (0, 24), (2, 0)])
def test_an_empty_textual_inversion(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = facts(tensor_file(tmp_path / "x.safetensors", {"<dog>": torch.ones(shape)}))
    assert found["vectors"] == [f"<dog>: {(1, *shape)[-2]} of width {shape[-1]}"]


# --- models ------------------------------------------------------------------------------------------------------------


def test_model_folder(tiny_folder: Path) -> None:
    reports = inspect(tiny_folder)
    assert [report["is"] for report in reports] == [
        "a model folder in the diffusers layout",
        "an SD (cross-attention width 24) U-Net in the diffusers layout",
        "a VAE in the diffusers layout",
        "a CLIP text encoder of width 24",
    ]
    assert reports[0] == {
        "path": str(tiny_folder),
        "is": "a model folder in the diffusers layout",
        "pipeline": "StableDiffusionPipeline", "predicts": "epsilon", "sampler": "DDIMScheduler",
    }
    assert not any("problem" in report for report in reports)


def test_single_file(model: ModelParts, tmp_path: Path) -> None:
    save(ldm_tensors(model.unet, model.vae, model.text_encoder), tmp_path / "tiny.safetensors")
    found = facts(tmp_path / "tiny.safetensors")
    assert found["is"] == "an SD (cross-attention width 24) single file in the LDM layout" and "problem" not in found
    other = read_model(tmp_path / "tiny.safetensors", like=model.home)
    assert other.weights().keys() == model.weights().keys()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"conv_in.weight": (320, 9, 3, 3), "time_embedding.x": (1,)}, "inpainting U-Net in the diffusers layout"),
        ({"conditioner.embedders.0.x": (1, 2)}, "an SDXL single file"),
        ({"cond_stage_model.model.x": (1, 2)}, "an SD 2.x single file in the LDM layout"),
        ({"first_stage_model.decoder.conv_in.weight": (1, 2)}, "a VAE in the LDM layout"),
        ({"encoder.down.0.x.weight": (1, 2), "decoder.mid.y.weight": (1, 2)}, "a VAE in the LDM layout"),
        ({"a.b.weight": (1, 2, 3)}, 'nothing that minidiff knows: 1 tensors, the first is "a.b.weight"'),
    ],
)
def test_families(tmp_path: Path, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    assert said in facts(path)["is"]


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = {"decoder.mid_block.weight": torch.tensor([1.0, torch.nan]), "encoder.bias": torch.zeros(1)}
    assert "decoder.mid_block.weight has NaN" in facts(tensor_file(tmp_path / "x.safetensors", tensors))["problem"]


# --- files that are none -----------------------------------------------------------------------------------------------


def test_a_pickle_must_be_converted_first(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"a.ckpt is a PyTorch pickle .*: minidiff convert .*a.ckpt NEW.safetensors"):
        inspect(tmp_path / "a.ckpt")


def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {"a": torch.ones(1, 4)}, {"x": ""})
    missing = 0x80 - path.read_bytes()[0]
    tensor_file(path, {"a": torch.ones(1, 4)}, {"x": "y" * missing})
    assert path.read_bytes()[:1] == b"\x80" and not is_pickle(path.read_bytes())


def test_every_weight_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no .safetensors file"):
        inspect(tmp_path)
    for name in ("b", "a"):
        tensor_file(tmp_path / f"{name}.safetensors", {"a": torch.ones(1)})
    assert [Path(report["path"]).name for report in inspect(tmp_path)] == ["a.safetensors", "b.safetensors"]


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = save_embedding(tmp_path / "a.safetensors", "<dog>", torch.ones(1, 24))
    main(["inspect", str(path), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path)
    main(["inspect", str(tiny_folder)])
    assert capsys.readouterr().out.count("\n\n") == 3
    none, nameless = ["inspect", str(tmp_path / "none")], ["inspect", " "]
    for words, message in ((none, "none does not exist"), (nameless, "must name a file or folder")):
        with pytest.raises(SystemExit) as leave:
            main(words)
        assert leave.value.code == 2 and message in capsys.readouterr().err


def test_a_picture_says_how_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("made.png", {"parameters": "a dog\nSteps: 3"}), ("other.png", {})):
        save_png(Image.new("RGB", (8, 8)), tmp_path / name, text)
        main(["inspect", str(tmp_path / name)])
    said = capsys.readouterr().out
    assert "made with  a dog\n" in said and "Steps: 3" in said and "It does not say" in said


def test_what_travels_with_the_package_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "pocket-lcm"])
    assert 'pocket-lcm does not exist. Did you mean "checkpoints/pocket-lcm"?' in capsys.readouterr().err
