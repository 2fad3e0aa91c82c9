"""Edit a photograph: generate one region of a face, and keep every other pixel of the file.

The face is aligned and parsed, its mask edited, the region generated at the size of the model (`pipelines.editing`) and
pasted with the inverse transform. Pixels outside the region are copied from the photograph, and the encoded file is
decoded and compared before it is written: the certificate counts the pixels that changed. The feather is inside the
region, which is therefore a margin larger than what the mask changes.

S pixels is the side of the portrait, W x H the size of the photograph.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from scipy import ndimage

from likeness.annotators.face_parser import parse_faces
from likeness.annotators.landmarks import FaceFinder
from likeness.conditions import CONDITIONS, Reading, Source
from likeness.conditions.framing import inverse, move
from likeness.conditions.images import MAX_PIXELS, open_image, read_rgb
from likeness.conditions.mask import resize
from likeness.conditions.mask.commands import apply_commands
from likeness.conditions.mask.edits import class_indices
from likeness.conditions.mask.geometry import shows_face
from likeness.pipelines.editing import DEFAULT_METHOD, DESCRIBED, METHODS, edit_steps, last
from likeness.pipelines.formats import format_of
from likeness.pipelines.generate import call_options, resolve
from likeness.pipelines.image_recipe import decode_raw, encode_image, encode_raw, recipe_of
from likeness.pipelines.output import PortraitOutput
from likeness.pipelines.sizes import LARGEST_SIDE
from likeness.prepare.align import cut_portrait, face_transform
from likeness.prepare.paste import FEATHER, bands, box_of, inward, paste_portrait
from likeness.types import ConditionInput, InputError, PortraitRequest, Progress

MARGIN = 0.05
"""Distance by which a region is larger than what the mask changes, and width of the feather inside it; of S."""

MANY_STEPS = 8
"""Sampling steps from which an inversion is accurate."""

RING = 0.08
"""Width of the ring outside the region from which colors are matched, of S."""

MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}
"""Pillow mode of a photograph -> mode of its result, in which the pixels are the same."""

WEBP_SIDE = 16383
"""Largest side of a WebP in pixels."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph."""

    image: Image.Image
    """Upright, in its own colors, mode L, LA, RGB or RGBA."""
    pixels: np.ndarray
    """In sRGB on white, uint8 [H, W, 3]."""
    profile: bytes | None
    """ICC profile of `image`."""
    name: str

    @property
    def sha256(self) -> str:
        """Hash of the decoded pixels."""
        image = self.image
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Change:
    """What to change in a photograph. Masks have the size of the photograph, or are square: of the aligned face."""

    mask_edit: str = ""
    """Commands of `likeness.conditions.mask.commands`."""
    mask: Source | None = None
    """The wanted mask."""
    region: Sequence[str] = ()
    """Classes to generate again."""
    region_mask: str | Path | Image.Image | bytes | None = None
    """Image whose white pixels are generated again."""
    keep: str = ""
    """Classes whose pixels stay, as "skin, eyes" or "all but hair"."""
    face: int | None = None
    """Number of the face, 1 for the largest."""
    whole: bool = False
    """Whether to change the whole portrait if nothing else is given."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where and what to generate."""

    transform: np.ndarray
    """float64 [2, 3], photograph -> portrait of S pixels."""
    region: np.ndarray
    """bool [S, S]."""
    before: np.ndarray
    """The photograph's mask, uint8 [S, S]."""
    after: np.ndarray
    """The wanted mask, uint8 [S, S]."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edited photograph."""

    image: Image.Image
    content: bytes
    """The encoded file."""
    certificate: dict[str, int]
    """`photo_pixels`, `region_pixels`, `changed_inside`, and `changed_outside`, which is 0."""
    recipe: dict[str, Any] | None
    notes: list[str]


def lossless_format(out: Path) -> str:
    """Return Pillow's format of the result's file name. Raises `InputError` for lossy formats and folders."""
    if out.suffix.lower() not in (".png", ".webp"):
        raise InputError(f"{out} must end in .png or .webp, in which no pixel changes")
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file to write")
    return format_of(out)


def open_photo(source: str | Path | bytes, name: str = "") -> Photo:
    """Read a photograph without changing a pixel.

    Raises:
        InputError: it cannot be read, or has values that a PNG of 8 bits cannot store.
    """
    image, name = open_image(source, name, max_pixels=MAX_PIXELS, exact=True), name or str(source)
    if image.mode not in MODES:
        raise InputError(f"{name} is a {image.mode} image, whose colors would be converted: save it as 8-bit RGB")
    mode = MODES[image.mode]
    if "transparency" in image.info and not mode.endswith("A"):
        mode += "A"
    profile = image.info.get("icc_profile")
    return Photo(image=image.convert(mode), pixels=np.array(read_rgb(image)), profile=profile, name=name)


def read_labels(file: str | Path) -> np.ndarray:
    """Read the mask that an edit names."""
    return CONDITIONS["mask"].read(Path(file)).raw


def edit_photo(
    pipeline: Any,
    photo: Photo,
    change: Change,
    request: PortraitRequest,
    *,
    parser: tuple[Any, int],
    find: FaceFinder | None = None,
    read: Callable[[str], np.ndarray] = read_labels,
    **options: Any,
) -> Edited:
    """Edit a photograph.

    Args:
        pipeline: an `MMFacePipeline` or `MDiTFacePipeline` with masks.
        photo: output of `open_photo`.
        change: what to change.
        request: prompt, seed, steps and guidance.
        parser: output of `load_face_parser`.
        find: face detector; without it the photograph must be an aligned square face.
        read: returns the mask that a mask edit names. Default: that of the file.
        options: keyword arguments of `carry_out`.

    Raises:
        InputError: no face is found, or the change is invalid or empty.
    """
    side = request.width or pipeline.config.defaults["size"]
    plan = plan_edit(photo, change, side, parser=parser, find=find, read=read)
    return carry_out(pipeline, photo, plan, request, **options)


def plan_edit(
    photo: Photo,
    change: Change,
    side: int,
    *,
    parser: tuple[Any, int],
    find: FaceFinder | None = None,
    read: Callable[[str], np.ndarray] = read_labels,
) -> Plan:
    """Find the face of a photograph, parse it, and apply the change to its mask; `side` is that of the model's images.

    Raises:
        InputError: see `edit_photo`.
    """
    given = change.mask_edit or change.mask is not None or change.region or change.region_mask is not None
    if not given and not change.whole:
        raise InputError("there is nothing to edit: pass a mask edit, a mask, a region or a strength")
    network, size = parser
    side = max(side, min(size, *photo.pixels.shape[:2]))  # the mask of a small photograph, pixel by pixel
    transform, _, notes = face_transform(photo.pixels, photo.name, find, side, change.face)
    (before,) = parse_faces(network, [cut_portrait(photo.pixels, transform, side)], size=size)
    if not shows_face(before):
        raise InputError(f"{photo.name} shows no face that the parser recognizes: use a frontal photograph")
    after = before
    if change.mask is not None:
        reading = CONDITIONS["mask"].read(change.mask, full=True)
        notes = [*notes, *(f"mask: {note.text}" for note in reading.notes)]
        after = in_portrait(reading.raw, photo, transform, side, "mask", outside=before)
    after = apply_commands(after, change.mask_edit, read)
    wanted = before != after
    if change.region:
        classes = class_indices(change.region, background=True)
        wanted |= np.isin(before, classes) | np.isin(after, classes)
    region = near(wanted, MARGIN * side) if wanted.any() else wanted
    if change.region_mask is not None:
        white = np.asarray(read_rgb(change.region_mask, background="black").convert("L")) >= 128
        inner = in_portrait(white, photo, transform, side, "region mask")
        if white.shape == photo.pixels.shape[:2]:  # no cell of the portrait that contains the place of a black pixel
            for rows, columns, *places in bands(transform, (0, 0, side, side), white.shape[1], white.shape[0]):
                x, y = (np.floor(place[~white[rows, columns]]).astype(int) for place in places)
                within = (x >= 0) & (x < side) & (y >= 0) & (y < side)
                inner[y[within], x[within]] = False
        wanted, region = wanted | inner, region | inner
    if not given:
        wanted = region = np.ones_like(wanted)
    if change.keep:
        allowed = changeable(change.keep, before, after)
        wanted, region = wanted & allowed, region & allowed
    if not wanted.any():
        reasons = (
            "the mask does not change, the face lacks the classes, or the region is outside the aligned face or kept"
        )
        raise InputError(f"the region is empty: {reasons}", kind="empty-region")
    return Plan(transform=transform, region=region, before=before, after=after, notes=notes)


def in_portrait(
    values: np.ndarray,
    photo: Photo,
    transform: np.ndarray,
    side: int,
    what: str,
    *,
    outside: np.ndarray | int = 0,
) -> np.ndarray:
    """Move labels or a region [h, w] of the photograph or of the portrait to the portrait, [side, side].

    `outside`, a value or [side, side], is what lies outside the photograph.

    Raises:
        InputError: they are of another size.
    """
    height, width = photo.pixels.shape[:2]
    if values.shape != (height, width) and values.shape[0] == values.shape[1]:
        return resize(values.astype(np.uint8), side, side).astype(values.dtype)
    if values.shape != (height, width):
        wanted = f"{width}x{height} as the photograph, or square as the aligned face"
        raise InputError(f"the {what} is {values.shape[1]}x{values.shape[0]}: it must be {wanted}")
    centers = np.arange(side) + 0.5
    x, y = np.moveaxis(move(np.stack(np.meshgrid(centers, centers), axis=-1), inverse(transform)), -1, 0)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    found = np.full((side, side), outside, values.dtype)
    found[inside] = values[y[inside].astype(int), x[inside].astype(int)]
    return found


def changeable(keep: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return where a portrait may change, bool [S, S], from "skin, eyes" or "all but hair"."""
    words = keep.strip().removeprefix("all but ")
    classes = class_indices([name.strip() for name in words.split(",") if name.strip()], background=True)
    if words != keep.strip():
        return np.isin(before, classes) | np.isin(after, classes)
    return ~np.isin(before, classes)


def carry_out(
    pipeline: Any,
    photo: Photo,
    plan: Plan,
    request: PortraitRequest,
    *,
    kind: str = "PNG",
    strength: float = 1.0,
    method: str | None = None,
    metadata: bool = True,
    fingerprint: str = "",
    on_step: Progress | None = None,
) -> Edited:
    """Generate the region of a plan and paste it.

    Args:
        pipeline: as in `edit_photo`; also `photo` and `request`.
        photo: the photograph.
        plan: output of `plan_edit`.
        request: what to generate.
        kind: PNG or WEBP.
        strength: fraction of the steps that run (`likeness.pipelines.editing.edit_steps`).
        method: name in `METHODS`. Default: `best_method`.
        metadata: whether to write the recipe into the file.
        fingerprint: hash of the pipeline's weights, for the recipe.
        on_step: called as (steps done, total steps).

    Raises:
        InputError: an argument is invalid, or the format cannot store the photograph.
    """
    request = request_for(pipeline, photo, plan, request, kind)
    method = best_method(pipeline, plan, request) if method is None else method
    how = {"strength": strength, "method": method}
    output = last(region_steps(pipeline, photo, plan, request, **how), on_step)
    recipe = recipe_of(request, pipeline, **pipeline.source, fingerprint=fingerprint) if metadata else None
    return composed(photo, plan, output.images[0], recipe, kind=kind, notes=output.notes, **how)


def best_method(pipeline: Any, plan: Plan, request: PortraitRequest) -> str:
    """Return the method that measures best for a plan and a resolved request (`benchmarks/edit.py`).

    A changed mask describes the change, so that the region can start from the photograph: by inversion, or by FlowEdit
    in few steps, which cannot be inverted. If the mask stays, these would change almost nothing.
    """
    if (plan.before == plan.after).all() or pipeline.config.objective["name"] != "rectified_flow":
        return DEFAULT_METHOD
    return "inversion" if (request.num_inference_steps or 0) >= MANY_STEPS else "flow_edit"


def request_for(pipeline: Any, photo: Photo, plan: Plan, request: PortraitRequest, kind: str) -> PortraitRequest:
    """Return the resolved request of a plan. Raises `InputError` if the format cannot store the photograph."""
    width, height = photo.image.size
    if kind == "WEBP" and max(width, height) > WEBP_SIDE:
        raise InputError(f"{photo.name} is {width}x{height}, and a WebP is at most {WEBP_SIDE} wide: write a .png")
    mask = ConditionInput(image=Reading(raw=plan.after, scheme="mask of the edit"))
    return resolve(replace(request, conditions={**request.conditions, "mask": mask}), pipeline)


def region_steps(
    pipeline: Any, photo: Photo, plan: Plan, request: PortraitRequest, *, strength: float, method: str
) -> Generator[tuple[int, int], None, PortraitOutput]:
    """Generate the region of a plan with the output of `request_for`, as `edit_steps`."""
    source = {"mask": Reading(raw=plan.before, scheme="mask of the photograph")}
    steps = edit_steps(
        pipeline,
        image=cut_portrait(photo.pixels, plan.transform, len(plan.region)),
        mask_image=plan.region,
        strength=strength,
        method=method,
        source_control_image=source if method in DESCRIBED else None,
        **call_options(request, [request.seed]),
    )
    return (yield from steps)  # the caller drives the generator


def composed(
    photo: Photo,
    plan: Plan,
    generated: Image.Image,
    recipe: dict[str, Any] | None,
    *,
    kind: str,
    strength: float,
    method: str,
    notes: Sequence[str] = (),
) -> Edited:
    """Paste a generated region into a photograph, and encode it with the recipe, unless that is None."""
    side, (width, height) = len(plan.region), photo.image.size
    portrait = cut_portrait(photo.pixels, plan.transform, side)
    made = np.array(generated.resize((side, side), Image.Resampling.LANCZOS))
    image, inside = paste_region(photo, match_color(made, portrait, plan.region), plan)
    after = np.array(image.convert("RGBA"))
    certificate = certify(np.array(photo.image.convert("RGBA")), after, inside)
    entry = {
        "method": method,
        "strength": strength,
        "photo": photo.sha256,
        "width": width,
        "height": height,
        "transform": plan.transform.tolist(),
        "region": encode_raw(plan.region.astype(np.uint8) * 255),
        "before": encode_raw(plan.before),
        "certificate": certificate,
    }
    recipe = None if recipe is None else {**recipe, "edit": entry}
    image.info["icc_profile"] = photo.profile
    content = encode_image(image, kind, recipe)
    with Image.open(io.BytesIO(content)) as written:
        assert np.array_equal(np.array(written.convert("RGBA")), after), "the file has other pixels"
    return Edited(image=image, content=content, certificate=certificate, recipe=recipe, notes=[*plan.notes, *notes])


def match_color(made: np.ndarray, portrait: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Shift the colors of a generated portrait, uint8 [S, S, 3], so that it continues that of the photograph around a
    region, bool [S, S].

    The difference on a ring outside the region, smoothed, is added: normalized convolution (Knutsson and Westin, 1993).
    """
    side = len(region)
    if region.all():
        return made
    ring = ~region & near(region, RING * side)
    difference = (portrait.astype(np.float64) - made) * ring[..., None]
    sigma, least = RING * side, 1e-3  # far from the ring the mean
    shift = ndimage.gaussian_filter(difference, (sigma, sigma, 0)) + least * difference[ring].mean(axis=0)
    shift /= (ndimage.gaussian_filter(ring.astype(np.float64), sigma) + least)[..., None]
    return np.rint(made + shift).clip(0, 255).astype(np.uint8)


def near(region: np.ndarray, distance: float) -> np.ndarray:
    """Return where a region, bool [S, S], is within a distance in pixels; it is not empty."""
    return np.asarray(ndimage.distance_transform_edt(~region)) <= distance


def paste_region(photo: Photo, made: np.ndarray, plan: Plan) -> tuple[Image.Image, np.ndarray]:
    """Paste the region of a portrait, in sRGB, into a photograph.

    Returns:
        The image, in the photograph's mode, and where its pixels may differ, bool [H, W].
    """
    side, (width, height) = len(plan.region), photo.image.size
    own = np.array(photo.image.convert("RGB"))
    corners = move(np.array([[0, 0], [width, height]]), plan.transform)
    fills = np.allclose(corners, [[0, 0], [side, side]])  # no border between portrait and photograph
    feather = 1e-6 if fills else FEATHER
    weight = inward(plan.region, MARGIN)
    pasted = paste_portrait(own, from_srgb(made, photo), plan.transform, side, feather=feather, weight=weight)
    inside = np.zeros((height, width), bool)
    for rows, columns, *places in bands(plan.transform, box_of(plan.region, 1), width, height):
        within = np.logical_and.reduce([(place >= 0) & (place < side) for place in places])
        x, y = (place.clip(0, side - 1).astype(np.int32) for place in places)
        inside[rows, columns] = within & plan.region[y, x]
    np.copyto(pasted, own, where=~inside[..., None])
    result = Image.fromarray(pasted)
    if photo.image.mode in ("L", "LA"):
        result = Image.fromarray(np.where(inside, np.array(result.convert("L")), own[..., 0]))
    if photo.image.mode.endswith("A"):
        result.putalpha(photo.image.getchannel("A"))
    return result, inside


def from_srgb(image: np.ndarray, photo: Photo) -> np.ndarray:
    """Convert uint8 [S, S, 3] from sRGB to the colors or grays of a photograph. An unusable profile is ignored."""
    if not photo.profile:
        return image
    mode = "L" if photo.image.mode in ("L", "LA") else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(photo.profile))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(Image.fromarray(image), srgb, profile, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None, "not in place"
    return np.array(converted.convert("RGB"))


def certify(before: np.ndarray, after: np.ndarray, inside: np.ndarray) -> dict[str, int]:
    """Count changed pixels of two images, uint8 [H, W, 4], inside and outside a region [H, W]."""
    changed = (before.view(np.uint32) != after.view(np.uint32))[..., 0]  # one comparison per pixel
    return {
        "photo_pixels": inside.size,
        "region_pixels": int(inside.sum()),
        "changed_inside": int((changed & inside).sum()),
        "changed_outside": int((changed & ~inside).sum()),
    }


def is_plausible(transform: np.ndarray, side: int, width: int, height: int) -> bool:
    """Return whether a portrait of a transform is near a photograph, so that neither is resampled without bound."""
    if not np.isfinite(transform).all() or not np.linalg.det(transform[:, :2]):
        return False
    corners = move(np.array([[0, 0], [side, 0], [0, side], [side, side]]), inverse(transform))
    return bool((np.abs(corners - [width / 2, height / 2]) < 3 * max(width, height)).all())


def replay_edit(
    pipeline: Any, recipe: Mapping[str, Any], request: PortraitRequest, photo: Photo, **options: Any
) -> Edited:
    """Repeat the edit of a recipe that was checked by `check_recipe`; `options` are those of `carry_out`.

    Raises:
        InputError: the photograph is another one, or the recipe is damaged.
    """
    entry = recipe["edit"]
    if photo.sha256 != entry["photo"]:
        raise InputError(f"{photo.name} is not the photograph that was edited, or was changed since: pass the original")
    if [len(row) for row in entry["transform"]] != [3, 3]:
        raise InputError("The edit of the recipe is damaged: its transform has another shape than [2, 3]")
    transform = np.array(entry["transform"], dtype=np.float64)
    region, before = (decode_raw(entry[name], raw) for name, raw in (("region", "sketch"), ("before", "mask")))
    after = request.conditions["mask"].image.raw if "mask" in request.conditions else before
    region, side = region >= 128, len(region)
    if not region.shape == before.shape == after.shape == (side, side) or not region.any() or side > LARGEST_SIDE:
        raise InputError("The edit of the recipe is damaged: its region and its masks do not match")
    if not is_plausible(transform, side, *photo.image.size) or entry["method"] not in METHODS:
        raise InputError("The edit of the recipe is damaged: its transform or its method is invalid")
    plan = Plan(transform=transform, region=region, before=before, after=after)
    return carry_out(pipeline, photo, plan, request, strength=entry["strength"], method=entry["method"], **options)
