"""A picture's text in A1111's form whose line of settings does not begin with Steps (some programs sort it, or put Sampler first).

exit 0: the settings are read, or a note says that they are not; 1: the line silently becomes a part of the negative prompt.
"""
import sys

from minidiff.studio.a1111 import read_a1111

bad = 0
for name, line in {
    "sampler first": "Sampler: Euler a, Steps: 20, CFG scale: 7, Seed: 3, Size: 128x128",
    "sorted": "CFG scale: 7, Sampler: Euler a, Seed: 3, Size: 128x128, Steps: 20",
}.items():
    reading = read_a1111("a red dog\nNegative prompt: blurred\n" + line)
    right = reading.get("num_inference_steps") == 20 and reading["negative_prompt"] == "blurred"
    print(f"{name}: {reading}")
    bad += not right
sys.exit(bool(bad))
