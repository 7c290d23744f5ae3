"""What comes out is ready to upload: the card, the licence, the metadata; no path, no caption, no date."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny_recipes import PRIOR, draw_pictures, tiny, train

from minidiff.files.values import from_toml
from minidiff.files.weights import read_header
from minidiff.trainer import checkpoint
from minidiff.trainer.card import base_license, is_hub_id, license_word
from minidiff.trainer.settings import FineTuneSettings, LoRASettings

FRONT = re.compile(r"---\n(.*?)\n---\n\n# ", re.DOTALL)
SECRET = ("folder-of-mine", "kept-class", "held-out", "zanzibar", "picture-")  # folders, a word of each caption, file names


def front_matter(folder: Path) -> dict[str, Any]:
    found = FRONT.match((folder / "README.md").read_text("utf-8"))
    assert found
    return yaml.safe_load(found[1])  # type: ignore[no-any-return]


def published(folder: Path) -> Iterator[Path]:
    """All files of a run that an upload takes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("checkpoint-", "samples")):
            yield path


@pytest.fixture(scope="module")
def licensed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a card."""
    home = tmp_path_factory.mktemp("licensed") / "tiny-model"
    shutil.copytree(tiny_folder, home)
    (home / "README.md").write_text('---\nlicense: "creativeml-openrail-m"\ntags:\n- dogs\n---\n\n# Tiny\nlicense: none\n')
    return home


@pytest.fixture(scope="module")
def finished(licensed: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRASettings:
    """A run with everything in it that should not come out: captions, folders, class pictures, sheets."""
    home = tmp_path_factory.mktemp("run")
    pictures = draw_pictures(home / "folder-of-mine")
    for i in range(3):
        (pictures / f"picture-{i}.txt").write_text(f"a dog on zanzibar{i}")
    (home / "held-out").mkdir()
    Image.effect_noise((16, 16), 9).convert("RGB").save(home / "held-out" / "x.png")
    (home / "held-out" / "x.txt").write_text("zanzibar at night")
    settings: LoRASettings = tiny(
        "lora",
        licensed,
        pictures,
        home / "my-dog",
        instance_data_dir=None,
        instance_prompt=None,
        train_data_dir=str(pictures),
        validation_data_dir=str(home / "held-out"),
        **{**PRIOR, "prior_from_base": False, "class_data_dir": str(home / "kept-class"), "num_class_images": 1},
        **{"validation_steps": 3, "learning_rate": 2e-3, "seed": 7, "overwrite_output_dir": True},
    )
    train(settings)
    return settings


def test_what_lies_in_the_folder(finished: LoRASettings) -> None:
    folder = Path(finished.output_dir)
    assert {str(p.relative_to(folder)) for p in published(folder)} == {
        ".gitignore", ".lock", "README.md", "metrics.jsonl", "pytorch_lora_weights.safetensors",
        "sheet.png", "train_config.toml",
    }  # fmt: skip


def test_no_path_and_no_caption_comes_out(finished: LoRASettings) -> None:
    for path in published(Path(finished.output_dir)):
        data = path.read_bytes()
        assert not [word for word in SECRET if word.encode() in data], path
        if path.suffix == ".png":
            assert Image.open(path).info == {}  # type: ignore[comparison-overlap]


def test_a_sheet_does_not_show_captions(finished: LoRASettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from minidiff.trainer.recipes import RECIPES

    seen: list[str] = []

    def sheet(rows: Any, row_labels: list[str], column_labels: Sequence[str] = ()) -> Image.Image:
        seen.extend([*row_labels, *column_labels, *(one for row in rows for one in row if isinstance(one, str))])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("minidiff.trainer.validation.contact_sheet", sheet)
    for changes in ({}, {"validation_prompt": ("a red dog",)}):
        settings = replace(finished, overwrite_output_dir=False, output_dir=finished.output_dir + "-other", **changes)  # type: ignore[arg-type]
        RECIPES[LoRASettings](settings).preview(2)
    rows = ["training pictures", "", "base", "step 2"]
    assert seen == [*rows, "the first caption, seed 7", *rows, "a red dog, seed 7"]


def test_the_card(finished: LoRASettings) -> None:
    folder = Path(finished.output_dir)
    assert front_matter(folder) == {
        "base_model": "tiny-model",
        "license": "creativeml-openrail-m",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training", "lora"],
        "inference": True,
    }
    card = (folder / "README.md").read_text("utf-8")
    assert "# my-dog" in card and "LoRA of tiny-model, 3 updates." in card
    assert all(f"\n{line}\n" in card for line in ("seed = 7", "rank = 2", "train_batch_size = 2", "learning_rate = 0.002"))
    assert 'pipe.load_lora_weights("my-dog")' in card and "The licence (creativeml-openrail-m)" in card
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert pictures and all((folder / name).is_file() for name in pictures)


def test_the_card_is_that_of_the_whole_run(finished: LoRASettings) -> None:
    """A checkpoint has no card: the run's would say that all updates were made, and show a sheet that is not there."""
    checkpoint_3 = Path(finished.output_dir) / "checkpoint-3"
    assert (checkpoint_3 / "pytorch_lora_weights.safetensors").is_file() and not (checkpoint_3 / "README.md").exists()


@pytest.mark.parametrize(
    "method, tag, words",
    [
        ("full", "full", ['from_pretrained("out")']),
        ("dreambooth", "dreambooth", ["DreamBooth of tiny-model, 1 updates"]),
        ("dora", "lora", ["use_dora = true", 'lora_targets = ["attention", "resnets"]']),
        ("textual inversion", "textual_inversion", ['placeholder_token = "<dog>"', 'load_textual_inversion("out")']),
        ("pivotal", "pivotal", ["num_vectors = 2", "load_textual_inversion", "load_lora_weights"]),
        ("pivotal", "pivotal", ["learning_rate_embedding = 0.0005", "learning_rate = 0.01"]),
    ],
)
def test_the_card_of_every_method(licensed: Path, tmp_path: Path, method: str, tag: str, words: list[str]) -> None:
    prompt = {} if method in ("textual inversion", "pivotal") else {"instance_prompt": 'a "sks" dog: 🐕 # \\ ---'}
    task_settings = tiny(method, licensed, draw_pictures(tmp_path / "p"), tmp_path / "out", max_train_steps=1, **prompt)
    train(task_settings)
    front, card = front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text("utf-8")
    assert front["tags"][-1] == tag and front["instance_prompt"] == front["widget"][0]["text"] == task_settings.prompt
    assert all(word in card for word in words), card
    for path in (tmp_path / "out").glob("*.safetensors"):
        check_metadata(read_header(path).metadata, task_settings)


def check_metadata(metadata: dict[str, str], settings: FineTuneSettings) -> None:
    """ModelSpec 1.0.1's required keys, and no hint of where or when."""
    kind = metadata["modelspec.architecture"].removeprefix("width-24/")
    assert kind in ("lora", "textual-inversion") and metadata["modelspec.sai_model_spec"] == "1.0.1"
    required = {"implementation", "title", "resolution"}
    assert required <= {key.removeprefix("modelspec.") for key in metadata}
    assert metadata["modelspec.resolution"] == "16x16" and metadata["modelspec.license"] == "creativeml-openrail-m"
    assert metadata["ss_v2"] == "False" and metadata["ss_base_model_version"] == "width-24"  # no model of SD
    assert metadata["ss_sd_model_name"] == "tiny-model" and metadata["ss_output_name"] == "out"
    assert not [key for key in metadata if "date" in key or "hash" in key or "dataset" in key]
    assert all(isinstance(value, str) and "/tmp" not in value for value in metadata.values())


def test_metadata_of_the_run(finished: LoRASettings) -> None:
    metadata = read_header(Path(finished.output_dir) / "pytorch_lora_weights.safetensors").metadata
    assert metadata["ss_output_name"] == "my-dog"
    assert "modelspec.trigger_phrase" not in metadata  # captions are not published
    assert metadata["modelspec.prediction_type"] == "epsilon" and len(metadata["base_fingerprint"]) == 16


def test_the_config_makes_it_again_to_the_byte(finished: LoRASettings, tmp_path: Path) -> None:
    """Nothing in a result says when or where: the same run gives the same bytes."""
    folder = Path(finished.output_dir)
    config = from_toml(LoRASettings, folder / checkpoint.CONFIG)
    assert not (config.overwrite_output_dir or config.train_data_dir or config.class_data_dir or config.validation_data_dir)
    given = {name: getattr(finished, name) for name in ("train_data_dir", "class_data_dir", "validation_data_dir")}
    again = replace(config, output_dir=str(tmp_path / "my-dog"), **given)
    assert replace(again, output_dir=finished.output_dir, overwrite_output_dir=True) == finished
    train(again)
    for path in published(folder):
        other = tmp_path / "my-dog" / path.relative_to(folder)
        if path.name not in ("metrics.jsonl", "train_config.toml"):  # seconds; output_dir
            assert other.read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("method", ["lora", "full", "pivotal"])
def test_the_code_of_the_card_runs_in_the_folder_above(
    licensed: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copytree(licensed, tmp_path / "models" / "base")
    train(tiny(method, Path("models/base"), draw_pictures(Path("p")), Path("results/out"), max_train_steps=1))
    (code,) = re.findall(r"```python\n(.*?)```", Path("results/out/README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir("results")
    exec(code, scope := dict[str, Any]())
    assert scope["pipe"].unet and str(tmp_path) not in code


def test_a_trigger_word_that_captions_share(licensed: Path, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p")
    for i, caption in enumerate(["ohwx, a dog", "a photo of ohwx", "ohwx"]):
        (folder / f"picture-{i}.txt").write_text(caption)
    captioned = {"instance_data_dir": None, "instance_prompt": None, "train_data_dir": str(folder), "trigger": "ohwx"}
    train(tiny("lora", licensed, folder, tmp_path / "out", max_train_steps=1, **captioned))
    assert "Its trigger word: `ohwx`." in (tmp_path / "out" / "README.md").read_text()
    assert front_matter(tmp_path / "out")["instance_prompt"] == "ohwx"
    metadata = read_header(tmp_path / "out" / "pytorch_lora_weights.safetensors").metadata
    assert metadata["modelspec.trigger_phrase"] == "ohwx"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_leaves_out_what_is_not_for_others(finished: LoRASettings, tmp_path: Path) -> None:
    """huggingface_hub sends .gitignore along, and the hub heeds it."""
    shutil.copytree(finished.output_dir, tmp_path / "run")

    def git(*words: str) -> str:
        plain = ["git", "-c", "core.excludesFile=/dev/null", "-C", str(tmp_path / "run"), *words]
        return subprocess.run(plain, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", "--all")
    assert set(git("ls-files").split()) == {
        ".gitignore", "README.md", "pytorch_lora_weights.safetensors", "sheet.png", "train_config.toml"
    }  # fmt: skip


OTHER = {"license": "other"}


@pytest.mark.parametrize(
    "card, terms, word",
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}, "mit"),
        ("---\r\nlicense: 'mit'  \r\n---\r\n", {"license": "mit"}, "mit"),
        (
            "---\ntags: [a]\nlicense: other\nlicense_name: my-terms\nlicense_link: LICENSE.md\n---\n",
            OTHER | {"license_name": "my-terms", "license_link": "LICENSE.md"},
            "my-terms",
        ),
        ("---\nlicense:\n- mit\n- gpl\n---\n", OTHER | {"license_name": "unknown"}, "unknown"),
        ("---\ntags: [a]\n---\nlicense: mit\n", OTHER | {"license_name": "unknown"}, "unknown"),
        ("license: mit\n", OTHER | {"license_name": "unknown"}, "unknown"),
        (None, OTHER | {"license_name": "unknown"}, "unknown"),
    ],
)
def test_the_licence_is_the_bases(tmp_path: Path, card: str | None, terms: dict[str, str], word: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert base_license(str(tmp_path)) == terms and license_word(terms) == word


def test_the_pocket_checkpoint_says_its_licence() -> None:
    pocket = Path(__file__).parents[2] / "checkpoints" / "pocket"
    assert base_license(str(pocket)) == {"license": "cc0-1.0"}


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5") and not is_hub_id("/home/me/model")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_id("a/b")
