"""A LoCon that was trained with its norm layers too (w_norm, b_norm beside the usual pairs), as A1111 and ComfyUI read it.

exit 0: read whole; or with strict=False what is a LoRA in it is read and the rest is named, as the function promises.
"""
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.core.inject import lora_layers

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")
path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
stem, norm = "lora_unet_" + path.replace(".", "_"), "lora_unet_down_blocks_1_attentions_0_norm"
A, B = torch.randn(4, 128) * 0.1, torch.randn(128, 4) * 0.1
content = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(4.0)}
content |= {f"{norm}.w_norm": torch.randn(128) * 0.01, f"{norm}.b_norm": torch.randn(128) * 0.01}
file = tempfile.mktemp(suffix=".safetensors")
save_file(content, file)
for strict in (True, False):
    try:
        print(pipe.load_lora_weights(file, strict=strict))
        sys.exit(not torch.allclose(lora_layers(pipe.unet)[path].delta(), B @ A, atol=1e-6))
    except Exception as error:
        print(f"strict={strict}:", str(error).replace(file, ""))
sys.exit(1)
