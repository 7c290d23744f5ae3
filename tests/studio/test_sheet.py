"""Axes from words, and the sheets over them: names, types, labels, order, and what is refused."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from PIL import Image

from minidiff.cli.draw_flags import Sampling, Sheet
from minidiff.core.errors import DataError, SettingsError
from minidiff.draw.images import contact_sheet
from minidiff.draw.pipeline import sampler_for
from minidiff.studio.sheet import Axis, contact_sheet_of, gallery, parse_axis


@dataclass(frozen=True)
class Settings:
    prompts: tuple[str, ...] = ("a dog",)
    seed: int = 0
    guidance_scale: float = 5.0
    sampler: str | None = None
    use_karras_sigmas: bool | None = None
    timestep_spacing: Literal["leading", "trailing"] | None = None
    lora: tuple[str, ...] = ()
    lora_weight: tuple[float, ...] = ()
    pretrained_model_name_or_path: str = "pocket"
    num_inference_steps: int = 25

    def check(self) -> None:
        if self.guidance_scale > 100:
            raise SettingsError("guidance_scale is too high")
        sampler_for(self.sampler or "ddim")


def picture(settings: Settings) -> Image.Image:
    """A flat colour that tells the settings."""
    return Image.new("RGB", (8, 8), (settings.seed, round(10 * settings.guidance_scale), len(settings.prompts[0])))


# -------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("text", "values", "labels"),
    [
        ("guidance_scale=1.5,5,20", (1.5, 5, 20), ["guidance 1.5", "guidance 5", "guidance 20"]),
        ("guidance = 2 , 3", (2, 3), ["guidance 2", "guidance 3"]),
        ("seed=0..3", (0, 1, 2, 3), ["seed 0", "seed 1", "seed 2", "seed 3"]),
        ("seed=-1..0,7", (-1, 0, 7), ["seed -1", "seed 0", "seed 7"]),
        ("sampler=ddim,none", ("ddim", None), ["ddim", "default"]),
        ("num-inference-steps=1,25", (1, 25), ["steps 1", "steps 25"]),
        ("steps=4", (4,), ["steps 4"]),
        ("lora_weight=0,0.5+1", ((0,), (0.5, 1)), ["lora weight 0", "lora weight 0.5 + 1"]),
        ("lora=my/dog,my/cat", (("my/dog",), ("my/cat",)), ["lora my/dog", "lora my/cat"]),
        ("lora=none,dog", ((), ("dog",)), ["lora none", "lora dog"]),
        ("guidance=1000001,0.1", (1000001, 0.1), ["guidance 1000001", "guidance 0.1"]),
        ("use_karras_sigmas=true,False", (True, False), ["use karras sigmas True", "use karras sigmas False"]),
        ("timestep_spacing=leading", ("leading",), ["timestep spacing leading"]),
        ("model=runs/a/model,runs/b/model", ("runs/a/model", "runs/b/model"), ["model runs/a/model", "model runs/b/model"]),
    ],
)
def test_words_become_an_axis(text: str, values: tuple[Any, ...], labels: list[str]) -> None:
    axis = parse_axis(text, Settings)
    assert axis.values == values and axis.labels == labels
    assert [type(value) for value in axis.values] == [type(value) for value in values]


def test_prompts_may_hold_commas() -> None:
    prompts = ["a dog, red/blue", "a cat"]
    axis = parse_axis("prompt", Sampling, prompts)
    assert axis == parse_axis("prompts", Sheet, prompts) == Axis("prompts", (("a dog, red/blue",), ("a cat",)))
    assert axis.labels == prompts


def test_every_setting_of_sampling_can_be_an_axis() -> None:
    """By reflection: a field of a type that `values_of` does not know fails here."""
    for field in dataclasses.fields(Sampling):
        hint = get_type_hints(Sampling)[field.name]
        kind = next(k for k in get_args(hint) or (hint,) if k is not type(None)) if get_origin(hint) is not tuple else hint
        kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
        word = get_args(kind)[0] if get_origin(kind) is Literal else {bool: "true", int: "3", float: "0.5"}.get(kind, "some")
        axis = parse_axis(f"{field.name}={word}", Sampling)
        assert axis.name == field.name and len(axis.values) == 1 and all(axis.labels)
        assert dataclasses.replace(Sampling(), **{field.name: axis.values[0]}) != Sampling()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidence_scale=1", r'"guidence_scale=1" is no axis.*Did you mean "guidance_scale"'),
        ("step=1", r'Did you mean "steps"'),
        ("seed", "seed=: must be a whole number"),
        ("seed=", "seed=: must be a whole number"),
        ("seed=1,,2", "seed=: must be a whole number"),
        ("seed=1.5", "seed=1.5: must be a whole number"),
        ("seed=3..1", "above the first"),
        ("seed=0..100000000000", "above the first"),
        ("guidance_scale=high", "must be float"),
        ("guidance_scale=nan", "must be float"),
        ("guidance_scale=one..3", "must be float"),
        ("use_karras_sigmas=yes", "must be bool"),
        ("timestep_spacing=trialing", 'one of leading, trailing.*Did you mean "trailing"'),
        ("lora_weight=0.5+x", "must be tuple"),
        ("prompt=a,b", 'Give "prompt" alone'),
        ("", "is no axis"),
    ],
)
def test_what_is_no_axis_is_told(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_axis(text, Settings)


# ------------------------------------------------------------------------------------------------------------ sheets


def colours(sheet: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for count, colour in sheet.getcolors(sheet.width * sheet.height) or [] if count >= 32 * 32}


def test_a_picture_for_each_pair_of_values() -> None:
    columns, rows = parse_axis("guidance=1,2", Settings), parse_axis("seed=1..3", Settings)
    sheet = contact_sheet_of(Settings(), [rows, columns], picture, "title", tile=32)
    by_hand = [[Image.new("RGB", (8, 8), (seed, 10 * scale, 5)) for scale in (1, 2)] for seed in (1, 2, 3)]
    labels = ["seed 1", "seed 2", "seed 3"], ["guidance 1", "guidance 2"]
    assert sheet.tobytes() == contact_sheet(by_hand, *labels, "title", 32).tobytes()


@pytest.mark.parametrize("count", [1, 6, 7, 13])
def test_one_axis_alone(count: int) -> None:
    axis = parse_axis(f"seed=1..{count}", Settings)
    sheet = contact_sheet_of(Settings(), [axis], picture, tile=32)
    assert {(seed, 50, 5) for seed in range(1, count + 1)} <= colours(sheet)
    assert sheet.width < 8 * 40  # many values are laid in rows


@pytest.mark.parametrize("swap", [False, True])
def test_what_takes_loading_changes_seldom(swap: bool) -> None:
    models, seeds = Axis("pretrained_model_name_or_path", ("a", "b", "c")), parse_axis("seed=0..3", Settings)
    drawn: list[str] = []

    def draw(settings: Settings) -> Image.Image:
        drawn.append(settings.pretrained_model_name_or_path)
        return picture(settings)

    contact_sheet_of(Settings(), (seeds, models) if swap else (models, seeds), draw, tile=32)
    assert "".join(drawn) == "aaaabbbbcccc"


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("seed=0..2", "seed=3..4", "both seed"),
        ("seed=0..99", "guidance=1,2,3,4,5", "500 pictures; a sheet holds 400"),
        ("guidance=5,101", "seed=0..3", "too high"),
        ("sampler=ddim,dimm", "seed=0..3", 'sampler "dimm" is unknown'),
    ],
)
def test_nothing_is_drawn_for_axes_that_cannot_be(columns: str, rows: str, message: str) -> None:
    def never(settings: Settings) -> Image.Image:
        raise AssertionError("drawn")

    with pytest.raises(SettingsError, match=message):
        axes = parse_axis(columns, Settings), parse_axis(rows, Settings)
        contact_sheet_of(Settings(), axes, never, check=Settings.check)


def test_an_error_while_drawing_names_its_tile() -> None:
    def draw(settings: Settings) -> Image.Image:
        if settings.seed == 2 and settings.guidance_scale == 7:
            raise DataError("the disk is gone")
        return picture(settings)

    with pytest.raises(DataError, match="^guidance 7, seed 2: the disk is gone$"):
        axes = parse_axis("guidance=5,7", Settings), parse_axis("seed=1..3", Settings)
        contact_sheet_of(Settings(), axes, draw)


def test_prompts_of_a_sheet() -> None:
    sheet = contact_sheet_of(Settings(), [Axis("prompts", (("a",), ("a b",)))], picture, tile=32)
    assert {(0, 50, 1), (0, 50, 3)} <= colours(sheet)


def test_a_gallery_is_laid_in_even_rows() -> None:
    red = [Image.new("RGB", (8, 8), "red")] * 8
    sheet = np.asarray(gallery(red, [f"picture {i}" for i in range(8)], tile=32))
    mask = (sheet == (255, 0, 0)).all(-1)
    assert mask.sum() == 8 * 32 * 32
    assert mask.any(axis=1).sum() == 2 * 32 and mask.any(axis=0).sum() == 4 * 32  # 4 and 4, not 6 and 2


@dataclass(frozen=True)
class Named:
    name: str = ""


def test_values_may_be_empty_or_hold_commas() -> None:
    axis = parse_axis('name=,"blurry, dark",plain', Named)
    assert axis.values == ("", "blurry, dark", "plain")
    assert axis.labels == ["name none", "name blurry, dark", "name plain"]


def test_tiles_per_row() -> None:
    red = [Image.new("RGB", (8, 8), "red")] * 5
    mask = (np.asarray(gallery(red, [""] * 5, tile=32, abreast=3)) == (255, 0, 0)).all(-1)
    assert mask.any(axis=1).sum() == 2 * 32 and mask.any(axis=0).sum() == 3 * 32
