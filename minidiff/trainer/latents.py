"""Examples -> latents, noise, timesteps and text for the loop; and their cache on the disk (`--cache_dir`).

Samples are numbered through the whole run, and each thing drawn for one (which picture, flip, timestep, noise) is a function
of (seed, its number, purpose). So a resumed run sees what it would have seen, and one batch of 4 is four batches of 1.

Shapes: B samples, 3 H W a picture in [-1, 1], C h w its latent, L tokens, D width of the text.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.core.rng import generator, normal
from minidiff.core.text import embed_sizes
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.draw.canny import canny
from minidiff.draw.images import load_image, load_weights, to_tensor
from minidiff.draw.progress import progress
from minidiff.files.atomic import sha256
from minidiff.files.names import modern
from minidiff.files.weights import read_header, save
from minidiff.trainer.dataset import Example, Size
from minidiff.trainer.settings import ControlNetSettings, FineTuneSettings

Tensors = dict[str, Tensor]
Place = tuple[float, float]  # of a crop, across and down: 0 is left or top, 1 right or bottom
MIDDLE: Place = (0.5, 0.5)
ENOUGH = 5  # pictures, so that one can be held out of the training


def crop(image: Image.Image, size: Size, place: Place = MIDDLE, flip: bool = False) -> Tensor:
    """Shrink until the picture just covers `size`, crop the rest: (3, height, width) in [-1, 1]."""
    width, height, left, top = crop_box(image.size, size, place)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    x = to_tensor(image.crop((left, top, left + size[0], top + size[1])))
    return x.flip(-1) if flip else x


def crop_box(given: Size, size: Size, place: Place) -> tuple[int, int, int, int]:
    """Width and height that a picture of a `given` size is scaled to, and left and top of its crop.

    `place` says where along the longer side the crop lies.
    """
    scale = max(size[0] / given[0], size[1] / given[1])
    width, height = max(size[0], round(given[0] * scale)), max(size[1], round(given[1] * scale))
    return width, height, round(place[0] * (width - size[0])), round(place[1] * (height - size[1]))


def hint_of(example: Example, kind: str | None, size: Size, place: Place = MIDDLE, flip: bool = False) -> Tensor:
    """The hint of a picture that is cropped like this, uint8 (3, height, width): its own file, or made of the `kind`."""
    x = crop(load_image(example.hint or example.path), size, place, flip)
    if kind == "tile":
        small = F.interpolate(x[None], scale_factor=0.25, mode="bicubic", antialias=True)
        x = F.interpolate(small, x.shape[1:], mode="bicubic").clamp(-1, 1)[0]
    pixels = ((x + 1) * 127.5).round().byte()
    return torch.from_numpy(canny(pixels.permute(1, 2, 0).numpy())).expand(3, -1, -1) if kind == "canny" else pixels


def fingerprint(examples: list[Example]) -> str:
    """A hash of all pictures' bytes, captions, masks and repeats, whatever folder they lie in."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(bytes.fromhex(sha256(example.path)) + example.caption.encode() + b"\0")
        for name, file in ((b"mask", example.mask), (b"hint", example.hint)):
            if file:
                sha.update(name + bytes.fromhex(sha256(file)))
        if example.repeats > 1:
            sha.update(f"{example.repeats} times".encode())
    return sha.hexdigest()[:16]


def model_fingerprint(*models: nn.Module) -> str:
    """Tells base models apart, wherever they lie: a hash of the first numbers of each tensor, as loaded here."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():  # modern: transformers 4 and 5 call the text encoder's differently
            digest.update(f"{modern(name)} {tuple(tensor.shape)} {tensor.flatten()[:16].tolist()}".encode())
    return digest.hexdigest()[:16]


def held_out(examples: list[Example], settings: FineTuneSettings) -> tuple[list[Example], list[Example]]:
    """The pictures to train on, and those that only the validation loss sees: --validation_share of five or more."""
    s, count = settings, len(examples)
    measured = s.validation_steps and s.validation_share and not s.validation_data_dir
    few = max(1, round(s.validation_share * count)) if measured and count >= ENOUGH else 0
    chosen = set(torch.randperm(count, generator=generator(s.seed, "held out")).tolist()[:few])
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


# --- the order of an epoch -------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def order(count: int, seed: int, epoch: int) -> list[int]:
    """In which order an epoch goes through `count` pictures."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


@lru_cache(maxsize=16)
def bucketed_order(sizes: tuple[Size, ...], batch_size: int, seed: int, epoch: int) -> list[int]:
    """In which order an epoch goes through pictures of these sizes: batch after batch, each of one size alone.

    Each picture comes once. A bucket's last batch is filled up with pictures of that bucket, which come a second time.
    """
    draws, batches = generator(seed, "bucketed order", epoch), []
    for bucket in sorted(set(sizes)):
        members = [i for i, size in enumerate(sizes) if size == bucket]
        shuffled = [members[k] for k in torch.randperm(len(members), generator=draws).tolist()]
        for first in range(0, len(shuffled), batch_size):
            batches.append([shuffled[k % len(shuffled)] for k in range(first, first + batch_size)])
    return [i for k in torch.randperm(len(batches), generator=draws).tolist() for i in batches[k]]


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """The random choices of a sample, without its noise."""

    picture: int
    place: Place  # of the crop
    flip: bool
    t: Tensor  # (), a whole number
    prompt: str
    unseen: bool  # for an IP-Adapter, which then does not see the picture


class LatentData:
    """The data of every recipe: `batch(step, micro)` gives latents, noise, timesteps and text.

    Prompts are encoded once. With `cache_latents` pictures are, too, to the mean and log-variance of their latents; a latent
    is drawn from these anew each time. `encode_prompts` gives the text of a batch: "text" (B, L, D), for SDXL also "pooled"
    (B, P); or, for a text encoder that is trained itself, "ids" (B, L). With `size_width`, a batch has SDXL's "sizes", too.
    """

    def __init__(
        self,
        examples: list[Example],
        settings: FineTuneSettings,
        resolution: int,
        vae: AutoencoderKL,
        encode_prompts: Callable[[list[str]], Tensors],
        timesteps: int,
        size_width: int | None = None,
        look: Callable[[Path], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.examples, self.settings, self.resolution, self.size_width = examples, settings, resolution, size_width
        self.vae, self.encode, self.timesteps, self.look = vae, encode_prompts, timesteps, look
        self.held_out: list[Example] = []  # of the same folder, for the validation loss alone
        self.turns = [i for i, e in enumerate(examples) for _ in range(e.repeats)]  # an epoch, in no order yet
        self.sizes = [e.size or (resolution, resolution) for e in examples]
        self.sizes_in_turn = tuple(self.sizes[i] for i in self.turns)
        self.samples_per_epoch = len(self._order(0))  # with repeats, and with what fills the last batches of buckets
        prompts = [*(prompt for e in examples for prompt in e.prompts), ""]
        with torch.no_grad():
            rows = {p: {name: row[0].cpu() for name, row in encode_prompts([p]).items()} for p in dict.fromkeys(prompts)}
        self.live_text = "ids" in rows[""]  # the text encoder is trained itself
        self.prompts = rows if self.live_text else {p: {k: x.float() for k, x in row.items()} for p, row in rows.items()}
        seen = progress(examples, "picture", "looking at pictures", show=True) if look else []
        self.e = [look(example.path)[0][0].float().cpu() for example in seen] if look else []
        self.cache: dict[tuple[int, bool], Tensors] = {}
        self.disk = Cache(settings.cache_dir, vae) if settings.cache_dir else None
        if settings.cache_latents:
            for i in progress(range(len(examples)), "picture", "encoding pictures", show=True):
                for flip in (False, True) if settings.random_flip else (False,):
                    self.cache[i, flip] = self._encoded(i, MIDDLE, flip)

    def of(self, examples: list[Example], settings: FineTuneSettings) -> "LatentData":
        """Other pictures, encoded by the same networks."""
        how = self.resolution, self.vae, self.encode, self.timesteps, self.size_width, self.look
        return LatentData(examples, settings, *how)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the data. A resumed run must have the same."""
        return {"pictures": len(self.examples), "data": fingerprint(self.examples), "side": self.resolution}

    def batch(self, step: int, micro: int) -> Tensors:
        """latents (B, C, h, w), scaled; noise, of that shape; t (B,), whole numbers; the text, see above.

        With --masked_loss also mask (B, 1, h, w), the share of each cell that is learnt; for a ControlNet hint (B, 3, H, W) in
        [0, 1]; for an IP-Adapter e (B, 1, E), its view of the picture. All on the CPU.
        """
        samples = [self.sample(number) for number in self.numbers(step, micro)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def numbers(self, step: int, micro: int) -> range:
        """Which samples of the run a batch holds."""
        s = self.settings
        first = (step * s.gradient_accumulation_steps + micro) * s.train_batch_size
        return range(first, first + s.train_batch_size)

    def draw(self, number: int) -> Draw:
        """The random choices of sample `number` of the run: a pure function of (seed, number)."""
        s, (epoch, turn) = self.settings, divmod(number, self.samples_per_epoch)
        i = self.turns[self._order(epoch)[turn]]
        draws = generator(s.seed, "sample", number)
        flip, drop, x, y = torch.rand(4, generator=draws).tolist()
        t = torch.randint(self.timesteps, (), generator=draws)
        prompts = self.examples[i].prompts
        no_text, no_image = s.proportion_empty_prompts, getattr(s, "proportion_empty_images", 0.0)
        prompt = prompts[int(torch.randint(len(prompts), (), generator=draws))] if drop >= no_text else ""
        first = no_text - min(no_text, no_image) / 2  # from here to `no_text` both are missing
        unseen = first <= drop < first + no_image
        return Draw(i, MIDDLE if s.center_crop else (x, y), s.random_flip and flip < 0.5, t, prompt, unseen)

    def sample(self, number: int) -> Tensors:
        """One row of a batch."""
        seed, draw = self.settings.seed, self.draw(number)
        encoded = self._encoded(draw.picture, draw.place, draw.flip)
        shape = encoded["mean"].shape
        z = sample_posterior(encoded["mean"], encoded["logvar"], normal(shape, seed, "posterior", number))
        noise = normal(shape, seed, "noise", number)
        if self.settings.noise_offset:  # also a shift of each whole channel: Guttenberg 2023, "Diffusion with Offset Noise"
            noise = noise + self.settings.noise_offset * normal((shape[0], 1, 1), seed, "noise offset", number)
        return self._row(draw.picture, encoded, z, draw.prompt, not draw.unseen) | {"noise": noise, "t": draw.t}

    def fixed(self, i: int) -> Tensors:
        """Picture `i` with nothing drawn (its middle, the mean of its latent, the first template), without noise and t."""
        encoded = self._encoded(i, MIDDLE, False)
        return self._row(i, encoded, encoded["mean"], self.examples[i].prompts[0])

    def _row(self, i: int, encoded: Tensors, z: Tensor, prompt: str, seen: bool = True) -> Tensors:
        row = {"latents": z * self.vae.config.scaling_factor, **self.prompts[prompt]}
        row |= {"hint": encoded["hint"] / 255} if "hint" in encoded else {}
        row |= {"sizes": embed_sizes(encoded["sizes"][None], self.size_width)[0]} if self.size_width else {}
        row |= {"e": self.e[i] * seen} if self.e else {}
        return row | {"mask": encoded["mask"]} if "mask" in encoded else row

    def _order(self, epoch: int) -> list[int]:
        s = self.settings
        if s.aspect_ratio_buckets:
            return bucketed_order(self.sizes_in_turn, s.train_batch_size, s.seed, epoch)
        return order(len(self.turns), s.seed, epoch)

    def _encoded(self, i: int, place: Place, flip: bool) -> Tensors:
        """A picture's latent as the VAE gives it, "mean" and "logvar" (C, h, w), its "mask" (1, h, w), its "hint" (3, H, W)."""
        if (i, flip) in self.cache:
            return self.cache[i, flip]
        s, example, encode = self.settings, self.examples[i], partial(self._encode, i, place, flip)
        if self.disk is None:
            encoded = encode()
        else:
            mask = sha256(example.mask) if s.masked_loss and example.mask else None
            origin = {"picture": sha256(example.path), "size": self.sizes[i], "place": place, "flip": flip}
            encoded = self.disk.get(origin | {"masked": s.masked_loss, "mask": mask}, encode)
        if isinstance(s, ControlNetSettings):
            encoded["hint"] = hint_of(example, s.hint, self.sizes[i], place, flip)
        return encoded

    @torch.no_grad()
    def _encode(self, i: int, place: Place, flip: bool) -> Tensors:
        example, size, weight = self.examples[i], self.sizes[i], next(self.vae.parameters())
        x = crop(image := load_image(example.path), size, place, flip)  # (3, H, W)
        mean, logvar = self.vae.encode(x[None].to(weight.device, weight.dtype))
        encoded = {"mean": mean[0].float().cpu(), "logvar": logvar[0].float().cpu()}
        width, _, left, top = crop_box(image.size, size, place)
        left = width - size[0] - left if flip else left  # in the flipped picture
        encoded["sizes"] = torch.tensor([*image.size[::-1], top, left, *size[::-1]], dtype=torch.float32)
        if self.settings.masked_loss and example.mask:
            pixels = crop(load_weights(example.mask), size, place, flip)[:1] / 2 + 0.5  # (1, H, W) in [0, 1]
            encoded["mask"] = F.avg_pool2d(pixels, self.vae.config.downscale)  # each cell: the mean of its pixels
        elif self.settings.masked_loss:
            encoded["mask"] = torch.ones_like(encoded["mean"][:1])
        return encoded


# --- the cache on the disk -------------------------------------------------------------------------------------------


class Cache:
    """Encoded pictures in a folder. SettingsError for a folder that cannot be made.

        cache/3f0c…e1.safetensors      one picture's latent, and its mask

    A file's name is the sha256 of everything its numbers come from: the picture's bytes, size, crop and flip; each number of
    the VAE; and the device and versions, on which the last bits depend. So no file is ever out of date. Each is whole or
    absent, and holds the sha256 of its own numbers: where it is damaged, the picture is encoded again.
    """

    def __init__(self, folder: str | Path, vae: nn.Module) -> None:
        self.folder, self.writes, weight = Path(folder), True, next(vae.parameters())
        processor = torch.cuda.get_device_name(weight.device) if weight.is_cuda else platform.machine()
        versions = [torch.__version__, PIL.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        self.surroundings = [digest(vae.state_dict()), processor, *versions]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--cache_dir {self.folder} cannot be a folder for the cache: {error.strerror}.") from error

    def path(self, origin: Mapping[str, Any]) -> Path:
        """The file of what comes from `origin` (JSON)."""
        whole = json.dumps([origin, self.surroundings], sort_keys=True)
        return self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()}.safetensors"

    def get(self, origin: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The tensors of a picture, read if an earlier run made them, else made now."""
        path = self.path(origin)
        with suppress(WeightsError, OSError):
            tensors = (file := read_header(path)).read()
            if file.metadata.get("sha256") == digest(tensors, path.stem):
                return tensors
        tensors = make()
        try:
            if self.writes:
                save(tensors, path, {"sha256": digest(tensors, path.stem)})
        except OSError as error:  # no reason to stop
            print(f"Note: --cache_dir: {path} could not be written ({error.strerror}); going on without.", file=sys.stderr)
            self.writes = False
        return tensors


def digest(tensors: Mapping[str, Tensor], key: str = "") -> str:
    """sha256 of the key, and of names, dtypes, shapes and numbers."""
    sha = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
