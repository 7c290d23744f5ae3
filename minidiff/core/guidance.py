"""Classifier-free guidance (arXiv 2207.12598): ask the network with and without the prompt, and exaggerate the difference.

An encoded prompt is a tuple, `(states,)` in SD 1.x and 2.x and `(states, vector)` in SDXL: all that the U-Net reads of it.

B pictures   C H W one latent   L tokens, 77 or a multiple of it   D their width   V width of SDXL's vector
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.core.samplers import Model

Text = tuple[Tensor, ...]  # states (B, L, D); in SDXL also a vector (B, V)
UNetCall = Callable[..., Tensor]  # (x, t, *text) -> eps or v


def guided(unet: UNetCall, cond: Text, uncond: Text | None, scale: float, rescale: float = 0.0) -> Model:
    """A model(x, t) for the samplers: x (B, C, H, W) and t (B,) in, fp32 (B, C, H, W) out.

    `cond` and `uncond` are encoded prompts, B or 1 of them; the network sees x in the dtype of the states. With a `scale` above
    1, both questions are one batch of 2B. Otherwise only the prompt is asked: scale 1 means "no guidance". `rescale`, 0 to 1,
    is the share of the contrast added by guidance that is taken back.
    """
    if scale <= 1 or uncond is None:
        return lambda x, t: unet(x.to(cond[0].dtype), t, *cond).float()
    text = [torch.cat([no.expand_as(yes), yes]) for no, yes in zip(uncond, cond)]  # (2B, L, D); (2B, V)

    def model(x: Tensor, t: Tensor) -> Tensor:
        output = unet(torch.cat([x, x]).to(text[0].dtype), torch.cat([t, t]), *text)  # (2B, C, H, W)
        without, with_prompt = output.float().chunk(2)
        x_cfg = without + scale * (with_prompt - without)  # 2207.12598 eq. 6, whose w is scale - 1
        if rescale:
            spread = with_prompt.std((1, 2, 3), keepdim=True) / x_cfg.std((1, 2, 3), keepdim=True)
            x_cfg = rescale * (x_cfg * spread) + (1 - rescale) * x_cfg  # 2305.08891 eqs. 15 and 16
        return x_cfg

    return model
