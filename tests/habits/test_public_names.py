"""What `from minidiff import …` finds, and what is said of names that are not there."""

import inspect

import pytest

import minidiff
from minidiff.draw.schedulers import SCHEDULERS
from minidiff.files.folder import SAMPLER_OF


def test_every_name_is_listed() -> None:
    assert {*minidiff.__all__, "__version__"} == set(dir(minidiff))
    assert set(SCHEDULERS) == set(SAMPLER_OF) == {name for name in minidiff.__all__ if name.endswith("Scheduler")}


@pytest.mark.parametrize(("name", "near"), minidiff.NEAREST.items())
def test_a_scheduler_that_is_not_there(name: str, near: str) -> None:
    with pytest.raises(ImportError, match=f"minidiff has no {name}. {near} is nearest to it"):
        exec(f"from minidiff import {name}")
    assert near in minidiff.__all__


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(ImportError, match='minidiff has no trian_lora. Did you mean "train_lora"?'):
        exec("from minidiff import trian_lora")
    exec("from minidiff import trainer")  # a room, whose name is near, too


def test_help_of_a_recipe_names_its_settings() -> None:
    text, signature = minidiff.train_lora.__doc__, inspect.signature(minidiff.train_lora)
    assert "rank=4: Rank r of each layer's update" in text and "max_train_steps=None: Updates in total" in text
    assert "--" not in text
    assert list(signature.parameters)[:2] == ["pictures", "prompt"] and signature.parameters["rank"].default == 4
    assert "rank" not in inspect.signature(minidiff.train_full).parameters
