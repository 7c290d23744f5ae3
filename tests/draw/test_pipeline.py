"""Text to image on a tiny model with drawn weights: what a call promises, and what bad input gets to hear."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sizes import TINY_UNET, TINY_VAE
from torch import Tensor, nn

from minidiff.core.config import SD15_UNET, SD15_VAE, NoiseConfig, VAEConfig
from minidiff.core.errors import AdapterError, MinidiffError, SettingsError, WeightsError
from minidiff.core.grids import SAMPLERS, Step
from minidiff.core.inject import adapter_weights, inject, lora_layers, set_adapters
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline, check_steps, sampler_for
from minidiff.fast.frozen import frozen_weights
from minidiff.files.folder import SAMPLER_OF, SD15_TEXT
from minidiff.files.lora_file import save_lora
from minidiff.files.model import ldm_tensors, split_single_file
from minidiff.files.text_files import build_text_encoder
from minidiff.files.weights import load_into, read_header, save
from minidiff.pocket.tokenizer import END, START, alphabet, build_tokenizer

DOG, CAT = "a photo of a red dog", "a drawing of a blue cat"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def load(folder: Path, **options: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    """For reading only."""
    return load(tiny_folder)


@pytest.fixture
def fresh(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """For changing."""
    return deepcopy(pipe)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def latents(pipe: StableDiffusionPipeline, prompt: Any = DOG, **options: Any) -> Tensor:
    result: Tensor = pipe(prompt, **{"num_inference_steps": 3, "seed": 5, "output_type": "latent"} | options).images
    return result


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> StableDiffusionPipeline:
    """In fp64. Another batch size adds up in another order, and random weights blow fp32's rounding up a thousandfold."""
    return load(tiny_folder, torch_dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def differ(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() > 1e-2)


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_the_same_alone_or_in_a_batch(exact: StableDiffusionPipeline, sampler: str) -> None:
    batch = latents(exact, [DOG, CAT, DOG], sampler=sampler)
    for i, prompt in enumerate([DOG, CAT, DOG]):
        close(latents(exact, prompt, seed=5 + i, sampler=sampler)[0], batch[i])
    assert differ(batch[0], batch[2])
    assert torch.equal(latents(exact, [DOG, CAT, DOG], sampler=sampler), batch)


def test_images_per_prompt_are_one_batch(pipe: StableDiffusionPipeline) -> None:
    assert torch.equal(latents(pipe, [DOG, CAT], num_images_per_prompt=2), latents(pipe, [DOG, DOG, CAT, CAT]))


def test_a_list_of_seeds(exact: StableDiffusionPipeline) -> None:
    for seeds in ([7, 5], (7, 5), np.array([7, 5]), torch.tensor([7, 5])):
        two = latents(exact, [DOG, DOG], seed=seeds)
        close(two[0], latents(exact, seed=7)[0])
        close(two[1], latents(exact, seed=np.int64(5))[0])


def test_without_a_seed_every_picture_is_new(pipe: StableDiffusionPipeline) -> None:
    assert differ(latents(pipe, seed=None), latents(pipe, seed=None))


def test_a_generator_draws_as_in_diffusers(pipe: StableDiffusionPipeline) -> None:
    """First the latents of the whole batch, then the noise of each step; nothing for latents that are given."""
    g = torch.Generator().manual_seed(3)
    start, *steps = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(4))
    expected = latents(pipe, [DOG, CAT], generator=torch.Generator().manual_seed(3), sampler="euler_a")
    assert torch.equal(expected, latents(pipe, [DOG, CAT], generator=torch.Generator().manual_seed(3), sampler="euler_a"))
    g = torch.Generator().manual_seed(3)
    torch.randn(2, 4, 8, 8, generator=g)  # now where the step noise begins
    assert torch.equal(expected, latents(pipe, [DOG, CAT], latents=start, generator=g, sampler="euler_a"))
    after = torch.Generator().manual_seed(3)
    for _ in range(4):
        torch.randn(2, 4, 8, 8, generator=after)
    assert torch.equal(g.get_state(), after.get_state())


def test_given_latents_are_the_start(pipe: StableDiffusionPipeline) -> None:
    start = normal((4, 8, 8), 5, "latents")[None]
    assert torch.equal(latents(pipe, latents=start), latents(pipe))
    assert torch.equal(latents(pipe, latents=start.double(), seed=99), latents(pipe))  # ddim draws nothing more


def test_the_global_generator_is_left_alone(pipe: StableDiffusionPipeline) -> None:
    before = torch.get_rng_state()
    latents(pipe, sampler="euler_a")
    assert torch.equal(torch.get_rng_state(), before)


# --- guidance and prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "batch"), [(7.5, 4), (1.01, 4), (1.0, 2), (0.0, 2), (-3.0, 2)])
def test_guidance_doubles_the_batch_above_one_only(pipe: StableDiffusionPipeline, scale: float, batch: int) -> None:
    seen: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    latents(pipe, [DOG, CAT], guidance_scale=scale)
    hook.remove()
    assert seen == [batch] * 3


def test_without_guidance_only_the_prompt_counts(pipe: StableDiffusionPipeline) -> None:
    """The same as the sampler with the bare network, and a negative prompt changes nothing."""
    text = pipe.encode_prompt([DOG])
    noise = normal((4, 8, 8), 5, "latents")[None]
    with torch.no_grad(), frozen_weights([pipe.unet], large=True, prompt=True):
        steps = SAMPLERS["ddim"](lambda x, t: pipe.unet(x, t, text), noise, pipe.schedule, 3, lambda i: noise)
        *_, last = steps
    assert torch.equal(latents(pipe, guidance_scale=1), last.x)
    assert torch.equal(latents(pipe, guidance_scale=1, negative_prompt=CAT), last.x)


def test_prompts_have_an_effect(pipe: StableDiffusionPipeline) -> None:
    plain = latents(pipe)
    assert differ(latents(pipe, CAT), plain)
    assert differ(latents(pipe, negative_prompt="a blue cat"), plain)
    assert differ(latents(pipe, guidance_scale=3.0), plain)
    assert torch.equal(latents(pipe, negative_prompt=""), plain)


def test_one_negative_prompt_or_one_for_each(pipe: StableDiffusionPipeline) -> None:
    both = latents(pipe, [DOG, CAT], negative_prompt=["snow", "beach"])
    close(both[1], latents(pipe, CAT, negative_prompt="beach", seed=6)[0])
    assert torch.equal(
        latents(pipe, [DOG, CAT], negative_prompt="snow"), latents(pipe, [DOG, CAT], negative_prompt=["snow", "snow"])
    )
    four = latents(pipe, [DOG, CAT], negative_prompt=["snow", "beach"], num_images_per_prompt=2)
    assert torch.equal(four, latents(pipe, [DOG, DOG, CAT, CAT], negative_prompt=["snow", "snow", "beach", "beach"]))


# --- what comes out --------------------------------------------------------------------------------------------------


def test_class_names(pipe: StableDiffusionPipeline) -> None:
    names = [type(part).__name__ for part in (pipe.text_encoder, pipe.unet, pipe.vae)]
    assert names == ["CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL"]
    assert pipe.device == torch.device("cpu") and pipe.to("cpu") is pipe
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_cast_and_moved_the_vae_stays_in_fp32(tiny_folder: Path) -> None:
    for arguments in ((torch.bfloat16,), ("cpu", torch.bfloat16)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_folder).to(*arguments)
        kinds = [next(part.parameters()).dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)]
        assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_an_attribute_that_would_change_nothing(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(AttributeError, match="has no scheduler that could be set"):
        pipe.scheduler = object()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no safety_checker that could be set"):
        pipe.safety_checker = None  # type: ignore[attr-defined]
    pipe.sampler = pipe.sampler


def test_one_prompt_as_a_string(pipe: StableDiffusionPipeline) -> None:
    assert torch.equal(pipe.encode_prompt("a dog"), pipe.encode_prompt(["a dog"]))


def test_output_types(pipe: StableDiffusionPipeline) -> None:
    z = latents(pipe, [DOG, CAT])
    pt = latents(pipe, [DOG, CAT], output_type="pt")
    pil = pipe([DOG, CAT], num_inference_steps=3, seed=5).images
    assert z.shape == (2, 4, 8, 8) and z.dtype == torch.float32
    assert pt.shape == (2, 3, 16, 16) and 0 <= pt.min() < pt.max() <= 1
    assert [(type(image), image.size, image.mode) for image in pil] == [(Image.Image, (16, 16), "RGB")] * 2
    with torch.no_grad():
        expected = pipe.vae.decode(z / pipe.vae.config.scaling_factor).clamp(-1, 1)
    close(pt * 2 - 1, expected)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in pil])).permute(0, 3, 1, 2).float()
    assert (pixels - pt * 255).abs().max() <= 0.5 + 1e-3
    array = latents(pipe, [DOG, CAT], output_type="np")
    assert isinstance(array, np.ndarray) and (array == pt.permute(0, 2, 3, 1).numpy()).all()
    assert not pt.requires_grad


def test_width_and_height(pipe: StableDiffusionPipeline) -> None:
    assert pipe(DOG, num_inference_steps=1, width=26, height=18).images[0].size == (26, 18)
    assert latents(pipe, width=26, height=18).shape == (1, 4, 9, 13)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step(pipe: StableDiffusionPipeline, sampler: str) -> None:
    seen: list[Step] = []
    last = latents(pipe, sampler=sampler, num_inference_steps=4, callback=seen.append)
    calls = {"pndm": 5, "heun": 7}.get(sampler, 4)
    assert [(step.index, step.total) for step in seen] == [(i, calls) for i in range(calls)]
    assert all(a.t >= b.t for a, b in zip(seen, seen[1:])) and torch.equal(seen[-1].x, last)
    assert all(step.x0.shape == step.x.shape == (1, 4, 8, 8) for step in seen)


def test_the_progress_bar_can_be_switched_off(fresh: StableDiffusionPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    latents(fresh)
    assert capfd.readouterr().err == ""
    fresh.set_progress_bar_config()
    latents(fresh)
    assert "0/3" in capfd.readouterr().err


# --- saving and loading ----------------------------------------------------------------------------------------------


def networks(pipe: StableDiffusionPipeline) -> list[nn.Module]:
    return [pipe.unet, pipe.vae, pipe.text_encoder]


def same_weights(a: StableDiffusionPipeline, b: StableDiffusionPipeline) -> bool:
    states = [(x.state_dict(), y.state_dict()) for x, y in zip(networks(a), networks(b))]
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in states)


def test_save_and_load_are_bit_equal(pipe: StableDiffusionPipeline, tiny_folder: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert same_weights(pipe, again)
    assert torch.equal(latents(pipe, sampler="euler_a"), latents(again, sampler="euler_a"))
    files = sorted(str(p.relative_to(tiny_folder)) for p in tiny_folder.rglob("*") if p.is_file())
    assert {"model_index.json", UNET_FILE, "text_encoder/model.safetensors", "tokenizer/merges.txt"} < set(files)
    for name in files:  # and what is written twice is the same file
        assert (tmp_path / "copy" / name).read_bytes() == (tiny_folder / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe: StableDiffusionPipeline, tiny_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The VAE stays in fp32: in fp16 it overflows."""
    half = load(tiny_folder, torch_dtype=dtype)
    assert [{p.dtype for p in part.parameters()} for part in networks(half)] == [{dtype}, {torch.float32}, {dtype}]
    picture = latents(half, output_type="pt")
    assert picture.dtype == torch.float32 and (picture - latents(pipe, output_type="pt")).abs().mean() < 0.05
    half.save_pretrained(tmp_path, dtype=dtype)
    again = load(tmp_path, torch_dtype=dtype)
    assert torch.equal(latents(half), latents(again))


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [
        ("PNDMScheduler", "pndm"),
        ("DDIMScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("DPMSolverMultistepScheduler", "dpm++_2m"),
        ("LCMScheduler", "lcm"),
        ("TCDScheduler", "tcd"),
    ],
)
def test_the_folder_says_which_sampler(folder: Path, tmp_path: Path, class_name: str, sampler: str) -> None:
    change(folder / "scheduler/scheduler_config.json", _class_name=class_name)
    pipe = load(folder)
    assert pipe.sampler == sampler
    assert torch.equal(latents(pipe), latents(pipe, sampler=sampler))
    pipe.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())
    assert SAMPLER_OF[again["_class_name"]] == sampler


def test_v_prediction_is_kept(folder: Path, tmp_path: Path, pipe: StableDiffusionPipeline) -> None:
    change(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    other = load(folder)
    assert other.schedule.config.prediction_type == "v_prediction" and differ(latents(other), latents(pipe))
    other.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").noise_config == replace(NoiseConfig(), prediction_type="v_prediction")


def test_single_file_round_trip(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(ldm_tensors(pipe.unet, pipe.vae, pipe.text_encoder), path)
    files = split_single_file(read_header(path), TINY_UNET, TINY_VAE)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(TINY_UNET), AutoencoderKL(TINY_VAE)
        text_encoder = build_text_encoder(pipe.text_encoder.config.to_dict(), "tiny")
    for model, file in zip((unet, vae, text_encoder), files.values()):
        load_into(model, file)
    again = StableDiffusionPipeline(unet, vae, text_encoder, pipe.tokenizer, NoiseConfig())
    again.set_progress_bar_config(disable=True)
    assert same_weights(pipe, again) and torch.equal(latents(pipe), latents(again))


def test_a_tiny_model_is_no_sd15_single_file(pipe: StableDiffusionPipeline, tiny_folder: Path, tmp_path: Path) -> None:
    save(ldm_tensors(pipe.unet, pipe.vae, pipe.text_encoder), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="model.safetensors"):
        StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors", tiny_folder / "tokenizer")


def sd15_sized_tokenizer(folder: Path) -> Path:
    """49,408 tokens as in CLIP, of made-up merges: two letters each."""
    build_tokenizer(folder, ["a"])
    letters = alphabet()[:256]
    pairs = [(a, f"{b}</w>") for a in letters for b in letters][:48_894]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs)]) + "\n")
    return folder


@pytest.mark.slow
def test_single_file_of_sd15s_size(tmp_path: Path, tiny_folder: Path) -> None:
    """2.1 GB: written in fp16, read back with from_single_file, every tensor the same; another tokenizer is refused."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(SD15_UNET), AutoencoderKL(SD15_VAE)
        text_encoder = build_text_encoder(SD15_TEXT, "SD 1.5")
    for i, model in enumerate((unet, vae, text_encoder)):
        model.to_empty(device="cpu").half()
        for j, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(i + j / 1024)  # each tensor is recognised by its number
    path = tmp_path / "sd15.safetensors"
    save(ldm_tensors(unet, vae, text_encoder), path)
    with pytest.raises(WeightsError, match="different models"):
        StableDiffusionPipeline.from_single_file(path, tiny_folder / "tokenizer", torch_dtype=torch.float16)
    tokenizer = sd15_sized_tokenizer(tmp_path / "tokenizer")
    pipe = StableDiffusionPipeline.from_single_file(path, tokenizer, torch_dtype=torch.float16)
    path.unlink()
    for model, again in zip((unet, vae, text_encoder), networks(pipe)):
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key].half(), value) for key, value in model.state_dict().items())
    assert pipe.latent_shape(1, None, None) == (1, 4, 64, 64)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def write_lora(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(TINY_UNET)
    for layer in inject(unet, rank=2, alpha=4, seed=seed).values():
        nn.init.normal_(layer.lora_B["default"], std=0.3)
    return save_lora({f"unet.{name}": weights for name, weights in adapter_weights(unet).items()}, path)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lora")
    return [write_lora(folder / "dog", 1), write_lora(folder / "style.safetensors", 2)]


def test_load_and_unload_lora(fresh: StableDiffusionPipeline, pipe: StableDiffusionPipeline, loras: list[Path]) -> None:
    base = latents(pipe)
    loaded = fresh.load_lora_weights(loras[0])
    assert "rank 2, alpha/r 2" in str(loaded) and len(loaded.ranks) == len(lora_layers(fresh.unet))
    tuned = latents(fresh)
    assert differ(tuned, base)
    fresh.unload_lora_weights()
    assert same_weights(fresh, pipe) and torch.equal(latents(fresh), base)
    for where, options in ((loras[0].parent, {}), (loras[0].parent, {"weight_name": loras[0].name})):
        fresh.load_lora_weights(where, **options)
        assert torch.equal(latents(fresh), tuned)
        fresh.unload_lora_weights()


def test_set_adapters(fresh: StableDiffusionPipeline, pipe: StableDiffusionPipeline, loras: list[Path]) -> None:
    pictures = {}
    for name, path in zip(("dog", "style"), loras):
        fresh.load_lora_weights(path, adapter_name=name)
        pictures[name] = latents(fresh)  # the one that was loaded last is on alone
    for name, picture in pictures.items():
        fresh.set_adapters(name)
        assert torch.equal(latents(fresh), picture)
    fresh.set_adapters(["dog", "style"], adapter_weights=[0.8, 0.5])
    both = latents(fresh)
    assert differ(both, pictures["dog"]) and differ(both, pictures["style"])
    fresh.set_adapters(["style", "dog"], [0.5, 0.8])
    assert torch.equal(latents(fresh), both)
    fresh.set_adapters(["dog", "style"], [0.0, 0.0])
    assert torch.equal(latents(fresh), latents(pipe))


def test_fuse_and_unfuse(fresh: StableDiffusionPipeline, loras: list[Path]) -> None:
    fresh.load_lora_weights(loras[0])
    tuned, detour = latents(fresh), {k: v.clone() for k, v in fresh.unet.state_dict().items()}
    fresh.fuse_lora()
    close(latents(fresh), tuned)
    assert not torch.equal(fresh.unet.state_dict()[key := first_base_weight(fresh)], detour[key])
    fresh.unfuse_lora()
    assert all(torch.equal(value, detour[key]) for key, value in fresh.unet.state_dict().items())
    assert torch.equal(latents(fresh), tuned)


def first_base_weight(pipe: StableDiffusionPipeline) -> str:
    return next(key for key in pipe.unet.state_dict() if key.endswith(".base.weight"))


def test_lora_errors(fresh: StableDiffusionPipeline, loras: list[Path], tmp_path: Path) -> None:
    for call in (fresh.fuse_lora, fresh.unfuse_lora, lambda: fresh.set_adapters("dog")):
        with pytest.raises(AdapterError):
            call()
    with pytest.raises(MinidiffError, match="nowhere"):
        fresh.load_lora_weights(tmp_path / "nowhere.safetensors")
    fresh.load_lora_weights(loras[0], adapter_name="dog")
    with pytest.raises(AdapterError, match='"dog" is there already'):
        fresh.load_lora_weights(loras[1], adapter_name="dog")
    with pytest.raises(AdapterError, match='Did you mean "dog"'):
        fresh.set_adapters(["dogs"])
    with pytest.raises(AdapterError, match="each adapter needs one finite weight"):
        fresh.set_adapters(["dog"], [1.0, 0.5])
    with pytest.raises(AdapterError, match="unload_lora_weights first"):
        fresh.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- bad input: folders ----------------------------------------------------------------------------------------------


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def damage(path: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(text)


def remove(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (remove("model_index.json"), "model_index.json does not exist"),
    "index is no JSON": (damage("model_index.json", '{"_class_name": '), "model_index.json cannot be read as JSON"),
    "index is a list": (damage("model_index.json", "[]"), "model_index.json holds no JSON object"),
    "SD 3": (
        lambda folder: change(folder / "model_index.json", _class_name="StableDiffusion3Pipeline"),
        "describes a StableDiffusion3Pipeline; minidiff reads Stable Diffusion 1.x",
    ),
    "no U-Net weights": (remove(UNET_FILE), "has no .*safetensors"),
    "U-Net weights cut off": (lambda folder: cut(folder / UNET_FILE), "cut off|damaged"),
    "no U-Net at all": (lambda folder: shutil.rmtree(folder / "unet"), "the unet of a model has one"),
    "no VAE config": (remove("vae/config.json"), "vae/config.json does not exist"),
    "no scheduler": (remove("scheduler/scheduler_config.json"), "scheduler_config.json does not exist"),
    "no vocabulary": (remove("tokenizer/vocab.json"), "no CLIP tokenizer here"),
    "no text config": (remove("text_encoder/config.json"), "text_encoder/config.json does not exist"),
    "text config is another's": (damage("text_encoder/config.json", "{}"), "not the configuration of a CLIP text model"),
    "SD 2's linear projections": (
        lambda folder: change(folder / "unet/config.json", use_linear_projection=True),
        "does not fit UNet2DConditionModel(.|\\n)*misshapen: .*proj_in.weight is .16, 16, 1, 1., in the model .16, 16",
    ),
    "another width": (
        lambda folder: change(folder / "unet/config.json", cross_attention_dim=1024),
        "does not fit UNet2DConditionModel",
    ),
    "an impossible width": (
        lambda folder: change(folder / "unet/config.json", block_out_channels=[17, 32]),
        "unet/config.json: not a usable configuration: .* with widths .17, 32.",
    ),
    "another prediction": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", prediction_type="sample"),
        "prediction_type is 'sample'",
    ),
    "a bigger vocabulary": (lambda folder: other_tokenizer(folder, "many other words that are new here"), "different models"),
    "a smaller vocabulary": (lambda folder: other_tokenizer(folder, "a"), "different models"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_tokenizer(folder: Path, words: str) -> None:
    shutil.rmtree(folder / "tokenizer")
    text = "a photo of a red dog on the beach, a drawing of a blue cat in the snow " if "new" in words else ""
    build_tokenizer(folder / "tokenizer", [text + words])


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_an_error_that_says_what(folder: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert "\n\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize(("channels", "what"), [(8, "an image-editing"), (5, "a depth"), (7, "another")])
def test_a_unet_with_other_channels(pipe: StableDiffusionPipeline, channels: int, what: str) -> None:
    unet = UNet2DConditionModel(replace(TINY_UNET, in_channels=channels))
    with pytest.raises(WeightsError, match=rf"{channels} input channels \({what} model\); minidiff draws with 4, or 9"):
        StableDiffusionPipeline(unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, NoiseConfig())


def test_parts_of_different_width(pipe: StableDiffusionPipeline) -> None:
    unet = UNet2DConditionModel(replace(TINY_UNET, cross_attention_dim=32))
    with pytest.raises(WeightsError, match="the text encoder is 24 wide and the U-Net reads 32"):
        StableDiffusionPipeline(unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, NoiseConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runwayml/stable-diffusion-v1-5", "lives on as stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("someone/some-model", "no hub model of that name in the local cache"),
        ("no/such/folder", "there is no such folder"),
        ("checkpoints/poket", "there is no such folder"),
        ("bad id/with spaces!", "there is no such folder"),
    ],
)
def test_a_name_that_is_not_here(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=message):
        StableDiffusionPipeline.from_pretrained(name)


def test_a_file_in_place_of_a_folder(tiny_folder: Path) -> None:
    with pytest.raises(WeightsError, match="is a file, not a model folder; .* from_single_file"):
        StableDiffusionPipeline.from_pretrained(tiny_folder / UNET_FILE)


# --- bad input: calls ------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": 15}, "width is 15; it must be a multiple of 2 up to 8192"),
    "height": ({"height": 0}, "height is 0; it must be a multiple of 2 up to 8192"),
    "negative height": ({"height": -8}, "height is -8"),
    "sampler": ({"sampler": "dpm++2m"}, r'sampler "dpm\+\+2m" is unknown.*Did you mean "dpm\+\+_2m"'),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; it can be 1 to 1000"),
    "too many steps": ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    "far too many steps": ({"num_inference_steps": 10**400}, "num_inference_steps is 1000.*; it can be 1 to 1000"),
    "half a step": ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0; it must be a whole number"),
    "a broken width": ({"width": 16.0}, "width is 16.0; it must be a whole number"),
    "generators": ({"generator": [torch.Generator()] * 2}, "a list with one for each of the 1 pictures"),
    "no generator": ({"generator": 7}, "generator must be one torch.Generator, or a list"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    "output": ({"output_type": "numpy"}, 'output_type "numpy" is unknown; it is pil, pt, np or latent'),
    "seeds": ({"seed": [1, 2]}, "2 seeds were given for 1 pictures"),
    "a broken seed": ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    "a word for a seed": ({"seed": "42"}, "seed is '42'; it must be a whole number"),
    "latents": ({"latents": torch.zeros(1, 4, 8, 7)}, r"latents have the shape \(1, 4, 8, 7\); .* must be \(1, 4, 8, 8\)"),
    "a list of latents": ({"latents": [0.0]}, "latents must be a tensor of floats"),
    "whole latents": ({"latents": torch.zeros(1, 4, 8, 8).long()}, "latents must be a tensor of floats"),
    "NaN in the latents": ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents must be.*without NaN"),
    "batch of latents": ({"latents": torch.zeros(2, 4, 8, 8)}, r"must be \(1, 4, 8, 8\)"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    "no prompts": ({"prompt": []}, "1 negative prompts for 0 prompts"),
    "prompt None": ({"prompt": None}, "give either a prompt or prompt_embeds"),
    "prompt a number": ({"prompt": [DOG, 3]}, "prompt and negative_prompt must be a text"),
    "negative a number": ({"negative_prompt": 3}, "prompt and negative_prompt must be a text"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_is_an_error_that_says_what(pipe: StableDiffusionPipeline, case: str) -> None:
    options, message = CALLS[case]
    with pytest.raises(SettingsError, match=message):
        pipe(**{"prompt": DOG, "num_inference_steps": 2} | options)


@pytest.mark.parametrize(("levels", "factor"), [(4, 8), (3, 4), (1, 1)])
def test_sides_follow_the_vaes_levels(pipe: StableDiffusionPipeline, levels: int, factor: int) -> None:
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4))
    other = StableDiffusionPipeline(pipe.unet, vae, pipe.text_encoder, pipe.tokenizer, NoiseConfig())
    assert other.latent_shape(1, 5 * factor, None) == (1, 4, 5, 8)
    if factor > 1:
        with pytest.raises(SettingsError, match=f"multiple of {factor} up to 8192"):
            other.latent_shape(1, 64, 6 * factor + 1)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "lcm", "tcd"])
def test_no_karras_sigmas_for_walkers(name: str) -> None:
    with pytest.raises(SettingsError, match="only these samplers take Karras sigmas: euler, euler_a, heun, dpm"):
        sampler_for(name, karras=True)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_bad_eta(eta: float) -> None:
    with pytest.raises(SettingsError, match="eta is"):
        sampler_for("ddim", eta=eta)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim", "tcd")])
def test_only_ddim_and_tcd_have_an_eta(name: str) -> None:
    with pytest.raises(SettingsError, match="only ddim and tcd have one"):
        sampler_for(name, eta=0.5)


def test_an_unknown_sampler_and_a_spacing_for_lcm() -> None:
    assert sampler_for("ddim", "trailing", eta=1.0) is SAMPLERS["ddim"]
    with pytest.raises(SettingsError, match=r'"euler-a" is unknown; .* Did you mean "euler_a"'):
        sampler_for("euler-a")
    with pytest.raises(SettingsError, match="Leave it out"):
        sampler_for("lcm", "trailing")
    with pytest.raises(SettingsError, match="one of leading, linspace, trailing"):
        sampler_for("ddim", "trailling")


def test_steps_that_a_sampler_cannot_take() -> None:
    """With zero terminal SNR, Heun's mean of two directions at sigma = 4096 would be a hundred times the picture."""
    plain, zero_snr = (NoiseSchedule.from_config(NoiseConfig(rescale_betas_zero_snr=on)) for on in (False, True))
    check_steps("heun", 10, 1.0, "leading", zero_snr)
    check_steps("ddim", 20, 0.05, "leading", plain)
    for given, message in {
        ("heun", 10, 1.0, "linspace", zero_snr): "heun cannot begin at zero terminal SNR",
        ("lcm", 51, 1.0, None, plain): "num_inference_steps is 51; it can be 1 to 50 with lcm",
        ("ddim", -3, 1.0, "leading", plain): "num_inference_steps is -3; it can be 1 to 1000",
        ("ddim", 10, 0.05, "leading", plain): "0 denoising steps: 10 steps at strength 0.05 .* use more of either",
        **{("ddim", 10, wrong, "leading", plain): "strength is" for wrong in (0.0, -1.0, 1.1, float("nan"))},
    }.items():
        with pytest.raises(SettingsError, match=message):
            check_steps(*given)


# --- prompt embeddings and the prompt language ---------------------------------------------------------------------------


def test_embeddings_stand_in_for_prompts(pipe: StableDiffusionPipeline) -> None:
    words, none = pipe.encode_prompt([DOG]), pipe.encode_prompt([""])
    plain = latents(pipe)
    assert torch.equal(latents(pipe, None, prompt_embeds=words), plain)
    assert torch.equal(latents(pipe, None, prompt_embeds=words, negative_prompt_embeds=none), plain)
    close(latents(pipe, None, prompt_embeds=words, num_images_per_prompt=2), latents(pipe, num_images_per_prompt=2))
    close(latents(pipe, [DOG, DOG], negative_prompt_embeds=none), latents(pipe, [DOG, DOG]))


def test_long_prompts_and_weights(pipe: StableDiffusionPipeline) -> None:
    """A prompt of three chunks beside a short negative one; weights change the picture, and a weight of 1 does not."""
    long = ", ".join([DOG] * 30)
    assert pipe.encode_prompt([long]).shape[1] > 77
    assert latents(pipe, long).isfinite().all() and differ(latents(pipe, f"({DOG}:1.6)"), latents(pipe))
    assert torch.equal(latents(pipe, f"({DOG}:1.0)"), latents(pipe))
    assert torch.equal(latents(pipe, guidance_scale=1), latents(pipe, guidance_scale=1, negative_prompt=long))  # it is off


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt_embeds": torch.zeros(2, 77, 24), "num_images_per_prompt": 1}, None),
        ({"prompt_embeds": torch.zeros(0, 77, 24)}, "1 negative prompts for 0 prompts"),
        ({"prompt_embeds": torch.zeros(77, 24)}, r"prompt_embeds must be \(B, 77, 24\), .*it is \(77, 24\)"),
        ({"prompt_embeds": np.zeros((1, 77, 24))}, "prompt_embeds must be a tensor of floats"),
        ({"prompt_embeds": torch.full((1, 77, 24), float("inf"))}, "prompt_embeds must be.*without NaN"),
        ({"prompt": DOG, "negative_prompt_embeds": torch.zeros(1, 77, 24).bool()}, "prompt_embeds must be a tensor"),
        ({"prompt_embeds": torch.zeros(1, 70, 24)}, r"must be \(B, 77, 24\)"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, r"must be \(B, 77, 24\)"),
        ({"prompt": DOG, "prompt_embeds": torch.zeros(1, 77, 24)}, "give either a prompt or prompt_embeds"),
        ({"prompt": DOG, "negative_prompt_embeds": torch.zeros(3, 77, 24)}, "3 negative prompts for 1 prompts"),
        (
            {"prompt_embeds": torch.zeros(1, 77, 24), "negative_prompt_embeds": torch.zeros(1, 154, 24)},
            r"must be \(B, 154, 24\), .*it is \(1, 77, 24\)",
        ),
        ({"prompt": DOG, "negative_prompt": "<lora:x:1> ugly"}, "the negative prompt names a LoRA"),
        ({"prompt": f"{DOG} <lora:x:1>"}, "<lora:x>: no adapter is called so; none is loaded"),
        ({"prompt": [DOG, f"{DOG} <lora:x:1>"]}, "name different LoRAs"),
        ({"prompt": DOG, "clip_skip": 2}, "clip_skip is 2; this text encoder has 2 layers"),
    ],
)
def test_what_cannot_stand_in_for_a_prompt(pipe: StableDiffusionPipeline, call: dict[str, Any], message: str | None) -> None:
    call = {"prompt": None, "num_inference_steps": 1, "output_type": "latent", "seed": 0} | call
    if message is None:
        assert pipe(**call).images.shape[0] == 2
        return
    with pytest.raises(SettingsError, match=message):
        pipe(**call)


def test_a_callback_may_change_an_adapter(fresh: StableDiffusionPipeline) -> None:
    """What attention remembers of a prompt was made with the adapter as it was."""
    layers = inject(fresh.unet, 2, targets="attn2.to_k")
    for layer in layers.values():
        layer.lora_B["default"].data.normal_(0, 3, generator=torch.Generator().manual_seed(0))

    def drawn(remembers: bool) -> Tensor:
        set_adapters(fresh.unet, ["default"])
        with pytest.MonkeyPatch.context() as patch:
            if not remembers:
                patch.setattr("minidiff.fast.frozen_weights", lambda models, large, prompt: frozen_weights(models, large))
            return latents(fresh, callback=lambda step: set_adapters(fresh.unet, []))

    assert torch.equal(drawn(remembers=True), drawn(remembers=False))
    set_adapters(fresh.unet, ["default"])
    assert differ(latents(fresh), drawn(remembers=True))
