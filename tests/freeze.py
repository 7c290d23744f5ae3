"""Freeze what minidiff does today, to compare after a change that must not change it.

    python tests/freeze.py before; (change something); python tests/freeze.py after; diff -r before after

Through the command line and the public names alone: pictures, three updates of every recipe with its checkpoint, files that
are converted, key names of the networks, and every help text. A picture is compared by its pixels, a safetensors file by its
tensors; so only numbers count, and not the paths that stand in metadata.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOG = ["--instance_data_dir", str(ROOT / "lessons/data/dog"), "--instance_prompt", "a photo of a sks dog"]
CHALK = ["--train_data_dir", str(ROOT / "lessons/data/chalk")]
SHORT = ["--max_train_steps", "3", "--train_batch_size", "2", "--checkpointing_steps", "3"]
TRAINING = {
    "full": ["full", *CHALK, "--max_grad_norm", "0.5", "--lr_scheduler", "cosine"],
    "full_text": ["full", *DOG, "--train_text_encoder", "--use_ema", "--gradient_accumulation_steps", "2"],
    "full_8bit": ["full", *DOG, "--use_8bit_adam", "--optimizer_in_backward", "--mixed_precision", "bf16"],
    "dreambooth": ["dreambooth", *DOG, "--class_prompt", "a photo of a dog", "--num_class_images", "2",
                   "--class_data_dir", "class"],
    "lora": ["lora", *DOG, "--rank", "4"],
    "lora_all": ["lora", *DOG, "--rank", "2", "--lora_targets", "attention", "feed_forward", "resnets",
                 "--lora_dropout", "0.1"],
    "lora_lean": ["lora", *DOG, "--rank", "4", "--gradient_checkpointing", "--layerwise_casting", "--snr_gamma", "5"],
    "dora": ["lora", *DOG, "--rank", "4", "--use_dora", "--use_rslora", "--with_prior_preservation",
             "--prior_from_base", "--class_prompt", "a photo of a dog"],
    "word": ["textual_inversion", *DOG[:2], "--placeholder_token", "<sks>", "--initializer_token", "dog"],
    "pivotal": ["pivotal", *DOG[:2], "--placeholder_token", "<sks>", "--initializer_token", "dog", "--rank", "2"],
}
DOG_RED = "a photo of a red dog on the beach"
SAMPLERS = ("ddpm", "ddim", "pndm", "euler_a", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc", "lcm")
PICTURES = {
    **{name: [DOG_RED, "--sampler", name] for name in SAMPLERS},
    "euler": [DOG_RED, "--sampler", "euler", "--use_karras_sigmas", "True", "--timestep_spacing", "trailing"],
    "two": [DOG_RED, "--num_images_per_prompt", "2"],
    "weights": ["a photo of a (red:1.4) dog [on] the beach BREAK snow", "--negative_prompt", "blue", "--guidance_scale", "3"],
    "wide": [DOG_RED, "--width", "192", "--height", "136"],
    "lora": ["a photo of a sks dog", "--lora", "lora", "--lora_weight", "0.7"],
    "dora": ["a photo of a sks dog", "--lora", "dora", "lora_all", "--lora_weight", "0.7", "0.5"],
    "word": ["a photo of a <sks>", "--textual_inversion", "word"],
    "image": [DOG_RED, "--image", str(ROOT / "lessons/data/dog/01.png"), "--resize", "--strength", "0.6"],
    "mask": [DOG_RED, "--image", "ddim.png", "--mask_image", "white.png", "--strength", "0.9"],
    "tiles": [DOG_RED, "--image", "ddim.png", "--width", "256", "--height", "256", "--tile_size", "128", "--strength", "0.5"],
}
FILES = {
    "kohya": ["convert", "lora", "kohya.safetensors", "--to", "kohya"],
    "peft": ["convert", "lora_all", "peft", "--to", "peft"],
    "diffusers": ["convert", "dora", "diffusers.safetensors", "--to", "diffusers"],
    "bake": ["merge", "bake", "--lora", "lora", "dora", "--lora_weight", "0.8", "0.5", "--output", "baked"],
    "join": ["merge", "join", "--lora", "lora", "lora_all", "--output", "joined.safetensors"],
    "single": ["merge", "bake", "--lora", "lora", "--output", "single.safetensors"],
}
HELP = ["", "sample", "sheet", "morph", "filmstrip", "attention", "tokens", "train full", "train dreambooth", "train lora",
        "train textual_inversion", "train pivotal", "data check", "inspect", "convert", "merge bake", "merge join",
        "merge extract", "merge resize", "ladder", "lesson", "bench", "pretrain", "judge"]  # fmt: skip


def minidiff(home: Path, arguments: list[str]) -> str:
    """One command in `home`; its exit code and its last words, where it failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "minidiff", *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = done.stdout[-500:] + done.stderr[-1500:]
        print(f"exit {done.returncode}: minidiff {' '.join(arguments)}\n{words}", file=sys.stderr)
    return done.stdout


def tensors(path: Path) -> str:
    """A hash of the names, shapes, dtypes and numbers of a safetensors file."""
    from safetensors.torch import load_file

    rows = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        rows.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        rows.update(tensor.contiguous().flatten().view(-1).numpy(force=True).tobytes() if tensor.dtype.itemsize != 2 or
                    not tensor.dtype.is_floating_point else tensor.float().numpy().tobytes())  # fmt: skip
    return rows.hexdigest()[:16]


def pixels(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()[:16]}"


def freeze(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    from PIL import Image, ImageDraw

    (home / "checkpoints").symlink_to(ROOT / "checkpoints") if not (home / "checkpoints").exists() else None
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((30, 40, 90, 100), fill=255)
    mask.save(home / "white.png")
    with ThreadPoolExecutor(2) as pool:
        help_texts = list(pool.map(lambda name: minidiff(home, [*name.split(), "--help"]), HELP))
        list(pool.map(lambda job: minidiff(home, ["train", *job[1], *SHORT, "--output_dir", job[0]]), TRAINING.items()))
        how = ["--num_inference_steps", "6", "--seed", "3"]
        list(pool.map(lambda job: minidiff(home, ["sample", *job[1], *how, "--output", job[0] + ".png"]), PICTURES.items()))
        list(pool.map(lambda arguments: minidiff(home, arguments), FILES.values()))
        resumed = ["train", *TRAINING["lora"], *SHORT[2:], "--max_train_steps", "5", "--resume_from_checkpoint", "latest"]
        minidiff(home, [*resumed, "--output_dir", "lora"])
    (home / "report").mkdir(exist_ok=True)
    for name, text in zip(HELP, help_texts):
        (home / "report" / f"help {name}.txt").write_text(text)
    found = {str(p.relative_to(home)): pixels(p) for p in home.rglob("*.png")}
    found |= {str(p.relative_to(home)): tensors(p) for p in home.rglob("*.safetensors") if "checkpoints/pocket" not in str(p)}
    (home / "report" / "numbers.txt").write_text("".join(f"{name}: {value}\n" for name, value in sorted(found.items())))
    (home / "report" / "keys.txt").write_text(keys())


def keys() -> str:
    """The names and shapes of the networks' tensors."""
    from minidiff import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(ROOT / "checkpoints/pocket"))
    parts = {"unet": pipe.unet, "vae": pipe.vae}
    return "".join(f"{p}.{name} {tuple(t.shape)}\n" for p, net in parts.items() for name, t in net.state_dict().items())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    freeze(Path(sys.argv[1]).resolve())
