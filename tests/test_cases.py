"""Situations from bug reports of other tools, each a small script that exits 0 when minidiff does what is right.

They take a minute and more together, so they are marked slow: pytest -m slow tests/test_cases.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    done = subprocess.run([sys.executable, path], cwd=path.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
