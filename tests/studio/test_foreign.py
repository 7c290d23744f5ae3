"""Texts of A1111 and ComfyUI, plain, odd and hostile: taken over as far as they map, and the rest is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from minidiff.core.errors import DataError
from minidiff.core.grids import SAMPLERS
from minidiff.studio import comfyui
from minidiff.studio.comfyui import read_comfyui
from minidiff.studio.foreign import (
    SAMPLER_NAMES,
    clean,
    fields_of,
    number,
    parse_json,
    picture_texts,
    read_a1111,
)
from minidiff.studio.replay import read_origin

A1111 = """photo of a (red:1.2) dog, <lora:chalk:0.8>
on the beach, 8k
Negative prompt: blurry, lowres,
bad hands
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3847561029, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Clip skip: 2, ENSD: 31337, RNG: CPU, Lora hashes: "chalk: a1b2c3d4e5f6, ink: 00112233aabb", \
TI hashes: "easyneg: c74b4e810b03", Version: v1.9.3"""


def test_a1111_as_it_writes_today() -> None:
    reading = read_a1111(A1111)
    assert reading.program == "A1111 v1.9.3"
    assert reading.settings == {
        "prompt": "photo of a (red:1.2) dog, \non the beach, 8k",
        "negative_prompt": "blurry, lowres,\nbad hands",
        "num_inference_steps": 28,
        "guidance_scale": 6.5,
        "seed": 3847561029,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "sampler": "dpm++_2m",
        "use_karras_sigmas": True,
    }
    said = "; ".join(reading.notes)
    for name in (
        "v1-5-pruned-emaonly (hash 6ce0161689)",
        "lora chalk at 0.8",
        "ink: 00112233aabb",
        "easyneg",
        "ENSD: 31337",
        "RNG: CPU",
    ):
        assert name in said
    assert "--lora_weight 0.8" in said and "--pretrained_model_name_or_path" in said and "--textual_inversion" in said


@pytest.mark.parametrize(
    ("words", "sampler", "karras"),
    [
        ("Sampler: Euler a", "euler_a", False),
        ("Sampler: DPM++ 2M Karras", "dpm++_2m", True),  # before version 1.9
        ("Sampler: DPM++ 2M SDE Karras", "dpm++_2m_sde", True),
        ("Sampler: DPM++ 2M", "dpm++_2m", False),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpm++_2m", True),
        ("Sampler: Euler, Schedule type: Automatic", "euler", False),
        ("Sampler: Euler, Schedule type: Uniform", "euler", False),
        ("Sampler: Heun, Schedule type: Karras", "heun", True),
        ("Sampler: DDIM", "ddim", None),
        ("Sampler: PLMS", "pndm", None),
        ("Sampler: UniPC", "unipc", False),
        ("Sampler: LCM", "lcm", None),
        ("Sampler: dpm++_2m", "dpm++_2m", False),  # minidiff before it knew A1111's names
        ("Sampler: DPM adaptive", None, None),
    ],
)
def test_a1111_samplers(words: str, sampler: str | None, karras: bool | None) -> None:
    reading = read_a1111(f"a dog\nSteps: 20, {words}, CFG scale: 7")
    assert (reading.settings.get("sampler"), reading.settings.get("use_karras_sigmas")) == (sampler, karras)
    assert ("DPM adaptive" in "".join(reading.notes)) == (sampler is None)


def test_a_schedule_without_counterpart_is_named() -> None:
    assert "sgm uniform" in "".join(read_a1111("a\nSteps: 2, Sampler: Euler, Schedule type: SGM Uniform").notes)


def test_karras_that_a_sampler_of_ours_cannot_is_told() -> None:
    for words in ("PLMS Karras", "DDIM, Schedule type: Karras"):
        reading = read_a1111(f"a\nSteps: 2, Sampler: {words}")
        assert "Schedule type: Karras" in "".join(reading.notes) and "use_karras_sigmas" not in reading.settings


def test_every_sampler_name_comes_back() -> None:
    assert SAMPLER_NAMES.keys() == SAMPLERS.keys() >= set(comfyui.OURS.values())
    for ours, name in SAMPLER_NAMES.items():
        assert read_a1111(f"a\nSteps: 20, Sampler: {name}, Seed: 1").settings["sampler"] == ours


def test_hires_keeps_its_denoising_strength_to_itself() -> None:
    text = "a\nSteps: 20, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent"
    reading = read_a1111(text)
    assert "strength" not in reading.settings and "Denoising strength: 0.5, Hires upscale: 2" in reading.notes[-1]
    reading = read_a1111("a\nSteps: 20, Denoising strength: 0.5")
    assert "strength" not in reading.settings and "--image and --strength 0.5" in reading.notes[0]


def test_prompts_of_odd_shapes() -> None:
    assert read_a1111("Steps: 20, Seed: 5").settings["prompt"] == ""
    assert read_a1111("just words").settings["prompt"] == "just words"
    assert read_a1111("").settings["prompt"] == ""
    both = read_a1111("Steps: to heaven\nNegative prompt: x\nNegative prompt: y\nSteps: 3, Seed: 4").settings
    assert (both["prompt"], both["negative_prompt"]) == ("Steps: to heaven", "x\nNegative prompt: y")
    assert both["num_inference_steps"] == 3


def test_quoted_values() -> None:
    line = r'Steps: 3, Wildcard prompt: "a, \"b\": c\nd", Size: 8x8, Empty: , Broken: "x, y'
    assert fields_of(line) == {
        "Steps": "3",
        "Wildcard prompt": 'a, "b": c\nd',
        "Size": "8x8",
        "Empty": "",
        "Broken": '"x',
    }


@pytest.mark.parametrize(
    ("label", "value"),
    [("Steps", "1000000000"), ("Steps", "2.5"), ("CFG scale", "1e999"), ("CFG scale", "nan"), ("CFG scale", "-inf")]
    + [("Seed", str(2**64)), ("Seed", "-1"), ("Seed", "9" * 5000), ("Size", "0x99999999"), ("Clip skip", "400")],
)
def test_numbers_that_cannot_be_are_left_out_and_named(label: str, value: str) -> None:
    reading = read_a1111(f"a\nSteps: 4, {label}: {value}")
    assert {v for v in reading.settings.values() if not isinstance(v, str)} <= {4, 0}  # the steps, no clip skip
    assert label in reading.notes[-1] and len(reading.notes[-1]) < 200


def test_numbers() -> None:
    assert number("7.5", 0, 100) == 7.5 and number(" 7 ", 0, 100, whole=True) == 7 and number(7.0, 0, 9, whole=True) == 7
    for bad in ("", "x", "0x10", "1_000", "٣", None, True, [], {}, float("nan"), "1e5"):
        assert number(bad, 0, 100) is None


def test_terminal_escapes_are_taken_out() -> None:
    hostile = "a \x1b[31mred\x1b[0m dog\x07\x9b2J\u202egod\ud800\nwith\ttabs é 犬"
    assert clean(hostile) == "a red doggod\nwith\ttabs é 犬"
    reading = read_a1111(f"{hostile}\nSteps: 2, Model: \x1b]0;owned\x07, Odd\x1b: {hostile!r}\x1b[2J")
    everything = repr([reading.settings, reading.notes, reading.program])
    assert "\\x1b" not in everything.replace("\\\\x1b", "") and "\\x07" not in everything.replace("\\\\x07", "")


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


# ------------------------------------------------------------------------------------------------------------ ComfyUI


def graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """The default workflow, with a LoRA and clip skip; `changes` are inputs by node name, n3=… for "3"."""
    nodes: dict[str, Any] = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 156680208700286,
                "steps": 20,
                "cfg": 8.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 1,
                "model": ["10", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "beautiful scenery\nin a bottle", "clip": ["11", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["11", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
        "10": {
            "class_type": "LoraLoader",
            "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.7, "model": ["4", 0], "clip": ["4", 1]},
        },
        "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    }
    for name, inputs in changes.items():
        nodes[name[1:]]["inputs"].update(inputs)
    return nodes


def test_comfyui_default_workflow() -> None:
    reading = read_comfyui(graph(), "a.png")
    assert reading.settings == {
        "num_inference_steps": 20,
        "guidance_scale": 8.0,
        "seed": 156680208700286,
        "sampler": "dpm++_2m",
        "use_karras_sigmas": True,
        "width": 512,
        "height": 640,
        "prompt": "beautiful scenery\nin a bottle",
        "negative_prompt": "text, watermark",
        "clip_skip": 1,
    }
    assert len(reading.notes) == 2, reading.notes  # nothing else is left
    assert "ink.safetensors at 0.7" in reading.notes[0] and "v1-5-pruned" in reading.notes[1]


def test_comfyui_advanced_and_links_to_values() -> None:
    nodes = graph(n3={"noise_seed": ["20", 0], "sampler_name": "euler_ancestral", "scheduler": "exponential"})
    nodes["3"]["class_type"] = "KSamplerAdvanced"
    nodes["6"]["inputs"]["text"] = ["21", 0]
    nodes["20"] = {"class_type": "Seed (rgthree)", "inputs": {"seed": 77}}
    nodes["21"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a linked prompt"}}
    reading = read_comfyui(nodes, "a.png")
    assert reading.settings["seed"] == 77 and reading.settings["prompt"] == "a linked prompt"
    assert reading.settings["sampler"] == "euler_a" and reading.settings["use_karras_sigmas"] is False
    assert "scheduler: exponential" in reading.notes[-1]


def test_comfyui_second_pass_and_controlnet_are_named() -> None:
    nodes = graph(n8={"samples": ["30", 0]}, n3={"positive": ["32", 0], "negative": ["32", 1]})
    nodes["30"] = {"class_type": "KSampler", "inputs": {**nodes["3"]["inputs"], "denoise": 0.5, "latent_image": ["31", 0]}}
    nodes["31"] = {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0]}}
    links = {"positive": ["6", 0], "negative": ["7", 0], "strength": 1}
    nodes["32"] = {"class_type": "ControlNetApplyAdvanced", "inputs": links}
    reading = read_comfyui(dict(sorted(nodes.items(), reverse=True)), "a.png")
    assert "strength" not in reading.settings  # the first pass
    assert (reading.settings["prompt"], reading.settings["negative_prompt"]) == (
        "beautiful scenery\nin a bottle",
        "text, watermark",
    )
    said = "; ".join(reading.notes)
    assert "2 samplers" in said and "ControlNetApplyAdvanced" in said and "LatentUpscale" in said


def test_comfyui_image_to_image() -> None:
    nodes = graph(n3={"denoise": 0.6, "latent_image": ["40", 0]})
    nodes["40"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["41", 0], "vae": ["4", 2]}}
    nodes["41"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    reading = read_comfyui(nodes, "a.png")
    assert "strength" not in reading.settings and any("--image and --strength 0.6" in note for note in reading.notes)
    assert "denoise: 0.6" in "".join(read_comfyui(graph(n3={"denoise": 0.6}), "a.png").notes)  # of an empty latent


def test_comfyui_in_a_circle() -> None:
    nodes = graph(n10={"model": ["10", 0], "clip": ["11", 0]}, n3={"latent_image": ["3", 0], "seed": ["50", 0]})
    nodes["50"] = {"class_type": "Loop", "inputs": {"seed": ["50", 0]}}
    nodes["6"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0]}}
    reading = read_comfyui(nodes, "a.png")
    assert "seed" not in reading.settings and reading.settings["prompt"] == ""
    assert any("positive prompt" in note for note in reading.notes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "no graph"),
        ({}, "no graph"),
        ({"1": 5}, "no graph"),
        ({"1": {"class_type": "SaveImage"}}, "no KSampler; it has SaveImage"),
        ({str(i): {} for i in range(3000)}, "3,000 nodes"),
    ],
)
def test_comfyui_no_graph(content: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_comfyui(content, "a.png")


@pytest.mark.parametrize("junk", [None, 5, [], ["3"], ["99", 0], [["3"], 0], {"a": 1}, "x\x1b[2J", float("inf"), True, 10**400])
def test_comfyui_junk_in_every_input(junk: object) -> None:
    for name, node in graph().items():
        for key in node["inputs"]:
            reading = read_comfyui(graph(**{f"n{name}": {key: junk}}), "a.png")
            assert "\x1b" not in repr(reading.settings) + "".join(reading.notes)
    assert read_comfyui({"1": {"class_type": "KSampler", "inputs": junk}}, "a.png").notes


# -------------------------------------------------------------------------------------------------------------- files


def png(path: Path, **texts: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_comfyui_nan_is_read_and_depth_is_refused() -> None:
    assert parse_json('{"1": {"is_changed": [NaN]}}', "x") == {"1": {"is_changed": [None]}}  # ComfyUI writes it
    for text, words in (("[" * 500_000, "nested too deep"), ("{", "no JSON"), ("1" * 5000, "no JSON")):
        with pytest.raises(DataError, match=words):
            parse_json(text, "x")


@pytest.mark.parametrize("key", ["minidiff", "parameters", "prompt"])
def test_huge_texts_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=f'"{key}" has 1,000,001 characters'):
        read_origin(png(tmp_path / "a.png", **{key: "x" * 1_000_001}))


def test_a_compressed_bomb_is_one_message(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "x" * 5_000_000, zip=True)  # 5 kB in the file
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(DataError, match="a.png"):
        read_origin(tmp_path / "a.png")


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_of_a1111(tmp_path: Path, kind: str, order: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.replace("beach", "plage à la 犬").encode(order)
    path = tmp_path / f"a.{kind.lower()}"
    Image.new("RGB", (8, 8)).save(path, kind, exif=exif)
    assert picture_texts(path)["parameters"].splitlines()[1] == "on the plage à la 犬, 8k"
    origin = read_origin(path)
    assert origin.settings.num_inference_steps == 28 and origin.settings.seed == 3847561029
    assert "its noise is another" in origin.notes[0]


def test_a_picture_that_says_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(DataError, match="does not say how it was made"):
            read_origin(tmp_path / name)
    (tmp_path / "no.png").write_bytes(b"text")
    with pytest.raises(DataError, match="not a picture"):
        read_origin(tmp_path / "no.png")


def test_foreign_pictures_as_settings(tmp_path: Path) -> None:
    origin = read_origin(png(tmp_path / "a.png", prompt=json.dumps(graph()), workflow="{}"))
    assert origin.settings.prompt == "beautiful scenery\nin a bottle" and origin.settings.height == 640
    assert origin.settings.output == "a-again.png"
    assert origin.settings.pretrained_model_name_or_path == "checkpoints/pocket"  # ours, and a note on theirs
    with pytest.raises(DataError, match="no JSON"):
        read_origin(png(tmp_path / "b.png", prompt="a dog"))
