"""The networks of a pipeline: loading, saving, moving; LoRAs and new words, with the field's method names."""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from minidiff.core import inject, ip_adapter, textual_inversion
from minidiff.core.config import NoiseConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import SettingsError
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.draw.device import chosen_device
from minidiff.draw.image_prompt import ImagePrompt
from minidiff.draw.lora_tags import at_strengths
from minidiff.draw.speed import fast, needed, speed_up, speed_up_network
from minidiff.draw.tiles import tiled
from minidiff.files import ip_adapter_file, lora_file, weights, word_file
from minidiff.files.bundled import here_or_bundled
from minidiff.files.folder import found, is_turbo, local_folder
from minidiff.files.model import ModelParts, check_parts_fit, read_model, write_folder
from minidiff.files.values import check_names

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

ONE_STEP = (
    "num_inference_steps is 1, which leaves noise or a blur; take about 20. Models and LoRAs that were distilled to few steps "
    'draw in 1 to 8 with sampler "lcm", or with timestep_spacing "trailing" and guidance_scale 1.'
)
GUIDED_TURBO = (
    "guidance_scale is {}; by its scheduler, Euler with trailing timestep_spacing, this is a turbo model, which draws in 1 to "
    "4 steps with guidance_scale 0."
)
NONFINITE = (
    "NaN or infinity comes out of the {}, so the picture would be black. Where half precision overflowed, run in float32 or "
    "bfloat16 (torch_dtype); where training diverged, take an earlier checkpoint; else get the model's files again."
)


def not_needed(why: str) -> Any:
    """A method that only says why nothing has to be switched."""
    return lambda self, *arguments, **field: warnings.warn(f"nothing is switched: {why}.", stacklevel=2)


class Model:
    """The parts are plain attributes: `unet`, `vae`, `text_encoder`, `tokenizer`, `schedule`."""

    switched_off: dict[str, float] | None = None  # by `disable_lora`: adapter -> weight

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: "CLIPTextModel", tokenizer: "CLIPTokenizer",
        noise_config: NoiseConfig, sampler: str = "ddim", name_or_path: str = "", plain: bool = False,
        text_encoder_2: Any = None, tokenizer_2: "CLIPTokenizer | None" = None, force_zeros_for_empty_prompt: bool = True,
    ) -> None:  # fmt: skip
        """`plain`: compute as `core` says, without minidiff.fast."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2  # SDXL's
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt and text_encoder_2 is not None
        self.noise_config, self.schedule = noise_config, NoiseSchedule.from_config(noise_config)
        self.sampler, self.name_or_path, self.progress_bar = sampler, name_or_path, True
        check_parts_fit(self.parts, name_or_path)
        self.plain = plain or fast is None
        self.is_turbo = is_turbo(noise_config, sampler)  # of the folder: another scheduler can be set later
        self.downscale = vae.config.downscale  # pixels per latent cell
        self.image_prompt: ImagePrompt | None = None  # an IP-Adapter
        self.tile_size: int | None = None  # pixels; of the U-Net and the VAE
        self.controlnets: tuple[ControlNetModel, ...] = ()
        self.vae_tile_size: int | None = None  # of the VAE alone
        speed_up(self)

    @property
    def parts(self) -> ModelParts:
        """All that a folder holds."""
        return ModelParts(**{f.name: getattr(self, f.name) for f in fields(ModelParts) if f.name != "home"})

    @property
    def controlnet(self) -> tuple[ControlNetModel, ...]:
        """The ControlNets, which act in calls with a `control_image`. Set it to one, or to a list."""
        return self.controlnets

    @controlnet.setter
    def controlnet(self, nets: ControlNetModel | Sequence[ControlNetModel] | None) -> None:
        self.controlnets = (nets,) if isinstance(nets, ControlNetModel) else tuple(nets or ())
        for net in self.controlnets:
            net.to(self.unet.conv_norm_out.weight.device)
            if not self.plain:
                speed_up_network(net)

    def set_tile_size(self, pixels: int | None) -> None:
        """Draw large pictures in overlapping tiles of so many pixels, with the memory of one tile; None: no tiles."""
        cell = self.downscale
        if pixels is not None and (not isinstance(pixels, int) or pixels < 8 * cell or pixels % cell):
            raise SettingsError(f"tile_size is {pixels}; it must be a multiple of {cell}, at least {8 * cell}.")
        self.tile_size = pixels

    def enable_vae_tiling(self) -> None:
        """Encode and decode pictures in tiles as large as those of the VAE's training."""
        self.vae_tile_size = self.vae.config.sample_size

    def disable_vae_tiling(self) -> None:
        self.vae_tile_size = None

    def enable_model_cpu_offload(self, *arguments: Any, **field: Any) -> None:
        """Move the model to the GPU, if there is one. SD 1.5 needs 2 GB there in torch.float16, so nothing is offloaded."""
        self.to(chosen_device(None))
        warnings.warn(f"nothing is offloaded: the whole model is on {self.vae.quant_conv.weight.device}.", stacklevel=2)

    enable_sequential_cpu_offload = enable_model_cpu_offload
    enable_attention_slicing = disable_attention_slicing = not_needed("attention never holds all of its weights in memory")
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = enable_attention_slicing
    enable_vae_slicing = disable_vae_slicing = not_needed("pictures are encoded and decoded one at a time")

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self.progress_bar = not disable

    # --- pictures and latents -------------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w), drawn from the VAE's posterior with `noise`."""
        x, tile = pictures.to(self.vae.post_quant_conv.weight), self.tile_size or self.vae_tile_size or max(pictures.shape)
        encode = tiled(lambda part: torch.cat(self.vae.encode(part), dim=1), tile, tile // 4, unit=self.downscale)
        mean, logvar = torch.cat([encode(row[None]) for row in x]).chunk(2, dim=1)
        return sample_posterior(mean, logvar, noise.to(mean)) * self.vae.config.scaling_factor

    # --- loading and saving ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, *, layerwise_casting: bool = False,
        plain: bool = False, **parts: Any,
    ) -> Self:  # fmt: skip
        """Read a folder in the diffusers layout, or a hub id whose files are in the local cache. WeightsError for any other.

        `parts`, such as `unet`, replace the folder's own.

        The VAE stays in fp32 for any `torch_dtype`: in fp16 it overflows, and the picture is black. With `layerwise_casting`,
        half-precision weights of the U-Net stay as in the file (fast/frozen.py), and a LoRA that is fused into them is rounded.
        """
        if layerwise_casting and plain:
            raise SettingsError("layerwise_casting is done by minidiff.fast, which plain leaves out; leave out one of the two.")
        dtypes = {"unet": None if layerwise_casting else torch_dtype, "vae": torch.float32, "text_encoder": torch_dtype}
        model = read_model(local_folder(str(folder)), dtypes=dtypes)
        pipe = cls(**model.arguments | {"name_or_path": str(folder), "plain": plain} | parts)
        if layerwise_casting:
            needed("layerwise_casting").cast_layerwise(pipe.unet, torch_dtype)
        return pipe

    @classmethod
    def from_single_file(
        cls, path: str | Path, tokenizer: str | Path, torch_dtype: torch.dtype = torch.float32, plain: bool = False,
        prediction_type: str | None = None,
    ) -> Self:  # fmt: skip
        """Read an SD 1.x, SD 2.x or SDXL checkpoint in one LDM file. It has no vocabulary: `tokenizer` is the folder of any
        SD model's. Nor does it say its `prediction_type`, "epsilon" (the default) or "v_prediction"."""
        dtypes = {"unet": torch_dtype, "vae": torch.float32, "text_encoder": torch_dtype}
        model = read_model(path, None, tokenizer, dtypes, None, prediction_type)
        return cls(**model.arguments, name_or_path=str(path), plain=plain)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` and diffusers read. AdapterError while a LoRA or a new word is attached."""
        write_folder(self.parts, folder, dtype)

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks, cast them, or both. The VAE stays in fp32, as in `from_pretrained`."""
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise SettingsError(f'to("{device}"): there is no GPU that torch can use here; leave the pipeline on "cpu".')
        where: Any = (device,) if dtype is None else (device, dtype)
        pictures = (self.image_prompt.adapter, self.image_prompt.tower) if self.image_prompt else ()
        for module in (*self.parts.adaptable.values(), *pictures, *self.controlnets):
            nn.Module.to(module, *where)
        if not isinstance(device, torch.dtype):
            nn.Module.to(self.vae, device)
        return self

    def in_other_words(self, given: dict[str, Any]) -> Any:
        """A call with arguments that `__call__` does not have; draw/habits.py knows those of other libraries."""
        names = ", ".join([f"{len(given['positional'])} more by position"] * bool(given["positional"]) + [*given["field"]])
        raise TypeError(f"the call has no such arguments: {names}")

    def __setattr__(self, name: str, value: object) -> None:
        """An attribute that the pipeline does not have, such as the `scheduler` of other libraries, would change nothing."""
        if "vae_tile_size" in self.__dict__ and name not in self.__dict__ and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no {name} that could be set.")
        super().__setattr__(name, value)
        if name in ("text_encoder", "text_encoder_2"):
            self.__dict__.pop("encoders", None)

    # --- LoRA and textual inversion --------------------------------------------------------------------------------------

    @property
    def adaptable(self) -> nn.ModuleDict:
        """The networks that can have adapters."""
        return nn.ModuleDict(self.parts.adaptable)

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, weight_name: str | None = None, alpha: float | None = None,
        strict: bool = True, **where: Any,
    ) -> lora_file.LoRAFile:  # fmt: skip
        """Attach the adapter of a file or folder and make it the only active one. Print the result for a one-line summary.

        Without a name, the first adapter is "default" and the second one "default_1". `alpha` is for files that do not contain
        it. With `strict=False`, tensors that do not match this model are left out. `where` says more of a hub id: see `found`.
        """
        taken = inject.adapter_names(self.adaptable)
        name = adapter_name or (f"default_{len(taken)}" if taken else "default")
        home = found(path, where)
        check_names("load_lora_weights", where, ())
        loaded = lora_file.load_lora(self.parts.adaptable, home, name, weight_name, alpha, strict)
        speed_up(self)
        return loaded

    @staticmethod
    def save_lora_weights(
        save_directory: str | Path, unet_lora_layers: Any = None, text_encoder_lora_layers: Any = None,
        weight_name: str = lora_file.FILE_NAME, safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Write what `get_peft_model_state_dict` gives for the networks, as safetensors always."""
        both = {"unet": unet_lora_layers or {}, "text_encoder": text_encoder_lora_layers or {}}
        modules = {f"{network}.{name}": own for network, layers in both.items() for name, own in layers.items()}
        lora_file.save_lora(modules, Path(save_directory, weight_name))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None) -> None:
        """Make these adapters active, each with its weight (default 1; one number is for all), and all others inactive."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else adapter_weights
        inject.set_adapters(self.adaptable, names, weights)

    def strengths(self, scale: float = 1.0) -> dict[str, float]:
        """Adapter -> its present weight times `scale`."""
        layers = inject.lora_layers(self.adaptable).values()
        return {name: weight * scale for layer in layers for name, weight in layer.strength.items()}

    def get_active_adapters(self) -> list[str]:
        return [name for name, weight in self.strengths().items() if weight]

    def disable_lora(self) -> None:
        """Draw without the adapters, until `enable_lora`."""
        self.switched_off = self.strengths()
        inject.set_adapters(self.adaptable, [])

    def enable_lora(self) -> None:
        if self.switched_off and not self.get_active_adapters():
            inject.set_adapters(self.adaptable, list(self.switched_off), list(self.switched_off.values()))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove some adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        check_names("the pipeline's list of adapters", dict.fromkeys(names, True), self.strengths())
        for layer in inject.adapted_layers(self.adaptable):
            for table in (layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.scale, layer.strength, layer.dropout):
                for name in names & set(table):
                    del table[name]
        if not inject.adapter_names(self.adaptable):
            inject.eject(self.adaptable)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the adapters, their weights times `lora_scale`, to those of the model: the same pictures, a little faster."""
        inject.adapted_layers(self.adaptable)  # AdapterError if there are none, or they are fused already
        with at_strengths(self.adaptable, self.strengths(lora_scale)):
            inject.merge(self.adaptable)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, to the bit."""
        inject.unmerge(self.adaptable)

    def unload_lora_weights(self) -> None:
        """Remove every adapter; the base model is restored to the bit. Fused ones stay in the weights, as in the field."""
        for layer in inject.lora_layers(self.adaptable).values():
            layer.unmerged_weight = None
        inject.eject(self.adaptable)

    def load_textual_inversion(
        self, path: str | Path, token: str | None = None, weight_name: str = "", **where: Any
    ) -> word_file.Embedding:
        """Add the word of a file or folder, under the name `token` if given. Print the result for a one-line summary."""
        home = found(path, where)
        check_names("load_textual_inversion", where, ())
        return word_file.load_embedding(self.tokenizer, [*self.parts.towers.values()], home / weight_name, token)

    def unload_textual_inversion(self) -> None:
        """Remove every new word; the text encoders are restored to the bit."""
        for tower in self.parts.towers.values():
            textual_inversion.eject(tower)

    # --- IP-Adapter ------------------------------------------------------------------------------------------------------

    def load_ip_adapter(
        self, path: str | Path, subfolder: str = "", weight_name: str = "", image_encoder_folder: str | Path = "image_encoder"
    ) -> None:
        """Attach an IP-Adapter: from now on each call has an `ip_adapter_image`.

        `path` is the file, or a folder or hub id with `weight_name` in its `subfolder`. Of the image tower, the folder
        `image_encoder_folder` is taken; or the one of this name beside the file or in `path`; or the model's own.
        """
        home = found(path, {})
        file = weights.find_weights(home / subfolder / weight_name if home.is_dir() else home, ())
        adapter = ip_adapter_file.load_ip_adapter(file, self.unet)
        parents = (Path(), file.parent, home, found(self.name_or_path, {}))
        places = [here_or_bundled(parent / image_encoder_folder) for parent in parents]
        self.attach_ip_adapter(adapter, *ip_adapter_file.load_image_tower(*places))

    def attach_ip_adapter(self, adapter: ip_adapter.IPAdapter, tower: Any, pixels: ip_adapter_file.Pixels) -> None:
        """The same with an adapter and an image tower that are in memory; they take the U-Net's device and dtype."""
        like = self.unet.conv_norm_out.weight
        nn.ModuleList([adapter, tower]).to(like.device, like.dtype)
        self.image_prompt = ImagePrompt(adapter, tower, pixels)
        ip_adapter.inject(self.unet, adapter)
        speed_up(self)

    def set_ip_adapter_scale(self, scale: float | Sequence[float]) -> None:
        """How much the pictures count, at first 1.0: one number, or one for each cross-attention in the order of the file."""
        if self.image_prompt is None:
            raise SettingsError("there is no IP-Adapter to scale; load_ip_adapter first.")
        self.image_prompt.set_scale(scale)

    def unload_ip_adapter(self) -> None:
        """Remove it; the base model is restored."""
        ip_adapter.eject(self.unet)
        self.image_prompt = None
        speed_up(self)
