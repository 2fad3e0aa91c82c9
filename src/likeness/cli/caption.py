"""The command `likeness prepare caption`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.terminal import PathArgument, print_notes, progress_bar, quiet_libraries
from likeness.types import InputError

MAX_FAILURES = 10
"""Number of failed faces to report individually."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Caption a prepared folder with a vision-language model and checks, or with a grammar over CelebA's attributes.

    Answers are cached in answers.jsonl, so no question is repeated. Exit code: 0 if every face is captioned, 1 if some
    are not or the budget is spent, 2 on error.
    """

    folder: PathArgument
    """Folder with metadata.jsonl, or the parent of splits. Run again to resume."""
    vlm: str | None = None
    """Model that describes the images: address of an OpenAI-compatible endpoint such as http://localhost:8000/v1, or a
    transformers checkpoint such as OpenGVLab/InternVL3-8B-hf."""
    refiner: str | None = None
    """Model that checks the captions against attributes and mask: an address, or a checkpoint such as Qwen/Qwen3-8B."""
    grammar: bool = False
    """Write captions from CelebA's attributes, offline, instead of or in addition to vlm."""
    attributes: Literal["given", "bundled"] = "given"
    """Attributes of the grammar: given by the rows, or bundled, which also predicts those of faces with neither
    attributes nor captions."""
    vlm_name: str | None = None
    """Name of the model at the endpoint. Default: the only one that it serves."""
    refiner_name: str | None = None
    """The same for the refiner."""
    vlm_fields: str = "{}"
    """JSON of additional fields of each request, such as '{"top_p": 0.9}'; null removes a field."""
    refiner_fields: str = "{}"
    """The same for the refiner, such as '{"chat_template_kwargs": {"enable_thinking": false}}'."""
    vlm_key_variable: str | None = None
    """Environment variable with the endpoint's API key. Default: LIKENESS_API_KEY, else OPENAI_API_KEY
    for api.openai.com."""
    refiner_key_variable: str | None = None
    """The same for the refiner."""
    prompts: tuple[str, ...] = ()
    """Names of the prompts to use: natural, brief, cues, hair, face, expression, accessories, age, light, portrait.
    Default: all."""
    components: Path | None = None
    """Folder of the model to train, whose tokenizer counts the tokens. Default: the bundled one, which makes about two
    tokens per word."""
    max_tokens: int = 77
    """Maximum number of tokens of a caption, including start and end; longer ones are cut after a sentence. The bundled
    models read 32."""
    pixels: int = 768
    """Largest side length of the images for the model, in pixels."""
    replace: bool = False
    """Drop captions of other origin from the metadata; captions.jsonl keeps them."""
    only_uncaptioned: tyro.conf.Suppress[bool] = False
    """Leave faces with captions unchanged, for `prepare shards`."""
    parallel: int = 8
    """Number of faces processed in parallel; 1 is enough for a checkpoint."""
    requests_per_minute: float | None = None
    """Rate limit of all endpoints."""
    budget: str | None = None
    """Maximum number of requests of this run, such as 5000, or of tokens, such as 2000000tokens."""
    tries: int = 6
    """Attempts per request; the waits double from 1 s."""
    timeout: float = 120.0
    """Seconds without data after which a request fails."""
    seed: int = 0
    """Random seed of the grammar."""
    device: str = "auto"
    """Device of checkpoints, for example cuda or cpu; auto takes an accelerator if present."""

    def __call__(self) -> None:
        if not self.caption():
            sys.exit(1)

    def caption(self) -> bool:
        """Caption and report; returns whether every face is captioned."""
        from likeness.chat import Meter
        from likeness.prepare.caption.folder import CaptionSettings, caption_folder
        from likeness.prepare.caption.models import load_attributes, load_counter, open_model
        from likeness.prepare.caption.prompts import PROMPTS

        quiet_libraries()
        if self.attributes == "bundled" and not self.grammar:
            raise InputError("--attributes bundled requires --grammar, which writes the captions")
        limits = read_budget(self.budget)
        for name, least in {"requests_per_minute": 0.001, "tries": 1, "timeout": 0.001}.items():
            if (value := getattr(self, name)) is not None and not least <= value <= 1e6:
                raise InputError(f"{name.replace('_', ' ')} must be from {least} to 1000000, not {value}")
        for role in ("vlm", "refiner"):
            for option, default in {"name": None, "fields": "{}", "key_variable": None}.items():
                if getattr(self, role) is None and getattr(self, f"{role}_{option}") != default:
                    flag = f"--{role}-{option.replace('_', '-')}"
                    raise InputError(f"{flag} has no effect without --{role}: give the model, or omit it")
        meter = Meter(
            self.requests_per_minute, limits.get("requests"), limits.get("tokens"), self.tries, timeout=self.timeout
        )
        count = load_counter(self.components) if self.components else load_counter()
        models: dict[str, Any] = {
            role: open_model(
                source,
                vision=role == "vlm",
                meter=meter,
                **{option: getattr(self, f"{role}_{option}") for option in ("name", "fields", "key_variable")},
                device=self.device,
            )
            for role in ("vlm", "refiner")
            if (source := getattr(self, role)) is not None
        }
        names = ("grammar", "only_uncaptioned", "max_tokens", "pixels", "replace", "seed")
        shared = {name: getattr(self, name) for name in names}
        settings = CaptionSettings(
            **models,
            **shared,
            predict=load_attributes() if self.attributes == "bundled" else None,
            prompts=self.prompts or tuple(PROMPTS),
        )
        with progress_bar("Captioning") as advance:
            report = caption_folder(self.folder, settings, count, meter=meter, parallel=self.parallel, progress=advance)
        print_notes([f"{name}: {reason}" for name, reason in list(report.failed.items())[:MAX_FAILURES]])
        if len(report.failed) > MAX_FAILURES:
            print_notes([f"and {len(report.failed) - MAX_FAILURES} more faces were not captioned"])
        if report.incomplete:
            lacking = f"{report.incomplete} faces lack captions"
            print_notes([f"the budget is spent: {lacking}; run the same command again to resume"])
        dropped = ", ".join(f"{number} {rule}" for rule, number in report.dropped.most_common())
        counts = [f"{self.folder}: {report.faces} faces, {report.used} captions"]
        counts += [f"dropped: {dropped}"] if dropped else []
        counts += [f"{meter.requests} requests, {meter.tokens} tokens"] if meter.requests else []
        print("; ".join(counts))
        return not (report.failed or report.incomplete)


def read_budget(text: str | None) -> dict[str, int]:
    """Parse a budget to `requests` or `tokens` -> maximum."""
    if text is None:
        return {}
    found = re.fullmatch(r"([1-9]\d{0,17}) ?(requests|tokens)?", text.strip().replace("_", "").replace(",", ""))
    if not found:
        raise InputError(f"invalid budget {text!r}: give requests, such as 5000, or tokens, such as 2000000tokens")
    return {found[2] or "requests": int(found[1])}
