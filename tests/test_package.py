"""The package holds every folder, and what travels with it is found from anywhere. `.ci/run` tries the wheel itself."""

from configparser import ConfigParser
from pathlib import Path

from minidiff.cli.train_commands import lesson_files
from minidiff.files.bundled import here_or_bundled
from minidiff.files.folder import local_folder
from minidiff.trainer.dataset import read_folder

ROOT = Path(__file__).resolve().parents[1]


def packages() -> dict[str, str]:
    """The packages of setup.cfg, each with its folder."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    elsewhere = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n")[1:])
    return {name: elsewhere.get(name, name.replace(".", "/")) for name in setup["options"]["packages"].split()}


def test_every_folder_with_python_is_a_package():
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "minidiff").rglob("*.py")}
    assert folders | {"checkpoints", "lessons"} == set(packages().values())


def test_the_pocket_checkpoint_and_the_pictures_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_folder("checkpoints/pocket") == ROOT / "checkpoints/pocket"
    assert len(read_folder(Path("lessons/data/dog"), "a photo of a sks dog")) == 5
    assert lesson_files()[0].is_file()


def test_what_lies_in_the_present_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Path("checkpoints/pocket")
    mine.mkdir(parents=True)
    assert here_or_bundled(mine) == mine


def test_nothing_else_of_the_package_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("minidiff/core", "tests", "checkpoints/../minidiff", "checkpoints/nobody", "", "."):
        assert here_or_bundled(name) == Path(name)
