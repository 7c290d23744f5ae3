"""Errors that a person can mend: the message says what is wrong, where, and what to do. Other errors are bugs."""

import difflib
from collections.abc import Iterable


class MinidiffError(Exception):
    """Bad input of any kind; `str(error)` is the whole message."""


class WeightsError(MinidiffError):
    """Weights are missing, damaged, foreign, or do not fit the model."""


class AdapterError(MinidiffError):
    """An adapter or its settings do not fit the model."""


class DataError(MinidiffError):
    """A picture or a caption cannot be used."""


class SettingsError(MinidiffError):
    """An argument has a value that cannot work."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as ` Did you mean "ddim"?`, or an empty string where nothing is near."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f' Did you mean "{known[near[0]]}"?' if near else ""
