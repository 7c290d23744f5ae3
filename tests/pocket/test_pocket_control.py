"""The pocket's ControlNets: their hints, and one update of each to a folder that is read again."""

from pathlib import Path

import pytest
import torch

from minidiff.draw.canny import canny
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.controlnet import read_controlnet
from minidiff.pocket import control, pretrain
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.stage import load_world
from minidiff.trainer.run import read_metrics

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket")
    settings = PretrainSettings(str(folder), ("world", "latents", "canny"), init_from=str(POCKET), device="cpu",
                                pictures=4, control_steps=2, control_batch=2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "edge_f1", lambda pipe: float(len(pipe.controlnet)))  # the real one draws 12 pictures
        pretrain.pretrain(settings)
    return folder


def test_hints(home: Path) -> None:
    world = load_world(PretrainSettings(str(home), pictures=4))
    edges = control.edges(world)([2, 0])
    assert edges.shape == (2, 3, 128, 128) and torch.equal(edges[0, 1] * 255, torch.from_numpy(canny(world.pixels[2])).float())


def test_the_stage_writes_a_net(home: Path) -> None:
    """In two updates; the learning rate of the first is 0."""
    net = read_controlnet(home / "canny")
    assert sum(p.numel() for p in net.parameters()) == 4_816_392
    assert read_metrics(home / "canny")[-1]["edge_f1"] == 1
    assert net.controlnet_mid_block.weight.any() and net.config.conditioning_embedding_out_channels == control.WIDTHS


@pytest.mark.skipif(not (POCKET.parent / "pocket-canny").is_dir(), reason="there is no checkpoints/pocket-canny")
def test_the_checkpoint_follows_its_hints() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    pipe.controlnet = read_controlnet(POCKET.parent / "pocket-canny")
    assert control.edge_f1(pipe, 3, steps=8) > control.edge_f1(pipe, 3, scale=0, steps=8) + 0.1
