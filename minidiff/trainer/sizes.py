"""Sizes of memory, as people write them."""

import re


def size_in_bytes(text: str) -> int | None:
    """Such as 8GB, 7.5 GiB, 900mb (GB is 1000^3, GiB 1024^3); None for anything else, or below 1 MB or above 100 TB."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        return None
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))
    return size if 10**6 <= size <= 10**14 else None
