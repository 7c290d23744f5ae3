"""The pocket checkpoint, the lessons and their pictures travel with the package, and are found wherever one stands."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE / "bundled" if (PACKAGE / "bundled").is_dir() else PACKAGE.parent  # in a wheel; in a checkout
FOLDERS = ("checkpoints", "lessons")


def here_or_bundled(path: str | Path) -> Path:
    """The path itself if it exists; else what the package has under that name, such as checkpoints/pocket."""
    ours = os.path.normpath(path).split(os.sep)[0] in FOLDERS
    return HOME / path if ours and not Path(path).exists() and (HOME / path).exists() else Path(path)
