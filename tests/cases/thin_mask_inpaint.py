"""Inpainting along a thin stroke (a scratch, a wire): white pixels of the mask must be drawn anew.

exit 0: the stroke is really drawn anew; 1: the pixels under the stroke come back as they were, without a word.
"""
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

import minidiff
from minidiff import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")
pipe.set_progress_bar_config(disable=True)
photo = pipe("a photo of a red dog on the beach", seed=3, num_inference_steps=8).images[0]
old = np.asarray(photo).copy()
bad = 0
for width in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32):
    stroke = np.zeros((128, 128), np.uint8)
    stroke[64 : 64 + width, 8:120] = 255
    scratched = old.copy()
    scratched[stroke > 0] = (255, 0, 255)  # a magenta scratch across the picture
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            new = pipe(
                "a photo of a red dog on the beach",
                image=Image.fromarray(scratched),
                mask_image=Image.fromarray(stroke),
                num_inference_steps=8,
                seed=1,
            ).images[0]
        except Exception as error:
            print(f"{width:2d} px: refused, which is honest: {error}")
            continue
    new = np.asarray(new)
    inside = (new[stroke > 0].astype(int) == (255, 0, 255)).all(-1).mean()
    left = 1 - np.abs(new[stroke > 0].astype(float) - (255, 0, 255)).mean() / np.abs(old[stroke > 0].astype(float) - (255, 0, 255)).mean()
    print(f"{width:2d} px: {inside:.0%} of the white pixels are exactly the scratch still; about {max(left, 0):.0%} of it left; warnings {len(said)}")
    bad += left > 0.5 and not said
sys.exit(bool(bad))
