"""Makes models.safetensors: what diffusers' modules answer, with weights that anyone can draw again.

    python tests/golden/make_models.py

No weights are stored: `fill` draws each tensor from its name and shape, and minidiff's names are diffusers' names. The
tests load this file too, for `fill` and `inputs`; diffusers is imported where it is used.
"""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_sizes import TINY_UNET, TINY_VAE
from torch import Tensor, nn

from minidiff.files.folder import config_values
from minidiff.files.weights import save

SCALES = (1.0, 0.01)  # at 0.01 a wrong epsilon shows: the variance in the norms is 1e-4
C, GROUPS, HEADS, TEXT, TIME = 32, 8, 2, 24, 48  # widths of the single modules
PICTURE, TOKENS, WORDS = (2, C, 6, 5), (2, 30, C), (2, 7, TEXT)

INPUTS: dict[str, dict[str, tuple[int, ...]]] = {  # the first one is scaled
    "timestep_embedding": {"t": (4,)},
    "time_embedding": {"x": (2, C)},
    "resblock": {"x": PICTURE, "time": (2, TIME)},
    "resblock_wider": {"x": PICTURE, "time": (2, TIME)},
    "resblock_without_time": {"x": PICTURE},
    "geglu": {"x": TOKENS},
    "feed_forward": {"x": TOKENS},
    "self_attention": {"x": TOKENS},
    "cross_attention": {"x": TOKENS, "text": WORDS},
    "transformer_block": {"x": TOKENS, "text": WORDS},
    "spatial_transformer": {"x": PICTURE, "text": WORDS},
    "spatial_attention": {"x": PICTURE},
    "downsample_unet": {"x": PICTURE},
    "downsample_vae": {"x": PICTURE},
    "upsample": {"x": PICTURE},
    "upsample_to_size": {"x": PICTURE},
    "unet": {"x": (2, 4, 8, 6), "text": WORDS},
    "unet_odd_sides": {"x": (1, 4, 9, 7), "text": (1, 77, TEXT)},
    "encoder": {"x": (1, 3, 16, 12)},
    "decoder": {"x": (1, 4, 8, 6)},
    "vae_encode": {"x": (1, 3, 16, 12)},
    "vae_decode": {"x": (1, 4, 8, 6)},
}
UNET_T, ODD_SIZE = (981, 21), (11, 9)  # timesteps of the two latents; what upsample_to_size is asked for


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers from a name. numpy promises that RandomState's never change; torch promises less."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(numbers).float()


def fill(module: nn.Module) -> nn.Module:
    """Weights from names: matrices keep the variance of what goes through, norms are about 1, biases are small."""
    state = {}
    for key, old in module.state_dict().items():
        numbers = seeded(key, tuple(old.shape))
        if key.endswith("bias"):
            state[key] = 0.01 * numbers
        else:
            state[key] = 1 + 0.1 * numbers if old.ndim == 1 else numbers / (old.numel() / len(old)) ** 0.5
    module.load_state_dict(state)
    return module.eval()


def exactly(case: str, scale: float) -> Tensor:
    """The reference's answer in float64, so that no processor's rounding is in it; kept as float32."""
    answer = reference(case, torch.float64)(*(x.double() for x in inputs(case, scale)))
    return answer.float()


def inputs(case: str, scale: float) -> list[Tensor]:
    """What the module is called with; timesteps are 981 * scale and so on, so 0.01 makes fractions of them."""
    if case == "timestep_embedding":
        return [torch.tensor([0.0, 1.0, 499.5, 981.0]) * scale]
    tensors = [seeded(f"input {name}", shape) for name, shape in INPUTS[case].items()]
    return [tensors[0] * scale, *tensors[1:]]


def reference(case: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """diffusers' module, filled and cast to `dtype`, as a function of the `inputs`."""
    if case == "timestep_embedding":
        from diffusers.models.embeddings import Timesteps

        return Timesteps(C, flip_sin_to_cos=True, downscale_freq_shift=0)
    if case.startswith(("unet", "vae", "encoder", "decoder")):
        return reference_network(case, dtype)
    module = fill(reference_module(case)).to(dtype)
    if case == "spatial_transformer":
        return lambda x, text: module(x, text).sample
    if case == "transformer_block":
        return lambda x, text: module(x, encoder_hidden_states=text)
    if case == "upsample_to_size":
        return lambda x: module(x, output_size=ODD_SIZE)
    if case == "resblock_without_time":
        return lambda x: module(x, None)
    return module


def reference_module(case: str) -> nn.Module:
    """The brick of that name, with the arguments that diffusers' SD 1.5 gives it."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock, FeedForward
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.embeddings import TimestepEmbedding
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    resblock: dict[str, Any] = {"in_channels": C, "groups": GROUPS}
    heads: dict[str, Any] = {"heads": HEADS, "dim_head": C // HEADS}
    vae_attention: dict[str, Any] = {"heads": 1, "dim_head": C, "eps": 1e-6, "norm_num_groups": GROUPS, "bias": True}
    builders: dict[str, Callable[[], nn.Module]] = {
        "time_embedding": lambda: TimestepEmbedding(C, TIME),
        "resblock": lambda: ResnetBlock2D(**resblock, out_channels=C, temb_channels=TIME, eps=1e-5),
        "resblock_wider": lambda: ResnetBlock2D(**resblock, out_channels=2 * C, temb_channels=TIME, eps=1e-5),
        "resblock_without_time": lambda: ResnetBlock2D(**resblock, out_channels=C, temb_channels=None, eps=1e-6),
        "geglu": lambda: GEGLU(C, 4 * C),
        "feed_forward": lambda: FeedForward(C, activation_fn="geglu"),
        "self_attention": lambda: Attention(C, **heads),
        "cross_attention": lambda: Attention(C, cross_attention_dim=TEXT, **heads),
        "transformer_block": lambda: BasicTransformerBlock(C, HEADS, C // HEADS, cross_attention_dim=TEXT),
        "spatial_transformer": lambda: Transformer2DModel(
            HEADS, C // HEADS, in_channels=C, norm_num_groups=GROUPS, cross_attention_dim=TEXT
        ),
        "spatial_attention": lambda: Attention(C, **vae_attention, residual_connection=True, _from_deprecated_attn_block=True),
        "downsample_unet": lambda: Downsample2D(C, use_conv=True, padding=1, name="op"),
        "downsample_vae": lambda: Downsample2D(C, use_conv=True, padding=0, name="op"),
        "upsample": lambda: Upsample2D(C, use_conv=True),
        "upsample_to_size": lambda: Upsample2D(C, use_conv=True),
    }
    return builders[case]()


def reference_network(case: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The whole U-Net, the autoencoder, or the inside of it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if case.startswith("unet"):
        unet: Any = fill(UNet2DConditionModel.from_config(config_values(TINY_UNET, "UNet2DConditionModel"))).to(dtype)
        return lambda x, text: unet(x, torch.tensor(UNET_T[: len(x)]), text).sample
    vae: Any = AutoencoderKL.from_config(config_values(TINY_VAE, "AutoencoderKL"))
    if case in ("encoder", "decoder"):
        part: nn.Module = getattr(vae, case)
        return fill(part).to(dtype)
    fill(vae).to(dtype)
    if case == "vae_encode":
        return lambda x: vae.encode(x).latent_dist.parameters
    return lambda x: vae.decode(x).sample


@torch.no_grad()
def main() -> None:
    import diffusers

    torch.set_num_threads(1)
    golden = {"seeded": seeded("seeded", (100,))}  # should the numbers ever differ, this says so first
    for case in INPUTS:
        for scale in SCALES:
            golden[f"{case} x {scale:g}"] = exactly(case, scale)
    path = Path(__file__).with_name("models.safetensors")
    metadata = {"diffusers": diffusers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    save(golden, path, metadata)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
