"""A1111's .pt of a new word: `inspect` names a command; following it, the new word must still be usable under its own name.

exit 0: it is; 1: the file that comes out teaches the word "string_to_param/*", so a prompt with the real name draws without it.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import minidiff
from minidiff import StableDiffusionPipeline

root, folder = Path(minidiff.__file__).parents[1], Path(tempfile.mkdtemp())
vectors = torch.randn(2, 128) * 0.02
torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "mydogword", "step": 10}, folder / "mydogword.pt")


def cli(*words):
    done = subprocess.run([sys.executable, "-m", "minidiff", *map(str, words)], cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


_, said = cli("inspect", folder / "mydogword.pt")
print("inspect says:", said.strip())
hint = re.search(r"minidiff (convert .*)", said)[1].replace("NEW.safetensors", str(folder / "new.safetensors"))
print("so we do:    minidiff", hint, "->", cli(*hint.split())[0])
pipe = StableDiffusionPipeline.from_pretrained(root / "checkpoints/pocket")
try:
    print(pipe.load_textual_inversion(folder / "new.safetensors"))
except Exception as error:
    print("loading it is refused:", error)
    sys.exit(0)
print("words now known:", list(pipe.placeholders))
sys.exit(any("string_to_param" in word for word in pipe.placeholders))
