"""`minidiff convert`: from any form to any other, read again; and one message for each thing that cannot be done."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import EVERY, random_adapter
from safetensors.torch import load_file
from torch import nn

from minidiff.cli.main import main
from minidiff.core.errors import AdapterError, WeightsError
from minidiff.core.lora import LoRAWeights
from minidiff.files.atomic import new_output
from minidiff.files.convert import moved, rewritten
from minidiff.files.lora_file import read_lora, save_lora
from minidiff.files.model import ModelParts, cast, empty_model, read_model
from minidiff.files.names import UNET_PREFIX
from minidiff.files.weights import read_header, save
from minidiff.files.word_file import read_embedding, save_embedding

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> ModelParts:
    """For reading only."""
    return read_model(tiny_folder)


@pytest.fixture(scope="module")
def modules(model: ModelParts) -> dict[str, LoRAWeights]:
    return random_adapter(model.adaptable, 1, targets=EVERY)


def convert(*words: str | Path) -> None:
    main(["convert", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The message of a command that leaves with code 2."""
    with pytest.raises(SystemExit) as leave:
        convert(*words)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "Traceback" not in said, said
    return said


def differences(one: dict[str, LoRAWeights], other: dict[str, LoRAWeights]) -> float:
    assert one.keys() == other.keys()
    return max((one[n].product().flatten(1) - other[n].product().flatten(1)).abs().max().item() for n in one)


# --- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["diffusers", "kohya"])
@pytest.mark.parametrize("then", ["diffusers", "kohya"])
def test_lora_between_styles(modules: dict[str, LoRAWeights], tmp_path: Path, first: str, then: str, capsys: Any) -> None:
    about = {"modelspec.trigger_phrase": "sks", "ss_network_dim": "99", "sshs_model_hash": "old", "base_model": "pocket"}
    source = save_lora(modules, tmp_path / "a.safetensors", first, metadata=about)
    convert(source, tmp_path / "b.safetensors", "--to", then)
    after = read_lora(tmp_path / "b.safetensors")
    assert after.dialect == then and differences(modules, after.modules) < 1e-6
    assert {weights.scale for weights in after.modules.values()} == {1.5}
    assert after.metadata["modelspec.trigger_phrase"] == "sks" and after.metadata["base_model"] == "pocket"
    assert "sshs_model_hash" not in after.metadata and after.metadata.get("ss_network_dim") == {"kohya": "2"}.get(then)
    said = capsys.readouterr().out
    assert "max |ΔW - ΔW'| = 0\n" in said and said.startswith(f"{source}: {first} style")


def test_lora_to_peft_and_back(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    unet = {name: weights for name, weights in modules.items() if name.startswith("unet.")}
    source = save_lora(unet, tmp_path / "a.safetensors", "kohya")
    convert(source, tmp_path / "peft", "--to", "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    assert differences(unet, read_lora(tmp_path / "b.safetensors").modules) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_in_another_dtype_says_how_far_it_moved(
    modules: dict[str, LoRAWeights], tmp_path: Path, dtype: str, capsys: Any
) -> None:
    source = save_lora(modules, tmp_path / "a.safetensors")
    convert(source, tmp_path / "b.safetensors", "--to", "kohya", "--dtype", dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} >= {DTYPES[dtype]}
    said = capsys.readouterr().out
    number = float(said.split("max |ΔW - ΔW'| = ")[1].split("\n")[0])
    assert number == pytest.approx(differences(modules, read_lora(tmp_path / "b.safetensors").modules), rel=1e-2)
    assert number == 0 if dtype == "float32" else 0 < number < 0.1
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")  # keeps its dtype
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "c.safetensors").values()}
    assert kinds == {DTYPES[dtype]}


def test_dora_keeps_its_magnitude(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    for axis, m in (("rows", torch.rand(6, 1, 1, 1)), ("columns", torch.rand(1, 4, 1, 1))):
        weights = LoRAWeights(torch.randn(2, 4, 3, 3, generator=g), torch.randn(6, 2, generator=g), 0.5, m)
        name = "unet.down_blocks.0.resnets.0.conv1"
        source = save_lora({name: weights}, tmp_path / f"{axis}.safetensors", "kohya")
        convert(source, tmp_path / f"{axis}.2.safetensors", "--to", "kohya")
        after = read_lora(tmp_path / f"{axis}.2.safetensors").modules[name]
        assert after.magnitude is not None and torch.equal(after.magnitude, m)


def test_dora_by_columns_cannot_be_diffusers(tmp_path: Path, capsys: Any) -> None:
    weights = LoRAWeights(torch.ones(2, 4), torch.ones(6, 2), 0.5, torch.ones(1, 4))
    source = save_lora({NAME: weights}, tmp_path / "a.safetensors", "kohya")
    assert "Write it in the kohya style, or bake it" in refused(capsys, source, tmp_path / "b.safetensors")


def test_alpha_is_given_where_the_file_is_silent(tmp_path: Path, capsys: Any) -> None:
    save({f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(6, 2)}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--alpha", "8")
    assert read_lora(tmp_path / "b.safetensors").scales == {NAME: 4}
    said = refused(capsys, tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--alpha", "8")
    assert "says its alpha itself" in said
    assert "--alpha must be a number above 0; it is -1.0" in refused(capsys, "a", "b", "--alpha", "-1")


def test_a_model_says_what_ldm_names_count(model: ModelParts, tiny_folder: Path, tmp_path: Path) -> None:
    """LDM numbers layers straight through, so input_blocks_4_1 is another module in another architecture."""
    stem = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    save(tensors, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", tmp_path / "b.safetensors", "--pretrained_model_name_or_path", tiny_folder)
    assert list(read_lora(tmp_path / "b.safetensors").modules) == [
        "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    ]


# --- how far numbers moved ---------------------------------------------------------------------------------------------


def test_the_largest_difference() -> None:
    W = {"a": torch.tensor([1.0, 2.0]), "empty": torch.ones(0, 3)}
    assert moved(W, W) == "max |W - W'| = 0" == moved(W, W | {"a": W["a"].half()})
    assert moved(W, W | {"a": W["a"] + 0.5}) == "max |W - W'| = 0.5"


def test_an_adapter_is_read_again(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    one = {NAME: modules[NAME]}
    line, _ = rewritten(one, tmp_path / "b.safetensors", "kohya", torch.float16, {})
    written = read_lora(tmp_path / "b.safetensors").modules
    change = float(line.removeprefix("max |ΔW - ΔW'| = "))
    assert change == pytest.approx(differences(one, written), rel=1e-2) and 0 < change < 1e-3
    dora = {NAME: replace(modules[NAME], magnitude=torch.full((32, 1), 1.0001))}
    line, _ = rewritten(dora, tmp_path / "c.safetensors", "kohya", torch.bfloat16, {})
    assert float(line.removeprefix("max |ΔW - ΔW'| = ")) >= 1e-4  # m counts too
    infinite = {NAME: LoRAWeights(torch.full((2, 32), 3e38), torch.full((32, 2), 3e38), 1.0)}
    with pytest.raises(AdapterError, match="its numbers are so large that B A is infinite"):
        rewritten(infinite, tmp_path / "d.safetensors", "kohya", torch.float32, {})


def test_metadata_of_the_old_file_alone_is_left_out(tmp_path: Path) -> None:
    about = {"format": "tf", "ss_network_dim": "4", "ss_seed": "1", "modelspec.hash_sha256": "x", "sshs_model_hash": "y"}
    modules = {NAME: LoRAWeights(torch.ones(2, 16), torch.ones(16, 2), 1.0)}
    rewritten(modules, tmp_path / "a.safetensors", "diffusers", torch.float32, about)
    assert read_header(tmp_path / "a.safetensors").metadata.keys() == {"format", "ss_seed", "lora_adapter_metadata"}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "x.txt"
    with pytest.raises(ZeroDivisionError), new_output(output) as place:
        place.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_output(output) as place:
        place.write_text("whole")
        assert not output.exists()
    assert output.read_text() == "whole" and [path.name for path in tmp_path.iterdir()] == ["new"]


# --- textual inversion -------------------------------------------------------------------------------------------------


def test_textual_inversion_between_styles(tmp_path: Path, capsys: Any) -> None:
    vectors = torch.randn(2, 24)
    save_embedding(tmp_path / "a.safetensors", "<dog>", vectors, metadata={"ss_seed": "1"})
    convert(tmp_path / "a.safetensors", tmp_path / "dog.safetensors", "--to", "kohya")
    assert list(load_file(tmp_path / "dog.safetensors")) == ["emb_params"]
    said = capsys.readouterr().out
    assert "max |v - v'| = 0\n" in said
    assert 'programs that read this form take the file\'s name for the word: "dog"' in said
    convert(tmp_path / "dog.safetensors", tmp_path / "c.safetensors", "--token", "<cat>")
    again = read_embedding(tmp_path / "c.safetensors")
    assert again.word == "<cat>" and torch.equal(again.vectors, vectors)
    assert read_header(again.path).metadata["ss_seed"] == "1"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("dog.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 24)}, "name": "x"}, "dog"),
        ("old.pt", {"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 24))})}, "old"),
        ("paper.pt", {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 24)}}, "paper"),
        ("learned_embeds.bin", {"<dog>": torch.ones(24)}, "<dog>"),
        ("bare.bin", torch.ones(1, 24), None),
    ],
)
def test_pickled_textual_inversion(tmp_path: Path, name: str, content: Any, word: str | None, capsys: Any) -> None:
    torch.save(content, tmp_path / name)
    out = tmp_path / "out.safetensors"
    if word is None:
        said = refused(capsys, tmp_path / name, out)
        assert 'bare.bin does not say what its word is. minidiff convert --token "<my-dog>" writes it under that word' in said
        convert(tmp_path / name, out, "--token", "<dog>")
    else:
        convert(tmp_path / name, out)
    again = read_embedding(out)
    assert again.word == (word or "<dog>") and torch.equal(again.vectors, torch.ones_like(again.vectors))


@pytest.mark.parametrize(
    "content", [{"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 24)}}, {"dog": torch.ones(2, 24)}]
)
def test_the_command_that_messages_give_keeps_the_word(tmp_path: Path, capsys: Any, content: Any) -> None:
    """A folder of a pickle alone: the message has the command, and after it the folder can be read."""
    torch.save(content, tmp_path / "dog.bin")
    with pytest.raises(WeightsError) as caught:
        read_embedding(tmp_path)
    convert(*str(caught.value).split("minidiff convert ")[1].split())
    assert list(load_file(tmp_path / "model.safetensors")) == ["dog"]
    again = read_embedding(tmp_path)
    assert again.word == "dog" and torch.equal(again.vectors, torch.ones(2, 24))


def test_the_kohya_form_of_what_a1111_cannot_use(tmp_path: Path, capsys: Any) -> None:
    to_k = NAME.replace("attn1.to_q", "attn2.to_k")
    for width, note in ((128, True), (768, False)):
        lora = save_lora({to_k: LoRAWeights(torch.ones(2, width), torch.ones(8, 2), 1.0)}, tmp_path / f"{width}.safetensors")
        word = save_embedding(tmp_path / f"w{width}.safetensors", "<dog>", torch.ones(1, width))
        for source in (lora, word):
            for to in ("kohya", "diffusers"):
                convert(source, tmp_path / to / source.name, "--to", to)
                said = capsys.readouterr().out
                assert ("A1111 and ComfyUI cannot use it: it is for a model of width 128" in said) == (note and to == "kohya")


# --- models and pickles ------------------------------------------------------------------------------------------------


def test_folder_to_single_file_and_back(tiny_folder: Path, model: ModelParts, tmp_path: Path, capsys: Any) -> None:
    single = tmp_path / "tiny.safetensors"
    convert(tiny_folder, single, "--to", "ldm")
    assert f"{UNET_PREFIX}input_blocks.0.0.weight" in load_file(single)
    assert "max |W - W'| = 0\n" in capsys.readouterr().out
    convert(single, tmp_path / "back", "--pretrained_model_name_or_path", tiny_folder)
    after = read_model(tmp_path / "back").weights()
    assert all(torch.equal(after[key], tensor) for key, tensor in model.weights().items())
    assert (tmp_path / "back" / "tokenizer" / "vocab.json").is_file()


def test_a_model_in_half_precision(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    convert(tiny_folder, tmp_path / "half", "--dtype", "float16")
    assert {tensor.dtype for tensor in read_model(tmp_path / "half").weights().values()} == {torch.float16}
    moved = float(capsys.readouterr().out.split("max |W - W'| = ")[1].split("\n")[0])
    assert 0 < moved < 0.01


def test_numbers_too_large_for_fp16(model: ModelParts) -> None:
    large = deepcopy(model)
    large.unet.conv_in.bias.data[0] = 1e6
    with pytest.raises(WeightsError, match="unet.conv_in.bias has numbers too large for torch.float16; take bfloat16"):
        cast(large, torch.float16)


def test_a_pickled_checkpoint(tiny_folder: Path, model: ModelParts, tmp_path: Path) -> None:
    convert(tiny_folder, tmp_path / "tiny.safetensors", "--to", "ldm")
    tensors = load_file(tmp_path / "tiny.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "as_is.safetensors", "--to", "safetensors")
    as_is = load_file(tmp_path / "as_is.safetensors")
    assert as_is.keys() == tensors.keys() and all(torch.equal(as_is[key], tensors[key]) for key in tensors)
    convert(tmp_path / "old.ckpt", tmp_path / "folder", "--pretrained_model_name_or_path", tiny_folder)
    after = read_model(tmp_path / "folder").weights()
    assert all(torch.equal(after[key], tensor) for key, tensor in model.weights().items())


def test_a_pickled_lora(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    save_lora({NAME: modules[NAME]}, tmp_path / "a.safetensors", "kohya")
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.weights")  # known by its first bytes
    convert(tmp_path / "a.weights", tmp_path / "b.safetensors")
    assert differences({NAME: modules[NAME]}, read_lora(tmp_path / "b.safetensors").modules) < 1e-6


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("owned",))


def test_refusals(modules: dict[str, LoRAWeights], tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    lora = save_lora({NAME: modules[NAME]}, tmp_path / "lora.safetensors")
    infinite = LoRAWeights(torch.full((2, 32), 3e38), torch.full((32, 2), 3e38), 1.0)
    huge = save_lora({NAME: infinite}, tmp_path / "huge.safetensors")
    word = save_embedding(tmp_path / "word.safetensors", "<dog>", torch.ones(1, 24))
    vae = tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    new = tmp_path / "out" / "x.safetensors"
    cases: dict[tuple[str | Path, ...], str] = {
        (lora, lora): "lora.safetensors is there already, and nothing is overwritten; choose another name",
        (lora, new, "--to", "ldm"): "is a LoRA, and that has no form --to ldm; it has diffusers, kohya, peft",
        (lora, new, "--token", "x"): "is a LoRA, for which --token means nothing; leave it out",
        (lora, new, "--to", "peft"): "peft's adapters are folders of two files; give the name of a folder",
        (lora, new, "--to", "safetensors"): "is a LoRA, and that has no form --to safetensors; it has diffusers",
        (word, new, "--to", "peft"): "is a textual inversion, and that has no form --to peft; it has diffusers, kohya",
        (word, new, "--dtype", "float16"): "is a textual inversion, for which --dtype means nothing",
        (tiny_folder, new, "--to", "kohya"): "is a model, and that has no form --to kohya; it has diffusers, ldm",
        (tiny_folder, new): "a model in the form diffusers is a folder; choose another name, or another --to",
        (tiny_folder, tmp_path / "out", "--to", "ldm"): "is a file that ends in .safetensors",
        (vae, tmp_path / "out"): "checkpoint in one file. The file looks like a VAE in",
        (tmp_path / "evil.pt", new): "evil.pt",
        (tmp_path / "none.pt", new): "none.pt does not exist",
        (tmp_path / "none.safetensors", new): "none.safetensors does not exist",
        (tmp_path / "pointer.safetensors", new): "is a git-LFS pointer, not the file itself",
        (lora, tmp_path / "out" / "x.ckpt"): "x.ckpt: minidiff writes no .ckpt files; name a .safetensors file, or a folder",
        (tiny_folder, tmp_path / "out" / "x.pt"): "x.pt: minidiff writes no .pt files",
        (huge, new): "its numbers are so large that B A is infinite",
        (word, new, "--token", "two words"): '"two words" has a space in it; a new word is one word',
        (lora, ""): "--output must name a file or folder",
    }
    for words, message in cases.items():
        said = refused(capsys, *words)
        assert message in said and "owned" not in said and ".tmp-minidiff-" not in said and "a bug" not in said, words
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-minidiff-*"))


def test_errors_name_the_users_own_file(tmp_path: Path, capsys: Any) -> None:
    torch.save({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "nan.pt")
    said = refused(capsys, tmp_path / "nan.pt", tmp_path / "x.safetensors", "--to", "safetensors")
    assert f"minidiff: {tmp_path / 'nan.pt'}: a has NaN or infinite values" in said


def test_an_output_beyond_a_folder_that_is_not_there(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    lora = save_lora({NAME: modules[NAME]}, tmp_path / "lora.safetensors")
    convert(lora, tmp_path / "x" / ".." / "new.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"lora.safetensors", "new.safetensors"}


def test_a_folder_may_be_called_as_a_pickle_is(modules: dict[str, LoRAWeights], tmp_path: Path) -> None:
    save_lora({NAME: modules[NAME]}, tmp_path / "dog").parent.rename(tmp_path / "dog.pt")
    convert(tmp_path / "dog.pt", tmp_path / "new.safetensors")
    assert read_lora(tmp_path / "new.safetensors").modules.keys() == {NAME}


def test_empty_model_is_sd15_without_numbers() -> None:
    model = empty_model(None)
    assert sum(tensor.numel() for tensor in model.unet.state_dict().values()) == 859_520_964
    assert next(model.unet.parameters()).is_meta
