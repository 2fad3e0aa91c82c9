"""The portraits that an evaluation measures, made by any number of processes.

Every process walks through all faces, its own share first; what is there already is passed over. So the files are the
same for any number of processes, none waits for another, a dead one is made up for, and a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from likeness.data.folder import read_photo
from likeness.encoders.latent import LatentCodec, through
from likeness.evaluate.config import Protocol, conditions_of
from likeness.evaluate.faces import Face
from likeness.parallel import rank_and_world
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.record import hash_of, read_recipe, recipe_of, write_picture
from likeness.types import InputError, PortraitRequest

ROUND = 1_000_000
"""Distance of the seeds of two rounds."""

Report = Callable[[str, int, int], None]
"""Called as (what is being done, done, in all)."""


def own_first(count: int, rank: int, world: int) -> list[int]:
    """All numbers below `count`: every `world`-th from `rank` on, then those of the other processes from the end."""
    own = list(range(rank, count, world))
    return own + sorted(set(range(count)) - set(own), reverse=True)


def seed_of(face: Face, number_of_round: int) -> int:
    """The seed of a face's portrait: its number, moved by the round."""
    return face.number + number_of_round * ROUND


def portrait_file(out: Path, given: str, number_of_round: int, face: Face) -> Path:
    """Where a portrait lies."""
    return out / "pictures" / given / str(number_of_round) / f"{face.name}.png"


def ceiling_file(out: Path, face: Face) -> Path:
    """Where the photograph lies that went through the autoencoder."""
    return out / "pictures" / "ceiling" / f"{face.name}.png"


def request_for(face: Face, given: str, number_of_round: int, protocol: Protocol, pipeline: Any) -> PortraitRequest:
    """The resolved request of a portrait."""
    request = PortraitRequest(
        prompt=face.caption,
        control_image={name: face.conditions[name] for name in conditions_of(given)},
        num_inference_steps=protocol.steps,
        guidance_scale=protocol.guidance_scale,
        seed=seed_of(face, number_of_round),
    )
    return resolve(request, pipeline)


def made_of(file: Path, request: PortraitRequest) -> bool:
    """Whether a portrait is there and was made of this request: the folder may have changed since.

    Model, steps and guidance are not looked at: all portraits of an evaluation have the same.
    """
    try:
        recipe, _ = read_recipe(file)
    except InputError:  # none is there
        return False
    hashes = {name: hash_of(reading.raw) for name, reading in request.control_image.items()}
    there = {name: entry["sha256"] for name, entry in recipe["conditions"].items()}
    return (recipe["prompt"], recipe["seed"], there) == (request.prompt, request.seed, hashes)


def make_portraits(
    pipeline: Any,
    faces: Sequence[Face],
    protocol: Protocol,
    out: Path,
    *,
    model: str,
    fingerprint: str,
    report: Report,
) -> dict[str, str]:
    """Make what is not there yet, or of what the folder held before: a picture with its recipe for every face, set and
    round.

    Args:
        pipeline: a pipeline of this package.
        faces: what is asked for.
        protocol: how.
        out: folder of the evaluation.
        model: the name under which the pipeline was loaded, for the recipes.
        fingerprint: hash of its weights.
        report: told about progress.

    Returns:
        Condition file -> why it cannot be read; portraits that need it were not made.
    """
    rank, world = rank_and_world()
    faults: dict[str, str] = {}
    for given in protocol.given:
        for number_of_round in range(protocol.seeds):
            for done, index in enumerate(own_first(len(faces), rank, world)):
                face = faces[index]
                file = portrait_file(out, given, number_of_round, face)
                try:
                    request = request_for(face, given, number_of_round, protocol, pipeline)
                except InputError as error:
                    faults[face.name] = str(error)
                    file.unlink(missing_ok=True)
                    continue
                if not made_of(file, request):
                    pictures, _ = generate(pipeline, request, [request.seed])
                    recipe = recipe_of(request, pipeline, model=model, fingerprint=fingerprint)
                    write_picture(pictures[0], file, recipe)
                report(f"portraits from {given}", done + 1, len(faces))
    return faults


def changed_since(file: Path, photo: Path) -> bool:
    """Whether the photograph was written after the file that was made of it."""
    return photo.is_file() and photo.stat().st_mtime_ns > file.stat().st_mtime_ns


def make_ceiling(pipeline: Any, faces: Sequence[Face], size: int, out: Path, report: Report) -> dict[str, str]:
    """The photographs through the pipeline's autoencoder: what a portrait would score that is the photograph itself.

    Returns:
        Name of the face -> why its photograph cannot be read.
    """
    codec, faults = LatentCodec(pipeline.vae), {}
    rank, world = rank_and_world()
    for done, index in enumerate(own_first(len(faces), rank, world)):
        face = faces[index]
        file = ceiling_file(out, face)
        if not file.is_file() or changed_since(file, face.photo):
            try:
                picture = through(codec, read_photo(face.photo, size))
            except InputError as error:
                faults[face.name] = str(error)
                continue
            write_picture(Image.fromarray(picture), file, None)
        report("photographs through the autoencoder", done + 1, len(faces))
    return faults
