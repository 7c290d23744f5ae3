"""`minidiff COMMAND --help`: the flags of a command in groups. A flag is a field of its dataclass."""

import inspect
import shutil
import textwrap
from dataclasses import MISSING, Field
from typing import Any, get_args, get_origin

from minidiff.cli.words import choices_of, flags_of
from minidiff.files.values import texts_of

GROUPS = {  # heading -> flags; a flag that stands in none comes last
    "Common": "instance_data_dir instance_prompt placeholder_token initializer_token train_data_dir max_train_steps "
    "learning_rate rank resolution train_batch_size validation_prompt preset methods probes every output_dir file "
    "source folder number prompt prompts columns rows seeds frames count negative_prompt num_images_per_prompt "
    "num_inference_steps guidance_scale sampler seed width height lora output",
    "Model, LoRA, words": "pretrained_model_name_or_path tokenizer prediction_type lora_weight lora_dir "
    "textual_inversion clip_skip revision",
    "From a picture": "image mask_image strength resize tile_size controlnet control_image hint controlnet_conditioning_scale "
    "control_guidance_start control_guidance_end guess_mode ip_adapter ip_adapter_image ip_adapter_scale image_encoder "
    "conditioning_data_dir conditioning_image_column controlnet_model_name_or_path",
    "Sampler": "timestep_spacing use_karras_sigmas eta",
    "The adapter": "lora_alpha lora_targets rank_pattern use_rslora use_dora lora_dropout train_text_encoder",
    "The new word": "num_vectors learnable_property learning_rate_embedding",
    "Pictures": "captions caption_column image_column max_train_samples repeats skip_bad center_crop random_flip "
    "aspect_ratio_buckets masked_loss cache_latents cache_dir",
    "Learning": "num_train_epochs gradient_accumulation_steps text_encoder_lr scale_lr lr_scheduler lr_warmup_steps "
    "lr_num_cycles lr_power adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm "
    "use_ema ema_decay proportion_empty_prompts proportion_empty_images snr_gamma noise_offset",
    "Prior preservation": "with_prior_preservation class_data_dir class_prompt num_class_images sample_batch_size "
    "prior_loss_weight prior_from_base prior_generation_precision",
    "Checks and checkpoints": "validation_steps validation_epochs validation_data_dir validation_share num_validation_images "
    "validation_guidance_scale validation_inference_steps checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint overwrite_output_dir report_to logging_dir",
    "The result": "trigger push_to_hub hub_model_id to dtype alpha token title tile tiles_per_row fps",
    "Speed and memory": "device torch_dtype mixed_precision compile plain fit gradient_checkpointing layerwise_casting "
    "use_8bit_adam optimizer_in_backward dataloader_num_workers",
}
EXTRA = {  # flags that are no fields: see words.settings_of
    "sample": ("--from PICTURE", "Draw this picture again. It must be a PNG of minidiff or A1111; other flags change it."),
    "train": ("--config FILE", "A TOML file with defaults for all other flags, such as the train_config.toml of a result."),
}


def help_text(name: str, kind: type) -> str:
    """All flags of a command in groups, each with its default and the text under its field."""
    flags, texts, width = flags_of(kind), texts_of(kind), min(shutil.get_terminal_size().columns, 120)
    free = [field.upper() for field, (_, _, positional) in flags.items() if positional]
    lines = [" ".join(["minidiff", name, *free, "[--flags]"]), "", inspect.getdoc(kind) or ""]
    listed = set(" ".join(GROUPS.values()).split())
    for heading, names in (GROUPS | {"More": " ".join(flag for flag in flags if flag not in listed)}).items():
        rows = [(left_of(flag, *flags[flag]), right_of(flags[flag][0], texts[flag])) for flag in names.split() if flag in flags]
        if heading == "Common":
            rows += [EXTRA[name.split()[0]]] if name.split()[0] in EXTRA else []
        lines += ["", heading] if rows else []
        for left, right in rows:
            body = textwrap.wrap(right, width - 30)
            first = [f"  {left:<26}  {body.pop(0)}"] if len(left) <= 26 else [f"  {left}"]
            lines += [*first, *(" " * 30 + line for line in body)]
    return "\n".join(lines)


def left_of(name: str, field: Field[Any], hint: Any, positional: bool) -> str:
    """`--seed INT`, `--sampler NAME`, `--lora PATH …`, `--[no_]plain`; a positional in capitals."""
    if positional:
        return name.upper()
    if hint is bool:
        return f"--[no_]{name}" if field.default is True else f"--{name}"
    if choices := choices_of(hint):
        return f"--{name} {'|'.join(choices)}"
    shown = {str: "TEXT", int: "N", float: "X"}[(get_args(hint) or (hint,))[0]]
    return f"--{name} {shown}{' …' if get_origin(hint) is tuple else ''}"


def right_of(field: Field[Any], text: str) -> str:
    default = field.default
    if default is True:
        return f"{text} (on)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return text if default in (None, MISSING) or default is False or not shown or "Default:" in text else f"{text} ({shown})"
