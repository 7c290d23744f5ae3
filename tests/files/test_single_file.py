"""SD 2.x and SDXL in one file: OpenCLIP's names, what is made up for A1111, and the prediction type that no file says."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import sd2_folder, xl_folder
from torch import Tensor

from minidiff.cli.main import main
from minidiff.core.errors import SettingsError, WeightsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files import names
from minidiff.files.model import (
    FAMILIES,
    Family,
    ModelParts,
    empty_model,
    family_of,
    ldm_tensors,
    predicting,
    read_model,
    split_single_file,
    write_model,
)
from minidiff.files.text_files import to_openclip
from minidiff.files.weights import TensorFile, TensorInfo, check_fit, named, read_header, save

(CLIP,) = FAMILIES["SD 2"].texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd2_folder(tmp_path_factory.mktemp("tiny"), "SD 2 v")


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelParts:
    return read_model(folder)


@pytest.fixture
def single(model: ModelParts, tmp_path: Path) -> Path:
    save(ldm_tensors(model.unet, model.vae, model.text_encoder), tmp_path / "sd2.safetensors")
    return tmp_path / "sd2.safetensors"


@pytest.fixture
def tiny_family(model: ModelParts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiny model for SD 2."""
    tiny = Family(model.unet.config, model.vae.config, {CLIP: model.text_encoder.config.to_dict()})
    monkeypatch.setitem(FAMILIES, "SD 2", tiny)


@pytest.mark.parametrize(
    ("family", "unet", "text", "numbers"),
    [("SD 1", 686, 196, 0), ("SD 2", 686, 294, 354_032_641), ("SDXL", 1680, 196 + 389, 0)],
)
def test_names_and_shapes_at_full_size(family: str, unet: int, text: int, numbers: int) -> None:
    """SD 2's file has OpenCLIP's last layer and projection, too; SDXL's all of bigG but the scale."""
    model = empty_model(None, family=family)
    written = ldm_tensors(model.unet, model.vae, model.text_encoder, model.text_encoder_2)
    tensors = {key: TensorInfo(torch.float32, tuple(tensor.shape), key) for key, tensor in written.items()}
    assert len(tensors) == unet + 248 + text
    assert sum(tensor.numel() for key, tensor in written.items() if key.startswith(CLIP)) == numbers
    file, layers = TensorFile(Path("x"), tensors, {}, ""), model.text_encoder.config.num_hidden_layers
    assert family_of(file) == family
    for part, split in split_single_file(file, model.unet.config, model.vae.config, layers).items():
        assert len(check_fit(model.networks[part], split)) == len(split.tensors)  # an error for another name or shape


def test_there_and_back_to_the_bit(model: ModelParts, single: Path) -> None:
    again = read_model(single, like=model.home)
    assert again.noise_config.prediction_type == "v_prediction"
    before, after = model.weights(), again.weights()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_names_of_openclip(model: ModelParts, single: Path) -> None:
    """Made up, as by kohya: the last layer, which SD 2 never reads, the projection and the scale."""
    tensors, text = load_file(single), named(model.text_encoder)
    q, k, v = (text[f"encoder.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(tensors[f"{CLIP}transformer.resblocks.1.attn.in_proj_weight"], torch.cat([q, k, v]))
    assert torch.equal(tensors[f"{CLIP}positional_embedding"], text["embeddings.position_embedding.weight"])
    assert torch.equal(tensors[f"{CLIP}transformer.resblocks.2.mlp.c_proj.bias"], text["encoder.layers.2.mlp.fc2.bias"])
    for key in [key for key in tensors if ".resblocks.3." in key]:
        assert torch.equal(tensors[key], tensors[key.replace(".resblocks.3.", ".resblocks.2.")])
    assert torch.equal(tensors[f"{CLIP}text_projection"], torch.ones(24, 24)) and tensors[f"{CLIP}logit_scale"] == 1
    assert not any(key.startswith(tuple(FAMILIES["SD 1"].texts)) for key in tensors)


@torch.no_grad()
def test_the_tower_computes_what_openclips_does(model: ModelParts) -> None:
    """OpenCLIP's text tower again, by nn.MultiheadAttention. SD 2 reads its layer before the last, normed."""
    state, heads = to_openclip(named(model.text_encoder)), 2
    ids = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    norm: Any = torch.nn.functional.layer_norm
    for i in range(3):
        mine = {k.removeprefix(f"transformer.resblocks.{i}."): t for k, t in state.items() if f".resblocks.{i}." in k}
        attention = torch.nn.MultiheadAttention(24, heads, batch_first=True)
        attention.load_state_dict({k.removeprefix("attn."): t for k, t in mine.items() if k.startswith("attn.")})
        h = norm(x, (24,), mine["ln_1.weight"], mine["ln_1.bias"])
        x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = norm(x, (24,), mine["ln_2.weight"], mine["ln_2.bias"]) @ mine["mlp.c_fc.weight"].mT + mine["mlp.c_fc.bias"]
        x = x + torch.nn.functional.gelu(h) @ mine["mlp.c_proj.weight"].mT + mine["mlp.c_proj.bias"]
    expected: Tensor = norm(x, (24,), state["ln_final.weight"], state["ln_final.bias"])
    torch.testing.assert_close(model.text_encoder(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tiny_family")
def test_the_prediction_type_is_the_users(model: ModelParts, single: Path, folder: Path) -> None:
    assert model.home
    words = model.home / "tokenizer"
    with pytest.warns(UserWarning, match="and epsilon is taken. Say it .* by its weights it is epsilon"):
        assert read_model(single, tokenizer=words).noise_config.prediction_type == "epsilon"
    for name, said in ((folder, "epsilon"), (single, "v")):
        with pytest.raises(SettingsError, match=f'--prediction_type is "{said}"; .* for a model in one file alone'):
            read_model(name, prediction_type=said)


@pytest.mark.parametrize(("spread", "says"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_the_guess_is_comfyuis(spread: float, says: str, model: ModelParts, single: Path) -> None:
    key = f"{names.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    save(load_file(single) | {key: spread * torch.tensor([-1.0, 1.0, -1.0, 1.0])}, single)
    with pytest.warns(UserWarning, match=f"by its weights it is {says}"):
        predicting(replace(model, home=None), single, read_header(single), None)


@pytest.mark.usefixtures("tiny_family")
def test_drawn_from_one_file_with_sd15s_tokenizer(single: Path, folder: Path, tmp_path: Path) -> None:
    """OpenCLIP pads with "!", whatever the folder of words says; then the pictures are the folder's own."""
    from tiny_families import WORDS

    from minidiff.pocket.tokenizer import build_tokenizer

    build_tokenizer(tmp_path / "words", WORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = StableDiffusionPipeline.from_single_file(single, tmp_path / "words", prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    expected = StableDiffusionPipeline.from_pretrained(folder)
    expected.set_progress_bar_config(disable=True)
    call = {"seed": 0, "num_inference_steps": 2, "output_type": "latent", "sampler": "ddim"}
    torch.testing.assert_close(pipe("a red dog", **call).images, expected("a red dog", **call).images, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("tiny_family")
def test_convert_keeps_the_prediction_type_that_it_is_told(
    single: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, flags = tmp_path / "made", ["--tokenizer", str(folder / "tokenizer"), "--prediction_type", "v_prediction"]
    main(["convert", str(single), str(made), "--to", "diffusers", *flags])
    assert read_model(made).noise_config.prediction_type == "v_prediction"
    main(["convert", str(made), str(tmp_path / "back.safetensors"), "--to", "ldm"])
    assert (tmp_path / "back.safetensors").read_bytes() == single.read_bytes()
    assert "max |W - W'| = 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sample", "a dog", "--pretrained_model_name_or_path", str(made), "--prediction_type", "epsilon"])
    assert "for a model in one file alone" in capsys.readouterr().err


# --- SDXL ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> ModelParts:
    return read_model(xl_folder(tmp_path_factory.mktemp("xl")))


def test_sdxl_there_and_back_to_the_bit(xl: ModelParts, tmp_path: Path) -> None:
    write_model(xl, single := tmp_path / "xl.safetensors")
    again = read_model(single, like=xl.home)
    before, after = xl.weights(), again.weights()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    projection = load_file(single)["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(projection, xl.text_encoder_2.text_projection.weight.T)


def test_sdxl_without_a_folder(xl: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model for SDXL: Euler, leading; one vocabulary, two paddings; a mark of those that predict v."""
    texts = dict(zip(FAMILIES["SDXL"].texts, [tower.config.to_dict() for tower in xl.towers.values()]))
    monkeypatch.setitem(FAMILIES, "SDXL", Family(xl.unet.config, xl.vae.config, texts))
    assert xl.home is not None
    call = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    expected = StableDiffusionPipeline.from_pretrained(xl.home)("a red dog", **call).images
    write_model(xl, single := tmp_path / "xl.safetensors")
    for name in ("tokenizer", "tokenizer_2"):  # whichever it is
        pipe = StableDiffusionPipeline.from_single_file(single, xl.home / name)
        torch.testing.assert_close(pipe("a red dog", **call).images, expected, rtol=1e-4, atol=1e-4)
        assert pipe.sampler == "euler" and pipe.schedule.config.prediction_type == "epsilon"
    save(load_file(single) | {"v_pred": torch.tensor(1.0)}, single)
    pipe = StableDiffusionPipeline.from_single_file(single, xl.home / "tokenizer")
    assert pipe.schedule.config.prediction_type == "v_prediction"


def test_the_refiner_is_called_by_its_name(tmp_path: Path) -> None:
    save({"conditioner.embedders.0.model.ln_final.weight": torch.ones(2)}, path := tmp_path / "refiner.safetensors")
    with pytest.raises(WeightsError, match="looks like a single file of SDXL's refiner"):
        read_model(path)
