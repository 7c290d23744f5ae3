"""The kind of a file, by the names and shapes of its tensors; nothing is opened or read."""

import re
from collections.abc import Mapping
from typing import Protocol

from minidiff.files.lora_names import adapter_kind, lora_dialect, unet_of


class HasShape(Protocol):
    """A tensor, or the header's entry for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


FAMILIES = {128: "SD pocket", 768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text that a U-Net reads
ARCHITECTURES = {  # and in metadata: ModelSpec's name, and kohya's
    128: ("pocket", "pocket"),
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
FIRST = re.compile(r"(conv_in|(model\.diffusion_model\.)?input_blocks\.0\.0)\.weight")  # a U-Net's first convolution
INPUTS = {4: "", 9: "inpainting ", 8: "InstructPix2Pix ", 5: "depth ", 7: "upscaling "}  # by the U-Net's input channels
LOOKS = (  # how a file can look, by the beginning of any of its names; the first that fits
    (r"conditioner\.embedders\.0\.model\.", "a single file of SDXL's refiner, with which minidiff does not draw"),
    (r"conditioner\.", "an SDXL {inputs}single file in the LDM layout"),
    (r"cond_stage_model\.model\.", "an SD 2.x {inputs}single file in the LDM layout"),
    (r"model\.diffusion_model\.", "an {family} {inputs}single file in the LDM layout"),
    (r"time_embedding\.", "an {family} {inputs}U-Net in the diffusers layout"),
    (r"input_blocks\.", "an {family} {inputs}U-Net in the LDM layout, without VAE and text encoder"),
    (r"decoder\.mid_block\.", "a VAE in the diffusers layout"),
    (r"decoder\.mid\.|first_stage_model\.", "a VAE in the LDM layout"),
    (r"vision_model\.|visual\.", "a CLIP model with an image encoder"),
)

CONTROL_FORMS = {  # ControlNets and their relatives, by the beginning of any of their names; the first that fits
    "difference": "ControlNet as differences to its base model",
    "lora_controlnet": "Control-LoRA",
    "control_add_embedding.": "union ControlNet",
    "task_embedding": "union ControlNet",
    "lllite_unet": "ControlNet-LLLite",
    **dict.fromkeys(("control_model.", "controlnet_cond_embedding.", "input_hint_block."), "ControlNet"),
}
IP_FORMS = {  # IP-Adapters, by the beginning of any of their names; the first that fits
    "id_encoder.": "PhotoMaker",
    "image_proj.perceiver_resampler.": "FaceID plus",
    "image_proj.latents": "plus",
    "image_proj.proj.3.": "full-face",
    "image_proj.proj.0.": "FaceID",
    "image_proj.proj.": "base",
}


def describe(tensors: Mapping[str, HasShape]) -> str:
    """A description of a file with these tensors, for after "the file looks like"."""
    if not tensors:
        return "an empty file"
    width = cross_attention_width(tensors)
    of = f" for {family(width)}" if width else ""
    if form := form_of(tensors, CONTROL_FORMS):
        return f"a {form}{of}" if form == "ControlNet" else f"a {form}, which minidiff does not read"
    if form := form_of(tensors, IP_FORMS):
        return f"an IP-Adapter of the form {form}{of}"
    if dialect := lora_dialect(tensors):
        of = of or " for SDXL" * bool(unet_of(tensors).addition_embed_type)
        return f"a {adapter_kind(tensors)} in the {dialect} style{of}"
    for pattern, looks in LOOKS:
        if any(re.match(pattern, key) for key in tensors):
            model = FAMILIES.get(width or 0, f"SD (cross-attention width {width or 'unknown'})")
            shapes = (t.shape for key, t in tensors.items() if FIRST.fullmatch(key) and len(t.shape) > 1)
            channels = next(shapes, (0, 4))[1]
            return looks.format(family=model, inputs=INPUTS.get(channels, f"{channels}-channel "))
    for key, tensor in tensors.items():
        if key.endswith("token_embedding.weight") and tensor.shape:
            return f"a CLIP text encoder of width {tensor.shape[-1]}"
    if is_embedding(tensors):
        widths = dict.fromkeys(tensor.shape[-1] for tensor in tensors.values())
        of = f", for {FAMILIES[sum(widths)]}" if sum(widths) in FAMILIES else ""
        return f"a textual inversion embedding of width {' and '.join(map(str, widths))}{of}"
    return f'nothing that minidiff knows: {len(tensors)} tensors, the first is "{next(iter(tensors))}"'


def family(width: int) -> str:
    """The family of models whose U-Net reads text of this width."""
    return f"{FAMILIES.get(width, 'an unknown model')} (cross-attention width {width})"


def form_of(tensors: Mapping[str, HasShape], forms: Mapping[str, str]) -> str | None:
    """The form of a ControlNet or an IP-Adapter, or of one of their relatives; None for any other file."""
    form = next((form for start, form in forms.items() if any(key.startswith(start) for key in tensors)), None)
    enters = tensors.get("image_proj.proj_in.weight") if form == "plus" else None
    return "InstantID" if enters is not None and enters.shape[-1] == 512 else form  # it reads a face's embedding


def kind_of(tensors: Mapping[str, HasShape]) -> str:
    """The kind of the file, in the words of `convert` and `inspect`."""
    if form := form_of(tensors, CONTROL_FORMS | IP_FORMS):  # a FaceID's file holds a LoRA, too
        return "a ControlNet" if form == "ControlNet" else "an IP-Adapter" if form in IP_FORMS.values() else "a model"
    return "a LoRA" if lora_dialect(tensors) else "a textual inversion" if is_embedding(tensors) else "a model"


def is_embedding(tensors: Mapping[str, HasShape]) -> bool:
    """Are these vectors under words, and not parts of a model or a LoRA?"""
    parts = lora_dialect(tensors) or any(key.endswith((".weight", ".bias")) for key in tensors)
    return bool(tensors) and not parts and all(1 <= len(tensor.shape) <= 2 for tensor in tensors.values())


def cross_attention_width(tensors: Mapping[str, HasShape]) -> int | None:
    """The width of the prompt's tokens: 768 in SD 1.x. From a U-Net's keys in any layout, or an adapter's."""
    to_k = re.compile(r"(attn2[._](processor\.)?to_k(_lora)?|ip_adapter\.\d+\.to_k_ip)\.(base\.)?(weight|.*(lora_A|down).*)$")
    return next((t.shape[1] for key, t in tensors.items() if to_k.search(key) and len(t.shape) > 1), None)


def architecture(width: int, v: bool | None = None) -> tuple[str, str]:
    """The model that an adapter belongs to, in the words of ModelSpec and of kohya. `v`: does it predict v? None: no matter."""
    name, kohyas = ARCHITECTURES.get(width, (f"width-{width}", f"width-{width}"))
    size = {None: "", False: "-512", True: "-768-v"}[v] if kohyas == "sd_v2" else ""
    return name + size, kohyas + "_v" * (v is True and kohyas.startswith("sd_"))
