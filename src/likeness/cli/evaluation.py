"""Commands that measure what models make, and hold measurements against one another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from likeness.cli.terminal import progress_bar, quiet_libraries, tell
from likeness.types import DtypeName, InputError


def evaluate(
    sources: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: Path,
    images: Path | None = None,
    protocol: Path | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> None:
    """Measure a model on held-out faces: `likeness evaluate MODEL FACES [key=value ...] --out DIR`.

    Portraits are made once, by as many processes as torchrun starts (RANK, WORLD_SIZE); to go on after a stop, run the
    same command again.

    Args:
        sources: MODEL (with --images: none) and FACES, a prepared folder; then changes of the protocol, as
            count=1000 or given=mask,none (docs/metrics.md lists all).
        out: Folder for portraits, results.json, report.md and report.html.
        images: Folder of any method's portraits, each called like the photograph of its face; with given=mask or
            whatever they were made from. A MODEL then lends its autoencoder for the ceiling.
        protocol: A TOML file with the protocol.
        base: The base model of an adapter, where it is not the one that the adapter names.
        device: Device, for example cuda or cpu; auto takes an accelerator if present, under torchrun one per process.
        dtype: Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
    """
    names, changes = split_sources(sources)
    least, most = (1, 2) if images is not None else (2, 2)
    if not least <= len(names) <= most:
        wanted = "FACES, or MODEL FACES for the ceiling" if images is not None else "MODEL FACES"
        raise InputError(f"evaluate was given {' '.join(names) or 'nothing'}; it needs {wanted}")
    settings = read_protocol(protocol, changes)
    results = run_evaluation(
        names[0] if len(names) == 2 else None, names[-1], out, settings, images, base, device, dtype
    )
    if results is None:
        return
    from likeness.evaluate.page import write_report
    from likeness.evaluate.report import markdown_table

    write_report(results, out)
    tell_faults(results)
    print(markdown_table(results))
    print(out / "report.html")


def compare(
    sources: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: Path,
    faces: Path | None = None,
    protocol: Path | None = None,
    allow: tuple[str, ...] = (),
    device: str = "auto",
    dtype: DtypeName = "auto",
) -> None:
    """Say which differences between models or settings are significant: `likeness compare A B ... --out DIR`.

    Args:
        sources: Each a folder of `likeness evaluate`, or a model, which is then measured on --faces, if need be with
            settings of its own: mmface-mini@steps=10,guidance_scale=3. Then changes of the protocol, as count=1000.
        out: Folder for comparison.json, comparison.md and comparison.html, and for evaluations that are made.
        faces: Prepared folder for models among the sources.
        protocol: A TOML file with the protocol.
        allow: Parts of the protocol that may differ since they are what is compared, such as steps.
        device: Device, for example cuda or cpu; auto takes an accelerator if present.
        dtype: Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
    """
    from likeness.evaluate.compare import compare_evaluations, markdown_of, read_evaluation, write_comparison

    names, changes = split_sources(sources)
    if len(names) < 2:
        raise InputError(f"compare was given {' '.join(names) or 'nothing'}; it needs two evaluations or models")
    if len(set(names)) < len(names):
        raise InputError("compare was given the same source twice")
    if counted := [name for name in names if re.search(r"[@,]\s*count\s*=", name)]:
        raise InputError(
            f"{counted[0]} would be measured on other faces than the others: say count=... for all of them"
        )
    evaluations, own = {}, set(allow)
    for name in names:
        if (Path(name) / "results.json").is_file():
            evaluations[name] = read_evaluation(Path(name))
            continue
        if faces is None:
            raise InputError(f"{name} is no evaluation (it has no results.json): for a model, name --faces, too")
        model, _, settings = name.partition("@")
        changed = tuple(settings.split(",")) if settings else ()
        own |= {change.partition("=")[0].strip() for change in changed}
        folder = out / re.sub(r"[^\w.=,@-]+", "-", name).strip("-")
        asked = read_protocol(protocol, (*changes, *changed))
        results = run_evaluation(model, str(faces), folder, asked, None, None, device, dtype)
        if results is None:
            return
        from likeness.evaluate.page import write_report

        write_report(results, folder)
        tell_faults(results)
        evaluations[name] = read_evaluation(folder)
    found = compare_evaluations(evaluations, allow=tuple(sorted(own)))
    write_comparison(found, out)
    tell(found["notes"])
    print(markdown_of(found))
    print(out / "comparison.html")


def split_sources(sources: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Names, and what has the form key=value."""
    changes = tuple(source for source in sources if re.match(r"[a-z_0-9]+=", source))
    return [source for source in sources if source not in changes], changes


def read_protocol(file: Path | None, changes: tuple[str, ...]) -> Any:
    """The protocol of a file with changes."""
    from likeness.config import load_toml
    from likeness.evaluate.config import Protocol

    # lists are easier to type without brackets and quotes
    written = [re.sub(r"^(given|metrics)=([\w+,]+)$", lambda m: f"{m[1]}={m[2].split(',')}", text) for text in changes]
    return load_toml(file, Protocol, tuple(written))


def run_evaluation(
    model: str | None,
    faces: str,
    out: Path,
    settings: Any,
    images: Path | None,
    base: str | None,
    device: str,
    dtype: DtypeName,
) -> dict[str, Any] | None:
    """One evaluation with a bar."""
    from likeness.cli.portraits import load_pipeline
    from likeness.device import choose_device
    from likeness.evaluate.evaluation import evaluate as measure

    quiet_libraries()
    place = choose_device(device)
    pipeline = None if model is None else load_pipeline(model, dtype, place, base)
    with progress_bar("Evaluating") as advance:
        return measure(
            Path(faces),
            out,
            settings,
            pipeline=pipeline,
            model=model or "",
            images=images,
            device=place,
            report=lambda what, done, total: advance(done, total),
        )


def tell_faults(results: dict[str, Any]) -> None:
    """What could not be read or measured, on stderr."""
    tell([f"not read: {fault['why']}" for fault in results["faults"]])
    tell([f"not measured: {entry['metric']}: {entry['why']}" for entry in results["missing"]])
    tell(results["notes"])
