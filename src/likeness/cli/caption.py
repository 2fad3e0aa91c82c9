"""The command that captions a folder: `likeness prepare caption`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell
from likeness.types import InputError

SHOWN = 10
"""Faces that failed, of which the reasons are told."""


def caption(
    folder: PathArgument,
    *,
    vlm: str | None = None,
    refiner: str | None = None,
    grammar: bool = False,
    vlm_name: str | None = None,
    refiner_name: str | None = None,
    vlm_fields: str = "{}",
    refiner_fields: str = "{}",
    vlm_key_variable: str | None = None,
    refiner_key_variable: str | None = None,
    prompts: tuple[str, ...] = (),
    components: Path | None = None,
    max_tokens: int = 77,
    pixels: int = 768,
    replace: bool = False,
    parallel: int = 8,
    requests_per_minute: float | None = None,
    budget: str | None = None,
    tries: int = 6,
    timeout: float = 120.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Caption a prepared folder by a vision-language model that is checked, or by a grammar over CelebA's attributes.

    What models answer is kept in answers.jsonl at once, so that nothing is asked twice. Exit code: 0 when every face is
    captioned, 1 when some could not be or the budget was spent, 2 when it cannot go on.

    Args:
        folder: A folder with metadata.jsonl, or the parent of such splits; run again to go on after an interruption.
        vlm: What describes the pictures: address of an OpenAI-compatible endpoint such as http://localhost:8000/v1, or
            a checkpoint of transformers such as OpenGVLab/InternVL3-8B-hf.
        refiner: What checks the captions against attributes and mask: an address, or a checkpoint such as
            Qwen/Qwen3-8B.
        grammar: Write captions from CelebA's attributes, offline; alone or beside vlm.
        vlm_name: Name of the model at the endpoint; the only one that it serves by default.
        refiner_name: The same for the refiner.
        vlm_fields: JSON of further fields of each request, such as '{"top_p": 0.9}'; null takes one out.
        refiner_fields: The same for the refiner, such as '{"chat_template_kwargs": {"enable_thinking": false}}'.
        vlm_key_variable: Name of the environment variable that holds the endpoint's key; LIKENESS_API_KEY by default,
            where it is set.
        refiner_key_variable: The same for the refiner.
        prompts: Names of the prompts to use: natural, brief, cues, hair, face, expression, accessories, age, light,
            portrait; all by default.
        components: Folder of the model that is to be trained, whose tokenizer counts; by default that of the bundled
            ones, which makes about two tokens of a word.
        max_tokens: Most tokens of a caption, its start and end among them; longer ones are cut after a sentence.
        pixels: Pixels of the longer side of what the model is shown, at most.
        replace: Leave captions of other origin out of the metadata; captions.jsonl keeps them.
        parallel: Faces worked on at the same time; 1 is enough for a checkpoint.
        requests_per_minute: Pace of the requests to endpoints, both together.
        budget: Most requests of this run, such as 5000, or most tokens, such as 2000000tokens.
        tries: How often a request is made before the endpoint counts as gone; the waits double from 1 s.
        timeout: Seconds without a word after which a request counts as failed.
        seed: Seed of the grammar.
        device: Device of checkpoints, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.prepare.caption.endpoint import Meter
    from likeness.prepare.caption.models import load_counter
    from likeness.prepare.caption.prompts import PROMPTS
    from likeness.prepare.caption.stage import Plan, caption_folder, open_model

    quiet_libraries()
    most = read_budget(budget)
    for what, value in (("requests per minute", requests_per_minute), ("tries", tries), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise InputError(f"{what} must be above 0, not {value}")
    meter = Meter(requests_per_minute, most.get("requests"), most.get("tokens"), tries, timeout=timeout)
    options = {"grammar": grammar, "prompts": prompts or tuple(PROMPTS), "max_tokens": max_tokens, "pixels": pixels}
    plan = Plan(**options, replace=replace, seed=seed)
    count = load_counter(components) if components else load_counter()
    given = {
        "vlm": (vlm, vlm_name, vlm_fields, vlm_key_variable),
        "refiner": (refiner, refiner_name, refiner_fields, refiner_key_variable),
    }
    models = {
        role: open_model(
            model, sees=role == "vlm", meter=meter, name=name, fields=fields, key_variable=key, device=device
        )
        for role, (model, name, fields, key) in given.items()
        if model is not None
    }
    plan = Plan(**options, replace=replace, seed=seed, **models)
    with progress_bar("Captioning") as advance:
        report = caption_folder(folder, plan, count, meter=meter, parallel=parallel, progress=advance)

    tell([f"{name}: {reason}" for name, reason in list(report.failed.items())[:SHOWN]])
    if len(report.failed) > SHOWN:
        tell([f"and {len(report.failed) - SHOWN} more faces that could not be captioned"])
    if report.incomplete:
        tell([f"the budget is spent: {report.incomplete} faces lack captions; run the same command again to go on"])
    left_out = ", ".join(f"{number} {rule}" for rule, number in report.left_out.most_common())
    print(
        f"{folder}: {report.faces} faces, {report.used} captions"
        + (f"; left out: {left_out}" if left_out else "")
        + (f"; {meter.requests} requests, {meter.tokens} tokens" if meter.requests else "")
    )
    if report.failed or report.incomplete:
        sys.exit(1)


def read_budget(text: str | None) -> dict[str, int]:
    """`requests` or `tokens` -> the most of them."""
    if text is None:
        return {}
    found = re.fullmatch(r"([1-9]\d*) ?(requests|tokens)?", text.strip().replace("_", "").replace(",", ""))
    if not found:
        raise InputError(f"{text!r} is no budget: give requests, such as 5000, or tokens, such as 2000000tokens")
    return {found[2] or "requests": int(found[1])}
