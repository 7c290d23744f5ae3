"""Errors that a person can mend: the message says what is wrong, in which file or flag, and what to do. Others are bugs."""

import difflib
from collections.abc import Iterable


class MinidiffError(Exception):
    """Bad input of any kind; `str(error)` is the whole message."""


class WeightsError(MinidiffError):
    """A model file or folder is missing, damaged, foreign, or does not fit the model."""


class AdapterError(MinidiffError):
    """A LoRA file or its settings do not fit the model."""


class DataError(MinidiffError):
    """A picture, a caption, or a folder of them cannot be used."""


class SettingsError(MinidiffError):
    """A flag or an argument has a value that cannot work."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as ` Did you mean "ddim"?`, or an empty string where nothing is near."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f' Did you mean "{known[near[0]]}"?' if near else ""
