"""A training mask painted on a transparent layer: white where to learn, transparent elsewhere (how editors save a selection).

exit 0: the transparent part is not learnt (or the file is refused, or a note is given); 1: the mask is silently the whole picture.
"""
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.trainer import task as common
from minidiff.trainer.settings import LoRASettings

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")


def mask_seen(mask):
    folder = tempfile.mkdtemp()
    Image.new("RGB", (128, 128), (200, 30, 30)).save(f"{folder}/a.png")
    mask.save(f"{folder}/a.mask.png")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = common.load_data(pipe, LoRASettings(instance_data_dir=folder, instance_prompt="a dog", masked_loss=True, output_dir=folder + "/out"))
    notes = [line for line in said.getvalue().replace("\r", "\n").splitlines() if line.startswith("Note")]
    return data.fixed(0)["mask"][0].numpy(), notes


shape = np.zeros((128, 128), np.uint8)
shape[32:96, 32:96] = 255
white = Image.new("L", (128, 128), 255)
plain, _ = mask_seen(Image.fromarray(shape))
bad = 0
for name, mask in {
    "white on transparent (RGBA)": Image.merge("RGBA", [white, white, white, Image.fromarray(shape)]),
    "white on transparent (LA)": Image.merge("LA", [white, Image.fromarray(shape)]),
}.items():
    try:
        seen, notes = mask_seen(mask)
    except Exception as error:
        print(f"{name}: refused: {error}")
        continue
    print(f"{name}: share learnt {seen.mean():.2f}, of an opaque mask of that shape {plain.mean():.2f}; notes {notes}")
    bad += abs(seen.mean() - plain.mean()) > 0.05 and not notes
sys.exit(bool(bad))
