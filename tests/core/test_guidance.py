"""Classifier-free guidance: the formula, the batch, and what scale 1 means."""

import pytest
import torch
from torch import Tensor

from minidiff.core.guidance import guided

X, T = torch.arange(2 * 4 * 2 * 2.0).reshape(2, 4, 2, 2), torch.tensor([7.0, 7.0])
COND, UNCOND = (torch.full((2, 77, 3), 2.0),), (torch.full((2, 77, 3), -1.0),)


class FakeUNet:
    """x times the text's first number, plus t; remembers the shapes and dtypes it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append((tuple(x.shape), tuple(text.shape), x.dtype))
        assert len(x) == len(t) == len(text)
        return x * text[:, :1, :1, None] + t.view(-1, 1, 1, 1).to(x.dtype)


def test_rescaled_guidance_eq15_and_16():
    """2305.08891: eq. 15 gives the output the spread of the answer to the prompt; eq. 16 goes a part of the way."""
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, whole, part = (guided(FakeUNet(), COND, UNCOND, 7.5, rescale)(x, T) for rescale in (0.0, 1.0, 0.25))
    with_prompt = FakeUNet()(x, T, *COND)
    torch.testing.assert_close(whole.std((1, 2, 3)), with_prompt.std((1, 2, 3)))
    torch.testing.assert_close(part, 0.25 * whole + 0.75 * plain)


def test_guidance_eq6():
    """2207.12598 eq. 6: (1 + w) eps(c) - w eps(), with w = scale - 1."""
    unet, scale = FakeUNet(), 7.5
    got = guided(unet, COND, UNCOND, scale)(X, T)
    w = scale - 1
    torch.testing.assert_close(got, (1 + w) * unet(X, T, *COND) - w * unet(X, T, *UNCOND))


def test_one_batch_of_2b():
    unet = FakeUNet()
    guided(unet, COND, UNCOND, 1.1)(X, T)
    assert unet.calls == [((4, 4, 2, 2), (4, 77, 3), torch.float32)]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
def test_scale_up_to_one_is_conditional_only(scale):
    unet = FakeUNet()
    got = guided(unet, COND, None, scale)(X, T)
    assert [shapes[0] for shapes in unet.calls] == [(2, 4, 2, 2)]
    assert torch.equal(got, unet(X, T, *COND))


def test_scale_one_is_continuous():
    """Just above 1, guidance gives what the conditional branch alone gives."""
    above, at = guided(FakeUNet(), COND, UNCOND, 1 + 1e-6), guided(FakeUNet(), COND, UNCOND, 1.0)
    torch.testing.assert_close(above(X, T), at(X, T), rtol=1e-5, atol=1e-4)


def test_every_member_of_an_encoded_prompt_is_doubled():
    """SDXL's prompt has a vector beside the states; in the batch the negative one comes first, as with the states."""
    seen = []

    def unet(x: Tensor, t: Tensor, states: Tensor, vector: Tensor) -> Tensor:
        seen.append((states[:, 0, 0].tolist(), vector[:, 0].tolist()))
        return x

    guided(unet, (*COND, torch.full((2, 5), 3.0)), (*UNCOND, torch.full((1, 5), 4.0)), 2.0)(X, T)
    assert seen == [([-1, -1, 2, 2], [4, 4, 3, 3])]


def test_one_negative_prompt_serves_the_batch():
    unet = FakeUNet()
    assert torch.equal(guided(unet, COND, (UNCOND[0][:1],), 3.0)(X, T), guided(unet, COND, UNCOND, 3.0)(X, T))


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_network_in_half_precision(dtype, scale):
    """The network sees its own dtype, the sampler gets fp32, and the difference is amplified in fp32."""
    unet = FakeUNet()
    got = guided(unet, (COND[0].to(dtype),), (UNCOND[0].to(dtype),), scale)(X, T)
    assert unet.calls[0][2] == dtype
    assert got.dtype == torch.float32


def test_each_picture_alone_or_in_a_batch():
    unet = FakeUNet()
    together = guided(unet, COND, UNCOND, 4.0)(X, T)
    alone = guided(unet, (COND[0][1:],), (UNCOND[0][1:],), 4.0)(X[1:], T[1:])
    assert torch.equal(together[1:], alone)
