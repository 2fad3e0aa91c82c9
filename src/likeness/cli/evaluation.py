"""Commands that measure models, compare measurements and count costs. The fields of a command are its options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from likeness.cli.terminal import print_notes, progress_bar, quiet_libraries
from likeness.config import load_toml, read_toml
from likeness.types import DtypeName, InputError

if TYPE_CHECKING:
    from likeness.evaluate.protocol import Protocol
    from likeness.evaluate.results import Results


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How models are measured."""

    protocol: Path | None = None
    """TOML file with the protocol."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present, under torchrun one per process."""
    dtype: DtypeName = "auto"
    """Dtype; auto is fp32 on a CPU, bf16 or fp16 on an accelerator."""

    def measure(
        self,
        model: str | None,
        faces: str,
        out: Path,
        settings: tuple[str, ...],
        base: str | None = None,
        images: Path | None = None,
    ) -> Results | None:
        """Evaluate with a progress bar and write the report."""
        from likeness.cli.portraits import load_pipeline
        from likeness.device import choose_device
        from likeness.evaluate.report import write_report
        from likeness.evaluate.run import evaluate

        quiet_libraries()
        protocol, device = read_protocol(self.protocol, settings), choose_device(self.device)
        pipeline: Any = None if model is None else load_pipeline(model, self.dtype, device, base)
        with progress_bar("Evaluating") as advance:
            results = evaluate(
                Path(faces),
                out,
                protocol,
                pipeline=pipeline,
                model=model or "",
                images=images,
                device=device,
                progress=lambda task, done, total: advance(done, total, task),
            )
        if results is not None:
            write_report(results, out)
        return results


@dataclass(frozen=True, kw_only=True)
class Evaluate(MeasureOptions):
    """Measure a model on held-out faces: `likeness evaluate MODEL FACES [key=value ...] --out DIR`.

    All processes that torchrun starts (RANK, WORLD_SIZE) generate images. Run the same command again to resume.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """MODEL (optional with --images) and FACES, a prepared folder; then settings of the protocol, such as count=1000 or
    given=mask,none (docs/metrics.md lists all)."""
    out: Path
    """Folder for images, results.json, report.md and report.html."""
    images: Path | None = None
    """Folder with images of any method, each named like the photograph of its face. Set given= to the condition
    that they were made from, such as given=mask. The autoencoder of MODEL then gives the ceiling."""
    base: str | None = None
    """Base model of an adapter, if it is not the one that the adapter names."""

    def __call__(self) -> None:
        names, settings = split_sources(self.sources)
        if len(names) != 2 and not (self.images is not None and len(names) == 1):
            expected = "MODEL FACES" if self.images is None else "FACES, or MODEL FACES for the ceiling"
            raise InputError(f"evaluate requires {expected}, not {' '.join(names) or 'nothing'}")
        model, faces = names if len(names) == 2 else (None, names[0])
        if model is None and self.base is not None:
            raise InputError("--base is the base of MODEL, but there is no MODEL")
        results = self.measure(model, faces, self.out, settings, self.base, self.images)
        if results is not None:
            from likeness.evaluate.report import numbers_table
            from likeness.pages import markdown_table

            print_notes([f"Not read: {file}: {why}" for file, why in results.faults.items()])
            print_notes([f"Not measured: {metric}: {why}" for metric, why in results.missing.items()])
            print_notes(results.notes)
            print(markdown_table(numbers_table(results)))
            print(self.out / "report.html")


@dataclass(frozen=True, kw_only=True)
class Compare(MeasureOptions):
    """Test which differences between models or settings are significant: `likeness compare A B ... --out DIR`."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Each a folder of `likeness evaluate`, or a model to evaluate on --faces, optionally with settings:
    mmface-mini@steps=10,guidance_scale=3. Then settings of the protocol for all models, such as count=1000."""
    out: Path
    """Folder for comparison.json, comparison.md and comparison.html, and for the evaluations of models."""
    faces: Path | None = None
    """Prepared folder on which models are evaluated."""
    allow: tuple[str, ...] = ()
    """Parts of the protocol that may differ because they are what is compared, such as steps."""

    def __call__(self) -> None:
        from likeness.evaluate.compare import compare_evaluations
        from likeness.evaluate.report import comparison_table, write_comparison
        from likeness.evaluate.results import RESULTS, read_evaluation
        from likeness.pages import markdown_table
        from likeness.parallel import rank_and_world

        names, settings = split_sources(self.sources)
        if len(names) < 2:
            raise InputError(f"compare requires at least two evaluations or models, not {' '.join(names) or 'nothing'}")
        if len(set(names)) < len(names):
            raise InputError(f"compare received a source twice: {', '.join(names)}")
        models = [name for name in names if not (Path(name) / RESULTS).is_file()]
        if not models and (settings or self.faces or self.protocol):
            raise InputError("All sources are finished evaluations: settings, --faces and --protocol are for models")
        evaluations, allowed = {}, set(self.allow)
        for name in names:
            folder = Path(name)
            if name in models:
                if self.faces is None:
                    raise InputError(f"{name} has no {RESULTS}, so it is a model: pass --faces")
                model, _, text = name.partition("@")
                own = tuple(text.split(",")) if text else ()
                keys = {setting.partition("=")[0].strip() for setting in own}
                if "count" in keys:
                    raise InputError(f"{name} would be evaluated on different faces: set count=... for all sources")
                allowed |= keys
                folder = self.out / re.sub(r"[^\w.=,@-]+", "-", name).strip("-")
                if self.measure(model, str(self.faces), folder, (*settings, *own)) is None:
                    continue  # of torchrun's processes, the first compares
            evaluations[name] = read_evaluation(folder)
        if rank_and_world()[0]:
            return
        comparison = compare_evaluations(evaluations, allow=tuple(sorted(allowed)))
        write_comparison(comparison, evaluations, self.out)
        print_notes(comparison.notes)
        print(markdown_table(comparison_table(comparison)))
        print(self.out / "comparison.html")


SAMPLING: dict[str, dict[str, tuple[float, ...]]] = {
    "release": {"steps": (50, 20), "guidance_scale": (7.5, 4.0, 2.0)},
    "mditface": {"steps": (28,), "guidance_scale": (3.5,)},
}
"""What is verified -> steps and guidance scales that are tried by default."""

VERIFIED = {
    "given": "mask",
    "face_parser": "jonathandinu/face-parsing",
    "text_image": "openai/clip-vit-base-patch16",
}
"""Settings of the protocol of `verify`, unless they are given: the bundled evaluator models are not comparable."""


@dataclass(frozen=True, kw_only=True)
class Verify(MeasureOptions):
    """Find the protocols that explain published numbers: `likeness verify release MODEL FACES --out DIR`.

    Generate and measure images under every combination of the settings below. Run the same command again to resume.
    Evaluator models by default: jonathandinu/face-parsing and openai/clip-vit-base-patch16, which are downloaded.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """`release` (MMFace-DiT) or `mditface` (an adapter), MODEL and FACES, a prepared folder; then settings of the
    protocol, such as count=1000 or given=sketch."""
    out: Path
    """Folder for images, verification.json, verification.md and verification.html."""
    steps: tuple[int, ...] = ()
    """Sampling steps. Default: 50 20; for an adapter 28."""
    guidance_scale: tuple[float, ...] = ()
    """Text guidance scales. Default: 7.5 4 2; for an adapter 3.5, which FLUX.1 embeds."""
    caption: tuple[Literal["first", "longest"], ...] = ("first", "longest")
    """Captions that are the prompts."""
    file_format: tuple[Literal["png", "jpg"], ...] = ("png", "jpg")
    """Formats of the images; JPEG has quality 95."""
    resizing: tuple[Literal["tensorflow", "pillow"], ...] = ("tensorflow", "pillow")
    """Resizing of images for FID's InceptionV3."""
    base: str | None = None
    """Base model of an adapter, if it is not the one that the adapter names."""

    def __call__(self) -> None:
        from likeness.cli.portraits import load_pipeline
        from likeness.device import choose_device
        from likeness.evaluate.verify import published_row, verdict, verify, write_verification

        names, settings = split_sources(self.sources)
        if len(names) != 3 or names[0] not in ("release", "mditface"):
            raise InputError(
                f"verify requires release or mditface, MODEL and FACES, not {' '.join(names) or 'nothing'}"
            )
        what, model, faces = names
        chosen = {setting.partition("=")[0] for setting in settings}
        chosen |= set() if self.protocol is None else read_toml(self.protocol).keys()
        if fixed := sorted(chosen & {"mask_model", "metrics"}):
            raise InputError(f"verify measures the published metrics of one condition: omit the setting {fixed[0]}")
        grid = {name: getattr(self, name) for name in ("steps", "guidance_scale", "caption", "file_format", "resizing")}
        grid |= {name: values for name, values in SAMPLING[what].items() if not grid[name]}
        if replaced := sorted(chosen & grid.keys()):
            name = replaced[0]
            raise InputError(f"verify tries several values of {name}: use --{name.replace('_', '-')}, not {name}=")
        unset = tuple(f"{name}={value}" for name, value in VERIFIED.items() if name not in chosen)
        quiet_libraries()
        protocol, device = read_protocol(self.protocol, (*unset, *settings)), choose_device(self.device)
        pipeline = load_pipeline(model, self.dtype, device, self.base)
        kind = {"release": "MMFacePipeline", "mditface": "MDiTFacePipeline"}[what]
        if type(pipeline).__name__ != kind:
            raise InputError(f"{model} is a {type(pipeline).__name__}, but verify {what} measures a {kind}")
        published = published_row(what, protocol.given[0], pipeline.config.objective["name"])
        with progress_bar("Verifying") as advance:
            trials = verify(
                Path(faces),
                self.out,
                grid,
                published,
                protocol,
                pipeline=pipeline,
                model=model,
                device=device,
                progress=lambda task, done, total: advance(done, total, task),
            )
        if not trials:
            return
        write_verification(trials, published, self.out, f"{model} against the paper")
        print("\n".join(verdict(trials, published)))
        print(self.out / "verification.html")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Count the operations and memory that a mask adds to MDiTFace on FLUX.1-dev, for every form of attention."""

    network: tyro.conf.Positional[Literal["mditface"]]
    """The network."""
    size: int = 512
    """Side in pixels."""
    steps: int = 28
    """Sampling steps."""
    text_tokens: int = 512
    """Tokens of the prompt."""
    conditions: int = 1
    """Number of simultaneous conditions."""
    rank: int = 8
    """Rank of the adapter's LoRA."""

    def __call__(self) -> None:
        from likeness.evaluate.cost import mditface_costs

        plain, *forms = mditface_costs(**{name: value for name, value in vars(self).items() if name != "network"})
        holistic = next(form for form in forms if form.attention == "holistic")
        print(
            f"10^12 multiply-accumulates per image: {self.size} px, {self.steps} steps, {self.text_tokens} text tokens"
            f", {self.conditions} condition{'s' * (self.conditions > 1)}, LoRA rank {self.rank}"
        )
        print(f"{'':10}{'Linear, LayerNorm':>30}{'all products':>30}{'cache':>12}{'adapter':>12}")
        print(f"{'':10}" + f"{'total':>10}{'added':>10}{'saved':>10}" * 2 + f"{'MB, bf16':>12}{'parameters':>12}")
        for row in (plain, *forms):
            line = f"{row.attention:10}"
            for own, none, full in zip(row[1:3], plain[1:3], holistic[1:3], strict=True):
                line += f"{own / 1e12:10.2f}{(own - none) / 1e12:10.2f}{1 - (own - none) / (full - none):10.1%}"
            print(f"{line}{row.cache / 1e6:12.0f}{row.adapter:12,}")
        print("saved: relative to holistic attention. The left count is that of the paper's Table 4 (docs/mditface.md)")


def split_sources(sources: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Separate names from settings of the form key=value."""
    settings = tuple(source for source in sources if re.match(r"[a-z_0-9]+=", source))
    return [source for source in sources if source not in settings], settings


def read_protocol(file: Path | None, settings: tuple[str, ...]) -> Protocol:
    """Read a protocol and apply settings. Lists may be written without brackets and quotes."""
    from likeness.evaluate.protocol import Protocol

    quoted = [re.sub(r"^(given|metrics)=([\w+,]+)$", lambda m: f"{m[1]}={m[2].split(',')}", text) for text in settings]
    return load_toml(file, Protocol, tuple(quoted))
