"""Caption a prepared folder: query models, filter, refine and shorten captions, and record their origin.

Answers of models are stored immediately. Everything else is a function of the answers and computed again in every
run, so an interrupted run repeats no question, and other limits or rules need no questions at all. `captions.jsonl`
(see `records`) and `metadata.jsonl` are written together at the end. Rejected captions are recorded with the reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from likeness.conditions.images import open_image
from likeness.data.folder import METADATA, captions_of, each_row, line_of, relative_row, splits_of
from likeness.files import writing_whole
from likeness.prepare.caption.endpoint import BudgetSpent, Meter, Rejected, open_endpoint
from likeness.prepare.caption.grammar import ATTRIBUTES, write_captions
from likeness.prepare.caption.models import Answer, Model, Question, question_key
from likeness.prepare.caption.prompts import PROMPTS, describe, refine
from likeness.prepare.caption.records import (
    ANSWERS,
    CAPTIONS,
    Caption,
    Journal,
    is_used,
    merge,
    open_journal,
    open_record,
)
from likeness.prepare.caption.refine import accept, facts_of, read_labels, without_contradictions
from likeness.prepare.caption.rules import Count, filter_answer, shorten
from likeness.types import InputError

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Settings of a run."""

    vlm: Model | None = None
    """Describes the images; None uses no model."""
    refiner: Model | None = None
    """Checks captions against attributes and mask; None checks against the masks only."""
    grammar: bool = False
    """Whether to write captions from CelebA's attributes, if rows have them."""
    prompts: Sequence[str] = tuple(PROMPTS)
    """Names of `PROMPTS`, one caption each."""
    max_tokens: int = 77
    """Most tokens of a caption, including start and end."""
    pixels: int = 768
    """Largest side length of the images for `vlm`, in pixels."""
    replace: bool = False
    """Whether to drop captions of other runs from the metadata."""
    seed: int = 0
    """Random seed of the grammar."""


@dataclass
class Captioned:
    """Result of a run."""

    faces: int
    used: int = 0
    """Captions in the metadata."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rule -> captions that it dropped."""
    incomplete: int = 0
    """Faces without all answers, because the budget was spent."""
    failed: dict[str, str] = field(default_factory=dict)
    """Face -> why it was not captioned."""


def caption_folder(
    folder: Path,
    settings: CaptionSettings,
    count: Count,
    *,
    meter: Meter | None = None,
    parallel: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Captioned:
    """Caption every row of a prepared folder. A row that cannot be captioned is not changed.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of splits, which have separate records.
        settings: settings of the run.
        count: text -> number of tokens, from `load_counter`.
        meter: meter of the endpoints in `settings`.
        parallel: number of faces processed in parallel.
        progress: called as (faces done, total).

    Raises:
        InputError: the settings are invalid, the folder or a record cannot be read, an endpoint does not respond (its
            answers are kept), or a file cannot be written.
    """
    check_settings(settings, parallel)
    splits, meter = splits_of(folder), meter or Meter()
    report = Captioned(sum(1 for split in splits for _ in each_row(folder / split)))
    done = 0
    for split in splits:
        with closing(caption_split((folder / split).resolve(), settings, count, meter, parallel)) as captioned:
            for name, outcome, dropped in captioned:
                add_outcome(report, name if split == "." else f"{split}/{name}", outcome, dropped)
                done += 1
                if progress is not None:
                    progress(done, report.faces)
    return report


def caption_split(
    root: Path, settings: CaptionSettings, count: Count, meter: Meter, parallel: int
) -> Generator[tuple[str, Outcome, list[str | None]]]:
    """Caption the rows of one folder; yields (name, outcome, reason of each dropped caption or None) of each face."""
    with open_journal(root / ANSWERS) as journal, open_record(root / CAPTIONS) as previous:

        def caption_row(row: Row) -> tuple[Row, Outcome]:
            try:
                return row, caption_face(row, name_of(row, root), settings, count, Asking(journal, meter))
            except BaseException:
                meter.stopped.set()  # immediately, so that other threads send no more requests
                raise

        try:
            with (
                closing(in_order(caption_row, each_row(root), parallel, meter)) as done,
                writing_whole(root / CAPTIONS) as record,
                writing_whole(root / METADATA) as metadata,  # renamed first: see `records`
            ):
                for row, outcome in done:
                    name, current = name_of(row, root), captions_of(row)
                    captions = merge(current, previous(name), outcome.captions, settings.replace and not outcome.fault)
                    texts = [caption["text"] for caption in captions if is_used(caption)]
                    record.write(line_of({"file_name": name, "captions": captions}))
                    columns = relative_row({key: value for key, value in row.items() if key != "text"}, root)
                    metadata.write(line_of(columns | ({"text": texts} if texts else {})))
                    yield name, outcome, [caption.get("dropped") for caption in captions]
        except InputError as error:
            if not journal.added:
                raise
            raise InputError(
                f"{error}; the {journal.added} answers of this run are stored in {journal.path}: run the same command "
                "again to resume"
            ) from error


def check_settings(settings: CaptionSettings, parallel: int) -> None:
    """Reject invalid settings."""
    unknown = [name for name in settings.prompts if name not in PROMPTS]
    if unknown or not settings.prompts:
        raise InputError(f"unknown prompt {unknown[0] if unknown else ''!r}. Available: {', '.join(PROMPTS)}")
    if settings.vlm is None and not settings.grammar:
        raise InputError("no source of captions: give --vlm MODEL, or --grammar if rows have CelebA's attributes")
    if settings.vlm is None and settings.refiner is not None:
        raise InputError("--refiner checks the captions of --vlm: give --vlm as well")
    for name, value, minimum in (
        ("max tokens", settings.max_tokens, 8),
        ("pixels", settings.pixels, 32),
        ("parallel", parallel, 1),
    ):
        if value < minimum:
            raise InputError(f"{name} must be at least {minimum}, not {value}")


def in_order(
    make: Callable[[Row], tuple[Row, Outcome]], rows: Iterable[Row], threads: int, meter: Meter
) -> Generator[tuple[Row, Outcome]]:
    """Yield `make(row)` of every row in order, computed in parallel.

    If it is closed early, no new requests are sent; pending ones are completed, since they are paid for.
    """
    rest = iter(rows)
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting = deque(pool.submit(make, row) for row in islice(rest, 4 * threads))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(make, row) for row in islice(rest, 1))
        except BaseException:
            meter.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def add_outcome(report: Captioned, name: str, outcome: Outcome, dropped: list[str | None]) -> None:
    """Add the outcome of a face to the report."""
    report.used += dropped.count(None)
    report.dropped.update(reason.partition(":")[0] for reason in dropped if reason is not None)
    report.incomplete += not outcome.complete
    if outcome.fault:
        report.failed[name] = outcome.fault


def name_of(row: Row, root: Path) -> str:
    """Return the image's name in the metadata."""
    return row["file_name"].relative_to(root).as_posix()


# One face


class Outcome(NamedTuple):
    """Outcome of one face."""

    captions: list[Caption]
    fault: str = ""
    """Why it was not captioned."""
    complete: bool = True
    """Whether every question was answered before the budget was spent."""


@dataclass(frozen=True)
class Asking:
    """Queries models, with a cache of earlier answers."""

    journal: Journal
    meter: Meter

    def __call__(
        self, model: Model, texts: Mapping[str, str], image: Image.Image | None = None, **about: str
    ) -> dict[str, Answer]:
        """Return answers by key; some are missing if the budget is spent or the run is being stopped.

        Args:
            model: the model.
            texts: key -> message.
            image: the image of all questions.
            about: information to store with the answers.
        """
        answers = {key: answer for key in texts if (answer := self.journal.find(key)) is not None}
        missing = [key for key in texts if key not in answers]
        if missing and not self.meter.stopped.is_set():
            questions = [Question(texts[key], image) for key in missing]
            with suppress(BudgetSpent):
                for key, answer in zip(missing, model.answer(questions), strict=True):
                    self.journal.add(key, answer, model=model.name, **about)
                    answers[key] = answer
        return answers

    def is_incomplete(self, texts: Mapping[str, str]) -> bool:
        """Return whether one of the questions, by key, has no answer yet."""
        return any(self.journal.find(key) is None for key in texts)


def caption_face(row: dict[str, Any], name: str, settings: CaptionSettings, count: Count, ask: Asking) -> Outcome:
    """Return the captions of one face, including dropped ones.

    Args:
        row: row of the metadata, with absolute paths.
        name: its `file_name` in the metadata.
        settings: settings of the run.
        count: text -> number of tokens.
        ask: queries the models.

    Raises:
        InputError: a model does not respond, or its answer cannot be stored.
    """
    captions = grammar_captions(row, name, settings.seed) if settings.grammar else []
    complete = True
    if settings.vlm is None and not captions:
        return Outcome([], "it has no attributes of CelebA, such as Smiling")
    if settings.vlm is not None:
        try:
            content, labels = row["file_name"].read_bytes(), read_labels(row)
            about = f"{hashlib.sha256(content).hexdigest()} at most {settings.pixels} pixels"
            texts = {
                question_key(settings.vlm, describe(prompt), about): describe(prompt) for prompt in settings.prompts
            }
            image = load_image(content, name, settings.pixels) if ask.is_incomplete(texts) else None
        except OSError as error:
            return Outcome([], f"it cannot be read: {error.strerror or error}")
        except InputError as error:
            return Outcome([], str(error))
        try:
            answers = ask(settings.vlm, texts, image, file_name=name)
            described = [
                describe_caption(prompt, settings.vlm, answers[key])
                for prompt, key in zip(settings.prompts, texts, strict=True)
                if key in answers
            ]
            if settings.refiner is not None:
                described = refine_captions(settings.refiner, row, labels, described, name, ask)
        except Rejected as error:
            return Outcome([], str(error))
        complete = len(described) == len(settings.prompts)
        for caption in filter(is_used, described):
            change(caption, *without_contradictions(labels, caption["text"]))
        captions += described
    for caption in filter(is_used, captions):
        text, how = shorten(caption["text"], count, settings.max_tokens)
        change(caption, text, [f"length: {how}"] if how else [])
    return Outcome(captions, complete=complete)


def load_image(content: bytes, name: str, pixels: int) -> Image.Image:
    """Decode an image for a model: upright, RGB, its longer side at most `pixels`."""
    image = open_image(content, name).convert("RGB")
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return image


def describe_caption(prompt: str, model: Model, answer: Answer) -> Caption:
    """Apply the rules to a model's answer."""
    filtered = filter_answer(answer.text, answer.finished)
    caption = {"text": "", "source": "vlm", "prompt": prompt, "model": model.name, "raw": answer.text}
    change(caption, filtered.text, filtered.touched)
    return caption


def refine_captions(
    refiner: Model, row: dict[str, Any], labels: np.ndarray | None, captions: list[Caption], name: str, ask: Asking
) -> list[Caption]:
    """Return the captions after refinement, without those whose refinement is missing."""
    facts = {id(caption): facts_of(row, labels, caption["text"]) for caption in filter(is_used, captions)}
    texts = {c["prompt"]: refine(facts[id(c)], c["text"]) for c in filter(is_used, captions)}
    keys = {prompt: question_key(refiner, text) for prompt, text in texts.items()}
    answers = ask(refiner, {keys[prompt]: text for prompt, text in texts.items()}, file_name=name)
    refined = []
    for caption in captions:
        if is_used(caption):
            answer = answers.get(keys[caption["prompt"]])
            if answer is None:
                continue
            result = accept(answer.text, caption["text"], facts[id(caption)], answer.finished)
            caption |= {"refiner": refiner.name, "refined": answer.text}
            change(caption, result.text, result.touched)
        refined.append(caption)
    return refined


def grammar_captions(row: dict[str, Any], name: str, seed: int) -> list[Caption]:
    """Return ten captions from CelebA's attributes, the same for the same name and seed; none without attributes."""
    attributes = row.get("attributes")
    if not isinstance(attributes, dict) or not set(attributes) & set(ATTRIBUTES):
        return []
    known = {key: value is True or value == 1 for key, value in attributes.items() if key in ATTRIBUTES}
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])
    return [{"text": text, "source": "grammar"} for text in write_captions(known, rng)]


def change(caption: Caption, text: str, reasons: Sequence[str]) -> None:
    """Set the text of a caption and add the reasons; without text, it is dropped."""
    caption["text"] = text
    if reasons:
        caption["touched"] = [*caption.get("touched", ()), *reasons]
    if not text:
        caption["dropped"] = reasons[-1]


def open_model(
    source: str,
    *,
    vision: bool,
    meter: Meter,
    name: str | None,
    fields: str,
    key_variable: str | None,
    device: str | None = None,
) -> Model:
    """Open a model by its address or checkpoint.

    Args:
        source: address of an endpoint, or hub name or folder of a checkpoint.
        vision: whether it must accept images.
        meter: meter of an endpoint.
        name: name of the model at an endpoint.
        fields: JSON of additional fields of an endpoint's requests.
        key_variable: environment variable of an endpoint's key.
        device: device of a checkpoint, as in `likeness.device.choose_device`.

    Raises:
        InputError: it cannot be opened, or an option is for endpoints only.
    """
    if source.startswith(("http://", "https://")):
        return open_endpoint(source, name, meter, fields=fields, key_variable=key_variable)
    if name is not None or fields != "{}":
        raise InputError(
            f"{source} is a checkpoint: names and fields are for endpoints, whose address begins with http"
        )
    from likeness.prepare.caption.checkpoint import open_language_model, open_vision_model

    return open_vision_model(source, device) if vision else open_language_model(source, device)
