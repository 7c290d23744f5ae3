"""Every recipe on a tiny model: what moves and what does not, what comes out, and what each setting does to the loss."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import METHODS, PRIOR, base_of, draw_pictures, loaded, numbers, picture, same, tiny, train, trained
from torch import Tensor

from minidiff.core import recipes as core_recipes
from minidiff.core.config import SD15_UNET, NoiseConfig
from minidiff.core.errors import DataError, MinidiffError, SettingsError
from minidiff.core.inject import DEFAULT_TARGETS, GROUPS, inject
from minidiff.core.losses import min_snr_weights, squared_error
from minidiff.core.schedule import NoiseSchedule, add_noise, training_target
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.lora_tags import at_strengths
from minidiff.files.folder import SAMPLER_OF, config_values, write_json
from minidiff.files.text_files import to_file_keys
from minidiff.trainer import checkpoint
from minidiff.trainer.latents import model_fingerprint
from minidiff.trainer.optimizers import optimizer_of
from minidiff.trainer.recipes import RECIPES, print_trainable_parameters
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import FineTuneSettings, LoRASettings
from minidiff.trainer.task import Job, diffusion_loss, load_base, load_data
from minidiff.trainer.validation import Sheets, explained


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder in memory, where there is one: fsync takes longer than these trainings."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def pictures(home: Path) -> Path:
    return draw_pictures(home / "pictures")


@pytest.fixture(scope="module")
def make(tiny_folder: Path, pictures: Path, home: Path) -> Any:
    """make(method, **changes) -> settings, each with an output folder of its own."""
    numbers = count()
    return lambda method, **changes: tiny(method, tiny_folder, pictures, home / f"out-{next(numbers)}", **changes)


@pytest.fixture(scope="module")
def fresh(make: Any) -> Callable[[str], tuple[Any, Job]]:
    """fresh(method) -> settings and task, before any training; made once, so do not train it."""

    @cache
    def prepared(method: str) -> tuple[Any, Job]:
        settings = make(method)
        return settings, recipe(settings)

    return prepared


@pytest.fixture(scope="module")
def runs(make: Any) -> Callable[[str], tuple[Any, Job]]:
    """runs(method) -> settings and task after three updates; trained once."""

    @cache
    def run(method: str) -> tuple[Any, Job]:
        settings = make(method)
        return settings, train(settings)

    return run


def recipe(settings: FineTuneSettings) -> Job:
    return RECIPES[type(settings)](settings)


def moved(task: Job) -> Job:
    """As after some training."""
    for p in task.trainable.values():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return task


# --- what moves, and what comes out ----------------------------------------------------------------------------------

MOVES = {"full": "U", "full, text encoder too": "UT", "dreambooth": "U"}  # whole networks


@pytest.mark.parametrize("method", METHODS)
def test_what_moves_and_what_comes_out(runs: Any, method: str) -> None:
    settings, task = runs(method)
    base, whole = base_of(settings), MOVES.get(method, "")
    assert same(numbers(task.modules["unet"]), numbers(base.unet)) == ("U" not in whole)
    assert same(numbers(trained(task, settings).text_encoder), numbers(base.text_encoder)) == ("T" not in whole)

    home, prompt = Path(settings.output_dir), settings.prompt
    result = loaded(home, settings)
    after = picture(trained(task, settings), prompt)
    assert torch.equal(picture(result, prompt), after)
    for path in home.rglob("*.safetensors"):  # a checkpoint is a result, too
        if path.relative_to(home).parts[0] != "checkpoint-3":
            assert path.read_bytes() == (home / "checkpoint-3" / path.relative_to(home)).read_bytes()
    if not whole:
        before = picture(base, prompt)
        assert not torch.allclose(before, after, atol=1e-3)
        result.unload_lora_weights()
        result.unload_textual_inversion()
        assert torch.equal(picture(result, prompt), before)


TRAINED = {
    "full": {"unet"},
    "full, text encoder too": {"unet", "text_encoder"},
    "dreambooth": {"unet"},
    "lora": {"unet lora"},
    "lora, text encoder too": {"unet lora", "text_encoder lora"},
    "dora": {"unet lora"},
    "textual inversion": {"word"},
    "pivotal": {"unet lora", "word"},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_names_of_what_is_trained(fresh: Any, method: str) -> None:
    names = set(fresh(method)[1].trainable)
    assert {name.partition(".")[0] + (" lora" if ".lora_" in name else "") for name in names} == TRAINED[method]
    assert any("magnitude" in name for name in names) == (method == "dora")


@pytest.mark.parametrize("method", METHODS)
def test_the_first_loss_is_the_bases(fresh: Any, method: str) -> None:
    """B = 0, m = ||W||: before any update the tuned model is the base. A new word begins at another's meaning."""
    settings, task = fresh(method)
    pipe, batch = base_of(settings), task.batch(0, 0)
    if "ids" in batch:  # the encoder as it is now is the base's, but for the new word
        words = task.modules["text_encoder"](input_ids=batch["ids"]).last_hidden_state
        batch = {name: rows for name, rows in batch.items() if name != "ids"} | {"text": words}
    if settings.with_prior_preservation:  # the class half costs nothing yet
        batch = {name: rows[:2] for name, rows in batch.items()}
    x_t = add_noise(pipe.schedule, batch["latents"], batch["noise"], batch["t"])
    expected = squared_error(pipe.unet(x_t, batch["t"], batch["text"]), batch["noise"]).mean()
    torch.testing.assert_close(task.loss(task.batch(0, 0), 0, 0), expected, rtol=1e-5, atol=0)


def test_pivotal_has_two_rates(make: Any) -> None:
    settings = make("pivotal", learning_rate=1e-3, learning_rate_embedding=1e-2, lr_scheduler="linear")
    task = recipe(settings)
    task.optimizer = optimizer = optimizer_of(task.trainable, settings)
    groups = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(1e-3, len(task.trainable) - 1), (1e-2, 1)]
    fit(task, settings)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 3, 1e-2 / 3])


def test_the_average_is_what_comes_out(make: Any) -> None:
    """With --use_ema: not the weights themselves."""
    settings = make("pivotal", use_ema=True)
    task = train(settings)
    home = Path(settings.output_dir)
    assert not torch.equal(picture(loaded(home, settings), settings.prompt), picture(trained(task, settings), settings.prompt))
    average = checkpoint.load(home / "checkpoint-3")[1]["ema"]
    for name, p in task.trainable.items():
        p.data = average[name]
    assert torch.equal(picture(loaded(home, settings), settings.prompt), picture(trained(task, settings), settings.prompt))


def test_a_word_is_practised_in_sentences(fresh: Any) -> None:
    task = fresh("textual inversion")[1]
    ids = torch.cat([task.batch(step, 0)["ids"] for step in range(8)])
    assert len(torch.unique(ids, dim=0)) > 4  # drawn from many templates
    V = task.modules["text_encoder"].config.vocab_size
    assert all(V in row and V + 1 in row for row in ids)  # both vectors, in each of them


def test_captions_must_hold_the_new_word(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_pictures(tmp_path / "captioned")
    settings = make("textual inversion", instance_data_dir=None, train_data_dir=str(folder))
    for i in range(3):
        (folder / f"picture-{i}.txt").write_text("a photo of a <dogs>")
    with pytest.raises(DataError, match="no caption holds the new word, <dog>, as a word of its own"):
        recipe(settings)
    (folder / "picture-1.txt").write_text("a <DOG> on the beach")
    recipe(settings)
    assert "2 of 3 captions are without <dog> (picture-0.png, picture-2.png)" in capsys.readouterr().err
    (folder / "picture-0.txt").unlink()  # sentences with the word take the caption's place
    ids = torch.cat([recipe(settings).batch(step, 0)["ids"] for step in range(6)])
    assert len(torch.unique(ids, dim=0)) > 4
    assert "1 of 3 pictures have no caption, so neutral sentences are trained for them" in capsys.readouterr().err


def test_a_caption_replaces_the_prompt(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_pictures(tmp_path / "captioned")
    (folder / "picture-1.txt").write_text("something else")
    settings = make("lora", instance_data_dir=str(folder))
    rows = [torch.unique(recipe(s).batch(0, 0)["text"], dim=0) for s in (settings, replace(settings, captions=False))]
    assert [len(row) for row in rows] == [2, 1]
    assert "Note: 1 of 3 pictures have captions of their own, which replace --instance_prompt" in capsys.readouterr().err


# --- prior preservation ----------------------------------------------------------------------------------------------

PLAIN = ["full", "lora", "dora", "pivotal"]


def losses(task: Job) -> list[float]:
    return [task.loss(task.batch(step, 0), step, 0).item() for step in range(3)]


@pytest.mark.parametrize("method", PLAIN)
def test_prior_weight_0_is_the_plain_loss(make: Any, fresh: Any, method: str) -> None:
    off = recipe(make(method, **PRIOR, prior_loss_weight=0.0))
    assert losses(off) == losses(fresh(method)[1])
    assert off.batch(0, 0)["t"].shape == (2,)


def test_a_prior_of_weight_0_costs_no_second_model(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.nn.Module] = []
    monkeypatch.setattr("minidiff.trainer.task.copy", SimpleNamespace(deepcopy=lambda model: copied.append(model) or model))
    recipe(make("full", **PRIOR, prior_loss_weight=0.0))
    assert not copied
    recipe(make("full", **PRIOR))
    assert len(copied) == 1


@pytest.mark.parametrize("method", PLAIN)
def test_class_pictures_are_drawn_and_trained_on(make: Any, fresh: Any, tmp_path: Path, method: str) -> None:
    """L = L_instance + weight L_class (2208.12242, eq. 2); drawn by the base, kept, and used again."""
    drawn = {"prior_from_base": False, "class_data_dir": str(tmp_path / "class"), "prior_loss_weight": 0.5}
    paired = recipe(make(method, **{**PRIOR, **drawn}))
    made = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert sorted(made) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    both, plain = paired.batch(1, 0), fresh(method)[1]
    instance, prior = (plain.loss({k: rows[half] for k, rows in both.items()}, 1, 0) for half in (slice(2), slice(2, None)))
    torch.testing.assert_close(paired.loss(both, 1, 0), instance + 0.5 * prior, rtol=1e-5, atol=0)
    assert paired.facts["class_pictures"] == 3 and "class_pictures" not in plain.facts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_class_pictures_are_the_same_after_an_interruption(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minidiff.draw.images import save_png

    def settings(name: str) -> FineTuneSettings:
        return make("lora", **{**PRIOR, "prior_from_base": False, "class_data_dir": str(tmp_path / name)})

    whole = recipe(settings("straight"))
    made = contents(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("minidiff.trainer.priors.save_png", lambda *a: save_png(*a) if "00000" in str(a[1]) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipe(settings("broken"))
    resumed = recipe(settings("broken"))
    assert contents(tmp_path / "broken") == made == contents(tmp_path / "straight") and len(made) == 3
    assert same(resumed.batch(0, 0), whole.batch(0, 0)) and resumed.facts == whole.facts


@pytest.mark.parametrize("method", ["full, text encoder too", "lora", "dora", "pivotal"])
def test_the_prior_from_the_base_is_the_bases_answer(make: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """However far the weights have gone, the class half's target is what the untuned model answers, to the bit."""
    targets: list[Tensor] = []

    def keep(output: Tensor, target: Tensor, *rest: Any) -> Tensor:
        targets.append(target)
        return squared_error(output, target, *rest)

    monkeypatch.setattr(core_recipes, "squared_error", keep)
    settings = make(method, **PRIOR)
    task, base = moved(recipe(settings)), base_of(settings)
    batch = task.batch(7, 0)
    task.loss(batch, 7, 0)
    x_t = add_noise(base.schedule, batch["latents"], batch["noise"], batch["t"])[2:]
    with torch.no_grad():
        answer = base.unet(x_t, batch["t"][2:], base.encode_prompt([settings.class_prompt]).expand(2, -1, -1))
    assert torch.equal(targets[0], torch.cat([batch["noise"][:2], answer]))
    if method == "lora":
        with at_strengths(task.modules["unet"], {"default": 0.0}), torch.no_grad():
            assert torch.equal(task.modules["unet"](x_t, batch["t"][2:], batch["text"][2:]), answer)


@pytest.mark.slow
def test_rehearsing_keeps_the_class_where_it_was(make: Any) -> None:
    """What the prior is for: with a heavy weight, the model answers to the class prompt more as the base does."""

    def drift(**changes: Any) -> float:
        settings = make("lora", max_train_steps=12, **changes)
        pipe, base = trained(train(settings), settings), base_of(settings)
        return (picture(pipe, PRIOR["class_prompt"]) - picture(base, PRIOR["class_prompt"])).abs().mean().item()

    assert drift(**PRIOR, prior_loss_weight=20.0) < 0.7 * drift()


# --- what the settings do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_simple_loss_eq14(make: Any, gamma: float | None, prediction_type: str) -> None:
    """DDPM eq. 14: the mean of ||eps - eps_theta(sqrt(a_bar) x0 + sqrt(1 - a_bar) eps, t)||^2, weighted if asked; or v."""
    settings = make("lora", snr_gamma=gamma)
    pipe = load_base(settings)[0]
    pipe.schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction_type))
    batch = load_data(pipe, settings).batch(0, 0)
    with torch.no_grad():
        given = diffusion_loss(pipe, settings)[0](batch, 0, 0)
        output = pipe.unet(add_noise(pipe.schedule, batch["latents"], batch["noise"], batch["t"]), batch["t"], batch["text"])
    weights = 1 if gamma is None else min_snr_weights(pipe.schedule, batch["t"], gamma)
    target = training_target(pipe.schedule, batch["latents"], batch["noise"], batch["t"])
    assert torch.equal(target, batch["noise"]) == (prediction_type == "epsilon")
    assert torch.equal(given, (squared_error(output, target) * weights).mean())


def v_base(base: Path, home: Path) -> Path:
    """The base with another scheduler_config.json, its weights being those of neither."""
    shutil.copytree(base, home)
    class_name = next(name for name, sampler in SAMPLER_OF.items() if sampler == "ddim")
    values = config_values(NoiseConfig(prediction_type="v_prediction"), class_name)
    write_json(home / "scheduler" / "scheduler_config.json", values)
    return home


LAYERS = ("attention", "feed_forward", "projections", "resnets", "samplers", "conv_in", "conv_out")
SHORT_RUNS: dict[str, dict[str, Any]] = {
    "loss": {"snr_gamma": 5.0, "noise_offset": 0.1, "lora_dropout": 0.3},
    "pictures": {"random_flip": True, "center_crop": False, "cache_latents": False, "proportion_empty_prompts": 0.5},
    "buckets": {"aspect_ratio_buckets": True, "random_flip": True},
    "layers": {"lora_targets": LAYERS, "use_rslora": True, "rank_pattern": ("resnets=1", "attn2.to_k=3")},
}


@pytest.mark.parametrize("name", SHORT_RUNS)
def test_a_short_run_with(make: Any, runs: Any, name: str) -> None:
    """What the settings mean is tested where they are used; here they run, change the result, and give a file that loads."""
    settings = make("lora", **SHORT_RUNS[name])
    result, (_, plain) = train(settings), runs("lora")
    assert not same(dict(result.trainable), dict(plain.trainable))  # type: ignore[arg-type]
    assert picture(loaded(Path(settings.output_dir), settings), settings.prompt).isfinite().all()


@pytest.mark.parametrize("method", ["full", "pivotal"])
def test_bf16(make: Any, method: str) -> None:
    """What is trained is fp32 and starts unrounded; what is frozen is not fp32 any more; sheets and validation run, too."""
    settings = make(method, mixed_precision="bf16", validation_steps=3)
    task = recipe(settings)
    assert {p.dtype for p in task.trainable.values()} == {torch.float32}
    whole = method.startswith(("full", "dreambooth"))
    assert next(task.modules["unet"].parameters()).dtype == (torch.float32 if whole else torch.bfloat16)
    if whole:
        assert same(numbers(task.modules["unet"]), numbers(base_of(settings).unet))
    assert fit(task, settings).finished
    assert (Path(settings.output_dir) / "samples" / "step-000003.png").exists()
    loaded(Path(settings.output_dir), settings)


def test_v_prediction(make: Any, tiny_folder: Path, tmp_path: Path) -> None:
    settings = make("lora", pretrained_model_name_or_path=str(v_base(tiny_folder, tmp_path / "v")), snr_gamma=5.0)
    train(settings)
    from minidiff.files.lora_file import read_lora

    assert read_lora(settings.output_dir).metadata["modelspec.prediction_type"] == "v"


def test_masked_loss(make: Any, tmp_path: Path) -> None:
    """The instance half learns where its masks are white, the class half everywhere."""
    folder = draw_pictures(tmp_path / "masked")
    for i in range(3):
        mask = Image.new("L", (40, 32))
        mask.paste(255, (0, 0, 20, 32))
        mask.save(folder / f"picture-{i}.mask.png")
    settings = make("lora", instance_data_dir=str(folder), masked_loss=True, **PRIOR)
    task, pipe = recipe(settings), base_of(settings)
    batch = task.batch(0, 0)
    assert batch["mask"][0].min() == 0 and batch["mask"][0].max() == 1 == batch["mask"][2:].min()
    x_t = add_noise(pipe.schedule, batch["latents"], batch["noise"], batch["t"])
    output = pipe.unet(x_t, batch["t"], batch["text"])[:2]  # the class half's loss is 0: its target is the base's answer
    expected = squared_error(output, batch["noise"][:2], mask=batch["mask"][:2]).mean()
    torch.testing.assert_close(task.loss(batch, 0, 0), expected, rtol=1e-5, atol=1e-6)
    assert fit(task, settings).finished


def test_num_train_epochs(make: Any) -> None:
    settings = make("lora", max_train_steps=None, num_train_epochs=3)  # 9 samples by two
    train(settings)
    assert [row["step"] for row in read_metrics(Path(settings.output_dir))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["lora, text encoder too", "textual inversion"])
def test_validation_losses_are_in_the_metrics(make: Any, method: str) -> None:
    settings = make(method, validation_steps=2)
    train(settings)
    rows = read_metrics(Path(settings.output_dir))
    quarters = {"val_loss", "val_loss_0_250", "val_loss_250_500", "val_loss_500_750", "val_loss_750_1000"}
    assert [row["step"] for row in rows if quarters <= row.keys()] == [0, 2, 3]
    assert rows[0]["val_loss"] != rows[-1]["val_loss"]


def test_validation_on_other_pictures(make: Any, fresh: Any, tmp_path: Path) -> None:
    folder = tmp_path / "held out"
    folder.mkdir()
    Image.effect_noise((16, 16), 10).convert("RGB").save(folder / "x.png")
    own = fresh("lora")[1].validate
    other = recipe(make("lora", validation_steps=1, validation_data_dir=str(folder))).validate
    assert own and other and own()["val_loss"] != other()["val_loss"]


def test_measuring_and_drawing_know_no_dropout(make: Any) -> None:
    """With most of the detour dropped the loss is another each time; what is measured and drawn is not."""
    task = moved(recipe(make("lora", lora_dropout=0.9, validation_steps=1)))
    assert task.validate and task.validate() == task.validate()
    sheets = [task.preview(3) for _ in range(2)]
    assert sheets[0] and sheets[1] and sheets[0].tobytes() == sheets[1].tobytes()
    batch = task.batch(0, 0)
    assert len({task.loss(batch, 0, 0).item() for _ in range(4)}) == 4


def test_first_row_is_the_base(make: Any) -> None:
    settings = make("lora", validation_steps=1, num_validation_images=2)
    pipe = load_base(settings)[0]
    sheet = Sheets(pipe, settings, load_data(pipe, settings)).sheet
    before = sheet(0)
    for p in pipe.unet.parameters():
        p.data *= 1.5
    after = sheet(0)
    assert before and after
    width, height = before.size
    top, bottom = (0, 0, width, height * 3 // 5), (0, height * 3 // 4, width, height)
    assert before.crop(top).tobytes() == after.crop(top).tobytes()
    assert before.crop(bottom).tobytes() != after.crop(bottom).tobytes()


def test_only_the_private_sheet_shows_training_pictures(make: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "magenta").mkdir()
    Image.new("RGB", (32, 32), (255, 0, 255)).save(folder / "a.png")
    settings = make("lora", instance_data_dir=str(folder), validation_steps=1)
    pipe = load_base(settings)[0]
    sheets = Sheets(pipe, settings, load_data(pipe, settings))

    def magenta(image: Image.Image | None) -> float:
        assert image
        colours = np.asarray(image, dtype=int)
        return float((colours == [255, 0, 255]).all(-1).mean())

    assert magenta(sheets.sheet(0)) > 0.1 and magenta(sheets.public_sheet(0)) < 0.001
    assert sheets.public_sheet(0).tobytes() == Sheets(pipe, settings, sheets.data).public_sheet(0).tobytes()  # drawn anew


# --- pictures that are held out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, changes, kept", [
    (4, {}, 0), (5, {}, 1), (8, {}, 1), (8, {"validation_share": 0.25}, 2), (8, {"validation_share": 0.0}, 0),
    (8, {"validation_steps": 0}, 0),
])  # fmt: skip
def test_held_out(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, changes: Any, kept: int) -> None:
    """They are never in a batch, and the validation loss sees them alone; it is said what that means."""
    (folder := tmp_path / "more").mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (20 * i + 20,) * 3).save(folder / f"{i}.png")
    settings = make("lora", instance_data_dir=str(folder), cache_latents=False, **{"validation_steps": 1, **changes})
    data = load_data(load_base(settings)[0], settings)
    trained, held = {e.path.name for e in data.examples}, {e.path.name for e in data.held_out}
    assert len(held) == kept and len(trained | held) == count and not trained & held
    assert data.samples_per_epoch == count - kept == data.facts["pictures"]
    said = explained(settings, data)
    if kept:
        assert ("held out" in said) and ("cannot show overfitting" not in said) and "stop there" in said
    else:
        assert ("It cannot show overfitting" in said) is bool(settings.validation_steps)


def test_the_validation_loss_sees_what_is_held_out(make: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "more").mkdir()
    for i in range(5):
        Image.effect_noise((16, 16), 10 + 40 * i).convert("RGB").save(folder / f"{i}.png")
    settings = make("lora", instance_data_dir=str(folder), validation_steps=1)
    (held,) = load_data(load_base(settings)[0], settings).held_out
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(held.path, alone)
    held.path.rename(tmp_path / "away.png")
    other = recipe(replace(settings, validation_data_dir=str(alone))).validate
    (tmp_path / "away.png").rename(held.path)
    own = recipe(settings).validate
    assert own and other and own() == other()


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "textual inversion"])
def test_a_broken_number_names_the_first_broken_gradient(make: Any, method: str) -> None:
    settings = make(method, train_batch_size=1, max_train_steps=5)
    task = recipe(settings)
    broken = dict(task.modules["unet"].named_modules())["mid_block.resnets.0.conv1"]
    broken.weight.data[0] = torch.nan
    with pytest.raises(MinidiffError) as error:
        fit(replace(task, trainable={k: p for k, p in task.trainable.items() if p is not broken.weight}), settings)
    message = str(error.value)
    assert "3 updates in a row without a finite loss" in message
    assert re.search(r"The first broken gradient is that of \S+\.", message)
    assert "No checkpoint had been saved yet" in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 30}, "--resolution 30: this model needs a multiple of 4, such as 28 or 32"),
        ({"resolution": 64}, "3 of 3 pictures cannot be used"),
        ({"rank": 0}, "--rank must be at least 1; it is 0"),
        ({"rank": 99}, "rank 99 is not possible for"),
        ({"rank_pattern": ("resnets",)}, "--rank_pattern must give layers and ranks, such as resnets=8"),
        ({"rank_pattern": ("resnets=8",)}, 'a rank is given for "resnets"'),
        ({"lora_alpha": -1.0}, "--lora_alpha"),
        ({"lora_dropout": 1.0}, "--lora_dropout must lie in [0, 1)"),
        ({"lora_targets": ("to_out",)}, "to_out.0"),
        ({"learning_rate": 0.0}, "--learning_rate must be a number above 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
        ({"instance_prompt": " "}, "--instance_data_dir needs --instance_prompt"),
        (
            {"instance_data_dir": None, "train_data_dir": "x", "captions": False, "instance_prompt": None},
            "--train_data_dir with --no_captions needs --instance_prompt",
        ),
        ({"train_data_dir": "x"}, "--instance_data_dir and --train_data_dir both name the pictures"),
        ({"instance_data_dir": "nowhere"}, "nowhere is no folder"),
        ({"validation_data_dir": "nowhere"}, "nowhere is no folder"),
        ({"device": "tpu9"}, "--device tpu9 is no device"),
        ({"device": "cuda"}, "--device cuda: there is no GPU"),
        ({"pretrained_model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts"),
        ({"snr_gamma": 0.0}, "--snr_gamma"),
        ({"lr_warmup_steps": 2}, "--lr_warmup_steps needs another --lr_scheduler"),
        ({"lr_scheduler": "cosin"}, 'Did you mean "cosine"'),
        ({"center_crop": False}, "--no-cache_latents"),
    ],
)
def test_bad_settings(make: Any, changes: dict[str, object], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MinidiffError, match=re.escape(message)):
        recipe(make("lora", **changes))


def test_folder_is_checked_before_anything_takes_time(make: Any) -> None:
    settings = make("lora", instance_data_dir="nowhere")
    Path(settings.output_dir).mkdir()
    (Path(settings.output_dir) / "thesis.tex").write_text("mine")
    with pytest.raises(SettingsError, match="thesis.tex"):
        recipe(settings)


def test_resume_with_other_pictures_is_refused(make: Any, runs: Any, pictures: Path, tmp_path: Path) -> None:
    earlier = runs("lora")[0].output_dir
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "0.png").write_bytes((pictures / "picture-0.png").read_bytes())
    other = make("lora", output_dir=earlier, instance_data_dir=str(tmp_path / "fewer"), rank=3)
    other = replace(other, resume_from_checkpoint="latest")
    with pytest.raises(SettingsError) as error:
        fit(recipe(other), other)
    assert "rank: was 2, is now 3" in str(error.value) and "pictures: was 3, is now 1" in str(error.value)


def test_the_base_has_a_fingerprint(make: Any) -> None:
    pipe, base = load_base(make("lora"))
    assert model_fingerprint(pipe.unet, pipe.vae, pipe.text_encoder) == base
    of_transformers_4: Any = SimpleNamespace(state_dict=lambda: to_file_keys(pipe.text_encoder.state_dict()))
    assert model_fingerprint(pipe.unet, pipe.vae, of_transformers_4) == base
    pipe.text_encoder.get_input_embeddings().weight.data[0, 0] += 1e-3
    assert model_fingerprint(pipe.unet, pipe.vae, pipe.text_encoder) != base


def test_captioned_folder(make: Any, pictures: Path) -> None:
    with pytest.raises(DataError, match="have no caption"):
        recipe(make("lora", instance_data_dir=None, instance_prompt=None, train_data_dir=str(pictures)))


def test_the_default_targets_are_the_adapters_own() -> None:
    assert LoRASettings().lora_targets == ("attention",) and GROUPS["attention"] == DEFAULT_TARGETS


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(SD15_UNET)
    inject(sd15, 4)
    print_trainable_parameters(sd15)
    assert capsys.readouterr().out == "trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927\n"
