"""The pocket's IP-Adapter: one update of its stage to the published files, and what the committed one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.pocket import ip_adapter, pretrain
from minidiff.pocket.judge import ImageTower
from minidiff.pocket.settings import PretrainSettings
from minidiff.pocket.world import draw, held_out

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


def test_one_update_of_the_ip_adapter_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, loss = [], ip_adapter.DiffusionLoss.predict

    def watched(self: ip_adapter.DiffusionLoss, batch: dict[str, torch.Tensor]) -> object:
        batches.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(ip_adapter.DiffusionLoss, "predict", watched)
    settings = PretrainSettings(str(tmp_path), ("world", "latents", "ip"), init_from=str(POCKET), device="cpu",
                                pictures=4, ip_steps=1, ip_batch=16)  # fmt: skip
    pretrain.pretrain(settings)
    spoken = batches[0]["ids"][:, 1] != batches[0]["ids"][0].max()  # the end mark comes first in an empty caption
    shown = batches[0]["e"].flatten(1).any(1)
    assert {(bool(a), bool(b)) for a, b in zip(spoken, shown)} >= {(True, True), (False, True)}
    file, unet = (
        load_file(tmp_path / "ip" / "ip_adapter.safetensors"),
        load_file(POCKET / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    assert sum(tensor.numel() for tensor in file.values()) == 361_216
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    torch.testing.assert_close(file["ip_adapter.1.to_v_ip.weight"], unet[key], atol=2e-3, rtol=0)  # a copy, one update later
    tower = load_file(tmp_path / "ip" / "image_encoder" / "model.safetensors")
    ours = load_file(POCKET / "image_encoder" / "model.safetensors")
    assert tower.keys() == ours.keys() and all(torch.equal(tower[name], ours[name]) for name in ours)


def test_the_committed_adapter_draws_what_it_is_shown() -> None:
    """Without a word. The pocket's image tower finds the drawings nearer to their own picture than to the other."""
    shown = [draw(picture, 10**6 + i) for i, picture in enumerate(held_out(2))]
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(POCKET.parent / "pocket-ip")
    call = {"num_inference_steps": 8, "guidance_scale": 5.0, "sampler": "ddim", "seed": 0}
    drawn = [pipe("", ip_adapter_image=picture, **call).images[0] for picture in shown]
    tower = ImageTower(POCKET / "image_encoder")
    likeness = tower.embed(drawn) @ tower.embed(shown).mT
    assert likeness.diag().mean() - likeness.fliplr().diag().mean() > 0.3  # 0.65 when it was committed
