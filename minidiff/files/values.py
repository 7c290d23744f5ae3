"""Rules for the values of a settings dataclass, declared beside the types: `rank: Annotated[int, at_least(1)] = 4`.

`Flags.check` reads types and rules from the fields, so each range is written once.
"""

import ast
import inspect
import json
import math
import os
import re
import textwrap
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.files.bundled import here_or_bundled

T = TypeVar("T")
POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]  # for a field whose value stands on the command line without a flag
ELSEWHERE = {  # names in other programs -> ours, the first that the command has
    "steps": "num_inference_steps max_train_steps", "cfg": "guidance_scale", "cfg_scale": "guidance_scale",
    "scheduler": "sampler", "scale": "guidance_scale", "model": "pretrained_model_name_or_path", "init_image": "image",
    "init_img": "image", "denoising_strength": "strength", "n_iter": "num_images_per_prompt", "negative": "negative_prompt",
    "mask": "mask_image", "batch_size": "train_batch_size num_images_per_prompt", "num_images": "num_images_per_prompt",
    "lr": "learning_rate", "epochs": "num_train_epochs", "network_dim": "rank", "lora_rank": "rank",
    "network_alpha": "lora_alpha", "out": "output", "lora_scale": "lora_weight", "embedding": "textual_inversion",
    "dtype": "torch_dtype mixed_precision", "data": "train_data_dir", "sampler_name": "sampler",
    "timesteps": "timestep_spacing", "sigmas": "use_karras_sigmas",
}  # fmt: skip
INSTEAD = {"device_map": "pipe.to(device)", "lora_scale": 'cross_attention_kwargs={"scale": 0.8}'}  # in Python


class Rule(NamedTuple):
    """A condition, and the words for it: "must be at least 1"."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    return Rule(f"must be at least {least}", lambda value: value >= least)


def between(least: float, most: float) -> Rule:
    return Rule(f"must lie in {least} … {most}", lambda value: least <= value <= most)


POSITIVE = Rule("must be a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("must not be negative", lambda value: 0 <= value < math.inf)
FINITE = Rule("must be a finite number", lambda value: -math.inf < value < math.inf)
BELOW_ONE = Rule("must lie in [0, 1)", lambda value: 0 <= value < 1)
A_FOLDER = Rule("must name a folder", lambda value: bool(value.strip()))
A_PATH = Rule("must name a file or folder", lambda value: bool(value.strip()))
NO_NUL = Rule("cannot hold a NUL character", lambda value: "\0" not in value)


class Flags:
    """The base of a command's settings, which are frozen dataclasses."""

    def check(self) -> None:
        """Raise SettingsError, naming the flag, for the first field whose value breaks a rule."""
        settings: Any = self
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(settings):
            value = getattr(self, field.name)
            if broken := broken_rule(value, hints[field.name]):
                raise SettingsError(f"--{field.name} {broken}; it is {value!r}.")


def broken_rule(value: Any, hint: Any) -> str | None:
    """The words of the first rule of the type `hint` that `value` breaks; None if it keeps all of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if origin is Annotated:
        rules = (rule for rule in arguments[1:] if isinstance(rule, Rule))
        return next((rule.words for rule in rules if not rule.holds(value)), None) or broken_rule(value, arguments[0])
    if origin is Literal:
        words = f"must be one of {', '.join(arguments)}.{did_you_mean(str(value), arguments)}".rstrip(".")
        return None if value in arguments else words
    if origin is tuple:
        return next(filter(None, (broken_rule(one, arguments[0]) for one in value)), None)
    if origin in (Union, UnionType):  # X | None
        return broken_rule(value, arguments[0])
    return NO_NUL.words if isinstance(value, str) and not NO_NUL.holds(value) else None


def fits(value: Any, hint: Any) -> bool:
    """Can a field of this type hold the value, which was read from JSON or TOML?"""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(fits(v, get_args(hint)[0]) for v in value)
    if get_args(hint):  # X | None
        return any(fits(value, one) for one in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int) or (value is None and hint is type(None))


def same_name(path: Path) -> Path:
    """The file of that name whatever the Unicode form of its accents; the path itself if there is none."""
    name, folder = unicodedata.normalize("NFC", path.name), path.parent
    beside = folder.iterdir() if not os.path.exists(path) and os.path.isdir(folder) else ()
    return next((one for one in beside if unicodedata.normalize("NFC", one.name) == name), path)


def near_path(path: str) -> str:
    """A hint such as ` Did you mean "dog"?`, from the names beside a path that does not exist."""
    parent, ours = here_or_bundled(Path(path).parent), f"checkpoints/{path}"
    if here_or_bundled(ours).exists():
        return f' Did you mean "{ours}"?'
    names = [one.name for one in parent.iterdir()] if parent.is_dir() else []
    return did_you_mean(Path(path).name, [name for name in names if name != Path(path).name])  # its own: a broken link


def check_names(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """SettingsError for a name that is not known, with minidiff's name for it. A value of None asks for nothing."""
    if wrong := next((name for name, value in given.items() if value is not None and name not in known), None):
        ours = INSTEAD.get(wrong) or our_name(wrong, known)
        raise SettingsError(f"{where} has no {wrong}.{f' Did you mean {ours}?' if ours else ''}")


def our_name(name: str, known: Collection[str]) -> str:
    """Of the known names the one for a name of other programs, or the nearest; "" if none is near."""
    elsewhere = {other: one for other, names in ELSEWHERE.items() for one in reversed(names.split()) if one in known}
    near = did_you_mean(name, [*elsewhere, *known]).split('"')
    return elsewhere.get(near[1], near[1]) if len(near) > 1 else ""


def texts_of(kind: type) -> dict[str, str]:
    """The string under each field; a subclass that only changes a default inherits it."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, below in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return texts


def listed(what: str, names: Iterable[str]) -> str:
    """Such as `  3 missing: a, b, c`; ten names at most."""
    names = sorted(f"{name:.200}" for name in names)
    return f"  {len(names)} {what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"


def printable(text: str) -> str:
    """With control characters as `\\x1b`: names and texts in files could otherwise write over what the terminal shows."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def to_toml(settings: Any, without: Collection[str] = ()) -> str:
    """The settings as a TOML file that `from_toml` reads; `without` some fields, and without those that are None."""
    rows = {k: v for k, v in asdict(settings).items() if v is not None and k not in without}
    lines = "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in rows.items())
    return lines.replace("\x7f", "\\u007f")  # JSON allows this one character unescaped, TOML does not


def from_toml(kind: type[T], path: Path) -> T:
    """Settings from a TOML file. Raises SettingsError for an unknown key, or a value of the wrong type."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read as TOML settings: {error}.") from error
    return settings_from(kind, values, str(path))


def settings_from(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Settings from values by name, with lists for tuples. Raises SettingsError as `from_toml` does; `where` they stand."""
    hints = get_type_hints(kind)
    check_names(where, values, [field.name for field in fields(kind)])  # type: ignore[arg-type]
    for name, value in values.items():
        if not fits(value, hints[name]):
            kind_of = hints[name].__name__ if type(hints[name]) is type else str(hints[name]).replace("typing.", "")
            raise SettingsError(f"{where}: {name} = {value!r:.60} has the wrong type; it must be {kind_of}.")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**given)
