"""Which layers a target means.

    find_targets(unet, ["attention", "ff.net.2"])   ->   ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", …]

A layer that can be adapted is a linear one or a convolution. Its name is its path in the plain model, whether it carries an
adapter or not.
"""

from collections.abc import Sequence

from torch import nn

from minidiff.core.errors import AdapterError, did_you_mean

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every attention projection, self and cross
GROUPS = {  # a word for several targets
    "attention": DEFAULT_TARGETS,
    "cross_attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),  # into and out of each transformer
    "resnets": ("conv1", "conv2", "time_emb_proj", "conv_shortcut"),
    "samplers": ("downsamplers.0.conv", "upsamplers.0.conv"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj"),  # the text encoder's attention
    "text_mlp": ("fc1", "fc2"),
}
TEXT = "text_model."


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers that the targets name; an AdapterError for a target that names none, or something else."""
    layers = adaptable_layers(model)
    found: dict[str, None] = {}
    for target in targets:
        matches = [name for name in layers if fits(name, target)]
        others = [path for path, _ in model.named_modules() if fits(path, target) and plain_name(path) not in layers]
        if not matches or others:
            raise AdapterError(why_not(model, target, others, list(layers)))
        found.update(dict.fromkeys(matches))
    if not found:
        raise AdapterError(f"no targets were given; the default is {' '.join(DEFAULT_TARGETS)}.")
    return list(found)


def chosen(model: nn.Module, target: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that a target of `rank_of` means; an AdapterError if it means none of them."""
    matches = [name for name in find_targets(model, [target]) if name in names]
    if not matches:
        raise AdapterError(f'a rank is given for "{target}", and no such layer is among the targets; add it to them.')
    return matches


def fits(name: str, target: str) -> bool:
    """Whole words only: "attn1.to_q" ends with "to_q", "proj_to_q" does not."""
    return f".{name}".endswith(tuple(f".{ending}" for ending in GROUPS.get(target, (target,))))


def why_not(model: nn.Module, target: str, others: list[str], layers: list[str]) -> str:
    """The message for a target that cannot be adapted, with what was perhaps meant."""
    what = f"matches nothing in {type(model).__name__}"
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        what = f"names a {kind} ({others[0]}), and LoRA adapts linear layers and convolutions only"
    groups = [group for group in GROUPS if any(fits(name, group) for name in layers)]
    endings = sorted({last_words(name) for name in layers})
    near = did_you_mean(target, [*endings, *groups])
    return f'target "{target}" {what}.{near} The layers end in {", ".join(endings)}; groups of them: {", ".join(groups)}.'


def last_words(name: str) -> str:
    """The shortest ending that says something: "to_q", but "to_out.0" where the last word is a number."""
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


# --- the layers of a model -------------------------------------------------------------------------------------------


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that can be adapted, by its name in the plain model, whether it is wrapped or not."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def plain_name(path: str) -> str:
    return path.removeprefix(TEXT).removesuffix(".base")
