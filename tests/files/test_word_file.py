"""Textual inversion files: every dialect in, two out, and a reason for each that cannot be used."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.core.errors import AdapterError, MinidiffError, WeightsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header
from minidiff.files.word_file import FILE_NAME, embedding_in, read_embedding, save_embedding

D = 24  # width of the tiny text encoder


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> StableDiffusionPipeline:
    """For reading only."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(base: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """For changing."""
    return deepcopy(base)


def vectors(n: int = 2, width: int = D) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


# --- in and out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("n", [1, 3])
def test_what_is_saved_comes_back(tmp_path: Path, dialect: str, n: int) -> None:
    path = save_embedding(tmp_path / "any name.safetensors", "<dog>", vectors(n), dialect, {"ss_seed": "7", "token": "x"})
    (key,) = load_file(path)
    assert key == ("<dog>" if dialect == "diffusers" else "emb_params")
    embedding = read_embedding(path)
    assert (embedding.word, embedding.dialect) == ("<dog>", dialect) and torch.equal(embedding.vectors, vectors(n))
    assert read_header(path).metadata == {
        "format": "pt",
        "ss_seed": "7",
        "token": "<dog>",
        "vectors": str(n),
        "minidiff_version": minidiff.__version__,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "width-24/textual-inversion",
        "modelspec.trigger_phrase": "<dog>",
    }


@pytest.mark.parametrize(("width", "family"), [(128, "pocket"), (768, "stable-diffusion-v1"), (1024, "stable-diffusion-v2")])
def test_a_file_names_its_family(tmp_path: Path, width: int, family: str) -> None:
    path = save_embedding(tmp_path, "<dog>", vectors(1, width))
    assert read_header(path).metadata["modelspec.architecture"] == f"{family}/textual-inversion"


def test_the_size_of_a_file(tmp_path: Path) -> None:
    """FORMATS 2.4: a word of SD 1.5 is some kilobytes; the same call gives the same bytes."""
    a, b = (save_embedding(tmp_path / name, "<dog>", vectors(3, 768).half()) for name in ("a", "b"))
    assert a == tmp_path / "a" / FILE_NAME and a.read_bytes() == b.read_bytes()
    assert 3 * 768 * 4 < a.stat().st_size < 3 * 768 * 4 + 600


@pytest.mark.parametrize("shape", [(D,), (1, D), (3, D)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_files(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    path = write(tmp_path / FILE_NAME, {"<cat-toy>": tensor})
    for given in (path, tmp_path):
        embedding = read_embedding(given)
        assert (embedding.word, embedding.dialect, embedding.path) == ("<cat-toy>", "diffusers", path)
        assert torch.equal(embedding.vectors, tensor.float().reshape(-1, D)) and embedding.vectors.dtype == torch.float32
    assert read_embedding(path, token="<mine>").word == "<mine>"


def test_the_name_of_a_kohya_file_is_its_word(tmp_path: Path) -> None:
    path = write(tmp_path / "old-style.safetensors", {"emb_params": vectors()})
    assert read_embedding(path).word == "old-style" and read_embedding(path, "<s>").word == "<s>"
    assert str(read_embedding(tmp_path)) == f"{path}: kohya style, old-style, 2 vectors of width 24"


@pytest.mark.parametrize(
    ("content", "dialect", "word"),
    [
        ({"": vectors()}, "bare", "<given>"),
        ({"": vectors()[0]}, "bare", "<given>"),
        ({"<cat-toy>": vectors()}, "diffusers", "<cat-toy>"),
        ({"emb_params": vectors()}, "kohya", "bad-hands-5"),
        ({"string_to_param/*": vectors()}, "A1111", "bad-hands-5"),
    ],
)
def test_what_a_pickle_holds(content: dict[str, Tensor], dialect: str, word: str) -> None:
    """`convert` opens it; here is only what comes out."""
    embedding = embedding_in(content, Path("bad-hands-5.pt"), "<given>" if dialect == "bare" else None)
    assert (embedding.dialect, embedding.word) == (dialect, word)
    assert torch.equal(embedding.vectors, vectors()[: len(embedding.vectors)])


def test_of_several_words_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "two.safetensors", {"<a>": vectors(1), "<b>": vectors(2)})
    assert torch.equal(read_embedding(path, token="<b>").vectors, vectors(2))
    for token in (None, "<c>"):
        with pytest.raises(
            AdapterError, match=r"two\.safetensors holds 2 words, where one is wanted.\n  2 words: <a>, <b>"
        ):
            read_embedding(path, token)


# --- the pipeline ------------------------------------------------------------------------------------------------------


def test_load_and_unload(tmp_path: Path, pipe: StableDiffusionPipeline) -> None:
    prompts = ["a photo of a <Dog> on the beach", "a photo of a red dog"]
    before, V = pipe.encode_prompt(prompts), len(pipe.tokenizer)
    path = save_embedding(tmp_path / "dog.safetensors", "<dog>", 3 * vectors())
    assert str(pipe.load_textual_inversion(path)) == f"{path}: diffusers style, <dog>, 2 vectors of width 24"
    pipe.load_textual_inversion(str(path), token="<twin>")
    assert pipe.placeholders == {"<dog>": [V, V + 1], "<twin>": [V + 2, V + 3]}
    text = pipe.encode_prompt([*prompts, "a photo of a <twin> on the beach"])
    assert not text.requires_grad and not torch.allclose(text[0], before[0], atol=0.1)
    torch.testing.assert_close(text[1], before[1])  # another batch size
    torch.testing.assert_close(text[2], text[0])
    pipe(prompts, num_inference_steps=1, seed=0, output_type="latent")
    pipe.unload_textual_inversion()
    assert pipe.placeholders == {} and torch.equal(pipe.encode_prompt(prompts), before)


def test_a_word_survives_a_cast_table(tmp_path: Path, tiny_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    pipe.load_textual_inversion(save_embedding(tmp_path, "<dog>", vectors()))
    assert pipe.encode_prompt(["<dog>"]).dtype == torch.bfloat16


# --- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"<x>": torch.ones(2, 1024)}, "its vectors are 1024 wide, as in SD 2.x; this text encoder is 24 wide"),
        ({"<x>": torch.ones(2, 99)}, "its vectors are 99 wide, as in no model of the SD family; this"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "its vectors are 768 and 1280 wide, as in SDXL;"),
        ({"<x>": torch.ones(76, D)}, "its vectors are (76, 24) of torch.float32; a word has (n, D) floating-point numbers"),
        ({"<x>": torch.ones(0, D)}, "its vectors are (0, 24) of torch.float32; a word has (n, D)"),
        ({"<x>": torch.ones(2, D, dtype=torch.int64)}, "its vectors are (2, 24) of torch.int64"),
        ({"<x>": torch.ones(2, D, 1)}, "no textual inversion. The file looks like"),
        ({}, "no textual inversion. The file looks like an empty file"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2, D)}, "no textual inversion. The file looks like a LoRA in the kohya"),
        ({"decoder.conv_in.weight": torch.ones(2, D)}, "no textual inversion. The file looks like"),
        ({"dog": torch.ones(2, D)}, '"dog" is in the model\'s vocabulary already'),
        ({"my dog": torch.ones(2, D)}, '"my dog" has a space in it'),
        ({"": torch.ones(2, D)}, 'does not say what its word is. minidiff convert --token "<my-dog>" writes it'),
        ({"emb_params": torch.ones(2, D)}, '"my file" has a space in it; a new word is one word. Take a word of your own'),
    ],
    ids=str,
)
def test_files_that_are_refused(
    tmp_path: Path, pipe: StableDiffusionPipeline, tensors: dict[str, Tensor], message: str
) -> None:
    path = write(tmp_path / "my file.safetensors", tensors)
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        pipe.load_textual_inversion(path)
    assert str(caught.value).startswith(str(path)) and pipe.placeholders == {}


def test_a_word_is_loaded_once(tmp_path: Path, pipe: StableDiffusionPipeline) -> None:
    path = save_embedding(tmp_path, "<dog>", vectors())
    pipe.load_textual_inversion(path)
    message = f'{path}: "<dog>": there is a new word "<dog>" already, and a prompt could not tell them apart. Take a word'
    with pytest.raises(AdapterError, match=re.escape(message)):
        pipe.load_textual_inversion(path)
    assert list(pipe.placeholders) == ["<dog>"]


def test_sd2_vectors_on_sd15_are_told_by_their_width(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe.text_encoder.config.hidden_size = 768
    path = save_embedding(tmp_path, "<dog>", vectors(1, 1024))
    with pytest.raises(AdapterError, match=r"1024 wide, as in SD 2.x; this text encoder is 768 wide, as in SD 1.x. Look for"):
        pipe.load_textual_inversion(path)


def test_nan_is_refused(tmp_path: Path) -> None:
    bad = torch.full((1, D), torch.nan)
    with pytest.raises(WeightsError, match="<x> has NaN or infinite values"):
        read_embedding(write(tmp_path / "x.safetensors", {"<x>": bad}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds 0 words"),
        ({"": vectors()}, "does not say what its word is"),
        ({"string_to_param/*": vectors(), "string_to_param/+": vectors()}, "holds 2 words, where one is wanted"),
    ],
)
def test_pickles_that_hold_something_else(content: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=rf"^x\.pt.*{re.escape(message)}"):
        embedding_in(content, Path("x.pt"))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    torch.save({"<x>": vectors()}, tmp_path / "learned_embeds.bin")
    with pytest.raises(WeightsError, match=r"pickle.*get the .safetensors"):
        read_embedding(tmp_path / "learned_embeds.bin")
    with pytest.raises(WeightsError, match=r"has its weights only as a pickle \(learned_embeds.bin\)"):
        read_embedding(tmp_path)


def test_a_folder_with_many_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_embedding(tmp_path / f"{name}.safetensors", "<x>", vectors())
    with pytest.raises(WeightsError, match=r"has several weight files, a.safetensors, b.safetensors: name one of them"):
        read_embedding(tmp_path)
    with pytest.raises(MinidiffError, match="does not exist"):
        read_embedding(tmp_path / "c.safetensors")


@pytest.mark.parametrize("word", ["my dog", "__metadata__", "a.weight", "<\u200b>"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_words_that_could_not_be_read_again_are_not_written(tmp_path: Path, word: str, dialect: str) -> None:
    with pytest.raises(AdapterError, match="Take a word of your own"):
        save_embedding(tmp_path, word, vectors(), dialect)
    assert not any(tmp_path.iterdir())
