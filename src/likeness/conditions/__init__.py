"""Spatial conditions: what a user brings, read into an exact form and drawn for the autoencoder.

A literal table, no search for plug-ins: another condition is another file and another line here.
"""

from likeness.conditions.base import Condition, Reading, Source
from likeness.conditions.keypoints import KEYPOINTS
from likeness.conditions.mask import MASK
from likeness.conditions.sketch import SKETCH

CONDITIONS: dict[str, Condition] = {
    "mask": MASK,
    "sketch": SKETCH,
    "keypoints": KEYPOINTS,
}
"""Name -> condition; the order is that of the command line and of the columns of a data set."""

__all__ = ["CONDITIONS", "Condition", "Reading", "Source"]
