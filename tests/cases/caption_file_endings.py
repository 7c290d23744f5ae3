"""IMG_1.JPG with IMG_1.TXT, and a.jpg with a.jpg.txt. (Pictures may end in capitals; captions may not.)

exit 0: these captions are used, or the refusal says why not; 1: in kohya's folders another caption silently takes their place.
"""
import sys
import tempfile
from pathlib import Path

from PIL import Image

from minidiff.trainer.dataset import Scan

bad = 0
for picture, caption in (("IMG_1.JPG", "IMG_1.TXT"), ("a.jpg", "a.jpg.txt"), ("a.png", "a.caption")):
    for inside in (".", "10_sks dog"):
        top = Path(tempfile.mkdtemp())
        (top / inside).mkdir(exist_ok=True)
        Image.new("RGB", (128, 128)).save(top / inside / picture)
        (top / inside / caption).write_text("a red square")
        scan = Scan(None).of(top)
        captions = [example.caption for example in scan.examples]
        print(f"{inside}/{caption}: captions {captions}, errors {[e.replace(str(top), '')[:120] for e in scan.errors]}, notices {[n.replace(str(top), '') for n in scan.notices]}")
        told = any(caption in text for text in scan.errors)
        bad += captions != ["a red square"] and not told
sys.exit(bool(bad))
