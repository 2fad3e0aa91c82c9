"""Caption a prepared folder: ask, filter, check, shorten; record where every caption comes from.

What models answer is kept as soon as it is there (`answers.jsonl`, see `journal`). Everything else is a function of
the answers and is computed anew by every run, so that a killed run asks nothing twice, and another limit or rule asks
nothing at all. `captions.jsonl` (see `record`) and `metadata.jsonl` are written at the end, both or neither.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from likeness.data.folder import METADATA, captions_of, each_row, root_of
from likeness.files import writing_whole
from likeness.pipelines.catalogue import BUNDLED, COMMON
from likeness.pipelines.load import first_line
from likeness.prepare.caption.endpoint import Meter
from likeness.prepare.caption.face import Asking, Outcome, Plan, caption_face
from likeness.prepare.caption.journal import open_journal
from likeness.prepare.caption.models import Model, is_address
from likeness.prepare.caption.pieces import Count
from likeness.prepare.caption.prompts import PROMPTS
from likeness.prepare.caption.record import is_used, merge, open_record
from likeness.types import InputError

ANSWERS = "answers.jsonl"
CAPTIONS = "captions.jsonl"

Row = dict[str, Any]


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
        folder: a directory with `metadata.jsonl`, or its parent with a `train` split.
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
    root, meter = root_of(folder), meter or Meter()
    report = Captioned(sum(1 for _ in each_row(root)))
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
                for number, (row, outcome) in enumerate(done, start=1):
                    name, current = name_of(row, root), captions_of(row)
                    captions = merge(current, previous(name), outcome.captions, plan.replace and not outcome.fault)
                    texts = [caption["text"] for caption in captions if is_used(caption)]
                    record.write(line_of({"file_name": name, "captions": captions}))
                    metadata.write(
                        line_of({key: relative(value, root) for key, value in row.items()} | {"text": texts})
                    )
                    tally(report, name, outcome, [caption.get("dropped") for caption in captions])
                    if progress is not None:
                        progress(number, report.faces)
        except InputError as error:
            if not journal.added:
                raise
            raise InputError(
                f"{error}; the {journal.added} answers of this run are kept in {journal.path}: run the same command "
                "again to go on"
            ) from error
    return report


def open_model(
    given: str, *, sees: bool, meter: Meter, name: str | None, fields: str, key_variable: str | None
) -> Model:
    """A model by its address or its checkpoint.

    Args:
        given: address of an endpoint, or a hub name or folder for transformers.
        sees: whether it must read pictures.
        meter: what an endpoint counts in.
        name: of the model at an endpoint.
        fields: JSON of further fields of an endpoint's requests.
        key_variable: environment variable of an endpoint's key.

    Raises:
        InputError: it cannot be opened, or an option belongs to endpoints only.
    """
    if is_address(given):
        from likeness.prepare.caption.endpoint import open_endpoint

        return open_endpoint(given, name, meter, fields=fields, key_variable=key_variable)
    if name is not None or fields != "{}":
        raise InputError(f"{given} is a checkpoint: names and fields are for endpoints, whose address begins with http")
    from likeness.prepare.caption import local

    return local.open_vision_model(given) if sees else local.open_language_model(given)


def load_counter(components: Path = BUNDLED / COMMON) -> Count:
    """Counts tokens, start and end among them, with the tokenizer of a pipeline folder or of `common/`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    places = (components / "tokenizer", components.parent / COMMON / "tokenizer", components)
    where = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if where is None:
        raise InputError(f"{components} holds no tokenizer: give a model's folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {where} cannot be read: {first_line(error)}") from error
    turn = threading.Lock()  # fast tokenizers change themselves while they encode

    def count(text: str) -> int:
        with turn:
            return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    return count


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


def line_of(record: dict[str, Any]) -> bytes:
    """A line of a JSONL file."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
