"""The habits of the field: code that was written for diffusers and peft runs here when only its import line is changed.

    from minidiff import EulerDiscreteScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket", torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe("a photo of a red dog", 128, 128, callback_on_step_end=show).images[0]

The trainer and the command line know nothing of this file, and pipeline.py one line: it hands a call with arguments that it
does not have to `in_other_words`. habits_parts.py has the schedulers, the U-Net, the VAE, and peft's names.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from minidiff.core import inject
from minidiff.core.errors import SettingsError
from minidiff.core.grids import Step
from minidiff.draw import pipeline
from minidiff.draw.device import chosen_device
from minidiff.draw.habits_parts import HARMLESS, NO_PARTS, SCHEDULERS, Scheduler, adopt, check_names, found
from minidiff.draw.lora_tags import at_strengths
from minidiff.files import folder as model_folder
from minidiff.files.lora_file import FILE_NAME, LoRAFile, save_lora
from minidiff.files.word_file import Embedding

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def not_needed(why: str) -> Any:
    """A method that only says why nothing has to be switched."""
    return lambda self, *arguments, **field: warnings.warn(f"nothing is switched: {why}.", stacklevel=2)


class StableDiffusionPipeline(pipeline.StableDiffusionPipeline):
    """The pipeline of pipeline.py, with the names, keywords and positions of the field beside its own."""

    order: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps")  # by position, after the prompt
    switched_off: dict[str, float] | None = None  # by `disable_lora`: adapter -> weight
    safety_checker = feature_extractor = image_encoder = None  # whatever they are set to, they are never called

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, *own: Any, scheduler: Any = None, **field: Any
    ) -> None:
        """As in model.py; or with a `scheduler` in place of `noise_config` and `sampler`."""
        if scheduler is not None:  # the field's pipeline, too, corrects its offset
            own = (replace(scheduler.noise_config, steps_offset=1), scheduler.sampler)
        super().__init__(unet, vae, text_encoder, tokenizer, *own, **{k: v for k, v in field.items() if k not in HARMLESS})
        adopt(unet)
        adopt(vae)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, *own: Any, **field: Any) -> Self:
        """As in model.py; `scheduler`, `unet`, `vae`, … replace the folder's own."""
        home, parts = found(folder, field), {name: field.pop(name) for name in PARTS if field.get(name) is not None}
        check_names("from_pretrained", field, ("layerwise_casting", "plain"))
        pipe = super().from_pretrained(home, torch_dtype, *own, **field)
        pipe.name_or_path = str(folder)
        return cls.from_pipe(pipe, **parts) if parts else pipe

    @classmethod
    def from_pipe(cls, pipe: "StableDiffusionPipeline", **parts: Any) -> Self:
        """A pipeline with the networks of another one, but for these parts."""
        return cls(**pipe.components | parts, name_or_path=pipe.name_or_path, plain=pipe.plain)

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*PARTS, *NO_PARTS)}

    @property
    def scheduler(self) -> Scheduler:
        """The sampler and the noise schedule of a call that names no sampler."""
        values = model_folder.scheduler_values(self.noise_config, self.sampler)
        return SCHEDULERS[values["_class_name"]].from_config(values)

    @scheduler.setter
    def scheduler(self, new: Scheduler) -> None:
        if not isinstance(new, Scheduler):
            raise SettingsError(f"scheduler is a {type(new).__name__}; take one of minidiff's: {', '.join(SCHEDULERS)}.")
        self.sampler, self.noise_config, self.schedule = new.sampler, new.noise_config, new.schedule

    def __repr__(self) -> str:
        side, networks = self.unet.config.sample_size * self.downscale, (self.unet, self.vae, self.text_encoder)
        count = sum(parameter.numel() for network in networks for parameter in network.parameters())
        adapters = ", ".join(f"{name} at {weight:g}" for name, weight in self.strengths().items()) or "none"
        model = f"{self.name_or_path or 'a model'}, {side} x {side} pixels, {count:,} parameters, {self.device}, {self.dtype}"
        return f"<{type(self).__name__}: {model}, sampler {self.sampler}, adapters: {adapters}>"

    def in_other_words(self, given: dict[str, Any]) -> Any:
        """A call of the field, in minidiff's own names."""
        positional, field, _ = (given.pop(name) for name in ("positional", "field", "self"))
        negative = positional and isinstance(positional[0], str | list) and "height" in self.order
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

    def strengths(self, scale: float = 1.0, only: Sequence[str] | None = None) -> dict[str, float]:
        """Adapter -> its present weight times `scale`; 0 if it is not among `only`."""
        layers = inject.lora_layers(self.adaptable).values()
        return {n: w * scale if only is None or n in only else 0.0 for layer in layers for n, w in layer.strength.items()}

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None, *own: Any, **field: Any) -> LoRAFile:
        """As in model.py; from a hub id in the local cache, too. A second adapter without a name is default_1."""
        path, taken = found(path, field), inject.adapter_names(self.adaptable)
        adapter_name = adapter_name or (f"default_{len(taken)}" if taken else "default")
        return super().load_lora_weights(path, adapter_name, *own, **field)

    def load_textual_inversion(self, path: str | Path, token: str | None = None, **field: Any) -> Embedding:
        """As in model.py; from a hub id in the local cache, too; `weight_name` is a file in the folder."""
        path = found(path, field) / field.pop("weight_name", "")
        return super().load_textual_inversion(path, token, **field)

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

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """As in model.py; each weight times `lora_scale`, and only some of the adapters if `adapter_names` says so."""
        with at_strengths(self.adaptable, self.strengths(lora_scale, adapter_names)):
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
}  # fmt: skip
globals().update({name: type(name, (StableDiffusionPipeline,), {"order": order}) for name, order in ORDERS.items()})
