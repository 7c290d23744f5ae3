"""The networks: sizes, epsilons, attention, and diffusers' answers to the last digits (golden/models.safetensors)."""

import hashlib
import json
import math
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_sizes import TINY_SD2, TINY_UNET, TINY_VAE, TINY_XL
from torch import Tensor, nn

from minidiff import fast
from minidiff.core import blocks
from minidiff.core.attention import GEGLU, CrossAttention, FeedForward, SpatialAttention, SpatialTransformer, TransformerBlock
from minidiff.core.config import SD2_UNET, SD15_UNET, SD15_VAE, UNetConfig
from minidiff.core.errors import SettingsError
from minidiff.core.inject import inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.fast import IMPLS, attention
from minidiff.files.folder import SD15_TEXT, config_values, read_config
from minidiff.files.text_files import build_text_encoder

FOLDER = Path(__file__).parents[1] / "golden"
MAKER = runpy.run_path(str(FOLDER / "make_models.py"))
GOLDEN = load_file(FOLDER / "models.safetensors")
C, GROUPS, HEADS, TEXT, TIME = (MAKER[name] for name in ("C", "GROUPS", "HEADS", "TEXT", "TIME"))

UNET_T = torch.tensor(MAKER["UNET_T"])
OURS: dict[str, Callable[[], nn.Module]] = {
    "time_embedding": lambda: blocks.TimeEmbedding(C, TIME),
    "resblock": lambda: blocks.ResBlock(C, C, TIME, GROUPS, 1e-5),
    "resblock_wider": lambda: blocks.ResBlock(C, 2 * C, TIME, GROUPS, 1e-5),
    "resblock_without_time": lambda: blocks.ResBlock(C, C, None, GROUPS, 1e-6),
    "geglu": lambda: GEGLU(C, 4 * C),
    "feed_forward": lambda: FeedForward(C),
    "self_attention": lambda: CrossAttention(C, C, HEADS),
    "cross_attention": lambda: CrossAttention(C, TEXT, HEADS),
    "transformer_block": lambda: TransformerBlock(C, TEXT, HEADS),
    "spatial_transformer": lambda: SpatialTransformer(C, TEXT, HEADS, GROUPS),
    "spatial_attention": lambda: SpatialAttention(C, GROUPS),
    "downsample_unet": lambda: blocks.Downsample(C, pad_all_around=True),
    "downsample_vae": lambda: blocks.Downsample(C, pad_all_around=False),
    "upsample": lambda: blocks.Upsample(C),
    "upsample_to_size": lambda: blocks.Upsample(C),
    "unet": lambda: UNet2DConditionModel(TINY_UNET),
    "unet_odd_sides": lambda: UNet2DConditionModel(TINY_UNET),
    "encoder": lambda: AutoencoderKL(TINY_VAE).encoder,
    "decoder": lambda: AutoencoderKL(TINY_VAE).decoder,
    "vae_encode": lambda: AutoencoderKL(TINY_VAE),
    "vae_decode": lambda: AutoencoderKL(TINY_VAE),
}


def build(case: str) -> nn.Module:
    return MAKER["fill"](OURS[case]())


@torch.no_grad()
def answer(case: str, module: nn.Module, scale: float) -> Tensor:
    """What minidiff's module says to the golden inputs."""
    x, *more = MAKER["inputs"](case, scale)
    if case.startswith("unet"):
        return module(x, UNET_T[: len(x)], *more)
    if case == "upsample_to_size":
        return module(x, size=MAKER["ODD_SIZE"])
    if case == "vae_encode":
        return torch.cat(module.encode(x), dim=1)
    if case == "vae_decode":
        return module.decode(x)
    return module(x, *more)


def error(ours: Tensor, case: str, scale: float) -> float:
    """The largest difference from the golden answer, relative to the largest golden number."""
    golden = GOLDEN[f"{case} x {scale:g}"]
    assert ours.shape == golden.shape
    return float((ours - golden).abs().max() / golden.abs().max())


# --- sizes and epsilons at SD 1.5's full size ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15() -> dict[str, nn.Module]:
    with torch.device("meta"):  # shapes without memory
        text = build_text_encoder(SD15_TEXT, "SD 1.5")
        return {"unet": UNet2DConditionModel(SD15_UNET), "vae": AutoencoderKL(SD15_VAE), "text": text}


@pytest.mark.parametrize(
    ("part", "tensors", "parameters"),
    [("unet", 686, 859_520_964), ("vae", 248, 83_653_863), ("text", 196, 123_060_480)],
)
def test_counts(sd15: dict[str, nn.Module], part: str, tensors: int, parameters: int) -> None:
    assert len(sd15[part].state_dict()) == tensors
    assert sum(p.numel() for p in sd15[part].parameters()) == parameters


def test_counts_of_the_parts(sd15: dict[str, nn.Module]) -> None:
    sums: Counter[str] = Counter()
    for name, parameter in sd15["unet"].named_parameters():
        for part in ("attn1", "attn2", "ff", "resnets"):
            sums[part] += parameter.numel() * (f".{part}." in name)
    assert sums == {"attn1": 49_574_080, "attn2": 43_962_560, "ff": 148_797_120, "resnets": 537_670_400}
    vae = {name: sum(p.numel() for p in child.parameters()) for name, child in sd15["vae"].named_children()}
    assert vae == {"encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20}


def test_epsilon_census(sd15: dict[str, nn.Module]) -> None:
    def census(part: str) -> Counter[tuple[str, float]]:
        norms = (m for m in sd15[part].modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm))
        return Counter(("GroupNorm" if isinstance(norm, nn.GroupNorm) else "LayerNorm", norm.eps) for norm in norms)

    assert census("unet") == {("GroupNorm", 1e-5): 45, ("GroupNorm", 1e-6): 16, ("LayerNorm", 1e-5): 48}
    assert census("vae") == {("GroupNorm", 1e-6): 52}
    assert census("text") == {("LayerNorm", 1e-5): 25}
    for part in ("unet", "vae"):
        assert {m.num_groups for m in sd15[part].modules() if isinstance(m, nn.GroupNorm)} == {32}


def test_head_dims(sd15: dict[str, nn.Module]) -> None:
    """`attention_head_dim: 8` in the file means 8 heads; their widths follow: 40, 80, 160."""
    layers = [m for m in sd15["unet"].modules() if isinstance(m, CrossAttention)]
    assert Counter((m.heads, m.to_q.out_features // m.heads) for m in layers) == {(8, 40): 10, (8, 80): 10, (8, 160): 12}
    assert [(m.heads, m.to_q.out_features) for m in sd15["vae"].modules() if isinstance(m, CrossAttention)] == [(1, 512)] * 2


# --- the families around SD 1.5 -----------------------------------------------------------------------------------------

KEYS = runpy.run_path(str(FOLDER / "make_keys.py"))


@pytest.mark.parametrize("family", KEYS["CONFIGS"])
def test_names_and_shapes_of_the_families(family: str) -> None:
    """At full size: what diffusers builds from the same config.json (golden/keys.json)."""
    config = read_config(UNetConfig, KEYS["CONFIGS"][family], family)
    with torch.device("meta"):
        unet = UNet2DConditionModel(config)
    assert KEYS["summary"](unet.state_dict()) == json.loads((FOLDER / "keys.json").read_text())[family]


def test_sd2_is_what_its_config_json_says() -> None:
    assert read_config(UNetConfig, KEYS["SD2"], "SD 2") == SD2_UNET


@pytest.mark.parametrize("config", [SD15_UNET, SD2_UNET, TINY_SD2, TINY_XL])
def test_a_config_survives_its_json(config: UNetConfig) -> None:
    values = json.loads(json.dumps(config_values(config, "UNet2DConditionModel")))
    assert read_config(UNetConfig, values, "here") == config


def test_sd15_is_written_byte_for_byte_as_before_the_families() -> None:
    text = json.dumps(config_values(SD15_UNET, "UNet2DConditionModel"), indent=2)
    assert hashlib.sha256(text.encode()).hexdigest() == BEFORE_THE_FAMILIES


BEFORE_THE_FAMILIES = "695eca66cfb8824ef30fa0d2df7a0c3c51d505430fd6b3540954b4978d740a43"


def filled(config: UNetConfig) -> UNet2DConditionModel:
    unet: UNet2DConditionModel = MAKER["fill"](UNet2DConditionModel(config))
    return unet


def family_inputs(config: UNetConfig) -> list[Tensor | None]:
    """x, t, text, and the vector where the network reads one."""
    g, width = torch.Generator().manual_seed(0), config.projection_class_embeddings_input_dim
    x, text = torch.randn(2, 4, 8, 6, generator=g), torch.randn(2, 7, config.cross_attention_dim, generator=g)
    return [x, UNET_T, text, torch.randn(2, width, generator=g) if width else None]


@torch.no_grad()
def test_linear_layers_and_1x1_convolutions_compute_the_same() -> None:
    linear, conv = filled(TINY_SD2), UNet2DConditionModel(replace(TINY_SD2, use_linear_projection=False))
    conv.load_state_dict({k: v.reshape(conv.state_dict()[k].shape) for k, v in linear.state_dict().items()})
    inputs = family_inputs(TINY_SD2)
    torch.testing.assert_close(linear(*inputs), conv(*inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_added_embedding_of_zero_adds_nothing() -> None:
    """SDXL whose add_embedding.linear_2 is 0 is the U-Net without it; with any other it is not."""
    unet, names = filled(TINY_XL), ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    without = UNet2DConditionModel(replace(TINY_XL, **dict.fromkeys(names)))
    without.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("add_embedding")})
    x, t, text, vector = family_inputs(TINY_XL)
    assert not torch.allclose(unet(x, t, text, vector), without(x, t, text), atol=1e-3)
    unet.add_embedding.linear_2.requires_grad_(False).weight.zero_(), unet.add_embedding.linear_2.bias.zero_()
    assert torch.equal(unet(x, t, text, vector), without(x, t, text))


@pytest.mark.parametrize("config", [TINY_SD2, TINY_XL])
def test_the_fast_classes_know_the_families(config: UNetConfig) -> None:
    """Forward, and the gradients of a frozen network's input and of an adapter on every projection."""
    results = []
    for quick in (False, True):
        unet = filled(config)
        layers = inject(unet, rank=2, targets=("attention", "projections", "feed_forward"))
        for layer in layers.values():
            torch.nn.init.constant_(layer.lora_B["default"], 0.1)
        if quick:
            fast.install(unet)
            fast.install(unet, fast.CHECKPOINTED)
        x, t, text, vector = family_inputs(config)
        out = unet(x.requires_grad_(), t, text, vector)
        wanted = [x, *(p for p in unet.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().mean(), wanted)])
    assert len(results[0]) > 40
    for plain, other in zip(*results):
        torch.testing.assert_close(other, plain, rtol=2e-4, atol=1e-5)


# --- golden activations ----------------------------------------------------------------------------------------------


def test_seeded_numbers_are_the_makers() -> None:
    assert torch.equal(MAKER["seeded"]("seeded", (100,)), GOLDEN["seeded"])


@pytest.mark.parametrize("scale", MAKER["SCALES"])
@pytest.mark.parametrize("case", OURS)
def test_golden(case: str, scale: float) -> None:
    """The plain classes, and the fast ones."""
    module = build(case)
    assert error(answer(case, module, scale), case, scale) <= 1e-5
    fast.install(module)
    assert error(answer(case, module, scale), case, scale) <= 1e-5


@pytest.mark.parametrize("scale", MAKER["SCALES"])
def test_timestep_embedding_section_3_5(scale: float) -> None:
    """Against diffusers, and against the formula of 1706.03762, section 3.5; SD puts the cosines first."""
    (t,) = MAKER["inputs"]("timestep_embedding", scale)
    ours = blocks.timestep_embedding(t, C)
    assert error(ours, "timestep_embedding", scale) <= 1e-5
    for row, number in enumerate(t.tolist()):
        for i in range(C // 2):
            angle = number / 10000 ** (2 * i / C)
            assert ours[row, i].item() == pytest.approx(math.cos(angle), abs=2e-4)  # fp32 angles up to 981
            assert ours[row, C // 2 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_every_golden_is_used() -> None:
    assert {"timestep_embedding", *OURS} == set(MAKER["INPUTS"])
    assert set(GOLDEN) == {"seeded"} | {f"{case} x {scale:g}" for case in MAKER["INPUTS"] for scale in MAKER["SCALES"]}


@pytest.mark.parametrize(
    "case", ["resblock", "resblock_without_time", "spatial_transformer", "spatial_attention", "transformer_block"]
)
def test_a_wrong_epsilon_would_be_noticed(case: str) -> None:
    """1e-5 for 1e-6, or the reverse, in the first norm alone: the golden of small inputs fails by far.

    That of unit inputs hardly sees it, and this is how most re-implementations came to have it wrong.
    """
    module = build(case)
    norm = next(m for m in module.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm))
    norm.eps = 1e-5 if norm.eps == 1e-6 else 1e-6
    assert error(answer(case, module, 0.01), case, 0.01) > 1e-4
    assert error(answer(case, module, 1.0), case, 1.0) < 2e-5


@pytest.mark.parametrize("case", ["unet", "encoder", "decoder"])
def test_wrong_epsilons_in_a_whole_network_would_be_noticed(case: str) -> None:
    module = build(case)
    changed = 0
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm) and norm.eps == 1e-6:
            norm.eps, changed = 1e-5, changed + 1
    assert changed and error(answer(case, module, 0.01), case, 0.01) > 1e-5  # test_golden's tolerance


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(8, 8), (9, 7), (1, 1), (2, 5), (13, 8)])
def test_the_unet_keeps_any_size(sides: tuple[int, int]) -> None:
    unet = build("unet")
    with torch.no_grad():
        assert unet(torch.randn(1, 4, *sides), 500, torch.randn(1, 77, TEXT)).shape == (1, 4, *sides)


def test_t_is_a_number_or_one_for_each() -> None:
    unet = build("unet")
    x, text = MAKER["inputs"]("unet", 1.0)
    with torch.no_grad():
        each = unet(x, torch.tensor([7, 7]), text)
        assert torch.equal(unet(x, 7, text), each) and torch.equal(unet(x, torch.tensor(7), text), each)
        assert torch.equal(unet(x, torch.tensor([7.0, 7.0]), text), each)
        assert not torch.equal(unet(x, torch.tensor([7, 8]), text)[1], each[1])


def test_sample_posterior_eq10() -> None:
    mean, logvar, noise = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(sample_posterior(mean, logvar, noise), mean + logvar.exp().sqrt() * noise)
    assert torch.equal(sample_posterior(mean, logvar, torch.zeros(())), mean)


def test_the_log_variance_is_clamped() -> None:
    vae = build("vae_encode")
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e4)
        _, logvar = vae.encode(MAKER["inputs"]("vae_encode", 1.0)[0])
    assert logvar.min() == -30 and logvar.max() == 20


# --- attention -------------------------------------------------------------------------------------------------------


def qkv(dtype: torch.dtype, d: int, queries: int, keys: int) -> list[Tensor]:
    """Strided, as the layer hands them over: (B, L, N, D) seen as (B, N, L, D)."""
    g = torch.Generator().manual_seed(d)
    sizes = (queries, keys, keys)
    return [torch.randn(2, n, 3, d, generator=g, dtype=dtype).transpose(1, 2).requires_grad_() for n in sizes]


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "naive"])
@pytest.mark.parametrize("keys", [77, 20])
@pytest.mark.parametrize("d", [40, 80, 160])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_attention_is_the_naive_one(dtype: torch.dtype, tolerance: float, d: int, keys: int, impl: str) -> None:
    """Forward and gradients, at SD's head dims, over 77 words and over other cells."""
    inputs = qkv(dtype, d, 20, keys)
    weight = torch.randn(2, 3, 20, d, generator=torch.Generator().manual_seed(1), dtype=dtype)
    results = []
    for name in ("naive", impl):
        out = attention(*inputs, impl=name)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for naive, other in zip(*results):
        assert naive.dtype == other.dtype == dtype
        torch.testing.assert_close(other, naive, rtol=tolerance, atol=tolerance)


def test_attention_eq1() -> None:
    """1706.03762, eq. 1, number by number."""
    q, k, v = (x.detach() for x in qkv(torch.float64, 4, 3, 5))
    expected = torch.zeros(2, 3, 3, 4, dtype=torch.float64)
    for b, n, row in ((b, n, row) for b in range(2) for n in range(3) for row in range(3)):
        weights = [math.exp(float(q[b, n, row] @ k[b, n, s]) / math.sqrt(4)) for s in range(5)]
        expected[b, n, row] = sum(w * v[b, n, s] for s, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(attention(q, k, v, impl="naive"), expected)


def test_geglu_eq6() -> None:
    """2002.05202, eq. 5, with the exact GELU, x Φ(x)."""
    module, x = build("geglu"), MAKER["inputs"]("geglu", 1.0)[0]
    value, gate = F.linear(x, module.proj.weight, module.proj.bias).chunk(2, dim=-1)
    expected = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_impl() -> None:
    with pytest.raises(SettingsError, match='attention impl "spda" is unknown.*Did you mean "sdpa"'):
        attention(*qkv(torch.float32, 4, 3, 3), impl="spda")
