"""ControlNets beside diffusers', on tiny models."""

from typing import Any

import pytest
import torch
from tiny_sizes import TINY_SD2, TINY_UNET, TINY_XL

from minidiff.core.config import UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.folder import config_values

diffusers = pytest.importorskip("diffusers")

WIDTHS = (8, 16, 24, 32)


def jittered(model: Any) -> Any:
    """Zeros and ones hide mistakes: a little noise on every weight."""
    draws = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=draws)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("config", [TINY_UNET, TINY_SD2, TINY_XL], ids=["SD 1", "SD 2", "SDXL"])
def test_residuals_and_output(config: UNetConfig, guess: bool) -> None:
    torch.manual_seed(0)
    unet = jittered(UNet2DConditionModel(config))
    net = jittered(ControlNetModel.from_unet(unet, WIDTHS))
    their_unet = diffusers.UNet2DConditionModel.from_config(config_values(config, "UNet2DConditionModel")).eval()
    their_net = diffusers.ControlNetModel.from_unet(their_unet, conditioning_embedding_out_channels=WIDTHS).eval()
    their_unet.load_state_dict(unet.state_dict())
    their_net.load_state_dict(net.state_dict())
    x, text, hint = torch.randn(2, 4, 8, 8), torch.randn(2, 7, config.cross_attention_dim), torch.rand(2, 3, 64, 64)
    vector, more = None, {}
    if config.addition_embed_type:
        pooled, ids = torch.randn(2, 24), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        numbers = their_unet.add_time_proj(ids.flatten()).reshape(2, -1)
        vector, more = torch.cat([pooled, numbers], dim=1), {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    t = torch.tensor([981, 20])
    control = net(x, t, *(one for one in (text, vector) if one is not None), hint=net.encode_hint(hint), scale=0.7, guess=guess)
    their = dict(controlnet_cond=hint, conditioning_scale=0.7, guess_mode=guess, return_dict=False)
    down, mid = their_net(x, t, text, **their, **more)
    for ours, theirs in zip(control, [*down, mid], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    both = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    theirs = their_unet(x, t, text, **both, **more).sample
    torch.testing.assert_close(unet(x, t, text, vector, control), theirs, rtol=1e-6, atol=1e-6)
