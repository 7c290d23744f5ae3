"""A1111's text: taken over as far as minidiff has the settings, and the rest is named; odd and hostile texts."""

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from minidiff.cli.draw_flags import Sample
from minidiff.core.errors import DataError
from minidiff.core.grids import SAMPLERS
from minidiff.studio.a1111 import SAMPLER_NAMES, read_a1111
from minidiff.studio.recipe import Origin, read_origin

A1111 = """photo of a (red:1.2) dog, <lora:chalk:0.8>
on the beach, 8k
Negative prompt: blurry, lowres,
bad hands
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3847561029, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Clip skip: 2, ENSD: 31337, RNG: CPU, Lora hashes: "chalk: a1b2c3d4e5f6, ink: 00112233aabb", \
TI hashes: "easyneg: c74b4e810b03", Version: v1.9.3"""


def test_a1111_as_it_writes_today() -> None:
    assert read_a1111(A1111) == {
        "prompt": "photo of a (red:1.2) dog, <lora:chalk:0.8>\non the beach, 8k",
        "negative_prompt": "blurry, lowres,\nbad hands",
        "num_inference_steps": 28,
        "guidance_scale": 6.5,
        "seed": 3847561029,
        "width": 512,
        "height": 768,
        "sampler": "dpm++_2m",
        "use_karras_sigmas": True,
    }


@pytest.mark.parametrize(
    ("words", "sampler", "karras"),
    [
        ("Sampler: Euler a", "euler_a", False),
        ("Sampler: DPM++ 2M Karras", "dpm++_2m", True),  # before version 1.9
        ("Sampler: DPM++ 2M SDE Karras", "dpm++_2m_sde", True),
        ("Sampler: DPM++ 2M", "dpm++_2m", False),
        ("Sampler: Euler, Schedule type: Automatic", "euler", False),
        ("Sampler: Euler, Schedule type: Uniform", "euler", False),
        ("Sampler: Heun, Schedule type: Karras", "heun", True),
        ("Sampler: DDIM", "ddim", None),
        ("Sampler: PLMS", "pndm", None),
        ("Sampler: UniPC", "unipc", False),
        ("Sampler: LCM", "lcm", None),
        ("Sampler: TCD", "tcd", None),
        ("Sampler: DPM adaptive", None, None),
    ],
)
def test_a1111_samplers(words: str, sampler: str | None, karras: bool | None) -> None:
    settings = read_a1111(f"a dog\nSteps: 20, {words}, CFG scale: 7")
    assert (settings.get("sampler"), settings.get("use_karras_sigmas")) == (sampler, karras)


def test_every_sampler_name_comes_back() -> None:
    assert SAMPLER_NAMES.keys() == SAMPLERS.keys()
    for ours, name in SAMPLER_NAMES.items():
        assert read_a1111(f"a\nSteps: 20, Sampler: {name}, Seed: 1")["sampler"] == ours


def test_prompts_of_odd_shapes() -> None:
    assert read_a1111("Steps: 20, Seed: 5") == {"prompt": "", "negative_prompt": "", "num_inference_steps": 20, "seed": 5}
    assert read_a1111("just words")["prompt"] == "just words"
    assert read_a1111("")["prompt"] == ""
    both = read_a1111("Steps: to heaven\nNegative prompt: x\nNegative prompt: y\nSteps: 3, Seed: 4")
    assert (both["prompt"], both["negative_prompt"]) == ("Steps: to heaven", "x\nNegative prompt: y")
    assert both["num_inference_steps"] == 3


def test_quoted_values_may_hold_commas() -> None:
    found = read_a1111(r'Steps: 3, Wildcard prompt: "a, \"b\": c\nd, Seed: 4", Size: 8x8, Broken: "x, y')
    assert (found["width"], "seed" in found) == (8, False)


@pytest.mark.parametrize("field", ["Steps: 2.5", "CFG scale: x", "Seed: " + "9" * 5000, "Size: 0x99x9"])
def test_numbers_that_cannot_be_read_are_left_out(field: str) -> None:
    settings = read_a1111(f"a\nSteps: 4, {field}")
    assert all(isinstance(value, str) or value == 4 for value in settings.values())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "\n" * 200_000,
        "Steps: " + "a:" * 100_000,
        'Steps: "' + '\\"' * 100_000,
        "Steps: 1, " + 'k: "' * 50_000,
    ]
    + ["<lora:" * 30_000, "<lora:a" * 30_000 + ">", "Negative prompt:\n" * 12_000, "Steps: " + " " * 200_000, "((" * 100_000],
    ids=range(10),
)
def test_much_of_anything_takes_linear_time(text: str) -> None:
    read_a1111(text)  # what is quadratic takes minutes here, and hours at the limit


# -------------------------------------------------------------------------------------------------------------- files


def read(path: Path, text: str, compressed: bool = False) -> Origin:
    """The text in a PNG, read back."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text, zip=compressed)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return read_origin(path, Sample)


def test_a_picture_of_a1111_as_settings(tmp_path: Path) -> None:
    origin = read(tmp_path / "a.png", A1111)
    s = Sample(**origin.settings)
    assert (s.num_inference_steps, s.height, s.sampler) == (28, 768, "dpm++_2m")
    assert s.pretrained_model_name_or_path == "checkpoints/pocket"
    (note,) = origin.notes
    assert "its noise is another" in note and "prompts, steps, sampler, seed, size and guidance alone" in note


def test_huge_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png"):
        read(tmp_path / "a.png", "x" * 5_000_000, compressed=True)  # 5 kB in the file


def test_a_picture_that_says_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(DataError, match="does not say how it was made"):
            read_origin(tmp_path / name, Sample)
    (tmp_path / "no.png").write_bytes(b"text")
    with pytest.raises(DataError, match="not a picture"):
        read_origin(tmp_path / "no.png", Sample)


@pytest.mark.parametrize(
    "line",
    [
        "Sampler: Euler a, Steps: 20, CFG scale: 7, Seed: 3, Size: 128x96",
        "CFG scale: 7, Sampler: Euler a, Seed: 3, Size: 128x96, Steps: 20",
        "Model hash: 1a2b, Seed: 3, Size: 128x96, Sampler: Euler a, CFG scale: 7, Steps: 20",
    ],
)
def test_the_line_of_settings_may_begin_with_any_name(line: str) -> None:
    found = read_a1111(f"a red dog\nSteps: of stone\nNegative prompt: blurred\nSeed: of a plant\n{line}")
    assert found["prompt"] == "a red dog\nSteps: of stone" and found["negative_prompt"] == "blurred\nSeed: of a plant"
    assert (found["num_inference_steps"], found["seed"], found["width"], found["height"]) == (20, 3, 128, 96)
