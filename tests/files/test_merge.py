"""The algebra of adapters, and `minidiff merge`: sums are exact, cuts are the best of their rank, nothing is overwritten."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from random_adapters import EVERY, random_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff.cli.main import main
from minidiff.core.errors import AdapterError
from minidiff.core.inject import lora_layers, set_adapters
from minidiff.core.inject import merge as fuse
from minidiff.core.lora import LoRAWeights
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import attach, read_lora, save_lora
from minidiff.files.merge import bake, cut, extract, join, left_out, lost
from minidiff.files.model import FAMILIES, Family, ModelParts, empty_model, read_model

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Modules = dict[str, LoRAWeights]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> ModelParts:
    """For reading only."""
    return read_model(tiny_folder)


@pytest.fixture(scope="module")
def pair(model: ModelParts) -> tuple[Modules, Modules]:
    """One adapter for the U-Net's layers of every kind and the text encoder, one for the U-Net's attention, of another rank."""
    return random_adapter(model.adaptable, 1, targets=EVERY), random_adapter({"unet": model.unet}, 2, rank=3, alpha=1)


@pytest.fixture
def files(pair: tuple[Modules, Modules], tmp_path: Path) -> list[str]:
    names = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    return [str(save_lora(modules, name)) for modules, name in zip(pair, names)]


def small(seed: int, rank: int = 2, out: int = 6, inputs: tuple[int, ...] = (5,), scale: float = 0.7) -> LoRAWeights:
    g = torch.Generator().manual_seed(seed)
    return LoRAWeights(torch.randn(rank, *inputs, generator=g), torch.randn(out, rank, generator=g), scale)


def predict(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), torch.randn(1, 7, 24, generator=g))


def take_for_sd15(tiny: ModelParts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files without OpenCLIP's names are taken for SD 1.5."""
    texts = dict.fromkeys(FAMILIES["SD 1"].texts, tiny.text_encoder.config.to_dict())
    monkeypatch.setitem(FAMILIES, "SD 1", Family(tiny.unet.config, tiny.vae.config, texts))


def merge(*words: str | Path) -> None:
    main(["merge", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The message of a command that leaves with code 2."""
    with pytest.raises(SystemExit) as leave:
        merge(*words)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "Traceback" not in said, said
    return said


# --- join --------------------------------------------------------------------------------------------------------------


def test_join_is_the_sum(pair: tuple[Modules, Modules]) -> None:
    joined = join(pair, [0.8, -0.5])
    assert joined.keys() == pair[0].keys() | pair[1].keys()
    for name, weights in joined.items():
        parts = [strength * modules[name].product() for modules, strength in zip(pair, (0.8, -0.5)) if name in modules]
        torch.testing.assert_close(weights.product(), sum(parts), rtol=0, atol=1e-6)


def test_join_takes_a_1x1_convolution_in_both_forms() -> None:
    matrix, kernel = small(1), small(2, rank=3, inputs=(5, 1, 1))
    joined = join([{NAME: matrix}, {NAME: kernel}], [1, 1])[NAME]
    assert joined.A.shape == (5, 5, 1, 1)
    torch.testing.assert_close(joined.product(), kernel.product() + matrix.product()[..., None, None])


def test_join_refuses() -> None:
    with pytest.raises(AdapterError, match=r"attn1.to_q is of the shapes \[\(6, 5\), \(6, 7\)\].* different models"):
        join([{NAME: small(1)}, {NAME: small(2, inputs=(7,))}], [1, 1])
    dora = LoRAWeights(torch.ones(2, 5), torch.ones(6, 2), 1.0, torch.ones(6, 1))
    with pytest.raises(
        AdapterError, match="to_q is DoRA.*cannot be joined or cut. Bake it into the model: minidiff merge bake"
    ):
        join([{NAME: small(1)}, {NAME: dora}], [1, 1])


# --- rank --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [(5,), (4, 3, 3)])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_cut_is_the_truncated_svd(inputs: tuple[int, ...], rank: int) -> None:
    old = small(3, rank=4, inputs=inputs)
    shorter = cut({NAME: old}, rank)
    W, V = old.product(), shorter.modules[NAME].product()
    U, S, Vt = torch.linalg.svd(W.flatten(1), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    torch.testing.assert_close(V.flatten(1), best, rtol=0, atol=1e-5)
    assert shorter.error[NAME] == pytest.approx(((W - V).norm() / W.norm()).item(), abs=1e-6)
    assert shorter.modules[NAME].rank == min(rank, 4) and shorter.modules[NAME].A.shape[1:] == inputs


def test_cut_of_a_joined_adapter_of_high_rank() -> None:
    many = join([{NAME: small(i, rank=3)} for i in range(4)], [1] * 4)  # rank 12 for a matrix of 6 x 5
    torch.testing.assert_close(cut(many, 5).modules[NAME].product(), many[NAME].product(), rtol=0, atol=1e-5)


def test_cut_of_nothing_is_nothing() -> None:
    nothing = cut({NAME: LoRAWeights(torch.randn(2, 5), torch.zeros(6, 2), 1.0)}, 1)
    assert not nothing.modules[NAME].product().any() and nothing.error == {NAME: 0}


def test_lost_follows_eckart_and_young() -> None:
    assert lost(torch.tensor([4.0, 3.0, 0.0]), 1) == pytest.approx(3 / 5) and lost(torch.tensor([4.0, 3.0]), 2) == 0


# --- models ------------------------------------------------------------------------------------------------------------


def test_extract_finds_the_adapter_again(model: ModelParts, pair: tuple[Modules, Modules]) -> None:
    tuned = {part: deepcopy(network) for part, network in model.adaptable.items()}
    for part, network in tuned.items():
        attach(network, {n.removeprefix(f"{part}."): w for n, w in pair[0].items() if n.startswith(f"{part}.")})
    bake(tuned.values())
    found = extract(model.adaptable, tuned, 2)
    assert found.modules.keys() == pair[0].keys() and not left_out(model.adaptable, tuned, found.modules)
    for name, weights in pair[0].items():
        torch.testing.assert_close(found.modules[name].product(), weights.product(), rtol=0, atol=1e-5)
        assert found.error[name] < 1e-5


def test_extract_says_what_it_cannot_hold(model: ModelParts) -> None:
    tuned = deepcopy(model.unet)
    tuned.conv_in.bias.data += 1
    tuned.conv_norm_out.weight.data += 1
    tuned.conv_out.weight.data += torch.randn_like(tuned.conv_out.weight)
    found = extract({"unet": model.unet}, {"unet": tuned}, 1)
    assert list(found.modules) == ["unet.conv_out"]
    left = left_out({"unet": model.unet}, {"unet": tuned}, found.modules)
    assert set(left) == {"unet.conv_in.bias", "unet.conv_norm_out.weight"}
    change = tuned.conv_out.weight - model.unet.conv_out.weight
    error = (found.modules["unet.conv_out"].product() - change).norm() / change.norm()
    assert found.error["unet.conv_out"] == pytest.approx(error.item(), abs=1e-6) and error > 0.1


def test_extract_refuses(model: ModelParts) -> None:
    with pytest.raises(AdapterError, match="the same matrices; there is no adapter between them"):
        extract({"unet": model.unet}, {"unet": model.unet}, 1)
    other = deepcopy(model.unet)
    other.conv_out.weight = nn.Parameter(torch.zeros(4, 16, 1, 1))
    with pytest.raises(AdapterError, match=r"unet.conv_out.weight is \(4, 16, 3, 3\) in the base and \(4, 16, 1, 1\) in the"):
        extract({"unet": model.unet}, {"unet": other}, 1)


def test_bake_leaves_a_plain_model_in_its_own_dtype(model: ModelParts, pair: tuple[Modules, Modules]) -> None:
    unet = deepcopy(model.unet).half()
    before = unet.conv_in.weight.dtype
    attach(unet, {NAME.removeprefix("unet."): pair[0][NAME]})
    bake([unet])
    layer = unet.get_submodule(NAME.removeprefix("unet."))
    old = model.unet.get_submodule(NAME.removeprefix("unet.")).weight.half()
    assert not lora_layers(unet) and layer.weight.dtype == before == torch.float16
    assert torch.equal(layer.weight, (old.float() + pair[0][NAME].product()).half())


def test_bake_of_a_model_whose_adapters_are_merged_already(model: ModelParts, pair: tuple[Modules, Modules]) -> None:
    unet, path = deepcopy(model.unet), NAME.removeprefix("unet.")
    attach(unet, {path: pair[0][NAME]})
    fuse(unet)
    bake([unet])
    tuned = model.unet.get_submodule(path).weight + pair[0][NAME].product()
    assert not lora_layers(unet) and torch.equal(unet.get_submodule(path).weight, tuned)


# --- the commands: three ways to the same pictures ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(tiny_folder: Path, pair: tuple[Modules, Modules]) -> Tensor:
    """What the U-Net answers with both adapters on, at 0.8 and 0.5."""
    return predict(with_adapters(tiny_folder, pair, [0.8, 0.5]))


def with_adapters(folder: Path, adapters: tuple[Modules, ...], strengths: list[float]) -> UNet2DConditionModel:
    unet = StableDiffusionPipeline.from_pretrained(folder).unet
    for i, modules in enumerate(adapters):
        attach(unet, {name[5:]: weights for name, weights in modules.items() if name.startswith("unet.")}, f"a{i}")
    if adapters:
        set_adapters(unet, [f"a{i}" for i in range(len(adapters))], strengths)
    return unet


def test_bake_into_a_folder(tiny_folder: Path, files: list[str], wanted: Tensor, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "baked"
    merge("bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", *files, "--lora_weight", 0.8, 0.5, "--output", out)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    torch.testing.assert_close(predict(pipe.unet), wanted, rtol=0, atol=1e-5)
    assert (wanted - predict(StableDiffusionPipeline.from_pretrained(tiny_folder).unet)).abs().max() > 1e-2
    moved = read_model(out).text_encoder.state_dict()["encoder.layers.0.mlp.fc1.weight"]
    assert not torch.equal(moved, read_model(tiny_folder).text_encoder.state_dict()["encoder.layers.0.mlp.fc1.weight"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["baked"]
    said = capsys.readouterr().out
    assert "a.safetensors: diffusers style" in said and "weight 0.8" in said
    assert re.search(r"\d+ layers changed\n.*baked: written, and read again", said)


def test_bake_a_single_file_in_the_bases_dtype(
    tiny_folder: Path, files: list[str], wanted: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = empty_model(tiny_folder)
    take_for_sd15(tiny, monkeypatch)
    half, out = tmp_path / "half.safetensors", tmp_path / "baked.safetensors"
    main(["convert", str(tiny_folder), str(half), "--to", "ldm", "--dtype", "float16"])
    merge("bake", "--pretrained_model_name_or_path", half, "--lora", *files, "--lora_weight", 0.8, 0.5, "--output", out)
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    torch.testing.assert_close(predict(read_model(out).unet.float()), wanted, rtol=0, atol=1e-2)


def test_bake_of_dora_at_half_weight(tiny_folder: Path, tmp_path: Path) -> None:
    W = dict(StableDiffusionPipeline.from_pretrained(tiny_folder).unet.named_modules())[NAME[5:]].weight.detach()
    g = torch.Generator().manual_seed(1)
    dora = LoRAWeights(torch.randn(2, W.shape[1], generator=g), torch.randn(len(W), 2, generator=g), 1.0, torch.ones(len(W), 1))
    path = save_lora({NAME: dora}, tmp_path / "dora.safetensors")
    merge(
        *("bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", path),
        *("--lora_weight", 0.5, "--output", tmp_path / "baked"),
    )
    baked = read_model(tmp_path / "baked").unet.get_submodule(NAME[5:]).weight
    torch.testing.assert_close(baked.detach(), W + 0.5 * dora.delta(W), rtol=0, atol=1e-6)


def test_bake_that_changes_nothing_says_so(tiny_folder: Path, files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "baked"
    merge("bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", files[1], "--lora_weight", 0, "--output", out)
    assert "0 layers changed" in capsys.readouterr().out


def test_bake_beyond_all_numbers_names_the_flag(tiny_folder: Path, files: list[str], tmp_path: Path, capsys) -> None:
    words = ("bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", files[1], "--lora_weight", "1e40")
    said = refused(capsys, *words, "--output", tmp_path / "baked")
    assert "with the adapters its weights are too large for torch.float32; lower --lora_weight" in said
    assert ".tmp-minidiff-" not in said and not (tmp_path / "baked").exists()


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_join_command(tiny_folder: Path, files: list[str], wanted: Tensor, tmp_path: Path, capsys, style: str) -> None:
    merge("join", "--lora", *files, "--lora_weight", 0.8, 0.5, "--output", tmp_path / "ab.safetensors", "--to", style)
    joined = read_lora(tmp_path / "ab.safetensors")
    torch.testing.assert_close(predict(with_adapters(tiny_folder, (joined.modules,), [1])), wanted, rtol=0, atol=1e-5)
    assert joined.metadata["modelspec.merged_from"] == "a.safetensors x 0.8, b.safetensors x 0.5" and joined.dialect == style
    said = capsys.readouterr().out
    assert "max |ΔW - ΔW'| = 0\n" in said
    assert "ab.safetensors: " in said and ".tmp-minidiff-" not in said


def test_join_to_a_rank_prints_the_error(files: list[str], pair: tuple[Modules, Modules], tmp_path: Path, capsys) -> None:
    merge("join", "--lora", *files, "--rank", 2, "--output", tmp_path / "ab.safetensors", "--dtype", "float16")
    shorter, exact = read_lora(tmp_path / "ab.safetensors").modules, join(pair, [1, 1])
    changes = {name: weights.product() for name, weights in exact.items()}
    errors = [((shorter[name].product() - change).norm() / change.norm()).item() for name, change in changes.items()]
    said = re.search(r"ΔW at rank 2: ([\d.]+) on average of (\d+) layers, ([\d.]+) in unet", capsys.readouterr().out)
    assert said and int(said[2]) == len(errors)
    assert float(said[1]) == pytest.approx(sum(errors) / len(errors), abs=1e-3)
    assert float(said[3]) == pytest.approx(max(errors), abs=1e-3)
    assert {weights.rank for weights in shorter.values()} == {2}
    assert {tensor.dtype for tensor in load_file(tmp_path / "ab.safetensors").values()} == {torch.float16}


def test_join_keeps_the_words(pair: tuple[Modules, Modules], tmp_path: Path) -> None:
    for name, word in (("a", "sks dog"), ("b", "in tok style")):
        about = {"modelspec.trigger_phrase": word, "base_model": "pocket"}
        save_lora(pair[1], tmp_path / name, metadata=about)
    merge("join", "--lora", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab")
    metadata = read_lora(tmp_path / "ab").metadata
    assert metadata["modelspec.trigger_phrase"] == "sks dog, in tok style" and metadata["base_model"] == "pocket"


def test_resize_command(files: list[str], tmp_path: Path, capsys) -> None:
    merge("resize", files[1], "--rank", 1, "--output", tmp_path / "one", "--to", "peft")
    found = read_lora(tmp_path / "one")
    assert found.dialect == "peft" and set(found.ranks.values()) == {1}
    assert re.search(r"Relative error of ΔW at rank 1: .* of 32 layers", capsys.readouterr().out)


def test_extract_command(tiny_folder: Path, files: list[str], pair: tuple[Modules, Modules], tmp_path: Path, capsys) -> None:
    merge("bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", files[1], "--output", tmp_path / "tuned")
    for tuned in ("tuned", "tuned.safetensors"):
        if tuned != "tuned":
            main(["convert", str(tmp_path / "tuned"), str(tmp_path / tuned), "--to", "ldm"])
        out = tmp_path / f"{tuned}.lora.safetensors"
        merge("extract", tiny_folder, tmp_path / tuned, "--rank", 3, "--output", out)
        found = read_lora(out)
        assert found.modules.keys() == pair[1].keys() and found.metadata["base_model"] == str(tiny_folder)
        for name, weights in pair[1].items():
            torch.testing.assert_close(found.modules[name].product(), weights.product(), rtol=0, atol=1e-5)
    assert "no adapter can hold" not in capsys.readouterr().out


def test_extract_command_names_what_it_leaves(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for tensor in (pipe.unet.conv_in.weight, pipe.unet.conv_in.bias, pipe.vae.quant_conv.bias):
        tensor.data += 1
    pipe.save_pretrained(tmp_path / "tuned")
    merge("extract", tiny_folder, tmp_path / "tuned", "--output", tmp_path / "x.safetensors")
    said = capsys.readouterr().out
    assert (
        "2 tensors moved that no adapter can hold (biases, norms, embeddings, the VAE): unet.conv_in.bias, vae.quant_" in said
    )


# --- the commands: what is refused, with nothing written ---------------------------------------------------------------


def test_refusals(tiny_folder: Path, files: list[str], tmp_path: Path, capsys) -> None:
    base = ("--pretrained_model_name_or_path", tiny_folder)
    out = ("--output", tmp_path / "out" / "x.safetensors")
    dora = LoRAWeights(torch.ones(2, 32), torch.ones(32, 2), 1.0, torch.ones(32, 1))
    save_lora({NAME: dora}, tmp_path / "dora.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(b"PK\x03\x04")
    cases = {
        ("bake", *base, "--lora", *files): "--output",
        ("bake", *base, *out): "--lora",
        (
            "bake",
            *base,
            *out,
            "--lora",
            *files,
            "--lora_weight",
            1,
        ): "--lora_weight has 1 numbers for 2 LoRAs; give one",
        ("join", *out, "--lora", *files, "--lora_weight", 1, "nan"): "--lora_weight must be a finite number; it is (1.0, nan)",
        ("join", *out, "--lora", *files, "--rank", 0): "--rank must be at least 1; it is 0",
        ("join", *out, "--lora", tmp_path / "dora.safetensors"): "is DoRA, whose change is no product B A; it cannot be joined",
        ("join", *out, "--lora", tmp_path / "none.safetensors"): "none.safetensors does not exist",
        ("resize", *out, tmp_path / "dora.safetensors"): "cannot be joined or cut. Bake it",
        ("resize", *out): "minidiff merge resize needs ADAPTER",
        ("resize", *out, files[0], "--rank", 0): "--rank must be at least 1; it is 0",
        ("resize", *out, files[0], "--to", "peft"): "a peft folder holds the adapter of one network",
        ("extract", *out, tiny_folder): "minidiff merge extract needs",
        ("extract", *out, tiny_folder, tiny_folder): "the two models have the same matrices",
        ("extract", *out, tiny_folder, tmp_path): "model_index.json does not exist",
        ("extract", *out, tiny_folder, files[0]): "checkpoint in one file. The file looks like a LoRA",
    }
    for words, message in cases.items():
        assert message in refused(capsys, *words), words
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-minidiff-*"))


def test_nothing_is_overwritten(tiny_folder: Path, files: list[str], tmp_path: Path, capsys) -> None:
    before = Path(files[1]).read_bytes()
    assert "b.safetensors is there already, and nothing is overwritten" in refused(
        capsys, "join", "--lora", *files, "--output", files[1]
    )
    (tmp_path / "folder").mkdir()
    assert "choose another name" in refused(
        *(capsys, "bake", "--pretrained_model_name_or_path", tiny_folder, "--lora", files[1], "--output", tmp_path / "folder"),
    )
    assert Path(files[1]).read_bytes() == before and not list((tmp_path / "folder").iterdir())


def test_a_text_encoders_adapter_needs_no_tokenizer_but_a_folder_does(
    tiny_folder: Path, files: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = empty_model(tiny_folder)
    take_for_sd15(tiny, monkeypatch)
    single = tmp_path / "tiny.safetensors"
    main(["convert", str(tiny_folder), str(single), "--to", "ldm"])
    words = ("bake", "--pretrained_model_name_or_path", single, "--lora", files[0], "--output", tmp_path / "baked")
    assert "a model folder needs a vocabulary, and a single file has none; give --tokenizer" in refused(capsys, *words)
    assert not (tmp_path / "baked").exists()
    merge(*words, "--tokenizer", tiny_folder / "tokenizer")
    assert (tmp_path / "baked" / "tokenizer" / "vocab.json").is_file()
