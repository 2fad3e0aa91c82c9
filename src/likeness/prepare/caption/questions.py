"""Questions to models: one user message, decoded greedily, so that the answer is always the same and is cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from likeness.chat import Answer

ANSWER_TOKENS = 256
"""Most tokens of an answer: three captions, so that a long one can be cut after a sentence."""


class Question(NamedTuple):
    """A question about an image, or about text only."""

    text: str
    image: Image.Image | None = None
    """RGB, before the text."""


@dataclass(frozen=True)
class Model:
    """A model that answers."""

    name: str
    """Name for the records."""
    settings: str
    """Everything else that affects its answers, as text."""
    answer: Callable[[Sequence[Question]], Iterator[Answer]]
    """Yields answers in order, without waiting for later ones."""

    def key(self, text: str, image: str = "") -> str:
        """Return the key under which an answer is cached, 32 hexadecimal digits.

        Args:
            text: the message.
            image: hash of the image file and its size limit.
        """
        parts = "\0".join((self.name, self.settings, text, image))
        return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]
