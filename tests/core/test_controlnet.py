"""ControlNet: its size, and its wiring, which its first three updates prove."""

from dataclasses import asdict

import pytest
import torch
from tiny_sizes import TINY_UNET

from minidiff.core.config import SD2_UNET, SD15_UNET, SDXL_UNET, ControlNetConfig, UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.unet import UNet2DConditionModel

WIDTHS = (8, 8, 16, 16)
COUNTS = [(SD15_UNET, 361_279_120, 340), (SD2_UNET, 364_228_240, 340), (SDXL_UNET, 1_251_014_160, 844)]


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET).requires_grad_(False)


def inputs() -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(1)
    x, text, hint = (torch.randn(shape, generator=draws) for shape in ((2, 4, 8, 8), (2, 7, 24), (2, 3, 64, 64)))
    return x, torch.tensor([900, 20]), text, hint


@pytest.mark.parametrize(("config", "parameters", "tensors"), COUNTS)
def test_counts(config: UNetConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        net = ControlNetModel(ControlNetConfig(**asdict(config)))
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (parameters, tensors)


def test_at_birth_it_changes_nothing(unet: UNet2DConditionModel) -> None:
    x, t, text, hint = inputs()
    net = ControlNetModel.from_unet(unet, WIDTHS)
    assert torch.equal(unet(x, t, text, control=net(x, t, text, hint=net.encode_hint(hint))), unet(x, t, text))


def test_the_first_three_updates(unet: UNet2DConditionModel) -> None:
    """Connections; then the copy, and the last layer of the hint encoder; then the rest of it. The U-Net gets none."""
    x, t, text, hint = inputs()
    net = ControlNetModel.from_unet(unet, WIDTHS)
    moved: list[set[str]] = []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        unet(x, t, text, control=net(x, t, text, hint=net.encode_hint(hint))).square().mean().backward()
        moved.append({name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    connections = {name for name in net.state_dict() if name.startswith(("controlnet_down", "controlnet_mid"))}
    hints = {name for name in net.state_dict() if name.startswith("controlnet_cond")}
    assert moved[0] == connections
    assert moved[1] == {name for name in net.state_dict() if name not in hints or "conv_out" in name}
    assert moved[2] == set(net.state_dict())
    assert all(p.grad is None for p in unet.parameters())
