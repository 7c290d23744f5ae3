"""The folder of a pivotal run holds a LoRA and a new word. With --lora FOLDER alone the prompt's new word means nothing.

exit 0: drawing says that the folder has a new word too (or uses it); 1: the picture is drawn without it, and nothing is said.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.core.inject import adapter_weights, inject
from minidiff.files.lora_file import save_lora
from minidiff.files.word_file import save_embedding

root, folder = Path(minidiff.__file__).parents[1], Path(tempfile.mkdtemp())
pipe = StableDiffusionPipeline.from_pretrained(root / "checkpoints/pocket")
inject(pipe.unet, 2)
save_lora({f"unet.{name}": weights for name, weights in adapter_weights(pipe.unet).items()}, folder)
save_embedding(folder, "<my-dog>", torch.randn(1, 128))
done = subprocess.run(
    [sys.executable, "-m", "minidiff", "sample", "a photo of <my-dog>", "--lora", folder, "--num_inference_steps", "2", "--output", folder / "a.png"],
    cwd=root, capture_output=True, text=True,
)
said = "\n".join(line for line in (done.stdout + done.stderr).replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line)
print(sorted(p.name for p in folder.iterdir()), said, sep="\n")
sys.exit("learned_embeds" not in said and "<my-dog>" not in said and "textual" not in said)
