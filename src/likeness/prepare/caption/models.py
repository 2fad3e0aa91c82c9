"""A model that answers questions, whether it runs here or behind an address: what the stage knows of it.

One user message a question, decoded greedily, so that the same question has the same answer and answers can be kept by
their question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ANSWER_TOKENS = 256
"""Most tokens of an answer: three times a caption, so that one that is too long can be cut at a sentence."""


class Question(NamedTuple):
    """What a model is asked."""

    text: str
    picture: Image.Image | None = None
    """RGB, seen before the text."""


class Answer(NamedTuple):
    """What it said."""

    text: str
    finished: bool = True
    """Whether it came to its end, rather than to the largest number of tokens."""


@dataclass(frozen=True)
class Model:
    """A model that answers."""

    name: str
    """What records call it."""
    settings: str
    """Whatever else decides its answers, as text."""
    answer: Callable[[Sequence[Question]], Iterator[Answer]]
    """Answers in order, each as soon as it is there."""


def question_key(model: Model, text: str, picture: str = "") -> str:
    """What an answer is kept under, 32 hexadecimal digits.

    Args:
        model: who is asked.
        text: the message.
        picture: hash of the picture's file, and how it is shown.
    """
    parts = "\0".join((model.name, model.settings, text, picture))
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


def is_address(given: str) -> bool:
    """Whether a model is given by the address of an endpoint."""
    return given.startswith(("http://", "https://"))


def checkpoint_name(given: str) -> str:
    """A hub name as it is; a folder by its name and a hash of its configuration and of samples of its weights."""
    folder = Path(given)
    if not folder.is_dir():
        return given
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**16))
            digest.update(opened.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:8]}"
