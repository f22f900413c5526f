"""Baselines of the demo, in bits per byte of the held-out text: gzip, bz2, and an order-0 byte model."""

import bz2
import gzip
import math
from collections import Counter


def gzip_bits_per_byte(text: bytes) -> float:
    """Size of the whole text under gzip -9, in bits per byte of text."""
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def bz2_bits_per_byte(text: bytes) -> float:
    """Size of the whole text under bzip2 -9, in bits per byte of text."""
    return 8 * len(bz2.compress(text, 9)) / len(text)


def order0_bits_per_byte(train: bytes, text: bytes) -> float:
    """Cross entropy of `text` under the byte frequencies of `train`, with one added to each of the 256 counts."""
    counts = Counter(train)
    total = len(train) + 256
    bits = sum(n * -math.log2((counts[byte] + 1) / total) for byte, n in Counter(text).items())
    return bits / len(text)
