"""The interface of models that answer questions, behind an `endpoint` or in a `checkpoint`.

A question is one user message, decoded greedily: the same question has the same answer, so answers are cached.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON

ANSWER_TOKENS = 256
"""Most tokens of an answer: three captions, so that a long one can be cut after a sentence."""


class Question(NamedTuple):
    """A question about an image, or about text only."""

    text: str
    image: Image.Image | None = None
    """RGB, before the text."""


class Answer(NamedTuple):
    """An answer."""

    text: str
    finished: bool = True
    """Whether it ended, rather than reached the maximum number of tokens."""


@dataclass(frozen=True)
class Model:
    """A model that answers."""

    name: str
    """Name for the records."""
    settings: str
    """Everything else that affects its answers, as text."""
    answer: Callable[[Sequence[Question]], Iterator[Answer]]
    """Yields answers in order, each as soon as it is available."""


def question_key(model: Model, text: str, image: str = "") -> str:
    """Return the key under which an answer is cached, 32 hexadecimal digits.

    Args:
        model: the model.
        text: the message.
        image: hash of the image file and its size limit.
    """
    parts = "\0".join((model.name, model.settings, text, image))
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


def load_counter(components: Path = BUNDLED / COMMON) -> Callable[[str], int]:
    """Return a function that counts tokens, including start and end, with the tokenizer of a pipeline folder.

    Raises:
        InputError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from likeness.files import first_line

    places = (components / "tokenizer", components.parent / COMMON / "tokenizer", components)
    where = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if where is None:
        raise InputError(f"{components} has no tokenizer: give the folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {where} cannot be read: {first_line(error)}") from error
    lock = threading.Lock()  # fast tokenizers are not thread-safe

    def count(text: str) -> int:
        with lock:
            return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    return count
