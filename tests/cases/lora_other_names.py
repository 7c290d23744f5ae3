"""LoRA files in names that other programs write for SD 1.5. Each must be read with the right change, or be refused truthfully.

A file that plainly is a LoRA must not be called "no LoRA … nothing that minidiff knows".
exit 0: every form is read to 1e-5, or refused with words that say what it is.
"""
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.core.inject import adaptable_layers, lora_layers
from minidiff.files import names as keymaps

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")
folder = Path(tempfile.mkdtemp())
layers = {("unet", n): m for n, m in adaptable_layers(pipe.unet).items() if n.endswith(("attn1.to_q", "attn2.to_k"))}
layers |= {("text_encoder", n): m for n, m in adaptable_layers(pipe.text_encoder).items() if n.endswith("q_proj")}
draws = torch.Generator().manual_seed(0)
parts = {k: (torch.randn(4, m.weight.shape[1], generator=draws) * 0.1, torch.randn(len(m.weight), 4, generator=draws) * 0.1) for k, m in layers.items()}
ldm = keymaps.unet_table(pipe.unet.config)


def tensors(name, down, up, alpha=None, only=None):
    found = {}
    for (part, path), (A, B) in parts.items():
        if only in (None, part):
            stem = name(part, path)
            found |= {f"{stem}.{down}": A, f"{stem}.{up}": B} | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})
    return found


forms = {
    "ComfyUI's own (diffusion_model.…, text_encoders.clip_l.…)": (
        tensors(lambda p, n: "diffusion_model." + keymaps.rename(n, ldm) if p == "unet" else "text_encoders.clip_l.transformer.text_model." + n, "lora_down.weight", "lora_up.weight", 2.0), 0.5, None),
    "OneTrainer, dotted (unet.…lora_down)": (
        tensors(lambda p, n: "unet." + n if p == "unet" else "text_encoder.text_model." + n, "lora_down.weight", "lora_up.weight", 2.0), 0.5, None),
    "OneTrainer, LDM's names dotted (unet.input_blocks.…)": (
        tensors(lambda p, n: "unet." + keymaps.rename(n, ldm) if p == "unet" else "text_encoder.text_model." + n, "lora_down.weight", "lora_up.weight", 2.0), 0.5, None),
    "diffusers' unet.save_lora_adapter (no prefix)": (tensors(lambda p, n: n, "lora_A.weight", "lora_B.weight", only="unet"), 1.0, "unet"),
    "peft's plain state dict (…lora_A.default.weight)": (
        tensors(lambda p, n: "base_model.model." + n, "lora_A.default.weight", "lora_B.default.weight", only="unet"), 1.0, "unet"),
}
bad = 0
for i, (form, (content, scale, only)) in enumerate(forms.items()):
    save_file(content, folder / f"{i}.safetensors")
    try:
        pipe.load_lora_weights(folder / f"{i}.safetensors", alpha=4.0 if "peft" in form else None)
        worst = 0.0
        for (part, path), (A, B) in parts.items():
            if only in (None, part):
                layer = lora_layers(getattr(pipe, part)).get(path)
                worst = max(worst, 1.0 if layer is None else (layer.delta() - scale * B @ A).abs().max().item())
        print(f"{form}: read, worst difference {worst:.1e}")
        bad += worst > 1e-5
    except Exception as error:
        text = str(error).replace(str(folder), "")
        false = "is no LoRA" in text or "another model" in text
        print(f"{form}: refused{', and falsely' if false else ''}: {text[:230]}")
        bad += false
    pipe.unload_lora_weights()
sys.exit(bool(bad))
