"""The text tower: ids, both key layouts, and the errors of damaged folders."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff import weights
from minidiff.errors import WeightsError
from minidiff.models.text import (
    PREFIX,
    build_text_encoder,
    encode_prompt,
    load_tokenizer,
    to_file_keys,
    tokenize,
)
from minidiff.pocket.tokenizer import build_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_tokenizer(tmp_path / "tokenizer", ["a photo of a red dog on the beach"])
    return tmp_path / "tokenizer"


@pytest.fixture
def tokenizer(folder: Path) -> CLIPTokenizer:
    return load_tokenizer(folder)


def config(tokenizer: CLIPTokenizer) -> dict[str, object]:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 77,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }


def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    return build_text_encoder(config(tokenizer), "config.json")


def test_tokenize_is_what_the_library_gives(tokenizer: CLIPTokenizer) -> None:
    prompts = ["", "a photo of a sks dog", "Ünïcode 🐕 (dog:1.2), \\ 42"]
    ids = tokenize(tokenizer, prompts)
    theirs = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.dtype == torch.int64 and torch.equal(ids, theirs)
    assert tokenize(tokenizer, []).shape == (0, 77)


def test_75_tokens_pass_and_the_76th_is_quoted(tokenizer: CLIPTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizer, ["dog " * 75])
    with pytest.warns(UserWarning, match='77 tokens long and CLIP reads 75; cut off: "red beach"'):
        ids = tokenize(tokenizer, ["dog " * 75 + "red beach"])
    assert torch.equal(ids, tokenize(tokenizer, ["dog " * 75]))


def ids_of(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a photo of <dog>", ["a photo of", "<dog>"]),
        ("<DOG> on the beach", ["<dog>", "on the beach"]),
        ("a photo of<dog>, red", ["a photo of", "<dog>", ", red"]),
        ("<dog><dog>'s", ["<dog>", "<dog>", "'s"]),
        ("<dog>s on the beach", ["<dog>s", "on the beach"]),
        ("it asks a sks2 dog", ["it asks a sks2 dog"]),
        ("sks-dog (SKS)", ["sks", "-dog (", "sks", ")"]),
        ("my old-style dog", ["my", "old-style", "dog"]),
        ("", []),
    ],
)
def test_placeholders_are_whole_words_the_longest_first(tokenizer: CLIPTokenizer, prompt: str, pieces: list[str]) -> None:
    placeholders = {"<dog>": [1001, 1002, 1003], "<dog>s": [1004], "Sks": [1005], "old-style": [1006, 1007]}
    folded = {word.lower(): ids for word, ids in placeholders.items()}
    want = [i for piece in pieces for i in folded.get(piece) or ids_of(tokenizer, piece)]
    (row,) = tokenize(tokenizer, [prompt], placeholders).tolist()
    assert row[1 : len(want) + 1] == want
    assert row[0] == tokenizer.bos_token_id and set(row[len(want) + 1 :]) == {tokenizer.eos_token_id}


def test_a_placeholder_leaves_the_words_beside_it_alone(tokenizer: CLIPTokenizer) -> None:
    """An added token would: with "sks" in the tokenizer, "asks" falls into "a" and "sks" (diffusers)."""
    prompts = ["asks a red dog on the beach, (dog)!", "", "sksx"]
    assert torch.equal(tokenize(tokenizer, prompts, {"sks": [1000]}), tokenize(tokenizer, prompts))


def test_text_lost_behind_placeholders_is_quoted_with_their_names(tokenizer: CLIPTokenizer) -> None:
    with pytest.warns(UserWarning, match='79 tokens long and CLIP reads 75; cut off: "<dog> red beach"'):
        ids = tokenize(tokenizer, ["dog " * 74 + "<Dog> red beach"], {"<dog>": [1000, 1001, 1002]})
    assert ids.shape == (1, 77) and ids[0, 75] == 1000


def test_encode_prompt_is_the_last_state_after_the_norm(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    hidden = encode_prompt(tokenizer, tower, ["a red dog", ""])
    output = tower(tokenize(tokenizer, ["a red dog", ""]), output_hidden_states=True)
    norm = next(module for name, module in tower.named_modules() if name.endswith("final_layer_norm"))
    assert hidden.shape == (2, 77, 16) and hidden.requires_grad
    assert torch.equal(hidden, norm(output.hidden_states[-1]))


def test_a_prompt_is_the_same_alone_and_in_a_batch(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    pair = encode_prompt(tokenizer, tower, ["a photo", "a red dog on the beach"])
    torch.testing.assert_close(pair[1:], encode_prompt(tokenizer, tower, ["a red dog on the beach"]))


def test_both_key_layouts_load_and_agree(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """transformers 4 writes `text_model.…` (and once `position_ids`), transformers 5 does not."""
    tower = encoder(tokenizer)
    four = to_file_keys(tower.state_dict())
    four[PREFIX + "embeddings.position_ids"] = torch.arange(77)[None]
    five = {key.removeprefix(PREFIX): value for key, value in four.items()}
    want = encode_prompt(tokenizer, tower, ["a red dog"])
    for state in (four, five):
        with torch.device("meta"):
            empty = build_text_encoder(config(tokenizer), "config.json")
        weights.save(state, tmp_path / "model.safetensors")
        weights.load_into(empty, tmp_path / "model.safetensors")
        assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
        assert torch.equal(encode_prompt(tokenizer, empty, ["a red dog"]), want)


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
    assert torch.equal(encode_prompt(tokenizer, other, prompts), encode_prompt(tokenizer, tower, prompts))


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
