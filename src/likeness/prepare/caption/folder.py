"""Caption a prepared folder: query models, filter, refine and shorten captions, and record their origin.

Answers of models are stored immediately. Everything else is a function of the answers and computed again in every
run, so an interrupted run repeats no question, and other limits or rules do not send questions. `captions.jsonl`
(see `records`) and `metadata.jsonl` are written together at the end. Rejected captions are recorded with the reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from likeness.chat import Answer, BudgetSpent, Meter, Rejected
from likeness.conditions.images import read_rgb
from likeness.data.ahead import read_ahead
from likeness.data.folder import (
    METADATA,
    captions_of,
    changing,
    each_row,
    line_of,
    read_photo,
    relative_row,
    splits_of,
)
from likeness.files import writing_whole
from likeness.prepare.caption.grammar import ATTRIBUTES, write_captions
from likeness.prepare.caption.models import Model, Question
from likeness.prepare.caption.prompts import PROMPTS, describe, refine
from likeness.prepare.caption.records import (
    ANSWERS,
    CAPTIONS,
    AnswerCache,
    Caption,
    captions_record,
    is_used,
    merge,
    open_answers,
)
from likeness.prepare.caption.refine import accept, facts_of, mask_of_row, without_contradictions
from likeness.prepare.caption.rules import Count, filter_answer, shorten
from likeness.types import InputError, Note, Progress
from likeness.weights.hashes import file_hash


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Settings of a run."""

    vlm: Model | None = None
    """Describes the images; None uses no model."""
    refiner: Model | None = None
    """Checks captions against attributes and mask; None checks against the masks only."""
    grammar: bool = False
    """Whether to write captions from CelebA's attributes, if rows have them."""
    predict: Callable[[np.ndarray], dict[str, bool]] | None = None
    """Image uint8 RGB [H, W, 3] -> its attributes, for the grammar: called for rows with neither attributes nor
    captions. None: such rows are not captioned."""
    only_uncaptioned: bool = False
    """Whether to leave rows with captions unchanged."""
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


class FaceCaptions(NamedTuple):
    """Captions of one face, including dropped ones."""

    captions: list[Caption]
    fault: str = ""
    """Why it was not captioned."""
    complete: bool = True
    """Whether every question was answered before the budget was spent."""


def caption_folder(
    folder: Path,
    settings: CaptionSettings,
    count: Count,
    *,
    meter: Meter | None = None,
    parallel: int = 8,
    progress: Progress = lambda done, total: None,
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
    with ExitStack() as stack:
        stack.enter_context(changing(folder, splits))
        for split in splits:
            root = (folder / split).resolve()
            captioned = stack.enter_context(closing(caption_split(root, settings, count, meter, parallel)))
            for name, face, captions in captioned:
                report.used += sum(map(is_used, captions))
                report.dropped.update(caption["dropped"] for caption in captions if not is_used(caption))
                report.incomplete += not face.complete
                if face.fault:
                    report.failed[name if split == "." else f"{split}/{name}"] = face.fault
                done += 1
                progress(done, report.faces)
    return report


def check_settings(settings: CaptionSettings, parallel: int) -> None:
    unknown = [name for name in settings.prompts if name not in PROMPTS]
    if unknown or not settings.prompts:
        raise InputError(f"unknown prompt {unknown[0] if unknown else ''!r}. Available: {', '.join(PROMPTS)}")
    if repeated := [name for name in settings.prompts if settings.prompts.count(name) > 1]:
        raise InputError(f"prompt {repeated[0]!r} is given twice: name each prompt once")
    if settings.vlm is None and not settings.grammar:
        raise InputError(
            "no source of captions: give --vlm MODEL, --grammar if rows have CelebA's attributes, or --grammar "
            "--attributes bundled to predict them"
        )
    if settings.vlm is None and settings.refiner is not None:
        raise InputError("--refiner checks the captions of --vlm: give --vlm as well")
    limits = {"max tokens": (settings.max_tokens, 8), "pixels": (settings.pixels, 32), "parallel": (parallel, 1)}
    for name, (value, minimum) in limits.items():
        if value < minimum:
            raise InputError(f"{name} must be at least {minimum}, not {value}")


def caption_split(
    root: Path, settings: CaptionSettings, count: Count, meter: Meter, parallel: int
) -> Generator[tuple[str, FaceCaptions, list[Caption]]]:
    """Caption the rows of one folder; yields name, captions of this run and all captions of each face."""
    previous = captions_record(root / CAPTIONS)
    with open_answers(root / ANSWERS) as cache:

        def caption_row(row: dict[str, Any]) -> tuple[dict[str, Any], str, FaceCaptions]:
            name = row["file_name"].relative_to(root).as_posix()
            try:
                return row, name, caption_face(row, name, settings, count, cache, meter)
            except BaseException:
                meter.stopped.set()  # immediately, so that other threads send no more requests
                raise

        try:
            with (
                closing(read_ahead(caption_row, each_row(root), depth=4 * parallel, threads=parallel)) as done,
                writing_whole(root / CAPTIONS) as record,
                writing_whole(root / METADATA) as metadata,  # renamed first: see `records`
            ):
                try:
                    for row, name, face in done:
                        replace = settings.replace and face.complete and bool(face.captions)
                        captions = merge(captions_of(row), previous(name), face.captions, replace)
                        texts = [caption["text"] for caption in captions if is_used(caption)]
                        record.write(line_of({"file_name": name, "captions": captions}))
                        columns = relative_row({key: value for key, value in row.items() if key != "text"}, root)
                        metadata.write(line_of(columns | ({"text": texts} if texts else {})))
                        yield name, face, captions
                except BaseException:
                    meter.stopped.set()  # pending requests are completed, since they are paid for; no new ones are sent
                    raise
        except InputError as error:
            if not cache.added:
                raise
            raise InputError(
                f"{error}; the {cache.added} answers of this run are stored in {cache.path}: run the same command "
                "again to resume"
            ) from error


def caption_face(
    row: dict[str, Any], name: str, settings: CaptionSettings, count: Count, cache: AnswerCache, meter: Meter
) -> FaceCaptions:
    """Return the captions of one face.

    Raises:
        InputError: a model does not respond, or its answer cannot be stored.
    """
    if settings.only_uncaptioned and captions_of(row):
        return FaceCaptions([])
    vlm, labels, texts, image = settings.vlm, None, {}, None
    try:
        captions = grammar_captions(row, name, settings) if settings.grammar else []
        if vlm is not None:
            labels = mask_of_row(row)
            about = f"{file_hash(row['file_name'])} at most {settings.pixels} pixels"
            texts = {vlm.key(describe(prompt), about): describe(prompt) for prompt in settings.prompts}
            if any(cache.find(key) is None for key in texts):
                image = read_rgb(row["file_name"], name)
                image.thumbnail((settings.pixels, settings.pixels), Image.Resampling.LANCZOS)
    except (OSError, InputError) as error:
        return FaceCaptions([], str(error))
    if vlm is None and not captions and settings.predict is None:
        return FaceCaptions([], "it has no attributes of CelebA, such as Smiling: --attributes bundled predicts them")
    complete = True
    if vlm is not None:
        try:
            answers = query(vlm, texts, image, name, cache, meter)
            described = []
            for prompt, key in zip(settings.prompts, texts, strict=True):
                if answer := answers.get(key):
                    described.append(
                        {"text": "", "source": "vlm", "prompt": prompt, "model": vlm.name, "raw": answer.text}
                    )
                    change(described[-1], *filter_answer(answer.text, answer.finished))
            if settings.refiner is not None:
                described = refine_captions(settings.refiner, row, labels, described, name, cache, meter)
        except Rejected as error:
            return FaceCaptions([], str(error))
        complete = len(described) == len(settings.prompts)
        for caption in filter(is_used, described):
            change(caption, *without_contradictions(labels, caption["text"]))
        captions += described
    for caption in filter(is_used, captions):
        text, how = shorten(caption["text"], count, settings.max_tokens)
        change(caption, text, [Note("length", how)] if how else [])
    return FaceCaptions(captions, complete=complete)


def query(
    model: Model, texts: Mapping[str, str], image: Image.Image | None, name: str, cache: AnswerCache, meter: Meter
) -> dict[str, Answer]:
    """Return the answers to `texts`, key -> message about an image. New answers are added to the cache.

    Some are missing if the budget is spent or the run is being stopped.
    """
    answers = {key: answer for key in texts if (answer := cache.find(key)) is not None}
    missing = [key for key in texts if key not in answers]
    if missing and not meter.stopped.is_set():
        questions = [Question(texts[key], image) for key in missing]
        with suppress(BudgetSpent):
            for key, answer in zip(missing, model.answer(questions), strict=True):
                cache.add(key, answer, model=model.name, file_name=name)
                answers[key] = answer
    return answers


def refine_captions(
    refiner: Model,
    row: dict[str, Any],
    labels: np.ndarray | None,
    captions: list[Caption],
    name: str,
    cache: AnswerCache,
    meter: Meter,
) -> list[Caption]:
    """Return the captions after refinement, without those whose refinement is missing."""
    used = list(filter(is_used, captions))
    facts = [facts_of(row, labels, caption["text"]) for caption in used]
    texts = [refine(known, caption["text"]) for known, caption in zip(facts, used, strict=True)]
    keys = [refiner.key(text) for text in texts]
    answers = query(refiner, dict(zip(keys, texts, strict=True)), None, name, cache, meter)
    missing = []
    for caption, known, key in zip(used, facts, keys, strict=True):
        if answer := answers.get(key):
            caption |= {"refiner": refiner.name, "refined": answer.text}
            change(caption, *accept(answer.text, caption["text"], known, answer.finished))
        else:
            missing.append(caption)
    return [caption for caption in captions if caption not in missing]


def grammar_captions(row: dict[str, Any], name: str, settings: CaptionSettings) -> list[Caption]:
    """Return ten captions from CelebA's attributes, the same for the same name and seed; [] without attributes. Raises
    `InputError` if the image cannot be read.
    """
    attributes = row.get("attributes")
    if isinstance(attributes, dict) and set(attributes) & set(ATTRIBUTES):
        known = {key: value is True or value == 1 for key, value in attributes.items() if key in ATTRIBUTES}
        source = "grammar"
    elif settings.predict is not None and not captions_of(row):
        known, source = settings.predict(read_photo(row["file_name"])), "grammar over predicted attributes"
    else:
        return []
    rng = np.random.default_rng([settings.seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])
    return [{"text": text, "source": source} for text in write_captions(known, rng)]


def change(caption: Caption, text: str, notes: Sequence[Note]) -> None:
    """Set the text of a caption and add the notes; without text, it is dropped by the last one."""
    caption["text"] = text
    if notes:
        caption["touched"] = [*caption.get("touched", ()), *notes]
    if not text:
        caption["dropped"] = notes[-1].kind
