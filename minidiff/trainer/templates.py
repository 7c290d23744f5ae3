"""Sentences in which textual inversion practises a new word, {} being the word, where there are no captions.

In the spirit of arXiv 2208.01618, appendix: neutral sentences, true of any picture, many of them, so that the word
learns what the pictures share and not what one sentence says. They keep to words that the pocket checkpoint knows too,
whose whole language is the captions of pocket/world.py. ("style" alone is strange to it; SD 1.5 knows it best of all.)
"""

OBJECT = (
    "a photo of {}", "a photo of a {}", "a photo of the {}", "the photo of {}", "the photo of a {}", "the photo of the {}",
    "photo of {}", "photo of a {}", "photo of the {}",
    "a picture of {}", "a picture of a {}", "a picture of the {}", "the picture of {}", "the picture of a {}",
    "the picture of the {}", "picture of a {}", "picture of the {}",
    "{}", "a {}", "the {}",
)  # fmt: skip

STYLE = (
    "a picture in {}", "the picture in {}", "picture in {}", "art in {}",
    "a picture in the style of {}", "the picture in the style of {}", "a picture in {} style", "art in the style of {}",
    "a picture in {} art", "the picture in {} art", "a picture of {} art", "the picture of {} art", "{} art", "the {} art",
    "a {} picture", "the {} picture", "{} picture",
    "{}", "a {}", "the {}",
)  # fmt: skip

TEMPLATES = {"object": OBJECT, "style": STYLE}  # by --learnable_property
