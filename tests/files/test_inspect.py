"""`minidiff inspect`: what it says of every kind of file, sound or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import EVERY, random_adapter
from torch import Tensor

from minidiff.cli.main import main
from minidiff.core.errors import WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.files.inspect import find_file, inspect, rank_for, trigger_words
from minidiff.files.lora_file import save_lora
from minidiff.files.model import ModelParts, read_model, to_single_file
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


def facts(path: Path, model: ModelParts | None = None) -> dict[str, Any]:
    (report,) = inspect(path, model)
    return report.as_dict()


def tensor_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save(tensors, path, metadata)
    return path


# --- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_lora(modules: dict[str, LoRAWeights], model: ModelParts, tmp_path: Path, style: str) -> None:
    path = save_lora(modules, tmp_path / "a.safetensors", style, torch.float16, {"modelspec.trigger_phrase": "sks dog"})
    found, text = facts(path, model), str(inspect(path, model)[0])
    assert found["is"] == f"a LoRA in the {style} style for another model (cross-attention width 24)"
    count = sum(name.startswith("unet.") for name in modules)
    assert found["layers"][0].startswith(f"{count} of the U-Net: rank 2, alpha 3, alpha/rank 1.5 (conv, conv1, conv2, ")
    assert found["layers"][1].startswith("12 of the text encoder: rank 2, alpha 3, alpha/rank 1.5 (fc1, fc2, k_proj, ")
    tensors = len(modules) * (3 if style == "kohya" else 2)
    assert found["model"] == f"matches {tensors} of {tensors} tensors of the file"
    assert found["trigger words"] == ["sks dog"] and "not finite" not in found and "never trained" not in found
    assert f"{path.stat().st_size:,} bytes; {tensors} tensors of" in found["size"] and "float16" in found["size"]
    assert "99% of what ΔW does is in rank" in found["rank needed"] and "2 at most" in found["rank needed"]
    lines = text.splitlines()
    assert lines[0] == str(path) and len({line.find(line.split("  ", 2)[2].strip()) for line in lines[1:3]}) == 1


def test_how_much_of_the_rank_is_used() -> None:
    S = torch.tensor([3.0, 1.0, 0.1])
    assert [rank_for(S, energy) for energy in (0.5, 0.95, 0.9999)] == [1, 2, 3]
    assert rank_for(torch.zeros(3)) == 0


def test_lora_for_sd15_by_its_width(tmp_path: Path) -> None:
    key = NAME.replace("attn1.to_q", "attn2.to_k")
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 768), f"{key}.lora_B.weight": torch.ones(8, 2)}
    assert facts(tensor_file(tmp_path / "a.safetensors", tensors))["is"] == (
        "a LoRA in the diffusers style for SD 1.x (cross-attention width 768)"
    )


def test_what_is_wrong_is_named_and_not_refused(model: ModelParts, tmp_path: Path) -> None:
    good, nan = torch.ones(2, 32), torch.full((2, 32), torch.nan)
    to_k, to_v, alone = (NAME.replace("to_q", last) for last in ("to_k", "to_v", "to_out.0"))
    tensors = {
        f"{NAME}.lora_A.weight": nan,
        f"{NAME}.lora_B.weight": torch.ones(32, 2),
        f"{to_k}.lora_A.weight": good,
        f"{to_k}.lora_B.weight": torch.zeros(32, 2),
        f"{to_v}.lora_A.weight": torch.ones(2, 16),
        f"{to_v}.lora_B.weight": torch.ones(32, 2),
        f"{alone}.lora_A.weight": good,
        "strange": good,
    }
    found = facts(tensor_file(tmp_path / "a.safetensors", tensors), model)
    assert found["not finite"] == [f"{NAME}.lora_A.weight"]
    assert found["never trained"] == ["1 of 3 layers, where B is 0:", to_k]
    assert found["problems"][0] == "strange is no part of an adapter for SD"
    assert alone in found["problems"][1] and "and not the other half" in found["problems"][1]
    assert found["model"] == "matches 4 of 8 tensors of the file"
    assert found["layers"] == ["3 of the U-Net: rank 2, alpha not said (then it is the rank) (to_k, to_q, to_v)"]


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_an_alpha_that_cannot_be(tmp_path: Path, alpha: float) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(32, 2)}
    found = facts(tensor_file(tmp_path / "a.safetensors", tensors | {f"{stem}.alpha": torch.tensor(alpha)}))
    assert found.get("not finite") == ([f"{stem}.alpha"] if alpha != alpha else None)
    assert ("it must be a positive number" in str(found.get("problems"))) == (alpha == -1)


def test_dora_is_named(tmp_path: Path) -> None:
    weights = LoRAWeights(torch.ones(2, 32), torch.ones(32, 2), 1.0, torch.ones(32, 1))
    found = facts(save_lora({NAME: weights}, tmp_path / "a.safetensors"))
    assert found["is"].startswith("a DoRA in the diffusers style")
    assert found["layers"] == ["1 of the U-Net: rank 2, alpha 2, alpha/rank 1, DoRA (to_q)"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (
            "lora_unet_mid_block_attentions_0_proj_in.lokr_w1",
            "unsupported adapter type LoKr; minidiff reads LoRA, LoCon and DoRA",
        ),
        ("unet:0:down", "which counts layers and does not name them; minidiff does not read that"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", ""),
    ],
)
def test_adapters_that_cannot_be_used(tmp_path: Path, key: str, problem: str) -> None:
    assert problem in str(facts(tensor_file(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}))["problems"])


def test_a_damaged_configuration_is_a_problem(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    save_lora({NAME: modules[NAME]}, tmp_path / "a", "peft")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in facts(tmp_path / "a")["problems"][0]


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
    text = str(inspect(path)[0])
    assert r"\x1b[2Jfirst" in text and r"\x1b]0;owned\x07\x9b2J" in text and text.replace("\n", "").isprintable()


def test_long_metadata_is_not_printed(tmp_path: Path) -> None:
    about = {"ss_seed": "7", "ss_datasets": "x" * 5000}
    path = tensor_file(tmp_path / "a.safetensors", {"<dog>": torch.ones(1, 768)}, about)
    text = str(inspect(path)[0])
    assert "ss_datasets  (5,000 letters)" in text and "ss_seed      7" in text
    assert facts(path)["metadata"] == about


# --- textual inversion -------------------------------------------------------------------------------------------------


def test_textual_inversion(model: ModelParts, tmp_path: Path) -> None:
    path = save_embedding(tmp_path / "a.safetensors", "<dog>", torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "kohya")
    found = facts(path, model)
    assert found["is"] == "a textual inversion embedding of width 2"
    assert found["vectors"] == ["<dog>: 2 of width 2, lengths 5, 1"]
    assert found["model"] == "its text encoder is 24 wide: the vectors do not fit"
    fitting = tensor_file(tmp_path / "b.safetensors", {"<a>": torch.ones(24), "<b>": torch.zeros(1, 24)})
    assert facts(fitting, model)["model"].endswith("the vectors fit")
    assert facts(fitting)["problems"] == ["<b> is 0: never trained"]
    nan = tensor_file(tmp_path / "c.safetensors", {"<a>": torch.full((2, 24), torch.inf)})
    assert facts(nan)["not finite"] == ["<a>"]


@pytest.mark.parametrize("shape", [(0,), (0, 24), (2, 0)])
def test_an_empty_textual_inversion(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = facts(tensor_file(tmp_path / "x.safetensors", {"<dog>": torch.ones(shape)}))
    assert found["problems"] == ["<dog> is empty"]


# --- models ------------------------------------------------------------------------------------------------------------


def test_model_folder(tiny_folder: Path, model: ModelParts) -> None:
    reports = inspect(tiny_folder, model)
    assert [report.looks_like for report in reports] == [
        "a model folder in the diffusers layout",
        "an SD (cross-attention width 24) U-Net in the diffusers layout",
        "a VAE in the diffusers layout",
        "a CLIP text encoder of width 24",
    ]
    assert reports[0].facts == {"pipeline": "StableDiffusionPipeline", "predicts": "epsilon", "sampler": "DDIMScheduler"}
    for report in reports[1:]:
        matched, total = report.facts["model"].split()[1:4:2]
        assert matched == total != "0"


def test_single_file(model: ModelParts, tmp_path: Path) -> None:
    to_single_file(model.unet, model.vae, model.text_encoder, tmp_path / "tiny.safetensors")
    found = facts(tmp_path / "tiny.safetensors", model)
    numbers = sum(parameter.numel() for parameter in model.unet.parameters())
    assert found["parts"][0].startswith("text encoder: ") and f"U-Net: {numbers:,} numbers" in found["parts"]
    matched, total = found["model"].split()[1:4:2]
    assert matched == total != "0"
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
    assert facts(tensor_file(tmp_path / "x.safetensors", tensors))["not finite"] == ["decoder.mid_block.weight"]


# --- files that are none -----------------------------------------------------------------------------------------------


def test_a_pickle_must_be_converted_first(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"a.ckpt is a pickle.*minidiff convert .*a.ckpt NEW.safetensors --to safetensors"):
        inspect(tmp_path / "a.ckpt")


def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {"a": torch.ones(1, 4)}, {"x": ""})
    missing = 0x80 - path.read_bytes()[0]
    tensor_file(path, {"a": torch.ones(1, 4)}, {"x": "y" * missing})
    assert path.read_bytes()[:1] == b"\x80" and not is_pickle(path)


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no .safetensors file"):
        find_file(tmp_path)
    tensor_file(tmp_path / "b.safetensors", {"a": torch.ones(1)})
    assert find_file(tmp_path).name == "b.safetensors"
    tensor_file(tmp_path / "c.safetensors", {"a": torch.ones(1)})
    with pytest.raises(WeightsError, match="has several weight files, b.safetensors, c.safetensors: name one"):
        find_file(tmp_path)
    tensor_file(tmp_path / "pytorch_lora_weights.safetensors", {"a": torch.ones(1)})
    assert find_file(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = save_embedding(tmp_path / "a.safetensors", "<dog>", torch.ones(1, 24))
    main(["inspect", str(path), "--json", "--pretrained_model_name_or_path", str(tiny_folder)])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path) and found["model"].endswith("the vectors fit")
    main(["inspect", str(tiny_folder)])
    assert capsys.readouterr().out.count("\n\n") == 3
    none, nameless = ["inspect", str(tmp_path / "none")], ["inspect", " "]
    for words, message in ((none, "none does not exist"), (nameless, "must name a file or folder")):
        with pytest.raises(SystemExit) as leave:
            main(words)
        assert leave.value.code == 2 and message in capsys.readouterr().err
