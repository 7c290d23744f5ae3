"""A caption file with several lines, each a caption of its own (other programs take the first, or draw one each time).

exit 0: one line is taken at a time, or it is said that all are joined; 1: they are joined to one caption without a word.
"""
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from minidiff.trainer.dataset import read_folder

top, said = Path(tempfile.mkdtemp()), io.StringIO()
Image.new("RGB", (128, 128)).save(top / "a.png")
(top / "a.txt").write_text("a red square\na square of red colour on white\n1sq, red, white background\n")
with contextlib.redirect_stderr(said):
    caption = read_folder(top, None)[0].caption
print(repr(caption), said.getvalue())
sys.exit("square a square" in caption and not said.getvalue())
