"""The settings of the pocket world's own commands. Nothing here imports torch, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args

from minidiff.files.values import A_FOLDER, Flags, Positional, Rule, between

Stage = Literal["world", "vae", "latents", "decoder", "clip", "unet", "assemble", "judge", "student", "ip", "canny"]
STAGES: tuple[Stage, ...] = get_args(Stage)
USUAL = STAGES[: STAGES.index("student")]
Count = Annotated[int, between(1, 10_000_000)]
Method = Literal["full", "dreambooth", "lora", "lora-prior", "dora", "locon"]
METHODS: tuple[Method, ...] = get_args(Method)
A_PROMPT = Rule("must be a text", lambda value: bool(value.strip()))
PROBES = (  # things of the pocket's world, alike and unlike the dog
    *("a photo of a red car on the beach", "a photo of a brown dog in the snow"),
    *("a drawing of a blue cat in a room", "a watercolor of a green house in a meadow"),
)
NUMBERS: dict[str, tuple[Any, Any]] = {  # flag -> its default with --profile cpu, gpu
    "mixed_precision": ("no", "bf16"),
    "vae_steps": (12_000, 6000),
    "decoder_steps": (4000, 2000),
    "vae_batch": (4, 32),
    "clip_steps": (800, 1500),
    "unet_steps": (12_000, 8000),
    "unet_batch": (48, 256),
    "student_steps": (500, 1000),
    "student_batch": (16, 64),
    "ip_steps": (3000, 3000),
    "ip_batch": (16, 64),
    "control_steps": (2000, 3000),
    "control_batch": (16, 64),
}


@dataclass(frozen=True)
class PretrainSettings(Flags):
    """Train the pocket checkpoint from random numbers: draw a world, then train VAE, CLIP and U-Net on it."""

    output_dir: str = "pocket-pretrain"
    """Folder for all stages. Run the same command again to continue."""
    stages: Annotated[tuple[Stage, ...], Rule(f"names none; there are {', '.join(STAGES)}", bool)] = USUAL
    """Which stages to run, in this order. A finished stage is skipped. Default: all but `student`, a LoRA for few steps,
    `ip`, an IP-Adapter, and `canny`, a ControlNet."""
    init_from: str | None = None
    """Start from this checkpoint instead of from random numbers, to train it further."""
    device: str | None = None
    """Where to train: cpu or cuda. Default: cuda if there is a GPU."""
    profile: Literal["cpu", "gpu"] = "cpu"
    """Which numbers the flags below have by default: for CPU cores and a night, or for a GPU of 24 GB and half an hour."""
    pictures: Count = 30_000
    """Number of drawn training pictures (49 kB each on disk)."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Number format of the forward passes. Default: no; bf16 with --profile gpu. (On a CPU bf16 needs AVX512_BF16.)"""
    vae_steps: Count | None = None
    """Updates of the autoencoder. Default: 12000; 6000 with --profile gpu."""
    decoder_steps: Count | None = None
    """Updates of the decoder alone. Default: 4000; 2000 with --profile gpu."""
    vae_batch: Count | None = None
    """Pictures in each update of autoencoder or decoder. Default: 4; 32 with --profile gpu."""
    clip_steps: Count | None = None
    """Updates of the two CLIP towers, with 96 pairs in each. Default: 800; 1500 with --profile gpu."""
    unet_steps: Count | None = None
    """Updates of the U-Net. Default: 12000; 8000 with --profile gpu."""
    unet_batch: Count | None = None
    """Latents in each update of the U-Net. Default: 48; 256 with --profile gpu."""
    student_steps: Count | None = None
    """Updates of the LoRA for few steps. Default: 500; 1000 with --profile gpu."""
    student_batch: Count | None = None
    """Latents in each update of that LoRA. Default: 16; 64 with --profile gpu."""
    ip_steps: Count | None = None
    """Updates of the IP-Adapter. Default: 3000."""
    ip_batch: Count | None = None
    """Latents in each update of the IP-Adapter. Default: 16; 64 with --profile gpu."""
    control_steps: Count | None = None
    """Updates of a ControlNet. Default: 2000; 3000 with --profile gpu."""
    control_batch: Count | None = None
    """Latents in each update of a ControlNet. Default: 16; 64 with --profile gpu."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Output of the U-Net. A U-Net of --init_from that predicts something else learns it anew from its weights."""
    seed: int = 0
    """Seed of all random values."""

    @property
    def home(self) -> Path:
        return Path(self.output_dir)

    @property
    def sizes(self) -> Any:
        """The profile's numbers, and in their place those that are given."""
        usual = {name: gpu if self.profile == "gpu" else cpu for name, (cpu, gpu) in NUMBERS.items()}
        given = {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}
        return SimpleNamespace(**(usual | given))


@dataclass(frozen=True)
class LadderSettings(Flags):
    """Train a subject with every method, and compare their cost and their results."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model. Its folder needs an image_encoder, which compares the pictures."""
    instance_data_dir: str = "lessons/data/dog"
    """Folder of the subject's pictures."""
    output_dir: Annotated[str, A_FOLDER] = "outputs/ladder"
    """Folder for ladder.md, ladder.png and a folder for each method."""
    rungs: tuple[str, ...] = ()
    """Which methods. Default: all."""


@dataclass(frozen=True)
class ForgettingSettings(Flags):
    """Train a subject with several methods, and draw curves of what each learns and what it forgets meanwhile."""

    pretrained_model_name_or_path: str = "checkpoints/pocket"
    """The base model. Its folder needs an image_encoder, which compares the pictures."""
    instance_data_dir: str = "lessons/data/dog"
    """Folder of the subject's pictures."""
    instance_prompt: Annotated[str, A_PROMPT] = "a photo of a sks dog"
    """The subject's prompt, in training and in drawing."""
    class_prompt: Annotated[str, A_PROMPT] = "a photo of a dog"
    """Prompt of the class that dreambooth and lora-prior rehearse, so as not to forget it."""
    methods: Annotated[tuple[Method, ...], Rule(f"names none; there are {', '.join(METHODS)}", bool)] = METHODS[:4]
    """Which methods: full, dreambooth, lora, lora-prior, dora, locon (a LoRA with convolutions)."""
    probes: Annotated[tuple[Annotated[str, A_PROMPT], ...], Rule("names none; give one prompt or more", bool)] = PROBES
    """Prompts without the subject. What is drawn from them should not change. Default: four of the pocket's world."""
    max_train_steps: Count = 200
    """Updates of each method. A higher number goes on where the last run ended."""
    every: Count = 50
    """Measure after every so many updates."""
    num_images_per_prompt: Count = 2
    """Pictures of each prompt in each measurement, with the seeds 0, 1, …"""
    num_inference_steps: Annotated[int, between(1, 1000)] = 25
    """Sampler steps for each picture."""
    num_class_images: Count = 40
    """Class pictures that the base draws for dreambooth."""
    output_dir: Annotated[str, A_FOLDER] = "outputs/forgetting"
    """Folder for forgetting.png, forgetting.md and a folder for each method, with its model and sheets of the probes."""


@dataclass(frozen=True)
class JudgeSettings(Flags):
    """Score a pocket checkpoint: does it draw what unseen prompts say, and how sharp is its autoencoder?"""

    folder: Positional[str] = "checkpoints/pocket"
    """The checkpoint."""
    count: Annotated[int, between(1, 512)] = 500
    """How many unseen prompts to draw. There are 512."""
    judge: str = "outputs/judge.safetensors"
    """The classifier. It is trained first if the file does not exist."""
    guidance_scale: Annotated[float, between(0, 100)] = 5.0
    """How strongly the scored pictures follow their prompts."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Number format in which the classifier is trained. bf16 takes half as long on a CPU with AVX512_BF16."""
