"""The extractors, by name: those that ship with the project or come from a folder; `plugins.py` has the others.

Each is made from a protocol and looks at pictures in groups. What it needs and has not is `Missing`, a sentence that
the report shows instead of a number: another extractor is never put in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likeness.annotators.face_parser import parse_faces
from likeness.annotators.landmarks import open_landmarker
from likeness.annotators.sketch import DRAWING, extract_sketch
from likeness.conditions.keypoints import STROKES
from likeness.data.folder import read_photo
from likeness.encoders import text_image as pair
from likeness.encoders.text import to_ids
from likeness.evaluate import plugins
from likeness.evaluate.config import BUNDLED, Protocol
from likeness.evaluate.faces import Face, mask_counts, raw_condition
from likeness.evaluate.features import Extractor, Missing
from likeness.evaluate.scores import edge_f_score, keypoint_error
from likeness.pipelines import catalogue
from likeness.pipelines.load import load_face_parser, load_text_image, network_name, weights_hash

Make = Callable[[Protocol, int, str], Extractor]
"""(protocol, pixels a side of the pictures, device) -> the extractor. Raises `Missing`."""


def folder_of(name: str, file: str) -> Path | None:
    """The local folder that a protocol names, or its `model` where it is a run's; None where it must be a hub id.

    Raises:
        Missing: there is such a folder, but not what it should hold.
    """
    path = Path(name)
    if not path.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise Missing(f"there is no folder {name}: give one, a hub id, or {BUNDLED!r}")
        return None
    for folder in (path, path / "model"):
        if (folder / file).exists():
            return folder
    raise Missing(f"{path} has no {file}: give the folder of a trained component")


def face_parser(protocol: Protocol, size: int, device: str) -> Extractor:
    """Pixels right, given and found by class, against the own mask and another's: [B, 2, 19, 3]."""
    source = protocol.face_parser
    if source != BUNDLED and (folder := folder_of(source, "config.json")):
        source = str(folder)
    network, side = load_face_parser(source)
    notes = ("the bundled face parser also made masks that the bundled models learnt from: give another judge",)
    network.to(device)

    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        return mask_counts(parse_faces(network, pictures, size=side), faces)

    hashed, own = weights_hash(network)[:16], source == BUNDLED
    what = "bundled face parser" if own else f"{network_name(network).split()[0]} in {source}"
    return Extractor(name="face_parser", what=what, hash=hashed, look=look, notes=notes if own else ())


def sketch(protocol: Protocol, size: int, device: str) -> Extractor:
    """Edge F-score against the own sketch and another's, [B, 2]."""
    tolerance = 1.5 * size / 128

    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        scores = np.full((len(pictures), 2), np.nan)
        for row, (picture, face) in enumerate(zip(pictures, faces, strict=True)):
            drawn = extract_sketch(picture)
            for column, files in enumerate((face.conditions, face.another)):
                if (given := raw_condition(files, "sketch", len(drawn))) is not None:
                    scores[row, column] = edge_f_score(given, drawn, tolerance=tolerance)
        return scores

    told = f"XDoG {DRAWING}, strokes within {tolerance:g} px"
    return Extractor(name="sketch", what=told, hash=hash_of(told), look=look)


def landmarks(protocol: Protocol, size: int, device: str) -> Extractor:
    """Keypoint error against the own keypoints and another's, [B, 2]; NaN where no face is found."""
    if protocol.landmarker is None:
        raise Missing("keypoints are found by MediaPipe: set landmarker=face_landmarker.task, its model file")
    if find_spec("mediapipe") is None:
        raise Missing("keypoints are found by MediaPipe: pip install 'likeness[data]'")
    file, stack = Path(protocol.landmarker), ExitStack()
    find = stack.enter_context(open_landmarker(file))

    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        errors = np.full((len(pictures), 2), np.nan)
        for row, (picture, face) in enumerate(zip(pictures, faces, strict=True)):
            if (found := find(picture)) is None:
                continue
            for column, files in enumerate((face.conditions, face.another)):
                if (given := raw_condition(files, "keypoints", size)) is not None:
                    errors[row, column] = keypoint_error(given, found, STROKES)
        return errors

    content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Extractor(name="landmarks", what=f"MediaPipe's {file.name}", hash=content, look=look, close=stack.close)


def load_pair(protocol: Protocol, device: str) -> tuple[Any, Any, Path | None, str]:
    """The text-image pair of a protocol: `CLIPModel`, tokenizer, its folder (None: a published CLIP), what it is."""
    name = protocol.text_image
    if name == BUNDLED:
        folder, what = catalogue.BUNDLED / catalogue.COMMON, "bundled text-image pair"
    elif (Path(name) / "config.json").is_file():  # a CLIP as transformers saves it
        folder, what = None, f"CLIPModel in {name}"
    else:
        folder = folder_of(name, "clip")
        what = f"text-image pair in {folder}" if folder else name
    if folder is None:
        return *plugins.load_clip(name, device), None, what
    clip, tokenizer = load_text_image(folder)
    return clip.to(device).eval(), tokenizer, folder, what


def text_image(protocol: Protocol, size: int, device: str) -> Extractor:
    """Features of the picture and of the face's caption, unit vectors [B, 2, P]; a face without caption has zeros."""
    clip, tokenizer, folder, what = load_pair(protocol, device)
    prepare = own_input(clip) if folder else plugins.clip_input(clip)

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        seen = pair.embed_pictures(clip, prepare(pictures).to(device))
        ids = to_ids(tokenizer, [face.caption for face in faces], pair.most_tokens(clip)).to(device)
        told = pair.embed_captions(clip, ids) * torch.tensor([[bool(face.caption)] for face in faces]).to(device)
        return torch.stack([seen, told], dim=1).cpu().numpy()  # [B, 2, P]

    notes = ("the bundled text-image pair shares its text tower with the bundled models: give another judge",)
    own = protocol.text_image == BUNDLED
    hashed = weights_hash(clip)[:16]
    return Extractor(name="text_image", what=what, hash=hashed, look=look, notes=notes if own else ())


def own_input(clip: Any) -> Callable[[Sequence[np.ndarray]], Tensor]:
    """How this project's picture towers take uint8 pictures."""
    return lambda pictures: pair.reduced(pictures, clip.config.vision_config.image_size)


def attributes(protocol: Protocol, size: int, device: str) -> Extractor:
    """Whether each attribute that the face has is named from the picture, [B, A]: 1, 0, NaN where it has it not."""
    clip, _, folder, what = load_pair(protocol, device)
    head = pair.load_attribute_head(folder) if folder else None
    if head is None:
        raise Missing(
            f"the {what} has no {pair.ATTRIBUTES}: train one with attributes > 0 (recipes/text_image_mini.toml) on "
            "other faces and set text_image=its folder"
        )
    names = list(head.classes)

    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        named = pair.name_attributes(clip, head, own_input(clip)(pictures).to(device))
        right = np.full((len(pictures), len(names)), np.nan)
        for row, (found, face) in enumerate(zip(named, faces, strict=True)):
            for column, name in enumerate(names):
                value = face.attributes.get(name)
                if value not in (None, False, "none") and str(value) in head.classes[name]:
                    right[row, column] = found[name] == str(value)
        return right

    hashed = hash_of(weights_hash(clip), head.weight.numpy().tobytes().hex())
    return Extractor(name="attributes", what=f"attribute head of the {what}", hash=hashed, look=look)


def likeness_of(name: str, score: Callable[[Tensor, Tensor], Tensor], least: int) -> Make:
    """A score of portrait and photograph, [B, 1], by torchmetrics."""

    def make(protocol: Protocol, size: int, device: str) -> Extractor:
        if find_spec("torchmetrics") is None:
            raise Missing("structural similarity is torchmetrics': pip install 'likeness[eval]'")
        if size < least:
            raise Missing(f"its five scales need pictures of at least {least} pixels a side, these have {size}")

        def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
            stacked = (np.stack(pictures), np.stack([read_photo(face.photo, size) for face in faces]))
            made, real = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in stacked)  # [B, 3, S, S]
            return score(made, real).reshape(-1, 1).numpy()

        return Extractor(name=name, what="torchmetrics, Gaussian window of 11, sigma 1.5", hash=name, look=look)

    return make


def structural(made: Tensor, real: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures in [0, 1], [B]."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    found = ssim(made, real, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found


def structural_at_scales(made: Tensor, real: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003), five scales, [B]."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    return ms_ssim(made, real, data_range=1.0, reduction="none", normalize="relu")


def hash_of(*parts: str) -> str:
    """What stands for weights where there are none."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


EXTRACTORS: dict[str, Make] = {
    "face_parser": face_parser,
    "sketch": sketch,
    "landmarks": landmarks,
    "text_image": text_image,
    "attributes": attributes,
    "ssim": likeness_of("ssim", structural, 11),
    "ms_ssim": likeness_of("ms_ssim", structural_at_scales, 161),
    "inception": plugins.inception,
    "clip_large": plugins.clip_large,
    "dinov2": plugins.dinov2,
    "lpips": plugins.lpips,
    "topiq": plugins.topiq,
    "judge": plugins.judge,
}
"""Name -> how it is made."""
