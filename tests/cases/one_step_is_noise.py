"""One or two steps, as with distilled models: what is drawn must be a picture, or the person must hear why it is none.

exit 0: with every sampler 1 step gives something about as smooth as a picture, or a warning or an error is heard.
"""
import sys
import warnings
from pathlib import Path

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.core.grids import SAMPLERS

pipe = StableDiffusionPipeline.from_pretrained(Path(minidiff.__file__).parents[1] / "checkpoints/pocket")
pipe.set_progress_bar_config(disable=True)


def draw(sampler, steps):
    return pipe("a photo of a red dog on the beach", seed=1, num_inference_steps=steps, guidance_scale=3, sampler=sampler, output_type="pt").images


def roughness(x):  # mean step between neighbouring pixels
    return (x[..., 1:] - x[..., :-1]).abs().mean().item()


usual = draw("ddim", 20)
print(f"20 steps of ddim, the default: roughness {roughness(usual):.3f}, spread {usual.std():.2f}")
bad = 0
for sampler in SAMPLERS:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            x = draw(sampler, 1)
        except Exception as error:
            print(sampler, "refused:", error)
            continue
    noise, blank = roughness(x) > 2.5 * roughness(usual), x.std() < 0.35 * usual.std()
    print(f"1 step of {sampler}: roughness {roughness(x):.3f}, spread {x.std():.2f}{' NOISE' * noise}{' BLANK' * bool(blank)}; warnings: {len(said)}")
    bad += bool(noise or blank) and not said
sys.exit(bool(bad))
