"""IP-Adapter: its laws, its place beside LoRA and the fast classes, and the sizes of the published files."""

import pytest
import torch
from tiny_adapters import answer, digest, random, shake, tiny_unet
from tiny_ip_adapters import answers, set_scale, tiny_ip_adapter
from torch import Tensor

from minidiff import fast
from minidiff.core import inject as lora
from minidiff.core.config import SD15_UNET
from minidiff.core.ip_adapter import ImageAttention, ImageProjection, IPAdapter, Resampler, eject, full_projection, inject
from minidiff.core.unet import UNet2DConditionModel


def with_pictures(unet: UNet2DConditionModel, adapter: IPAdapter, e: Tensor) -> Tensor:
    """What the U-Net says to the question of `answer`, asked with pictures."""
    with torch.no_grad():
        return unet(random(2, 4, 8, 8, seed=1), torch.tensor([3, 900]), adapter(random(2, 7, 24, seed=2), e))


@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_scale_0_is_the_base_and_eject_restores_it(form: str) -> None:
    unet = tiny_unet()
    adapter, base, bits = tiny_ip_adapter(unet, form), answer(unet), digest(unet)
    inject(unet, adapter)
    assert digest(unet) == bits  # the U-Net's own weights and names
    assert (with_pictures(unet, adapter, answers(form)) - base).abs().max() > 0.01
    set_scale(adapter, [0.0] * len(adapter.ip_adapter))
    assert torch.equal(with_pictures(unet, adapter, answers(form)), base)
    eject(unet)
    assert torch.equal(answer(unet), base) and not any(isinstance(m, ImageAttention) for m in unet.modules())


def test_each_layer_has_its_scale() -> None:
    unet = tiny_unet()
    adapter = tiny_ip_adapter(unet)
    inject(unet, adapter)
    drawn = set()
    for i in range(layers := len(adapter.ip_adapter)):
        set_scale(adapter, [float(j == i) for j in range(layers)])
        drawn.add(round(float(with_pictures(unet, adapter, answers("base")).sum()), 3))
    assert len(drawn) == layers == 4


def test_pictures_stand_side_by_side_in_one_softmax() -> None:
    """The same picture twice halves each weight of the softmax: nothing changes. Their order counts for nothing, either."""
    unet = tiny_unet()
    adapter, e = tiny_ip_adapter(unet), answers("base", pictures=2)
    inject(unet, adapter)
    one = with_pictures(unet, adapter, e[:, :1])
    torch.testing.assert_close(with_pictures(unet, adapter, e[:, [0, 0]]), one, atol=1e-5, rtol=1e-5)
    both = with_pictures(unet, adapter, e)
    torch.testing.assert_close(with_pictures(unet, adapter, e.flip(1)), both, atol=1e-5, rtol=1e-5)
    assert (both - one).abs().max() > 1e-3


@pytest.mark.parametrize("lora_first", [True, False])
def test_with_lora_and_the_fast_classes(lora_first: bool) -> None:
    """In any order of attaching; k and v of prompt and pictures are computed once."""
    unet, e = tiny_unet(), answers("plus")
    adapter = tiny_ip_adapter(unet, "plus")
    for step in ("lora", "ip") if lora_first else ("ip", "lora"):
        if step == "ip":
            inject(unet, adapter)
        else:
            lora.inject(unet, 2)
            shake(unet)
    plain = with_pictures(unet, adapter, e)
    lora.set_adapters(unet, [])
    assert (with_pictures(unet, adapter, e) - plain).abs().max() > 1e-3  # the LoRA counts
    lora.set_adapters(unet, ["default"])
    fast.install(unet)
    calls = []
    first = adapter.ip_adapter["1"].to_k_ip
    first.register_forward_hook(lambda *given: calls.append(given))
    with torch.no_grad(), fast.frozen_weights([unet], large=True, prompt=True):
        context = adapter(random(2, 7, 24, seed=2), e)
        for _ in range(2):
            quick = unet(random(2, 4, 8, 8, seed=1), torch.tensor([3, 900]), context)
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
    fast.remove(unet)
    eject(unet)
    lora.eject(unet)
    assert torch.equal(answer(unet), answer(tiny_unet()))


def test_a_fresh_adapter_begins_with_the_texts_keys_and_values() -> None:
    unet = tiny_unet()
    lora.inject(unet, 2)
    adapter = IPAdapter(ImageProjection(8, 24), unet)
    first = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    assert torch.equal(adapter.ip_adapter["1"].to_k_ip.weight, first.to_k.base.weight)
    assert list(adapter.ip_adapter) == ["1", "3", "5", "7"] and all(p.requires_grad for p in adapter.parameters())


def test_sd15_has_the_published_sizes_and_numbers() -> None:
    """Base, plus and full-face; layers 1 to 11 lead down, 13 to 29 up, 31 is in the middle."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(SD15_UNET)
        forms = ImageProjection(1024, 768), Resampler(1280, 768), full_projection(1280, 768)
        adapters = [IPAdapter(form, unet) for form in forms]
    assert [sum(p.numel() for p in adapter.parameters()) for adapter in adapters] == [22_319_616, 49_087_488, 21_794_304]
    widths = {int(i): layer.to_k_ip.weight.shape[0] for i, layer in adapters[0].ip_adapter.items()}
    assert list(widths) == list(range(1, 32, 2)) and widths[31] == 1280 and widths[19] == 640 and widths[29] == 320
