"""The habits of the field: code that was written for diffusers and peft runs here when only its import line is changed.

    from minidiff import DDIMScheduler, LoraConfig, StableDiffusionPipeline, get_peft_model
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket", torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe("a photo of a red dog", 128, 128, callback_on_step_end=show).images[0]
    unet = get_peft_model(pipe.unet, LoraConfig(r=4))
    unet(pipe.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text).sample

pipeline.py hands a call with arguments that it does not have to `in_other_words`. `adopt` gives a network a subclass of its own
class, as fast.install does: the field's keywords give the field's output, positional calls the plain tensors of `core`.

Shapes: B pictures, C h w a latent, H W a picture.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from minidiff.core import inject, unet, vae
from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.grids import Step
from minidiff.core.lora import LoRAWeights
from minidiff.core.rng import normal
from minidiff.core.text import embed_sizes
from minidiff.draw import pipeline
from minidiff.draw.device import chosen_device
from minidiff.draw.lora_tags import at_strengths
from minidiff.draw.schedulers import SCHEDULERS, Scheduler
from minidiff.draw.speed import checkpoint_gradients, speed_up_network
from minidiff.files.folder import HARMLESS, NO_PARTS, config_values, found, scheduler_values, write_json
from minidiff.files.lora_file import FILE_NAME, LoRAFile, save_lora
from minidiff.files.values import check_names
from minidiff.files.weights import save
from minidiff.files.word_file import Embedding

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "text_encoder_2", "tokenizer_2")

# --- networks ------------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """The field's output of a network; a tuple, too."""

    sample: Tensor


class Posterior(NamedTuple):
    """Mean and log-variance (B, C, h, w), as in `core`; and the field's distribution of latents, which is the same object."""

    mean: Tensor
    logvar: Tensor

    @property
    def latent_dist(self) -> "Posterior":
        return self

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device if generator else self.mean.device)
        return vae.sample_posterior(self.mean, self.logvar, noise.to(self.mean))

    def mode(self) -> Tensor:
        return self.mean


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in inject.trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")


def with_habits(model: nn.Module) -> str:
    """The name of a network in `print(model)`."""
    return f"{type(model).__name__} with habits"


class UNet2DConditionModel(unet.UNet2DConditionModel):
    """core/unet.py's, which can be called in the field's way, too."""

    _get_name = with_habits
    plainly = nn.Module.__call__  # for the pipeline: by position only
    print_trainable_parameters = print_trainable_parameters
    enable_gradient_checkpointing = checkpoint_gradients

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if named.keys() <= {"latents", "t", "text", "vector", "control"}:
            return super().__call__(*inputs, **named)
        names = ("sample", "timestep", "encoder_hidden_states")
        named = dict(zip(names, inputs)) | named
        sdxl = ["added_cond_kwargs"] * bool(self.config.addition_embed_type)
        check_names("the U-Net's call", named, (*names, *sdxl, "return_dict"))
        text = [named["encoder_hidden_states"]]
        if added := named.get("added_cond_kwargs"):
            sizes = embed_sizes(added["time_ids"], self.config.addition_time_embed_dim or 0)
            text.append(torch.cat([added["text_embeds"], sizes.to(text[0].dtype)], dim=1))
        return Output(super().__call__(named["sample"], named["timestep"], *text))

    def add_adapter(self, adapter_config: "LoraConfig", adapter_name: str = "default") -> None:
        """A new adapter, which alone can be trained. AdapterError for settings that minidiff does not have."""
        c = adapter_config
        if c.bias != "none" or c.init_lora_weights not in (True, "gaussian"):
            raise AdapterError('LoraConfig: bias must be "none", and init_lora_weights True or "gaussian".')
        if not 0 < c.lora_alpha < float("inf") or not 0 <= c.lora_dropout < 1:
            raise AdapterError("LoraConfig: lora_alpha must be a positive number, and lora_dropout from 0 to below 1.")
        shape: Any = dict(rank_of=c.rank_pattern, rslora=c.use_rslora, dora=c.use_dora, dropout=c.lora_dropout)
        targets = c.target_modules or inject.DEFAULT_TARGETS
        layers = inject.inject(self, c.r, c.lora_alpha, targets, adapter_name=adapter_name, **shape)
        if c.init_lora_weights == "gaussian":  # as in peft: a standard deviation of 1 / r
            for name, layer in layers.items():
                A = layer.lora_A[adapter_name].data
                A.copy_(normal(A.shape, 0, "lora_A", name) / len(A))
        if type(self.conv_in) is not nn.Conv2d:  # the other layers are fast, too
            speed_up_network(self)

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """The U-Net as a folder; of one with an adapter the adapter, as a folder of peft. Always safetensors."""
        if adapters := inject.adapter_names(self):
            save_lora({f"unet.{name}": own for name, own in inject.adapter_weights(self, adapters[0]).items()}, folder, "peft")
        else:
            save(self.state_dict(), Path(folder, "diffusion_pytorch_model.safetensors"))
            values = config_values(self.config, "UNet2DConditionModel")
            write_json(Path(folder, "config.json"), values)


class AutoencoderKL(vae.AutoencoderKL):
    """core/vae.py's, which can be called in the field's way, too."""

    _get_name = with_habits
    plainly = vae.AutoencoderKL.decode

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """(B, 3, H, W) -> mean and log-variance, which have `latent_dist`."""
        posterior = Posterior(*super().encode(x))
        return posterior if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool | None = None) -> Any:
        """(B, C, h, w) -> (B, 3, H, W); in an `Output` if `return_dict` is given."""
        pictures = super().decode(z)
        return pictures if return_dict is None else Output(pictures)


CLASSES: dict[type, type] = {unet.UNet2DConditionModel: UNet2DConditionModel, vae.AutoencoderKL: AutoencoderKL}


def adopt(network: nn.Module) -> None:
    """Give a U-Net or VAE the habits. Another network, or a compiled one, stays as it is."""
    network.__class__ = CLASSES.get(type(network), type(network))


# --- peft ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraConfig:
    """peft's settings of an adapter. `target_modules` as in core/inject.py; default: every attention projection."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    bias: str = "none"


def get_peft_model(model: Any, peft_config: LoraConfig, adapter_name: str = "default") -> Any:
    """The same U-Net with a new adapter."""
    model.add_adapter(peft_config, adapter_name)
    return model


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, LoRAWeights]:
    """An adapter by layer, for pipe.save_lora_weights; unlike peft's tensors, it says how strong it is."""
    return inject.adapter_weights(model, adapter_name)


# --- the pipeline -----------------------------------------------------------------------------------------------------------


def not_needed(why: str) -> Any:
    """A method that only says why nothing has to be switched."""
    return lambda self, *arguments, **field: warnings.warn(f"nothing is switched: {why}.", stacklevel=2)


class StableDiffusionPipeline(pipeline.StableDiffusionPipeline):
    """The pipeline of pipeline.py, with the names, keywords and positions of the field beside its own."""

    order: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps")  # by position, after the prompt
    safety_checker = feature_extractor = image_encoder = None  # whatever they are set to, they are never called

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, *own: Any, scheduler: Any = None, controlnet: Any = None,
        **field: Any,
    ) -> None:  # fmt: skip
        """As in model.py; or with a `scheduler` in place of `noise_config` and `sampler`."""
        if scheduler is not None:  # the field's pipeline, too, corrects its offset
            own = (replace(scheduler.noise_config, steps_offset=1), scheduler.sampler)
        super().__init__(unet, vae, text_encoder, tokenizer, *own, **{k: v for k, v in field.items() if k not in HARMLESS})
        self.controlnet = controlnet
        adopt(unet)
        adopt(vae)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, *own: Any, **field: Any) -> Self:
        """As in model.py; `scheduler`, `unet`, `vae`, … replace the folder's own."""
        home, parts = found(folder, field), {name: field.pop(name) for name in PARTS if field.get(name) is not None}
        nets = field.pop("controlnet", None)
        check_names("from_pretrained", field, ("layerwise_casting", "plain"))
        pipe = super().from_pretrained(home, torch_dtype, *own, **field)
        pipe.name_or_path = str(folder)
        if parts:
            zeros = pipe.force_zeros_for_empty_prompt
            same = {"name_or_path": str(folder), "plain": pipe.plain, "force_zeros_for_empty_prompt": zeros}
            pipe = cls(**pipe.components | parts, **same)
        pipe.controlnet = nets
        return pipe

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*PARTS, *NO_PARTS)}

    @property
    def scheduler(self) -> Scheduler:
        """The sampler and the noise schedule of a call that names no sampler."""
        values = scheduler_values(self.noise_config, self.sampler)
        return SCHEDULERS[values["_class_name"]].from_config(values)

    @scheduler.setter
    def scheduler(self, new: Scheduler) -> None:
        if not isinstance(new, Scheduler):
            raise SettingsError(f"scheduler is a {type(new).__name__}; take one of minidiff's: {', '.join(SCHEDULERS)}.")
        self.sampler, self.noise_config, self.schedule = new.sampler, new.noise_config, new.schedule

    def __repr__(self) -> str:
        side, networks = self.unet.config.sample_size * self.downscale, self.parts.networks.values()
        count = sum(parameter.numel() for network in networks for parameter in network.parameters())
        adapters = ", ".join(f"{name} at {weight:g}" for name, weight in self.strengths().items()) or "none"
        model = f"{self.name_or_path or 'a model'}, {side} x {side} pixels, {count:,} parameters, {self.device}, {self.dtype}"
        return f"<{type(self).__name__}: {model}, sampler {self.sampler}, adapters: {adapters}>"

    def in_other_words(self, given: dict[str, Any]) -> Any:
        """A call of the field, in minidiff's own names."""
        positional, field, _ = (given.pop(name) for name in ("positional", "field", "self"))
        negative = positional and isinstance(positional[0], str | list) and self.order[0] == "height"
        names = ("negative_prompt",) if negative else self.order
        if len(positional) > len(names):
            raise SettingsError(f"by position, the call takes the prompt, {', '.join(names)}; name the other arguments.")
        field = dict(zip(names, positional)) | field
        watch, inputs = field.pop("callback_on_step_end", None), field.pop("callback_on_step_end_tensor_inputs", ())
        lora = field.pop("cross_attention_kwargs", None) or {}
        check_names("callback_on_step_end", dict.fromkeys(inputs, True), ("latents",))
        check_names("cross_attention_kwargs", lora, ("scale",))
        check_names("the call", field, (*given, "return_dict"))  # the output is a tuple anyway
        given |= {name: value for name, value in field.items() if name in given and value is not None}

        def callback(step: Step) -> None:
            seen = watch(self, step.index, torch.tensor(step.t), {"latents": step.x}) or {}
            if seen.get("latents", step.x) is not step.x:
                raise SettingsError("callback_on_step_end returns other latents; in minidiff, a callback only looks at them.")

        given["callback"] = callback if watch else given["callback"]
        with at_strengths(self.adaptable, self.strengths(lora["scale"])) if "scale" in lora else nullcontext():
            return self(**given)

    # --- adapters

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None, *own: Any, **field: Any) -> LoRAFile:
        """As in model.py; from a hub id in the local cache, too. A second adapter without a name is default_1."""
        path, taken = found(path, field), inject.adapter_names(self.adaptable)
        adapter_name = adapter_name or (f"default_{len(taken)}" if taken else "default")
        return super().load_lora_weights(path, adapter_name, *own, **field)

    def load_textual_inversion(self, path: str | Path, token: str | None = None, **field: Any) -> Embedding:
        """As in model.py; from a hub id in the local cache, too; `weight_name` is a file in the folder."""
        path = found(path, field) / field.pop("weight_name", "")
        return super().load_textual_inversion(path, token, **field)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """As in model.py; each weight times `lora_scale`."""
        with at_strengths(self.adaptable, self.strengths(lora_scale)):
            super().fuse_lora()

    def unload_lora_weights(self) -> None:
        """Remove every adapter. Fused ones stay in the weights, as in the field; after `unfuse_lora` the base is restored."""
        for layer in inject.lora_layers(self.adaptable).values():
            layer.unmerged_weight = None
        super().unload_lora_weights()

    @staticmethod
    def save_lora_weights(
        save_directory: str | Path, unet_lora_layers: Any = None, text_encoder_lora_layers: Any = None,
        weight_name: str = FILE_NAME, safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Write what `get_peft_model_state_dict` gives for the networks, as safetensors always."""
        both = {"unet": unet_lora_layers or {}, "text_encoder": text_encoder_lora_layers or {}}
        modules = {f"{network}.{name}": own for network, layers in both.items() for name, own in layers.items()}
        save_lora(modules, Path(save_directory, weight_name))

    # --- enable_… and disable_…

    enable_attention_slicing = disable_attention_slicing = not_needed("attention never holds all of its weights in memory")
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = enable_attention_slicing
    enable_vae_slicing = disable_vae_slicing = not_needed("pictures are encoded and decoded one at a time")

    def enable_model_cpu_offload(self, *arguments: Any, **field: Any) -> None:
        """Move the model to the GPU, if there is one. SD 1.5 needs 2 GB there in torch.float16, so nothing is offloaded."""
        self.to(chosen_device(None))
        warnings.warn(f"nothing is offloaded: the whole model is on {self.device}.", stacklevel=2)

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def enable_vae_tiling(self) -> None:
        """Encode and decode pictures in tiles as large as those of the VAE's training."""
        self.vae_tile_size = self.vae.config.sample_size

    def disable_vae_tiling(self) -> None:
        self.vae_tile_size = None


FROM_PICTURE, FROM_MASK = ("image", "strength", "num_inference_steps"), ("image", "mask_image")
ORDERS = {  # pipelines that differ only in what their arguments mean by position
    "DiffusionPipeline": StableDiffusionPipeline.order, "AutoPipelineForText2Image": StableDiffusionPipeline.order,
    "StableDiffusionImg2ImgPipeline": FROM_PICTURE, "AutoPipelineForImage2Image": FROM_PICTURE,
    "StableDiffusionInpaintPipeline": FROM_MASK, "AutoPipelineForInpainting": FROM_MASK,
    "StableDiffusionXLPipeline": StableDiffusionPipeline.order, "StableDiffusionXLImg2ImgPipeline": FROM_PICTURE,
    "StableDiffusionXLInpaintPipeline": FROM_MASK,
}  # fmt: skip
globals().update({name: type(name, (StableDiffusionPipeline,), {"order": order}) for name, order in ORDERS.items()})
