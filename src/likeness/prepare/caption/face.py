"""The captions of one face: what a model said of its picture, filtered, checked and shortened; or what a grammar says.

A caption that cannot be made good is kept too, with the reason in `dropped`, so that nothing vanishes unexplained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from likeness.conditions.pictures import open_picture
from likeness.prepare.caption.endpoint import Meter, Refused, Spent
from likeness.prepare.caption.facts import facts_of, read_labels, without_contradictions
from likeness.prepare.caption.grammar import ATTRIBUTES, write_captions
from likeness.prepare.caption.journal import Journal
from likeness.prepare.caption.models import Answer, Model, Question, question_key
from likeness.prepare.caption.pieces import Count, shorten
from likeness.prepare.caption.prompts import PROMPTS, describe, refine
from likeness.prepare.caption.record import Caption, is_used
from likeness.prepare.caption.refine import accept
from likeness.prepare.caption.rules import filter_answer
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do."""

    vlm: Model | None = None
    """Describes the pictures; None asks no model."""
    refiner: Model | None = None
    """Checks what `vlm` said against attributes and mask; None leaves that to the masks alone."""
    grammar: bool = False
    """Whether to write captions from CelebA's attributes, where rows have them."""
    prompts: Sequence[str] = tuple(PROMPTS)
    """Names of `PROMPTS`: a caption each."""
    max_tokens: int = 77
    """Most tokens of a caption, its start and end among them."""
    pixels: int = 768
    """Pixels of the longer side of what `vlm` sees, at most."""
    replace: bool = False
    """Whether captions that this run does not make are left out of the metadata."""
    seed: int = 0
    """Seed of the grammar."""


class Outcome(NamedTuple):
    """What became of one face."""

    captions: list[Caption]
    fault: str = ""
    """Why it could not be captioned."""
    complete: bool = True
    """Whether every question was answered, rather than the budget spent."""


@dataclass(frozen=True)
class Asking:
    """Asks models what they were not asked before."""

    journal: Journal
    meter: Meter

    def __call__(
        self, model: Model, texts: Mapping[str, str], picture: Image.Image | None = None, **about: str
    ) -> dict[str, Answer]:
        """Answers by key; fewer than questions where the budget is spent or the run is being stopped.

        Args:
            model: whom to ask.
            texts: key -> the message.
            picture: what all of them are about.
            about: what the journal notes beside the answers.
        """
        answers = {key: answer for key in texts if (answer := self.journal.find(key)) is not None}
        lacking = [key for key in texts if key not in answers]
        if lacking and not self.meter.stopped.is_set():
            questions = [Question(texts[key], picture) for key in lacking]
            with suppress(Spent):
                for key, answer in zip(lacking, model.answer(questions), strict=True):
                    self.journal.add(key, answer, model=model.name, **about)
                    answers[key] = answer
        return answers

    def lacks(self, texts: Mapping[str, str]) -> bool:
        """Whether one of the questions, by key, was never answered."""
        return any(self.journal.find(key) is None for key in texts)


def caption_face(row: dict[str, Any], name: str, plan: Plan, count: Count, ask: Asking) -> Outcome:
    """The captions of one face, those that are left out among them.

    Args:
        row: of the metadata, files as absolute paths.
        name: its `file_name` in the metadata.
        plan: what to do.
        count: a text -> its tokens.
        ask: how models are asked.

    Raises:
        InputError: a model cannot be asked any more, or its answer cannot be kept.
    """
    captions = grammar_captions(row, name, plan.seed) if plan.grammar else []
    complete = True
    if plan.vlm is None and not captions:
        return Outcome([], "it has no attributes of CelebA's, such as Smiling, to write captions from")
    if plan.vlm is not None:
        try:
            content, labels = row["file_name"].read_bytes(), read_labels(row)
            about = f"{hashlib.sha256(content).hexdigest()} at most {plan.pixels} pixels"
            texts = {question_key(plan.vlm, describe(prompt), about): describe(prompt) for prompt in plan.prompts}
            picture = look(content, name, plan.pixels) if ask.lacks(texts) else None
        except OSError as error:
            return Outcome([], f"it cannot be read: {error.strerror or error}")
        except InputError as error:
            return Outcome([], str(error))
        try:
            answers = ask(plan.vlm, texts, picture, file_name=name)
            described = [
                describe_caption(prompt, plan.vlm, answers[key])
                for prompt, key in zip(plan.prompts, texts, strict=True)
                if key in answers
            ]
            if plan.refiner is not None:
                described = checked_captions(plan.refiner, row, labels, described, name, ask)
        except Refused as error:
            return Outcome([], str(error))
        complete = len(described) == len(plan.prompts)
        for caption in filter(is_used, described):
            change(caption, *without_contradictions(labels, caption["text"]))
        captions += described
    for caption in filter(is_used, captions):
        text, how = shorten(caption["text"], count, plan.max_tokens)
        change(caption, text, [f"length: {how}"] if how else [])
    return Outcome(captions, complete=complete)


def look(content: bytes, name: str, pixels: int) -> Image.Image:
    """A picture file as it is shown to a model: upright, RGB, its longer side at most `pixels`."""
    picture = open_picture(content, name).convert("RGB")
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return picture


def describe_caption(prompt: str, model: Model, answer: Answer) -> Caption:
    """What the rules make of a model's answer."""
    filtered = filter_answer(answer.text, answer.finished)
    caption = {"text": "", "source": "vlm", "prompt": prompt, "model": model.name, "raw": answer.text}
    change(caption, filtered.text, filtered.touched)
    return caption


def checked_captions(
    refiner: Model, row: dict[str, Any], labels: np.ndarray | None, captions: list[Caption], name: str, ask: Asking
) -> list[Caption]:
    """The captions after their check; without those whose check is not there yet."""
    facts = {id(caption): facts_of(row, labels, caption["text"]) for caption in filter(is_used, captions)}
    texts = {c["prompt"]: refine(facts[id(c)], c["text"]) for c in filter(is_used, captions)}
    keys = {prompt: question_key(refiner, text) for prompt, text in texts.items()}
    answers = ask(refiner, {keys[prompt]: text for prompt, text in texts.items()}, file_name=name)
    checked = []
    for caption in captions:
        if is_used(caption):
            answer = answers.get(keys[caption["prompt"]])
            if answer is None:
                continue
            verdict = accept(answer.text, caption["text"], facts[id(caption)], answer.finished)
            caption |= {"refiner": refiner.name, "refined": answer.text}
            change(caption, verdict.text, verdict.touched)
        checked.append(caption)
    return checked


def grammar_captions(row: dict[str, Any], name: str, seed: int) -> list[Caption]:
    """Ten captions from CelebA's attributes, the same for the same face and seed; none where there are no such."""
    attributes = row.get("attributes")
    if not isinstance(attributes, dict) or not set(attributes) & set(ATTRIBUTES):
        return []
    holds = {key: value is True or value == 1 for key, value in attributes.items() if key in ATTRIBUTES}
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])
    return [{"text": text, "source": "grammar"} for text in write_captions(holds, rng)]


def change(caption: Caption, text: str, why: Sequence[str]) -> None:
    """Give a caption another text, and say why; one that is left with none is dropped."""
    caption["text"] = text
    if why:
        caption["touched"] = [*caption.get("touched", ()), *why]
    if not text:
        caption["dropped"] = why[-1]
