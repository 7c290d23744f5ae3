"""Adapters in a whole model: what is hit, how many parameters that is, and out again to the bit."""

import pytest
import torch
from tiny_adapters import EVERYWHERE, answer, digest, random, shake, tiny_text_encoder, tiny_unet
from torch import nn

from minidiff.core.config import SD15_UNET
from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.inject import (
    adapter_names,
    adapter_weights,
    eject,
    inject,
    lora_layers,
    merge,
    set_adapters,
    trainable,
    unmerge,
)
from minidiff.core.lora import LoRAConv2d, LoRALinear
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.lora_tags import at_strengths
from minidiff.files.folder import SD15_TEXT
from minidiff.files.lora_file import attach
from minidiff.files.text_files import build_text_encoder

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(SD15_UNET)


@pytest.fixture(scope="module")
def clip_l() -> nn.Module:
    with torch.device("meta"):
        return build_text_encoder(SD15_TEXT, "SD 1.5")


def count(
    model: nn.Module, rank: int, targets: list[str], dora: bool = False, rank_of: dict[str, int] | None = None
) -> tuple[int, int]:
    """Modules and parameters of an adapter."""
    modules = len(inject(model, rank, targets=targets, dora=dora, rank_of=rank_of or {}))
    parameters = sum(p.numel() for p in trainable(model).values())
    eject(model)
    return modules, parameters


# --- how many: FORMATS 2.2 -------------------------------------------------------------------------------------------

RANKS = (1, 4, 8, 16, 32)
TABLE = [
    (["attention"], 128, (199_296, 797_184, 1_594_368, 3_188_736, 6_377_472)),
    (["cross_attention"], 64, (99_456, 397_824, 795_648, 1_591_296, 3_182_592)),
    (["attn2.to_k", "attn2.to_v"], 32, (49_536, 198_144, 396_288, 792_576, 1_585_152)),
    (["attention", "feed_forward"], 160, (374_016, 1_496_064, 2_992_128, 5_984_256, 11_968_512)),
    (["attention", "feed_forward", "projections"], 192, (423_936, 1_695_744, 3_391_488, 6_782_976, 13_565_952)),
    (EVERYWHERE, 278, (1_050_816, 4_203_264, 8_406_528, 16_813_056, 33_626_112)),
    (["attention", "conv1", "conv2"], 172, (688_896, 2_755_584, 5_511_168, 11_022_336, 22_044_672)),
]
EVERY = [*EVERYWHERE, "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]


@pytest.mark.parametrize(
    ("targets", "modules", "rank", "parameters"),
    [(targets, modules, *pair) for targets, modules, counts in TABLE for pair in zip(RANKS, counts, strict=True)],
)
def test_counts_on_sd15(sd15: UNet2DConditionModel, targets: list[str], modules: int, rank: int, parameters: int) -> None:
    assert count(sd15, rank, targets) == (modules, parameters)


@pytest.mark.parametrize(
    ("rank", "parameters"), zip(RANKS, (1_058_216, 4_232_864, 8_465_728, 16_931_456, 33_862_912), strict=True)
)
def test_counts_of_every_layer_on_sd15(sd15: UNet2DConditionModel, rank: int, parameters: int) -> None:
    """The table gives conv_out the full rank, though it has 4 outputs; minidiff refuses more than 4 there."""
    useless = max(rank - 4, 0) * (320 * 9 + 4)
    assert count(sd15, rank, EVERY, rank_of={"conv_out": min(rank, 4)}) == (282, parameters - useless)
    assert not lora_layers(sd15)


@pytest.mark.parametrize(
    ("targets", "modules", "counts"),
    [
        (["text"], 48, (73_728, 294_912, 589_824, 1_179_648)),
        (["text", "text_mlp"], 72, (165_888, 663_552, 1_327_104, 2_654_208)),
    ],
)
def test_counts_on_the_text_encoder(clip_l: nn.Module, targets: list[str], modules: int, counts: tuple[int, ...]) -> None:
    assert [count(clip_l, rank, targets) for rank in RANKS[:4]] == [(modules, n) for n in counts]


@pytest.mark.parametrize(("targets", "added"), [("attention", 99_840), ("cross_attention", 49_920)])
def test_dora_adds_a_number_for_each_output(sd15: UNet2DConditionModel, targets: str, added: int) -> None:
    assert count(sd15, 4, [targets], dora=True)[1] - count(sd15, 4, [targets])[1] == added


def test_counting_takes_no_memory(sd15: UNet2DConditionModel) -> None:
    inject(sd15, 32, targets=["attn2.to_k", "samplers"], dora=True)
    assert all(p.is_meta for p in trainable(sd15).values())
    eject(sd15)


# --- which layers, which ranks ---------------------------------------------------------------------------------------


def test_targets_match_whole_words_at_the_end() -> None:
    names = inject(tiny_unet(), 2, targets="attn2.to_k")
    assert names and all(name.endswith(".attn2.to_k") for name in names)


def test_linear_layers_and_convolutions() -> None:
    layers = inject(tiny_unet(), 2, targets=EVERYWHERE)
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in layers.items()}
    assert kinds["to_q"] is kinds["time_emb_proj"] is LoRALinear
    assert kinds["proj_in"] is kinds["conv1"] is kinds["conv"] is LoRAConv2d


def test_ranks_by_target_the_last_that_fits_wins() -> None:
    rank_of = {"resnets": 3, "attention": 1, "attn2.to_k": 4}
    layers = inject(tiny_unet(), 2, alpha=6, targets=["attention", "resnets", "samplers"], rank_of=rank_of)
    ranks = {name: layer.weights("default").rank for name, layer in layers.items()}
    for name, rank in ranks.items():
        expected = 4 if name.endswith("attn2.to_k") else 1 if ".attn" in name else 3 if "resnets" in name else 2
        assert rank == expected and layers[name].scale["default"] == 6 / rank
    assert set(ranks.values()) == {1, 2, 3, 4}


def test_alpha_is_the_rank_of_each_layer_where_it_is_not_given() -> None:
    assert {layer.scale["default"] for layer in inject(tiny_unet(), 2, rank_of={"to_q": 5}).values()} == {1.0}


def test_rslora_theorem_3_2() -> None:
    """scale = alpha / √r (arXiv 2312.03732)."""
    assert {layer.scale["default"] for layer in inject(tiny_unet(), 4, alpha=6, rslora=True).values()} == {3.0}


# --- inject and eject ------------------------------------------------------------------------------------------------


def test_b_zero_is_the_identity() -> None:
    unet = tiny_unet()
    before = answer(unet)
    layers = inject(unet, rank=2, targets=EVERYWHERE)
    assert torch.equal(answer(unet), before)
    assert all(layer.lora_A["default"].abs().max() <= layer.base.weight[0].numel() ** -0.5 for layer in layers.values())
    shake(unet)
    assert not torch.allclose(answer(unet), before, atol=1e-3)


def test_only_the_adapter_is_trainable() -> None:
    unet = tiny_unet()
    inject(unet, rank=2, targets=EVERYWHERE)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable(unet))
    assert len(trainable(unet)) == 2 * len(lora_layers(unet))


def test_what_is_trained_is_fp32_whatever_the_base() -> None:
    unet = tiny_unet().half()
    inject(unet, rank=2, targets=EVERYWHERE, dora=True)
    assert {p.dtype for p in trainable(unet).values()} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.float16


def test_every_trainable_tensor_gets_a_gradient() -> None:
    for dora in (False, True):
        unet = tiny_unet()
        inject(unet, rank=2, targets=EVERYWHERE, dora=dora, dropout=0.1)
        shake(unet)
        unet(random(1, 4, 8, 8), torch.tensor([5]), random(1, 7, 24)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in trainable(unet).values())


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_are_in_the_mode_of_the_model(training: bool) -> None:
    unet = tiny_unet().train(training)
    inject(unet, 2, dropout=0.5)
    assert {module.training for module in unet.modules()} == {training}
    shake(unet)
    assert torch.equal(answer(unet), answer(unet)) != training  # dropout


def test_a_is_a_function_of_seed_and_name() -> None:
    a, b, c = tiny_unet(), tiny_unet(), tiny_unet()
    inject(a, 2, seed=5)
    torch.randn(100)
    inject(b, 2, seed=5, targets=["to_out.0", "to_v", "to_k", "to_q"])
    inject(c, 2, seed=6)
    As, Bs, Cs = ({name: weights.A for name, weights in adapter_weights(unet).items()} for unet in (a, b, c))
    assert all(torch.equal(As[name], Bs[name]) for name in As)
    in_order = list(As.values())
    assert all(not torch.equal(x, y) for x, y in zip(in_order, in_order[1:], strict=False) if x.shape == y.shape)
    assert any(not torch.equal(As[name], Cs[name]) for name in As)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_eject_is_bit_identical(merged: bool, dora: bool) -> None:
    unet = tiny_unet()
    modules, before = dict(unet.named_modules()), digest(unet)
    inject(unet, rank=2, targets=EVERYWHERE, dora=dora)
    inject(unet, rank=1, adapter_name="second", targets="attention")
    shake(unet)
    if merged:
        merge(unet)
    eject(unet)
    after = dict(unet.named_modules())
    assert modules.keys() == after.keys() and all(modules[name] is after[name] for name in modules)
    assert digest(unet) == before


# --- the text encoder ------------------------------------------------------------------------------------------------


class Transformers4(nn.Module):
    """A text encoder with its tower one level down, as in transformers 4."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = tiny_text_encoder()


@pytest.mark.parametrize("make", [tiny_text_encoder, Transformers4])
def test_the_text_encoder_of_both_versions_of_transformers(make: type[nn.Module]) -> None:
    model = make()
    tower = model if make is tiny_text_encoder else model.text_model
    ids, modules, bits = torch.tensor([[1, 7, 2]]), dict(model.named_modules()), digest(model)
    before = tower(input_ids=ids).last_hidden_state
    layers = inject(model, 2, targets=["text", "text_mlp"])
    assert set(layers) == set(adapter_weights(model)) == set(lora_layers(model)) and len(layers) == 12
    assert "encoder.layers.0.self_attn.q_proj" in layers
    assert torch.equal(tower(input_ids=ids).last_hidden_state, before)
    shake(model)
    tuned = tower(input_ids=ids).last_hidden_state
    assert not torch.allclose(tuned, before, atol=1e-2)
    merge(model)
    torch.testing.assert_close(tower(input_ids=ids).last_hidden_state, tuned, atol=1e-5, rtol=1e-5)
    eject(model)
    assert digest(model) == bits and all(modules[name] is module for name, module in model.named_modules())


def test_an_adapter_moves_between_the_versions() -> None:
    new, old = tiny_text_encoder(), Transformers4()
    inject(new, 2, targets="text")
    shake(new)
    attach(old, adapter_weights(new), "dog")
    ids = torch.tensor([[1, 7, 2]])
    assert torch.equal(old.text_model(input_ids=ids).last_hidden_state, new(input_ids=ids).last_hidden_state)


def test_two_networks_as_one() -> None:
    """As the pipeline mixes and merges them."""
    both = nn.ModuleDict({"unet": tiny_unet(), "text_encoder": tiny_text_encoder()})
    bits = digest(both)
    inject(both["unet"], 2)
    inject(both["text_encoder"], 2, targets="text")
    shake(both)
    set_adapters(both, ["default"], [0.5])
    merge(both)
    unmerge(both)
    assert {layer.strength["default"] for layer in lora_layers(both).values()} == {0.5}
    eject(both)
    assert digest(both) == bits


# --- attach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_attach_gives_the_same_outputs(dora: bool) -> None:
    unet, other = tiny_unet(), tiny_unet()
    inject(unet, 2, alpha=3, targets=EVERYWHERE, dora=dora)
    shake(unet)
    weights = adapter_weights(unet)
    attach(other, weights, "dog")
    assert torch.equal(answer(other), answer(unet)) and adapter_names(other) == ["dog"]
    again = adapter_weights(other, "dog")
    assert all(torch.equal(weights[name].A, again[name].A) and weights[name].scale == again[name].scale for name in weights)


# --- merge -----------------------------------------------------------------------------------------------------------


def test_merged_is_unmerged() -> None:
    unet = tiny_unet()
    inject(unet, rank=2, alpha=6, targets=EVERYWHERE)
    shake(unet)
    before, bits = answer(unet), digest(unet)
    merge(unet)
    torch.testing.assert_close(answer(unet), before, atol=1e-5, rtol=1e-5)
    assert digest(unet) != bits
    unmerge(unet)
    assert digest(unet) == bits and torch.equal(answer(unet), before)


def test_unmerge_is_exact_in_half_precision() -> None:
    unet = tiny_unet().to(torch.float16)
    inject(unet, rank=2, targets=EVERYWHERE)
    shake(unet)
    bits = digest(unet)
    merge(unet)
    unmerge(unet)
    assert digest(unet) == bits


def test_merging_twice_and_unmerging_nothing_are_errors() -> None:
    unet = tiny_unet()
    with pytest.raises(AdapterError, match="the model has no adapter; inject or load one first"):
        merge(unet)
    inject(unet, 2)
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(unet)
    merge(unet)
    with pytest.raises(AdapterError, match="merged already; unmerge .* first"):
        merge(unet)
    with pytest.raises(AdapterError, match="merged already; unmerge"):
        attach(unet, adapter_weights(unet), "second")
    with pytest.raises(AdapterError, match="merged already; unmerge"):
        inject(unet, 2, adapter_name="second")


# --- several adapters ------------------------------------------------------------------------------------------------


def two_adapters() -> UNet2DConditionModel:
    unet = tiny_unet()
    inject(unet, 2, adapter_name="dog", seed=1)
    shake(unet, "dog")
    inject(unet, 3, alpha=6, targets=["attn2.to_k", "attn2.to_v"], adapter_name="style", seed=2)
    for layer in lora_layers(unet).values():
        if "style" in layer.lora_B:
            layer.lora_B["style"].data += 0.1
    return unet


def test_set_adapters_sets_strengths() -> None:
    unet = two_adapters()
    assert adapter_names(unet) == ["dog", "style"]
    set_adapters(unet, ["style", "dog"], [0.5, 0.8])
    layers = lora_layers(unet)
    for name, layer in layers.items():
        both = name.endswith(("attn2.to_k", "attn2.to_v"))
        assert layer.strength == ({"dog": 0.8, "style": 0.5} if both else {"dog": 0.8})


def test_an_adapter_that_is_off_leaves_no_trace() -> None:
    unet, base = two_adapters(), answer(tiny_unet())
    set_adapters(unet, [])
    assert torch.equal(answer(unet), base)
    set_adapters(unet, ["style"])
    assert not torch.allclose(answer(unet), base, atol=1e-4)


def test_adapters_off_for_a_while() -> None:
    unet, base = two_adapters(), answer(tiny_unet())
    set_adapters(unet, ["dog"], [0.7])
    tuned = answer(unet)
    off = {"dog": 0.0, "style": 0.0}
    with pytest.raises(ZeroDivisionError), at_strengths(unet, off):
        assert torch.equal(answer(unet), base)
        raise ZeroDivisionError
    assert torch.equal(answer(unet), tuned)
    merge(unet)
    with pytest.raises(SettingsError, match="fused into the weights"), at_strengths(unet, off):
        pass


def test_a_new_adapter_is_the_only_one_that_trains() -> None:
    assert all(name.endswith(".style") for name in trainable(two_adapters()))


@pytest.mark.parametrize(
    ("names", "strengths", "message"),
    [
        (["styel"], None, 'no adapter is called "styel"; there is dog, style. Did you mean "style"'),
        (["dog", "style"], [1.0], r"adapters \['dog', 'style'\], weights \[1.0\]: each adapter needs one finite weight"),
        (["dog", "dog"], [0.5, 0.5], r"adapters \['dog', 'dog'\], weights .*: each adapter needs one"),
        (["dog"], [float("nan")], r"adapters \['dog'\], weights \[nan\]: .* one finite weight"),
    ],
)
def test_set_adapters_refuses(names: list[str], strengths: list[float] | None, message: str) -> None:
    unet = two_adapters()
    before = answer(unet)
    with pytest.raises(AdapterError, match=message):
        set_adapters(unet, names, strengths)
    assert torch.equal(answer(unet), before)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is not possible for .*: it can be 1 to 16"),
        ({"rank": 17}, "rank 17 is not possible for .*: it can be 1 to 16"),
        ({"rank": 5, "targets": ["attention", "conv_out"]}, "rank 5 is not possible for conv_out: it can be 1 to 4"),
        ({"rank": 2, "rank_of": {"to_q": 0}}, "rank 0 is not possible for .*to_q"),
        ({"rank": 2, "rank_of": {"attn2.to_k": 25}}, "rank 25 is not possible for .*attn2.to_k"),
        ({"rank": 2, "rank_of": {"to_out": 4}}, 'Did you mean "to_out.0"'),
        ({"rank": 2, "rank_of": {"conv1": 4}}, 'a rank is given for "conv1", and no such layer is among the targets'),
        ({"rank": 2, "targets": ["to_q", "to_out"]}, '"to_out" matches no linear layer .* Did you mean "to_out.0"'),
        ({"rank": 2, "targets": "toq"}, '"toq" matches no linear layer .* Did you mean "to_q"'),
        ({"rank": 2, "targets": "atention"}, 'Did you mean "attention"'),
        ({"rank": 2, "targets": "text"}, '"text" matches no linear layer or convolution of UNet2D'),
        ({"rank": 2, "targets": ["norm1"]}, "matches no linear layer or convolution"),
        ({"rank": 2, "targets": ["o_q"]}, "matches no linear layer"),
        ({"rank": 2, "targets": []}, "no targets"),
    ],
)
def test_bad_settings_change_nothing(settings: dict, message: str) -> None:
    unet = tiny_unet()
    with pytest.raises(AdapterError, match=message):
        inject(unet, **settings)
    assert not lora_layers(unet) and all(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("name", ["", "my.dog", "keys", "training"])
def test_not_every_word_can_name_an_adapter(name: str) -> None:
    unet = tiny_unet()
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        attach(unet, {}, name)


def test_the_same_name_twice_is_an_error() -> None:
    unet = tiny_unet()
    inject(unet, 2)
    with pytest.raises(AdapterError, match='"default" is there already; choose another name'):
        inject(unet, 2)
    with pytest.raises(AdapterError, match='"default" is there already'):
        attach(unet, adapter_weights(unet))
