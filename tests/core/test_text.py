"""The text tower: ids, chunks, weights, clip skip, the token view, both key layouts, the errors of damaged folders."""

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.core.text import encode_captions, token_ids, tokenize
from minidiff.draw.prompting import Part, Prompt, chunked, count_chunks, encode_prompts, parse_prompt
from minidiff.files import weights
from minidiff.files.text_files import PREFIX, build_text_encoder, load_tokenizer, to_file_keys
from minidiff.pocket.tokenizer import build_tokenizer
from minidiff.studio.tokens import token_view


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


def encode_prompt(
    tokenizer: CLIPTokenizer,
    tower: CLIPTextModel,
    prompts: list[str] | list[Prompt],
    placeholders: dict[str, list[int]] = {},  # noqa: B006
    **options: int,
) -> Tensor:
    """Captions (`str`) by core's way, prompts by draw's; captions with options as prompts of one part."""
    if not options and all(isinstance(prompt, str) for prompt in prompts):
        return encode_captions(tokenizer, tower, prompts, placeholders)
    whole = [Prompt(((Part(p, 1.0),),)) if isinstance(p, str) else p for p in prompts]
    return encode_prompts(tokenizer, tower, whole, placeholders, **options)


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


# --- chunks ------------------------------------------------------------------------------------------------------------

PLACEHOLDERS = {"<dog>": [1001, 1002, 1003], "<long>": list(range(1100, 1160))}


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("dog " * 75, [75]),
        ("dog " * 76, [75, 1]),
        ("dog " * 151, [75, 75, 1]),
        ("red " * 55 + ", " + "dog " * 19 + "beach", [56, 20]),  # the comma is one of the last 20
        ("red " * 54 + ", " + "dog " * 20 + "beach", [75, 1]),  # and here it is not
        ("red " * 74 + ", dog", [75, 1]),
        ("red " * 75 + ", dog", [75, 2]),  # a comma is never kept away from the end
        ("red " * 55 + ", " + "dog " * 19, [75]),
        ("red " * 55 + ", " + "dog " * 19 + ", beach", [75, 2]),
        ("red " * 60 + ", dog, " + "dog " * 12 + "beach", [63, 13]),  # the last one counts
        ("red " * 55 + ", " + "dog " * 100, [56, 75, 25]),
        ("red BREAK dog", [1, 1]),
        ("red BREAK BREAK dog BREAK", [1, 0, 1]),
        ("BREAK dog", [0, 1]),
        ("BREAK", [0]),
        ("red " * 75 + "BREAK dog", [75, 1]),
        ("red " * 72 + "<dog> beach", [75, 1]),
        ("red " * 73 + "<dog> beach", [73, 4]),  # a word of three vectors stays together
        ("red " * 60 + ", " + "dog " * 13 + "<dog>", [74, 3]),
        ("red " * 60 + ", " + "dog " * 14 + "<dog>", [61, 17]),
        ("red " * 55 + ", " + "dog " * 19 + "<long>", [56, 19, 60]),  # what moved on and the word do not fit together
    ],
)
def test_where_chunks_end(tokenizer: CLIPTokenizer, prompt: str, lengths: list[int]) -> None:
    assert [len(chunk) for chunk in chunked(tokenizer, parse_prompt(prompt), PLACEHOLDERS)] == lengths
    assert count_chunks(tokenizer, [parse_prompt("dog"), parse_prompt(prompt)], PLACEHOLDERS) == len(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_chunks_lose_nothing(tokenizer: CLIPTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    prompt = " ".join(rng.choices(["red", "(dog:1.3)", ",", "[beach]", "<dog>"], [6, 1, 1, 1, 1], k=rng.randint(60, 400)))
    parsed = parse_prompt(prompt)
    chunks = chunked(tokenizer, parsed, PLACEHOLDERS)
    want = [(index, part.weight) for part in parsed.sections[0] for index in token_ids(tokenizer, part.text, PLACEHOLDERS)]
    assert [token for chunk in chunks for token in chunk] == want
    for chunk in chunks:
        ids = [index for index, _ in chunk]
        assert len(ids) <= 75 and ids.count(1001) == ids.count(1002) == ids.count(1003)
        assert all(ids[i + 1 : i + 3] == [1002, 1003] for i, index in enumerate(ids) if index == 1001)


def test_placeholders_work_inside_weights(tokenizer: CLIPTokenizer) -> None:
    (chunk,) = chunked(tokenizer, parse_prompt("a (<DOG>:1.3)'s [beach]"), PLACEHOLDERS)
    assert chunk[1:4] == [(1001, 1.3), (1002, 1.3), (1003, 1.3)]
    assert [weight for _, weight in chunk[4:]] == [1.0] * (len(chunk) - 5) + [1 / 1.1]


def test_a_hundred_chunks_are_the_limit(tokenizer: CLIPTokenizer) -> None:
    assert len(chunked(tokenizer, parse_prompt("dog BREAK " * 99 + "dog"))) == 100
    with pytest.raises(SettingsError, match="fills 101 chunks of 75 tokens; 100 is the limit"):
        chunked(tokenizer, parse_prompt("dog BREAK " * 100 + "dog"))


# --- encoding ----------------------------------------------------------------------------------------------------------


def final_norm(tower: CLIPTextModel) -> nn.LayerNorm:
    return next(module for name, module in tower.named_modules() if name.endswith("final_layer_norm"))


def with_mean(tower: CLIPTextModel, mean: float = -0.3) -> CLIPTextModel:
    """A tower as CLIP's own is: its states have a mean that stands out."""
    nn.init.constant_(final_norm(tower).bias, mean)
    return tower


def parsed(*prompts: str) -> list[Prompt]:
    return [parse_prompt(prompt) for prompt in prompts]


PLAIN = ["", "a red dog on the beach", "dog " * 75, "a photo, of (nothing"]


def test_a_plain_prompt_has_the_bits_of_a_caption(tokenizer: CLIPTokenizer) -> None:
    """One path once: ids through the tower. Captions and plain prompts still give its bits, alone and together."""
    tower = encoder(tokenizer)
    plain = [Prompt(((Part(text, 1.0),),)) for text in PLAIN]
    together = tower(input_ids=tokenize(tokenizer, PLAIN)).last_hidden_state
    assert torch.equal(encode_prompt(tokenizer, tower, PLAIN), together)
    assert torch.equal(encode_prompt(tokenizer, tower, plain), together)
    assert torch.equal(encode_prompt(tokenizer, tower, [*PLAIN[:2], *plain[2:]]), together)
    for text, prompt in zip(PLAIN, plain):
        alone = tower(input_ids=tokenize(tokenizer, [text])).last_hidden_state
        assert torch.equal(encode_prompt(tokenizer, tower, [text]), alone)
        assert torch.equal(encode_prompt(tokenizer, tower, [prompt]), alone)


def test_captions_are_never_parsed(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    caption = "a (red:1.3) dog BREAK [beach] <lora:x:1>"
    want = tower(input_ids=tokenize(tokenizer, [caption])).last_hidden_state
    assert torch.equal(encode_prompt(tokenizer, tower, [caption]), want)


def test_a_caption_is_cut_off_and_a_prompt_is_not(tokenizer: CLIPTokenizer) -> None:
    tower, text = encoder(tokenizer), "dog " * 75 + "red beach"
    with pytest.warns(UserWarning, match='CLIP reads 75; cut off: "red beach"'):
        assert encode_prompt(tokenizer, tower, [text]).shape == (1, 77, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = encode_prompt(tokenizer, tower, parsed(text))
    both = encode_prompt(tokenizer, tower, ["dog " * 75, "red beach"])
    torch.testing.assert_close(long, both.reshape(1, 154, 16))


def test_chunks_are_encoded_alone_and_laid_side_by_side(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    text = encode_prompt(tokenizer, tower, parsed("a red dog BREAK on the beach BREAK", "a photo"), chunks=3)
    alone = [encode_prompt(tokenizer, tower, [words])[0] for words in ("a red dog", "on the beach", "", "a photo", "", "")]
    assert text.shape == (2, 231, 16)
    torch.testing.assert_close(text, torch.stack([torch.cat(alone[:3]), torch.cat(alone[3:])]))
    assert encode_prompt(tokenizer, tower, parsed("a BREAK b", "c"), chunks=1).shape == (2, 154, 16)


def test_prompt_weights_of_a1111(tokenizer: CLIPTokenizer) -> None:
    """z' = z w, z'' = z' mean(z) / mean(z'); the marks and the filling weigh 1."""
    tower = with_mean(encoder(tokenizer))
    z = encode_prompt(tokenizer, tower, ["a red dog on the beach"])[0]
    weights = torch.ones(77)
    weights[1:4], weights[6] = 1.4, 0.5
    want = z * weights[:, None]
    want = want * (z.mean() / want.mean())
    got = encode_prompt(tokenizer, tower, parsed("(a red dog:1.4) on the (beach:0.5)"))[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.mean(), z.mean())
    assert not torch.allclose(got[2], z[2], rtol=0.05) and not torch.equal(got[0], z[0])


def test_the_mean_is_that_of_each_chunk(tokenizer: CLIPTokenizer) -> None:
    """A chunk's states depend on no other chunk and on no other prompt."""
    tower = with_mean(encoder(tokenizer))
    rows = encode_prompt(tokenizer, tower, parsed("a (red:1.5) dog BREAK on the (beach:0.7)", "a photo"))
    for chunk, prompt in zip(rows.reshape(4, 77, 16), ("a (red:1.5) dog", "on the (beach:0.7)", "a photo", "")):
        torch.testing.assert_close(chunk, encode_prompt(tokenizer, tower, parsed(prompt))[0])


@pytest.mark.parametrize(("mean", "weight"), [(0.0, 1.4), (1e-4, 1.4), (0.05, -20.0), (-0.3, -100.0)])
def test_a_mean_that_is_chance_is_not_restored(tokenizer: CLIPTokenizer, mean: float, weight: float) -> None:
    """The quotient of such means can be anything; all states would be blown up or turned around, the marks' too."""
    tower = with_mean(encoder(tokenizer), mean)
    z = encode_prompt(tokenizer, tower, ["a red dog"])[0]
    got = encode_prompt(tokenizer, tower, [Prompt(((Part("a ", 1.0), Part("red dog", weight)),))])[0]
    torch.testing.assert_close(got, torch.cat([z[:2], z[2:4] * weight, z[4:]]))


def test_gradients_flow_through_chunks_and_weights(tokenizer: CLIPTokenizer) -> None:
    from minidiff.core.textual_inversion import add_word, placeholders

    tower = with_mean(encoder(tokenizer)).requires_grad_(False)
    row = add_word(tokenizer, tower, "<dog>", torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    prompts = parsed("a red BREAK a (<dog>:1.3) on the beach")
    encode_prompt(tokenizer, tower, prompts, placeholders(tower))[:, 77:].square().sum().backward()
    assert row.grad is not None and bool((row.grad != 0).all())


def test_the_dtype_is_the_encoders(tokenizer: CLIPTokenizer) -> None:
    tower = with_mean(encoder(tokenizer))
    fine = encode_prompt(tokenizer, tower, parsed("a (dog:1.3) BREAK b"))
    rough = encode_prompt(tokenizer, tower.bfloat16(), parsed("a (dog:1.3) BREAK b"))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), fine, rtol=0.1, atol=0.1)


# --- clip skip ---------------------------------------------------------------------------------------------------------


def test_clip_skip_takes_an_earlier_state_through_the_norm(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    tower = with_mean(build_text_encoder(config(tokenizer) | {"num_hidden_layers": 4}, "config.json"))
    ids = tokenize(tokenizer, ["a red dog", ""])
    states = tower(input_ids=ids, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    for skip in range(4):
        got = encode_prompt(tokenizer, tower, ["a red dog", ""], clip_skip=skip)
        assert torch.equal(got, final_norm(tower)(states[-1 - skip]))
        assert not any(torch.allclose(got, other, atol=1e-3) for other in seen)
        seen.append(got)
    assert torch.equal(seen[0], encode_prompt(tokenizer, tower, ["a red dog", ""]))


def test_clip_skip_goes_with_weights_and_chunks(tokenizer: CLIPTokenizer) -> None:
    tower = with_mean(encoder(tokenizer))
    got = encode_prompt(tokenizer, tower, parsed("a (dog:1.5) BREAK b"), clip_skip=1)
    first, second = (encode_prompt(tokenizer, tower, [words], clip_skip=1)[0] for words in ("a dog", "b"))
    torch.testing.assert_close(got[0, 77:], second)
    torch.testing.assert_close(got[0, :77].mean(), first.mean())
    torch.testing.assert_close(got[0, 2] / got[0, 1], 1.5 * first[2] / first[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip_skip", [-1, 2, 12, 1.0])
def test_a_clip_skip_out_of_range_names_both_numberings(tokenizer: CLIPTokenizer, clip_skip: int) -> None:
    with pytest.raises(SettingsError, match=r"has 2 layers, so it is 0 \(none skipped\) to 1\..*one higher: 1 to 2"):
        encode_prompt(tokenizer, encoder(tokenizer), ["a"], clip_skip=clip_skip)


# --- the token view ----------------------------------------------------------------------------------------------------


def test_the_token_view_of_a_short_prompt(tokenizer: CLIPTokenizer) -> None:
    view = token_view(tokenizer, "a (red:1.3) <Dog> <lora:chalk:0.8>", PLACEHOLDERS, trigger="<dog>")
    lines = [" ".join(line.split()) for line in view.splitlines()]
    a, red = ids_of(tokenizer, "a red")
    assert "One chunk: 5 of 75 tokens" in lines
    assert {f"1 a {a}", f"2 red {red} x1.30", "3 <dog> 1/3 1001", "5 <dog> 3/3 1003"} <= set(lines)
    assert "Adapters chalk x 0.8" in lines
    assert 'Trigger "<dog>" is a word of textual inversion, 3 vectors. It stands in the prompt once.' in lines


def test_the_token_view_of_a_long_prompt(tokenizer: CLIPTokenizer) -> None:
    view = token_view(tokenizer, "dog " * 75 + "red beach BREAK BREAK a photo", trigger="zebra")
    lines = view.splitlines()
    assert max(map(len, lines)) <= 100 and not view.endswith("\n")
    for heading in ("1 of 4: 75 of", "2 of 4: 2 of", "3 of 4: 0 of 75 tokens, nothing but filling", "4 of 4: 2 of"):
        assert sum(line.startswith(f"Chunk {heading}") for line in lines) == 1
    cut = len(token_ids(tokenizer, "dog " * 75 + "red beach BREAK BREAK a photo")) - 75
    assert f"cuts {cut} off: red beach" in view
    assert all(f"{i:>4}  dog" in view for i in range(1, 76))
    assert f'"zebra" is {len(ids_of(tokenizer, "zebra"))} tokens' in view and "nowhere" in view


def test_the_token_view_marks_words_that_go_on(tokenizer: CLIPTokenizer) -> None:
    pieces = ids_of(tokenizer, "zebra")
    cells = token_view(tokenizer, "zebra").splitlines()[3 : 3 + len(pieces)]
    shown = [cell.split()[1] for cell in cells]
    assert len(pieces) > 1 and all(word.endswith("+") for word in shown[:-1])
    assert "".join(word.rstrip("+") for word in shown) == "zebra" and not shown[-1].endswith("+")


@pytest.mark.parametrize("prompt", ["", "🐕 ünï", "x" * 200, "<" + "long" * 20 + ">", "<|endoftext|> \x00 a"])
def test_the_token_view_takes_anything(tokenizer: CLIPTokenizer, prompt: str) -> None:
    placeholders = {"<" + "long" * 20 + ">": [1001, 1002], "sks": [1003]}
    for trigger in (None, "", "dog", "sks", prompt):
        view = token_view(tokenizer, prompt, placeholders, trigger)
        assert max(map(len, view.splitlines())) <= 100


# --- files -------------------------------------------------------------------------------------------------------------


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
