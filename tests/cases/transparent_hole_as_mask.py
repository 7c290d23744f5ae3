"""The picture itself with a hole erased in it, given as the mask: editors save the place to be drawn so, and several programs
take transparent for "draw here". minidiff lays it over black and looks at brightness.

exit 0: the hole is drawn and the rest kept, or it is said how the alpha channel is taken; 1: silently the other way around.
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
alpha = np.full((128, 128), 255, np.uint8)
alpha[32:96, 32:96] = 0
holed = Image.merge("RGBA", [*photo.split(), Image.fromarray(alpha)])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        new = pipe("a photo", image=photo, mask_image=holed, num_inference_steps=4, seed=1).images[0]
    except Exception as error:
        print("refused:", error)
        sys.exit(0)
changed = np.abs(np.asarray(new).astype(int) - np.asarray(photo)).sum(-1) > 0
inside, outside = changed[alpha == 0].mean(), changed[alpha > 0].mean()
print(f"changed in the hole {inside:.0%}, outside it {outside:.0%}; warnings {len(said)}")
sys.exit(bool(outside > inside and not said))  # numpy's own False would be printed, and exit with 1
