"""README's sheet of pictures as conditions: python lessons/data/conditions.py

Above, edges hold the layout, and three prompts fill it; below, a picture is drawn again in three styles.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from minidiff import ControlNetModel, StableDiffusionPipeline
from minidiff.draw.canny import canny
from minidiff.draw.images import contact_sheet
from minidiff.pocket.world import Picture, draw

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parents[1] / "checkpoints"
PROMPTS = (
    "a photo of a red cat in the snow",
    "a watercolor of a green cat in a meadow",
    "a drawing of an orange cat on the beach",
)
STYLES = "a photo", "a watercolor", "a pixel art"

edges = Image.fromarray(canny(np.asarray(draw(Picture("cat", "cyan", "snow", "photo"), 3)))).convert("RGB")
controlled = StableDiffusionPipeline.from_pretrained(
    CHECKPOINTS / "pocket", controlnet=ControlNetModel.from_pretrained(CHECKPOINTS / "pocket-canny")
)
held = controlled(PROMPTS, control_image=edges, guidance_scale=5.0, seed=[1, 1, 1]).images

mushroom = draw(Picture("mushroom", "red", "meadow", "photo"), 1)
looking = StableDiffusionPipeline.from_pretrained(CHECKPOINTS / "pocket")
looking.load_ip_adapter(CHECKPOINTS / "pocket-ip")
looking.set_ip_adapter_scale(0.8)
like_it = looking(STYLES, ip_adapter_image=mushroom, guidance_scale=6.0, seed=[2, 2, 2]).images

rows = [["edges, for a ControlNet", *PROMPTS], [edges, *held], ["a picture, for an IP-Adapter", *STYLES], [mushroom, *like_it]]
contact_sheet(rows, tile=192).save(HERE / "conditions.png")
