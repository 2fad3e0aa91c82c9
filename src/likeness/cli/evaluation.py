"""Commands that measure models and compare measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from likeness.cli.terminal import print_notes, progress_bar, quiet_libraries
from likeness.types import DtypeName, InputError

if TYPE_CHECKING:
    from likeness.evaluate.protocol import Protocol
    from likeness.evaluate.results import Results


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

    All processes that torchrun starts (RANK, WORLD_SIZE) generate images. Run the same command again to resume.

    Args:
        sources: MODEL (optional with --images) and FACES, a prepared folder; then settings of the protocol, such as
            count=1000 or given=mask,none (docs/metrics.md lists all).
        out: Folder for images, results.json, report.md and report.html.
        images: Folder with images of any method, each named like the photograph of its face. Set given=mask or
            whichever condition they were made from. The autoencoder of MODEL then gives the ceiling.
        protocol: TOML file with the protocol.
        base: Base model of an adapter, if it is not the one that the adapter names.
        device: Device, for example cuda or cpu; auto takes an accelerator if present, under torchrun one per process.
        dtype: Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
    """
    names, settings = split_sources(sources)
    if len(names) != 2 and not (images is not None and len(names) == 1):
        expected = "MODEL FACES" if images is None else "FACES, or MODEL FACES for the ceiling"
        raise InputError(f"evaluate requires {expected}, not {' '.join(names) or 'nothing'}")
    model, faces = names if len(names) == 2 else (None, names[0])
    results = run_evaluation(model, faces, out, read_protocol(protocol, settings), device, dtype, base, images)
    if results is not None:
        from likeness.evaluate.report import markdown_table, numbers_table

        print(markdown_table(numbers_table(results)))
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
    """Test which differences between models or settings are significant: `likeness compare A B ... --out DIR`.

    Args:
        sources: Each a folder of `likeness evaluate`, or a model to evaluate on --faces, optionally with settings:
            mmface-mini@steps=10,guidance_scale=3. Then settings of the protocol for all models, such as count=1000.
        out: Folder for comparison.json, comparison.md and comparison.html, and for the evaluations of models.
        faces: Prepared folder on which models are evaluated.
        protocol: TOML file with the protocol.
        allow: Parts of the protocol that may differ because they are what is compared, such as steps.
        device: Device, for example cuda or cpu; auto takes an accelerator if present.
        dtype: Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
    """
    from likeness.evaluate.compare import compare_evaluations
    from likeness.evaluate.report import comparison_table, markdown_table, write_comparison
    from likeness.evaluate.results import RESULTS, read_evaluation

    names, settings = split_sources(sources)
    if len(names) < 2:
        raise InputError(f"compare requires at least two evaluations or models, not {' '.join(names) or 'nothing'}")
    if len(set(names)) < len(names):
        raise InputError(f"compare received a source twice: {', '.join(names)}")
    evaluations, allowed = {}, set(allow)
    for name in names:
        folder = Path(name)
        if not (folder / RESULTS).is_file():
            if faces is None:
                raise InputError(
                    f"{name} is not an evaluation (it has no {RESULTS}). To evaluate a model, pass --faces"
                )
            model, _, text = name.partition("@")
            own = tuple(text.split(",")) if text else ()
            keys = {setting.partition("=")[0].strip() for setting in own}
            if "count" in keys:
                raise InputError(f"{name} would be evaluated on different faces: set count=... for all sources")
            allowed |= keys
            folder = out / re.sub(r"[^\w.=,@-]+", "-", name).strip("-")
            settings_of_model = read_protocol(protocol, (*settings, *own))
            if run_evaluation(model, str(faces), folder, settings_of_model, device, dtype) is None:
                return
        evaluations[name] = read_evaluation(folder)
    comparison = compare_evaluations(evaluations, allow=tuple(sorted(allowed)))
    write_comparison(comparison, out)
    print_notes(comparison.notes)
    print(markdown_table(comparison_table(comparison)))
    print(out / "comparison.html")


def split_sources(sources: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Separate names from settings of the form key=value."""
    settings = tuple(source for source in sources if re.match(r"[a-z_0-9]+=", source))
    return [source for source in sources if source not in settings], settings


def read_protocol(file: Path | None, settings: tuple[str, ...]) -> Protocol:
    """Read a protocol and apply settings. Lists may be written without brackets and quotes."""
    from likeness.config import load_toml
    from likeness.evaluate.protocol import Protocol

    quoted = [re.sub(r"^(given|metrics)=([\w+,]+)$", lambda m: f"{m[1]}={m[2].split(',')}", text) for text in settings]
    return load_toml(file, Protocol, tuple(quoted))


def run_evaluation(
    model: str | None,
    faces: str,
    out: Path,
    protocol: Protocol,
    device: str,
    dtype: DtypeName,
    base: str | None = None,
    images: Path | None = None,
) -> Results | None:
    """Evaluate with a progress bar, write the report, and print what could not be read or measured to stderr."""
    from likeness.cli.portraits import load_pipeline
    from likeness.device import choose_device
    from likeness.evaluate.report import write_report
    from likeness.evaluate.run import evaluate as run

    quiet_libraries()
    device = choose_device(device)
    pipeline: Any = None if model is None else load_pipeline(model, dtype, device, base)
    with progress_bar("Evaluating") as advance:
        results = run(
            Path(faces),
            out,
            protocol,
            pipeline=pipeline,
            model=model or "",
            images=images,
            device=device,
            progress=lambda task, done, total: advance(done, total),
        )
    if results is not None:
        write_report(results, out)
        print_notes([f"Not read: {fault.file}: {fault.why}" for fault in results.faults])
        print_notes([f"Not measured: {entry.metric}: {entry.why}" for entry in results.missing])
        print_notes(results.notes)
    return results
