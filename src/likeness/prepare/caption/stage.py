"""Caption a prepared folder: ask, filter, refine, shorten; record where every caption comes from.

What models answer is kept as soon as it is there. Everything else is a function of the answers and is computed anew by
every run, so that a killed run asks nothing twice, and another limit or rule asks nothing at all. `captions.jsonl` (see
`records`) and `metadata.jsonl` are written at the end, both or neither. A caption that cannot be made good is kept too,
with the reason in `dropped`, so that nothing vanishes unexplained.
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

from likeness.conditions.pictures import open_picture
from likeness.data.folder import METADATA, captions_of, each_row, line_of, splits_of
from likeness.files import writing_whole
from likeness.prepare.caption.endpoint import Meter, Refused, Spent, open_endpoint
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


@dataclass
class Captioned:
    """What a run did."""

    faces: int
    used: int = 0
    """Captions in the metadata now."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rule -> captions that it left out."""
    incomplete: int = 0
    """Faces that lack an answer because the budget was spent."""
    failed: dict[str, str] = field(default_factory=dict)
    """Face -> why it could not be captioned."""


def caption_folder(
    folder: Path,
    plan: Plan,
    count: Count,
    *,
    meter: Meter | None = None,
    parallel: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Captioned:
    """Caption every row of a prepared folder. A row that cannot be captioned stays as it is.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of such splits; each keeps its own records.
        plan: what to do.
        count: a text -> its tokens, as `load_counter` gives it.
        meter: what the endpoints of `plan` count in; it is stopped when the run stops.
        parallel: faces worked on at the same time.
        progress: called as (faces done, faces in all).

    Raises:
        InputError: nothing was asked for, the folder or a record cannot be read, an endpoint is gone (what it answered
            is kept), or a file cannot be written.
    """
    check_plan(plan, parallel)
    splits, meter = splits_of(folder), meter or Meter()
    report = Captioned(sum(1 for split in splits for _ in each_row(folder / split)))
    done = 0
    for split in splits:
        with closing(caption_split((folder / split).resolve(), plan, count, meter, parallel)) as captioned:
            for name, outcome, dropped in captioned:
                tally(report, name if split == "." else f"{split}/{name}", outcome, dropped)
                done += 1
                if progress is not None:
                    progress(done, report.faces)
    return report


def caption_split(
    root: Path, plan: Plan, count: Count, meter: Meter, parallel: int
) -> Generator[tuple[str, Outcome, list[str | None]]]:
    """Caption the rows of one folder; (name, what became of it, why each caption is not used or None) of each face."""
    with open_journal(root / ANSWERS) as journal, open_record(root / CAPTIONS) as previous:

        def one(row: Row) -> tuple[Row, Outcome]:
            try:
                return row, caption_face(row, name_of(row, root), plan, count, Asking(journal, meter))
            except BaseException:
                meter.stopped.set()  # at once: what other threads would ask now is asked in vain
                raise

        try:
            with (
                closing(in_order(one, each_row(root), parallel, meter)) as done,
                writing_whole(root / CAPTIONS) as record,
                writing_whole(root / METADATA) as metadata,  # takes its place first: see `record`
            ):
                for row, outcome in done:
                    name, current = name_of(row, root), captions_of(row)
                    captions = merge(current, previous(name), outcome.captions, plan.replace and not outcome.fault)
                    texts = [caption["text"] for caption in captions if is_used(caption)]
                    record.write(line_of({"file_name": name, "captions": captions}))
                    columns = {key: relative(value, root) for key, value in row.items() if key != "text"}
                    metadata.write(line_of(columns | ({"text": texts} if texts else {})))
                    yield name, outcome, [caption.get("dropped") for caption in captions]
        except InputError as error:
            if not journal.added:
                raise
            raise InputError(
                f"{error}; the {journal.added} answers of this run are kept in {journal.path}: run the same command "
                "again to go on"
            ) from error


def check_plan(plan: Plan, parallel: int) -> None:
    """Refuse what cannot be done."""
    unknown = [name for name in plan.prompts if name not in PROMPTS]
    if unknown or not plan.prompts:
        raise InputError(f"there is no prompt {unknown[0] if unknown else ''!r}: choose among {', '.join(PROMPTS)}")
    if plan.vlm is None and not plan.grammar:
        raise InputError("nothing to caption with: give --vlm MODEL, or --grammar where rows have CelebA's attributes")
    if plan.vlm is None and plan.refiner is not None:
        raise InputError("--refiner checks what --vlm says: give --vlm as well")
    for name, value, least in (
        ("max tokens", plan.max_tokens, 8),
        ("pixels", plan.pixels, 32),
        ("parallel", parallel, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")


def in_order(
    make: Callable[[Row], tuple[Row, Outcome]], rows: Iterable[Row], threads: int, meter: Meter
) -> Generator[tuple[Row, Outcome]]:
    """`make(row)` of every row, in order, several at the same time.

    Where it ends early, nothing new is asked, and what is under way is waited for: its answer is paid for.
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


def tally(report: Captioned, name: str, outcome: Outcome, dropped: list[str | None]) -> None:
    """Count what became of a face."""
    report.used += dropped.count(None)
    report.left_out.update(reason.partition(":")[0] for reason in dropped if reason is not None)
    report.incomplete += not outcome.complete
    if outcome.fault:
        report.failed[name] = outcome.fault


def name_of(row: Row, root: Path) -> str:
    """The picture's name in the metadata."""
    return row["file_name"].relative_to(root).as_posix()


def relative(value: Any, root: Path) -> Any:
    """A file as the metadata names it; anything else as it is."""
    return value.relative_to(root).as_posix() if isinstance(value, Path) else value


# One face


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


def open_model(
    given: str,
    *,
    sees: bool,
    meter: Meter,
    name: str | None,
    fields: str,
    key_variable: str | None,
    device: str | None = None,
) -> Model:
    """A model by its address or its checkpoint.

    Args:
        given: address of an endpoint, or a hub name or folder for transformers.
        sees: whether it must read pictures.
        meter: what an endpoint counts in.
        name: of the model at an endpoint.
        fields: JSON of further fields of an endpoint's requests.
        key_variable: environment variable of an endpoint's key.
        device: Device of a checkpoint, as in `likeness.device.choose_device`.

    Raises:
        InputError: it cannot be opened, or an option belongs to endpoints only.
    """
    if given.startswith(("http://", "https://")):
        return open_endpoint(given, name, meter, fields=fields, key_variable=key_variable)
    if name is not None or fields != "{}":
        raise InputError(f"{given} is a checkpoint: names and fields are for endpoints, whose address begins with http")
    from likeness.prepare.caption.checkpoint import open_language_model, open_vision_model

    return open_vision_model(given, device) if sees else open_language_model(given, device)
