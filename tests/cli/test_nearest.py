"""The nearest right thing: samplers of other names, groups of layers, names in another Unicode form, our own LoRAs."""

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.inject import inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.lora_tags import in_lora_dir
from minidiff.draw.pipeline import sampler_for
from minidiff.files.inspect import describe
from minidiff.files.values import same_name
from minidiff.files.weights import save
from minidiff.trainer.dataset import read_folder


@pytest.mark.parametrize(
    ("asked", "ours"),
    [
        ("DDIMScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("UniPCMultistepScheduler", "unipc"),
        ("plms", "pndm"),
        ("PLMS", "pndm"),
        ("dpm2", "heun"),
        ("eular", "euler"),
    ],
)
def test_samplers_of_other_names(asked: str, ours: str) -> None:
    with pytest.raises(SettingsError, match=f'"{asked}" is unknown.*Did you mean "{ours}"'):
        sampler_for(asked)


@pytest.mark.parametrize(("asked", "ours"), [("ff", "feed_forward"), ("attn", "attention"), ("attentoin", "attention")])
def test_groups_of_layers(asked: str, ours: str) -> None:
    from tiny_sizes import TINY_UNET

    with pytest.raises(AdapterError, match=f'target "{asked}".*Did you mean "{ours}"'):
        inject(UNet2DConditionModel(TINY_UNET), 2, targets=asked)


def test_names_that_differ_in_their_unicode_form_are_the_same(tmp_path: Path) -> None:
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert one != other
    (tmp_path / f"{other}.safetensors").touch()
    assert in_lora_dir(str(tmp_path), one) == tmp_path / f"{other}.safetensors"
    assert same_name(tmp_path / "tea.safetensors") == tmp_path / "tea.safetensors"
    assert same_name(tmp_path / "no" / "tea") == tmp_path / "no" / "tea" and same_name(tmp_path / ("x" * 5000)).name[0] == "x"


def test_a_table_may_have_backslashes_and_another_unicode_form(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = [unicodedata.normalize("NFD", "é.png"), "b.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "sub" / name)
    rows = [{"file_name": f"sub\\{unicodedata.normalize('NFC', name)}", "text": name} for name in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {example.path.name: example.caption for example in read_folder(tmp_path, None)}
    assert {unicodedata.normalize("NFC", name) for name in found} == {"é.png", "b.png"} and len(found) == 2


def test_inspect_knows_our_own_loras(tmp_path: Path) -> None:
    import torch

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    tensors = {f"{layer}A.weight": torch.ones(2, 320), f"{layer}B.weight": torch.ones(320, 2)}
    for metadata, trained in (({"base_fingerprint": "0"}, "minidiff"), ({}, None)):
        save(tensors, tmp_path / "a.safetensors", metadata)
        assert describe(tmp_path / "a.safetensors").get("trained by") == trained
