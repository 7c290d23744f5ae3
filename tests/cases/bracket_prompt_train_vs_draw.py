"""A subject's name in square brackets, as papers write it, or a tag with a name in round ones.

Training reads captions letter by letter, drawing reads brackets as weights. The same text must mean the same in both, or
somebody must say so: with the text that was trained, the trained words have to be reached.
exit 0: the prompt that the model card and the validation sheet use gives what training saw, or a warning is heard.
"""
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

from PIL import Image

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.trainer import task as common
from minidiff.trainer.settings import LoRASettings
from minidiff.trainer.validation import Sheets

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")
bad = 0
for prompt in ("a photo of [V] dog", "a dog (sks)", "a photo of mika (blue archive)"):
    folder = tempfile.mkdtemp()
    Image.new("RGB", (128, 128), (200, 30, 30)).save(f"{folder}/a.png")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        settings = LoRASettings(instance_data_dir=folder, instance_prompt=prompt, output_dir=folder + "/out", validation_steps=1)
        settings.check()
        data = common.load_data(pipe, settings)
        trained = data.prompts[prompt]["text"]
        asked = []  # what the validation sheet asks the pipeline to draw
        real = StableDiffusionPipeline.__call__
        try:
            StableDiffusionPipeline.__call__ = lambda self, prompt, **k: (asked.append(prompt), type("o", (), {"images": [Image.new("RGB", (8, 8))]}))[1]
            Sheets(pipe, settings, data)
        finally:
            StableDiffusionPipeline.__call__ = real
        drawn = pipe.encode_prompt([asked[0]])[0]
    away = ((trained - drawn).norm() / trained.norm()).item()
    heard = any("bracket" in str(w.message) or "weigh" in str(w.message) for w in warned) or "bracket" in said.getvalue()
    print(f"{prompt!r}: what is drawn for the sheet is {away:.0%} away from what was trained; warned: {heard}")
    bad += away > 1e-3 and not heard
sys.exit(bool(bad))
