"""The habits of the field: code that was written for diffusers and peft runs here when only its import line is changed.

    from minidiff import DDIMScheduler, LoraConfig, StableDiffusionPipeline, get_peft_model
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket", torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe("a photo of a red dog", 128, 128, callback_on_step_end=show).images[0]
    unet = get_peft_model(pipe.unet, LoraConfig(r=4))
    unet(pipe.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text).sample

pipeline.py hands a call with arguments that it does not have to `in_other_words`. `adopt` gives a network a subclass of its own
class, as fast.install does: the field's keywords give the field's output, positional calls the plain tensors of `core`.
"""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from minidiff.core import controlnet, inject, unet, vae
from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.grids import Step
from minidiff.core.rng import normal
from minidiff.core.text import embed_sizes
from minidiff.draw import pipeline
from minidiff.draw.lora_tags import at_strengths, print_trainable_parameters
from minidiff.draw.schedulers import scheduler_of, set_scheduler
from minidiff.draw.speed import checkpoint_gradients, speed_up_network
from minidiff.files.controlnet import read_controlnet, write_controlnet
from minidiff.files.folder import HARMLESS, NO_PARTS, config_values, found, write_json
from minidiff.files.lora_file import save_lora
from minidiff.files.values import check_names
from minidiff.files.weights import save

Output = namedtuple("Output", "sample")  # of a network, as the field has it
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "text_encoder_2", "tokenizer_2")  # of a pipeline


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
    rank_pattern: Mapping[str, int] | None = None
    bias: str = "none"


class Habits:
    """A network that has them says so in `print(model)`."""

    def _get_name(self) -> str:
        return f"{type(self).__name__} with habits"


class UNet2DConditionModel(Habits, unet.UNet2DConditionModel):
    """core/unet.py's, which can be called in the field's way, too."""

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
        x, t, *text = (named[name] for name in names)
        if added := named.get("added_cond_kwargs"):
            sizes = embed_sizes(added["time_ids"], self.config.addition_time_embed_dim or 0)
            text.append(torch.cat([added["text_embeds"], sizes.to(text[0].dtype)], dim=1))
        return Output(super().__call__(x, t, *text))

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str = "default") -> None:
        """A new adapter, which alone can be trained. AdapterError for settings that minidiff does not have."""
        c = adapter_config
        if c.bias != "none" or c.init_lora_weights not in (True, "gaussian"):
            raise AdapterError('LoraConfig: bias must be "none", and init_lora_weights True or "gaussian".')
        if not 0 < c.lora_alpha < float("inf") or not 0 <= c.lora_dropout < 1:
            raise AdapterError("LoraConfig: lora_alpha must be a positive number, and lora_dropout from 0 to below 1.")
        shape: Any = dict(rank_of=c.rank_pattern or {}, rslora=c.use_rslora, dora=c.use_dora, dropout=c.lora_dropout)
        layers = inject.inject(self, c.r, c.lora_alpha, c.target_modules or inject.DEFAULT_TARGETS, 0, adapter_name, **shape)
        for name, layer in layers.items() if c.init_lora_weights == "gaussian" else ():
            A = layer.lora_A[adapter_name].data
            A.copy_(normal(A.shape, 0, "lora_A", name) / len(A))  # as in peft: a standard deviation of 1 / r
        if type(self.conv_in) is not nn.Conv2d:  # the other layers are fast, too
            speed_up_network(self)

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """The U-Net as a folder; of one with an adapter the adapter, as a folder of peft. Always safetensors."""
        if adapters := inject.adapter_names(self):
            save_lora({f"unet.{name}": own for name, own in inject.adapter_weights(self, adapters[0]).items()}, folder, "peft")
        else:
            save(self.state_dict(), Path(folder, "diffusion_pytorch_model.safetensors"))
            write_json(Path(folder, "config.json"), config_values(self.config, "UNet2DConditionModel"))


def get_peft_model(model: Any, peft_config: LoraConfig, adapter_name: str = "default") -> Any:
    """The same U-Net with a new adapter."""
    model.add_adapter(peft_config, adapter_name)
    return model


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """An adapter by layer, for pipe.save_lora_weights; unlike peft's tensors, it says how strong it is."""
    return inject.adapter_weights(model, adapter_name)


class AutoencoderKL(Habits, vae.AutoencoderKL):
    """core/vae.py's, which can be called in the field's way, too."""

    plainly = vae.AutoencoderKL.decode

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """(B, 3, H, W) -> mean and log-variance, which have `latent_dist`."""
        posterior = Posterior(*super().encode(x))
        return posterior if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool | None = None) -> Any:
        """(B, C, h, w) -> (B, 3, H, W); in an `Output` if `return_dict` is given."""
        pictures = super().decode(z)
        return pictures if return_dict is None else Output(pictures)


class ControlNetModel(Habits, controlnet.ControlNetModel):
    """core/controlnet.py's, which is loaded and saved in the field's way, too."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **field: Any) -> Self:
        """A folder, a hub id in the local cache, or a single file."""
        net: Any = read_controlnet(found(folder, field), torch_dtype)
        check_names("from_pretrained", field, ())
        net.__class__ = cls
        return net

    from_single_file = from_pretrained

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """The folder that `from_pretrained` and diffusers read."""
        write_controlnet(self, Path(folder))


def adopt(network: nn.Module) -> None:
    """Give a U-Net or VAE the habits. Another network, or a compiled one, stays as it is."""
    classes: dict[type, type] = {unet.UNet2DConditionModel: UNet2DConditionModel, vae.AutoencoderKL: AutoencoderKL}
    network.__class__ = classes.get(type(network), type(network))


class StableDiffusionPipeline(pipeline.StableDiffusionPipeline):
    """The pipeline of pipeline.py, with the names, keywords and positions of the field beside its own."""

    order: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps")  # by position, after the prompt
    safety_checker = feature_extractor = image_encoder = None  # whatever they are set to, they are never called
    scheduler = property(scheduler_of, set_scheduler)
    components = property(lambda self: {name: getattr(self, name) for name in (*PARTS, *NO_PARTS)})

    def __init__(self, *parts: Any, scheduler: Any = None, controlnet: Any = None, **field: Any) -> None:
        """As in model.py; or with a `scheduler` in place of `noise_config` and `sampler`."""
        if scheduler is not None:  # the field's pipeline, too, corrects its offset
            field |= {"noise_config": replace(scheduler.noise_config, steps_offset=1), "sampler": scheduler.sampler}
        super().__init__(*parts, **{name: value for name, value in field.items() if name not in HARMLESS})
        self.controlnet = controlnet
        adopt(self.unet)
        adopt(self.vae)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **field: Any) -> Self:
        """As in model.py, with the field's keywords for a hub id."""
        home = found(folder, field)
        check_names("from_pretrained", field, (*PARTS, "controlnet", "torch_dtype", "layerwise_casting", "plain"))
        parts = {name: value for name, value in field.items() if value is not None}
        return super().from_pretrained(home, torch_dtype, name_or_path=str(folder), **parts)

    def in_other_words(self, given: dict[str, Any]) -> Any:
        """A call of the field, in minidiff's own names."""
        positional, field, _ = (given.pop(name) for name in ("positional", "field", "self"))
        negative = positional and isinstance(positional[0], str | list) and self.order[0] == "height"
        names = ("negative_prompt",) if negative else self.order
        if len(positional) > len(names):
            raise SettingsError(f"by position, the call takes the prompt, {', '.join(names)}; name the other arguments.")
        field = dict(zip(names, positional)) | field
        watch, inputs = field.pop("callback_on_step_end", None), field.pop("callback_on_step_end_tensor_inputs", None) or ()
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


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Text to image, in which `image` is the hint for the `controlnet`."""

    order = ("control_image", *StableDiffusionPipeline.order)

    def __call__(self, *inputs: Any, image: Any = None, control_image: Any = None, **named: Any) -> Any:
        hint = control_image if image is None else image
        if hint is None and not inputs[1:]:
            raise SettingsError("a ControlNet pipeline follows a picture; give its image.")
        return super().__call__(*inputs, control_image=hint, **named)


IMAGE, MASK = {"order": ("image", "strength", "num_inference_steps")}, {"order": ("image", "mask_image")}
HINT = ("control_image", "height", "width", "strength")
KINDS: dict[str, dict[str, Any]] = {  # pipelines that differ only in what their arguments mean by position
    "DiffusionPipeline": {}, "AutoPipelineForText2Image": {}, "StableDiffusionXLPipeline": {},
    "AutoPipelineForImage2Image": IMAGE, "StableDiffusionImg2ImgPipeline": IMAGE, "StableDiffusionXLImg2ImgPipeline": IMAGE,
    "AutoPipelineForInpainting": MASK, "StableDiffusionInpaintPipeline": MASK, "StableDiffusionXLInpaintPipeline": MASK,
    "StableDiffusionControlNetImg2ImgPipeline": {"order": ("image", *HINT), "conditioning_scale": 0.8},
    "StableDiffusionControlNetInpaintPipeline": {"order": ("image", "mask_image", *HINT), "conditioning_scale": 0.5},
}  # fmt: skip
globals().update({name: type(name, (StableDiffusionPipeline,), own) for name, own in KINDS.items()})
StableDiffusionXLControlNetPipeline = type("StableDiffusionXLControlNetPipeline", (StableDiffusionControlNetPipeline,), {})
