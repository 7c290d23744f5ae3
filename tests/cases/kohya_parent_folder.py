"""kohya_ss keeps img/10_sks dog/a.png; people give the folder one above, or one below, the one that is wanted.

exit 0: both are understood, or the message says which folder to give; 1: it only lists what is there.
"""
import sys
import tempfile
from pathlib import Path

from PIL import Image

from minidiff.trainer.dataset import Scan

top = Path(tempfile.mkdtemp())
(top / "img" / "10_sks dog").mkdir(parents=True)
(top / "log").mkdir()
Image.new("RGB", (128, 128)).save(top / "img" / "10_sks dog" / "a.png")
bad = 0
for folder in (top, top / "img", top / "img" / "10_sks dog"):
    scan = Scan(None).of(folder)
    print(f"{folder.name}: {[(e.caption, e.repeats) for e in scan.examples]}", *[e.replace(str(top), "") for e in scan.errors], sep="\n   ")
    bad += not scan.examples and not any(str(top / "img") + " " in e + " " or "point there" in e or "10_" in e.split("pictures")[-1] for e in scan.errors)
sys.exit(bool(bad))
