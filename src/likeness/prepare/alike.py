"""Which pictures of many are the same one: compressed, resized or made lighter, but not another person framed alike.

A perceptual hash of 64 bits is quick to look up but does not tell 20,000 aligned faces apart; 256 bits of the same make
do. Both are kept, 40 bytes a picture, and no picture is opened twice.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import dctn

INDEX_BITS, NEAR_BITS = 6, 40
"""Two pictures are the same when at most so many of the 64 and of the 256 bits of `fingerprint` differ.

Of 20,000 CelebA faces (200 million pairs), the farthest two that agree in the 64 and show one photograph differ in 50
of the 256, the closest that do not in 56. JPEG of quality 30, half the size and 15 % more light change up to 22.
"""

NO_PRINT = bytes(40)
"""Stands for a picture that has none."""


def fingerprint(picture: Image.Image) -> bytes:
    """What a picture keeps when it is compressed, resized or made lighter: 64 bits to look up, 256 to be sure.

    Whether each of the lowest 8x8 and 16x16 frequencies of 32x32 grey pixels lies above their median: the perceptual
    hash of Zauner (2010), "Implementation and Benchmarking of Perceptual Image Hash Functions".

    Returns:
        40 bytes: five uint64.
    """
    grey = picture.convert("L").resize((32, 32), Image.Resampling.BOX)
    spectrum = np.asarray(dctn(np.asarray(grey, dtype=np.float32), norm="ortho"))
    low = [spectrum[:side, :side].ravel() for side in (8, 16)]
    return b"".join(np.packbits(values > np.median(values[1:])).tobytes() for values in low)


def shared_pictures(fingerprints: bytes | bytearray, held_out: np.ndarray) -> int:
    """How many pictures for training show what one that is held out shows.

    Args:
        fingerprints: 40 bytes for each of N pictures, one after the other.
        held_out: bool [N].
    """
    order = np.argsort(~held_out, kind="stable")  # those that are held out come first, so that the others match them
    first = first_alike(np.frombuffer(fingerprints, np.uint8).reshape(-1, 40)[order].tobytes())
    return int((held_out[order][first] & ~held_out[order]).sum())


def first_alike(fingerprints: bytes | bytearray) -> np.ndarray:
    """The first picture that is the same as each picture: itself, where there is no earlier one.

    Pictures that differ in at most `INDEX_BITS` of 64 bits agree wholly in one of `INDEX_BITS` + 1 bands of them, so
    sorting by one band after the other brings every such pair together.

    Args:
        fingerprints: 40 bytes for each of N pictures, one after the other.

    Returns:
        int [N], at most the picture's own number.
    """
    prints = np.frombuffer(fingerprints, dtype=np.uint64).reshape(-1, 5)
    unique, firsts, group = np.unique(prints, axis=0, return_index=True, return_inverse=True)
    best = firsts.copy()  # of each group of equal prints, the first picture that is the same
    known = np.asarray(unique.any(axis=1))
    for band in np.array_split(np.arange(64, dtype=np.uint64), INDEX_BITS + 1):
        key = (unique[:, 0] >> band[0]) & np.uint64(2 ** len(band) - 1)
        order = np.argsort(key, kind="stable")
        order = order[known[order]]
        key = key[order]
        left, shift = np.arange(len(order)), 1
        while len(left):  # pairs of one band that lie `shift` places apart
            left = left[left + shift < len(order)]
            left = left[key[left] == key[left + shift]]
            a, b = order[left], order[left + shift]
            close = np.bitwise_count(unique[a, 0] ^ unique[b, 0]) <= INDEX_BITS
            a, b = a[close], b[close]
            same = np.bitwise_count(unique[a, 1:] ^ unique[b, 1:]).sum(axis=1) <= NEAR_BITS
            np.minimum.at(best, a[same], firsts[b[same]])
            np.minimum.at(best, b[same], firsts[a[same]])
            shift += 1
    group, pictures = group.reshape(-1), np.arange(len(prints))
    return np.where(known[group], best[group], pictures)
