"""`minidiff COMMAND --help`, and the words of a command line before tyro reads them. The flags are fields of a dataclass."""

import inspect
import shutil
import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from minidiff.core.errors import SettingsError
from minidiff.files.values import our_name, texts_of

GROUPS = {  # heading -> flags; a flag that stands in none comes last
    "Common": "instance_data_dir instance_prompt train_data_dir max_train_steps learning_rate rank resolution "
    "train_batch_size validation_prompt preset methods probes every output_dir file source folder number prompt prompts "
    "columns rows seeds frames count negative_prompt num_images_per_prompt num_inference_steps guidance_scale sampler seed "
    "width height lora output",
    "Model, LoRA, words": "pretrained_model_name_or_path tokenizer prediction_type lora_weight lora_dir "
    "textual_inversion clip_skip revision",
    "From a picture": "image mask_image strength resize tile_size controlnet control_image hint controlnet_conditioning_scale "
    "control_guidance_start control_guidance_end guess_mode ip_adapter ip_adapter_image ip_adapter_scale image_encoder "
    "conditioning_data_dir conditioning_image_column controlnet_model_name_or_path",
    "Sampler": "timestep_spacing use_karras_sigmas eta",
    "The adapter": "lora_alpha lora_targets rank_pattern use_rslora use_dora lora_dropout train_text_encoder",
    "The new word": "placeholder_token initializer_token num_vectors learnable_property learning_rate_embedding",
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
EXTRA = {  # flags that cli/main.py reads itself
    "sample": ("--from PICTURE", "Draw this picture again. It must be a PNG of minidiff or A1111; other flags change it."),
    "train": ("--config FILE", "A TOML file with defaults for all other flags, such as the train_config.toml of a result."),
}
SMALL_WORDS = {"a", "an", "the", "of", "on", "in", "at", "with", "and"}  # a prompt of one such word was not meant


def flags_of(kind: type) -> dict[str, tuple[Field[Any], Any, bool]]:
    """name -> (field, type, is it a positional?) for every flag of a command."""
    hints, marked, mark = get_type_hints(kind), get_type_hints(kind, include_extras=True), get_args(Positional[int])[1]
    return {f.name: (f, hints[f.name], mark in getattr(marked[f.name], "__metadata__", ())) for f in fields(kind)}


# --- the help ----------------------------------------------------------------------------------------------------------


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
    kinds = [one for one in (get_args(hint) or (hint,)) if one not in (type(None), ...)]
    if get_origin(hint) is Literal or any(get_origin(one) is Literal for one in kinds):
        kinds = [str(one) for kind in kinds for one in (get_args(kind) or (kind,))]
        return f"--{name} {'|'.join(kinds)}"
    shown = {str: "TEXT", int: "N", float: "X", bool: "True|False"}.get(kinds[0], "VALUE")
    return f"--{name} {shown}{' …' if get_origin(hint) is tuple else ''}"


def right_of(field: Field[Any], text: str) -> str:
    default = field.default
    if default is True:
        return f"{text} (on)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return text if default in (None, MISSING) or default is False or not shown or "Default:" in text else f"{text} ({shown})"


# --- the words ---------------------------------------------------------------------------------------------------------


def ready_words(name: str, kind: type, words: list[str], default: object = None) -> list[str]:
    """The words for tyro: a prompt without quotes as one. SettingsError, with the nearest flag, for one that is not there."""
    flags, free, flagged, takes = flags_of(kind), list[str](), list[str](), 0.0
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, _ = word[2:].partition("=")
            flag = known_flag(name, flag.replace("-", "_"), flags)
            hint = flags[flag][1]
            takes = 0 if equals or hint is bool else float("inf") if get_origin(hint) is tuple else 1
            flagged.append(word)
        elif takes:
            flagged.append(word)
            takes -= 1
        else:
            free.append(word)
    asked = {field: hint for field, (_, hint, positional) in flags.items() if positional}
    if "prompt" in asked:
        if not free and not default:
            raise SettingsError(f'minidiff {name} needs a prompt, before its flags: minidiff {name} "a photo of a red dog"')
        free = [" ".join(free)] if free else []
    elif "prompts" in asked and SMALL_WORDS & {word.lower() for word in free}:
        raise SettingsError(f'put each prompt in quotes: minidiff {name} "{" ".join(free)}"')
    elif free and not asked:
        raise SettingsError(f'"{" ".join(free)}" belongs to no flag. A text with spaces needs quotes: --flag "several words"')
    return [*free, *flagged]


def known_flag(name: str, flag: str, flags: dict[str, Any]) -> str:
    """The field behind a flag; SettingsError with the nearest one."""
    field = flag.removeprefix("no_") if flag not in flags else flag
    if field in flags and not flags[field][2] and (field == flag or flags[field][1] is bool):
        return field
    if field in ("prompt", "prompts") and field in flags:
        raise SettingsError(f'the prompt stands alone, without a flag: minidiff {name} "a photo of a red dog"')
    hint = f" Did you mean --{near}?" if (near := our_name(flag, flags)) else ""
    raise SettingsError(f"--{flag} is no flag of minidiff {name}.{hint} minidiff {name} --help lists them.")
