"""LoRAs for drawing in few steps: the sampler and settings that each was distilled for. Only their names tell."""

import re
from pathlib import Path

TRAILING = "--timestep_spacing trailing --num_inference_steps {0}"
FLAGS = {  # by the publisher's names of files and repositories; the first that fits. {0}: the number in the name
    r"hyper-?sd.*?\b(\d+)-?steps?-cfg": f"--sampler ddim {TRAILING} --guidance_scale 5",
    r"hyper-?sd.*?\b(1)-?step\b": "--sampler tcd --eta 1 --num_inference_steps {0} --guidance_scale 0",  # one file for 1 to 8
    r"hyper-?sd.*?\b(\d+)-?steps?\b": f"--sampler ddim {TRAILING} --guidance_scale 0",
    r"lightning.*?(?<!\d)(\d+)-?steps?": f"--sampler euler {TRAILING} --guidance_scale 0",
    r"\btcd\b": "--sampler tcd --eta 0.3 --num_inference_steps 4 --guidance_scale 0",
    r"\blcm\b": "--sampler lcm --num_inference_steps 4 --guidance_scale 1",
}


def suggestion(path: Path) -> str | None:
    """The flags with which a model draws with this LoRA; None for one that is not known to be for few steps.

    The name of the file counts, or else that of its folder; in the hub's cache, of the repository.
    """
    for name in (path.stem, path.parent.name, path.parts[-4] if len(path.parts) > 3 else ""):
        for pattern, flags in FLAGS.items():
            if found := re.search(pattern, name.lower().replace("_", "-")):
                return flags.format(*found.groups())
    return None
