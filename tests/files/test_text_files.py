"""A text tower's files: both key layouts, and the errors of damaged folders."""

from pathlib import Path

import pytest
import torch
from tiny_text import config, encoder, tiny_tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff.core.errors import WeightsError
from minidiff.core.text import encode, tokenize
from minidiff.files import weights
from minidiff.files.text_files import PREFIX, build_text_encoder, load_tokenizer, to_file_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def tokenizer(folder: Path) -> CLIPTokenizer:
    return load_tokenizer(folder)


def test_both_key_layouts_load_and_agree(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """transformers 4 writes `text_model.…` (and once `position_ids`), transformers 5 does not."""
    tower = encoder(tokenizer)
    four = to_file_keys(tower.state_dict())
    four[PREFIX + "embeddings.position_ids"] = torch.arange(77)[None]
    five = {key.removeprefix(PREFIX): value for key, value in four.items()}
    want = encode(tower, tokenize(tokenizer, ["a red dog"]))
    for state in (four, five):
        with torch.device("meta"):
            empty = build_text_encoder(config(tokenizer), "config.json")
        weights.save(state, tmp_path / "model.safetensors")
        weights.load_into(empty, tmp_path / "model.safetensors")
        assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
        assert torch.equal(encode(empty, tokenize(tokenizer, ["a red dog"])), want)


def test_keys_go_there_and_back(tokenizer: CLIPTokenizer) -> None:
    state = encoder(tokenizer).state_dict()
    file = to_file_keys(state)
    assert all(key.startswith(PREFIX) and not key.startswith(PREFIX * 2) for key in file)
    assert to_file_keys(file).keys() == file.keys()
    assert [key.removeprefix(PREFIX) for key in file] == [key.removeprefix(PREFIX) for key in state]


def test_a_folder_of_transformers_itself_loads(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """Whatever layout the installed version writes, the same embeddings come out."""
    tower = encoder(tokenizer)
    tower.save_pretrained(tmp_path / "text_encoder")
    torch.manual_seed(1)
    other = build_text_encoder(config(tokenizer), "config.json")
    weights.load_into(other, tmp_path / "text_encoder" / "model.safetensors")
    prompts = ["a red dog", "sks"]
    assert torch.equal(encode(other, tokenize(tokenizer, prompts)), encode(tower, tokenize(tokenizer, prompts)))


def test_the_file_layout_loads_in_transformers(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tower = encoder(tokenizer)
    tower.config.save_pretrained(tmp_path)
    save_file(to_file_keys(tower.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = tokenize(tokenizer, ["a red dog"])
    torch.testing.assert_close(theirs(ids).last_hidden_state, tower(ids).last_hidden_state)


def test_a_missing_or_misshapen_weight_is_an_error(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tower = encoder(tokenizer)
    state = to_file_keys(tower.state_dict())
    name = PREFIX + "final_layer_norm.weight"
    for wrong in ({key: value for key, value in state.items() if key != name}, state | {name: torch.zeros(3)}):
        weights.save(wrong, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match="final_layer_norm.weight"):
            weights.load_into(tower, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 15}, {"hidden_act": "swish?"}, {"num_hidden_layers": None}, {"max_position_embeddings": 10}],
)
def test_an_unusable_configuration_names_its_file(tokenizer: CLIPTokenizer, change: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match=r"^here/config\.json"):
        build_text_encoder(config(tokenizer) | change, "here/config.json")


def test_a_foreign_configuration_says_what_is_missing() -> None:
    with pytest.raises(WeightsError, match="hidden_size.*vocab_size missing"):
        build_text_encoder({"model_type": "unet"}, "config.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"{"),
        ("vocab.json", b"[1, 2]"),
        ("vocab.json", b"{}"),
        ("merges.txt", b"\xff\xfe\x00"),
        ("merges.txt", b"#version: 0.2\n"),
        ("merges.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n"),
        ("merges.txt", None),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_damaged_tokenizer_folder_is_refused(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match="tokenizer.*(Copy|not a CLIP)"):
        load_tokenizer(folder)


def test_without_its_config_the_length_is_still_77(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.model_max_length == 77 and tokenizer.pad_token_id == tokenizer.eos_token_id
