"""The table of extractors: networks of this project and simple image operations; `external.py` has the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likeness.annotators.face_parser import confusion_of, load_face_parser, parse_faces
from likeness.annotators.landmarks import open_landmarker
from likeness.annotators.sketch import DRAWING, extract_sketch
from likeness.chat import Rejected, open_endpoint
from likeness.data.folder import read_photo
from likeness.encoders import text_image as pair
from likeness.encoders.text import token_ids
from likeness.encoders.text_image import load_text_image
from likeness.evaluate import external
from likeness.evaluate.external import Faces, Images
from likeness.evaluate.faces import read_condition
from likeness.evaluate.features import BATCH, Extractor, MissingError
from likeness.evaluate.protocol import BUNDLED, Protocol
from likeness.evaluate.scores import class_counts, edge_f_score, is_complete_face, keypoint_error, sharpness
from likeness.types import InputError
from likeness.weights import catalog
from likeness.weights.hashes import file_hash, network_name, weights_hash

CreateExtractor = Callable[[Protocol, int, str], Extractor]
"""(protocol, side of the images in pixels, device) -> extractor. Raises `MissingError`."""


def component_folder(name: str, file: str) -> Path | None:
    """Return the local folder that contains `file` of a component: `name` itself, or its `model` if it is a training
    run; None if `name` is a hub id. Raises `MissingError` if the folder does not exist or does not contain the file.
    """
    path = Path(name)
    if not path.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise MissingError(f"Folder {name} does not exist: provide a folder, a hub id, or {BUNDLED!r}")
        return None
    for folder in (path, path / "model"):
        if (folder / file).exists():
            return folder
    raise MissingError(f"{path} does not contain {file}: provide the folder of a trained component")


def text_hash(*parts: str) -> str:
    """Hash what defines an extractor without weights."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


# --- Conditions. Column 0: the face's own condition; column 1: the next face's, for the floor.


def compare_conditions(
    condition: str, annotations: Sequence[np.ndarray | None], faces: Faces, size: int | None,
    score: Callable[[np.ndarray, np.ndarray], Any], shape: tuple[int, ...] = (),
) -> np.ndarray:  # fmt: skip
    """Score annotations of images, [B], None if nothing was found, against the conditions of their faces, resized to
    `size` pixels or to the annotation.

    Args:
        score: (given, found) -> a score of this shape.

    Returns:
        Scores [B, 2, *shape]; NaN without annotation or condition.
    """
    scores = np.full((len(annotations), 2, *shape), np.nan)
    for row, (found, face) in enumerate(zip(annotations, faces, strict=True)):
        if found is None:
            continue
        for column, files in enumerate((face.conditions, face.mismatched)):
            try:
                given = read_condition(files, condition, size or len(found))
            except InputError:
                if column == 0:
                    raise
                continue  # reported for the face that has it
            if given is not None:
                scores[row, column] = score(given, found)
    return scores


def face_parser(protocol: Protocol, size: int, device: str) -> Extractor:
    """Class counts against the masks, and whether the label map shows a complete face, repeated: [B, 3, 19, 3]."""
    source = protocol.face_parser
    if source != BUNDLED and (folder := component_folder(source, "config.json")):
        source = str(folder)
    network, side = load_face_parser(source)
    network.to(device)

    def extract(images: Images, faces: Faces) -> np.ndarray:
        labels = parse_faces(network, images, size=side)
        count = lambda given, found: class_counts(confusion_of(given, found))  # noqa: E731
        counts = compare_conditions("mask", labels, faces, None, count, (19, 3))
        complete = [np.full((1, 19, 3), float(is_complete_face(found))) for found in labels]
        return np.concatenate([counts, complete], axis=1)

    other = f"{network_name(network).split()[0]} in {source}"
    description = "bundled face parser" if source == BUNDLED else other
    weights = text_hash(weights_hash(network), str(side))
    return Extractor(name="face_parser", description=description, hash=weights, extract=extract)


def sketch(protocol: Protocol, size: int, device: str) -> Extractor:
    """Edge F-score against the sketches, [B, 2]."""
    tolerance = 1.5 * size / 128
    description = f"XDoG {DRAWING}, strokes within {tolerance:g} px"

    def extract(images: Images, faces: Faces) -> np.ndarray:
        sketches = [extract_sketch(image) for image in images]
        score = lambda given, found: edge_f_score(given, found, tolerance=tolerance)  # noqa: E731
        return compare_conditions("sketch", sketches, faces, None, score)

    return Extractor(name="sketch", description=description, hash=text_hash(description), extract=extract)


def landmarks(protocol: Protocol, size: int, device: str) -> Extractor:
    """Keypoint error against the keypoints, [B, 2]; NaN if no face is detected."""
    if protocol.landmarker is None:
        raise MissingError("MediaPipe detects keypoints: set landmarker=face_landmarker.task, its model file")
    if find_spec("mediapipe") is None:
        raise MissingError("MediaPipe detects keypoints: pip install 'likeness[data]'")
    file, stack = Path(protocol.landmarker), ExitStack()
    detect = stack.enter_context(open_landmarker(file))

    def extract(images: Images, faces: Faces) -> np.ndarray:
        return compare_conditions("keypoints", [detect(image) for image in images], faces, size, keypoint_error)

    content = file_hash(file)[:16]
    description = f"MediaPipe's {file.name}"
    return Extractor(name="landmarks", description=description, hash=content, extract=extract, close=stack.close)


# --- Text


def load_pair(protocol: Protocol, device: str) -> tuple[Any, Any, Path | None, str]:
    """Load the text-image pair: `CLIPModel`, tokenizer, its folder (None for a published CLIP), a description."""
    name = protocol.text_image
    if name == BUNDLED:
        folder, description = catalog.BUNDLED / catalog.COMMON, "bundled text-image pair"
    elif (Path(name) / "config.json").is_file():  # a CLIP as transformers saves it
        folder, description = None, f"CLIPModel in {name}"
    else:
        folder = component_folder(name, "clip")
        description = f"text-image pair in {folder}" if folder else name
    if folder is None:
        return external.from_hub("CLIPModel", name, device), external.from_hub("AutoTokenizer", name), None, description
    clip, tokenizer = load_text_image(folder)
    return clip.to(device).eval(), tokenizer, folder, description


def text_image(protocol: Protocol, size: int, device: str) -> Extractor:
    """Unit feature vectors of image and caption, [B, 2, P]; zeros for a face without caption."""
    clip, tokenizer, folder, description = load_pair(protocol, device)

    @torch.no_grad()
    def extract(images: Images, faces: Faces) -> np.ndarray:
        pixels = pair_input(clip, images) if folder else external.clip_input(clip, images)
        image_features = pair.embed_images(clip, pixels.to(device))
        ids = token_ids(tokenizer, [face.caption for face in faces], pair.text_length(clip)).to(device)
        has_caption = torch.tensor([[bool(face.caption)] for face in faces]).to(device)
        return torch.stack([image_features, pair.embed_captions(clip, ids) * has_caption], dim=1).cpu().numpy()

    return Extractor(name="text_image", description=description, hash=weights_hash(clip)[:16], extract=extract)


def pair_input(clip: Any, images: Images) -> Tensor:
    """Prepare uint8 images for an image encoder of this project."""
    return pair.resize_images(images, clip.config.vision_config.image_size)


def attributes(protocol: Protocol, size: int, device: str) -> Extractor:
    """Whether each attribute of the face is recognized in the image, [B, A]: 1, 0, or NaN if the face lacks it."""
    clip, _, folder, description = load_pair(protocol, device)
    head = pair.load_attribute_head(folder) if folder else None
    if head is None:
        raise MissingError(
            f"The {description} has no {pair.ATTRIBUTES}: train one with attribute_weight > 0 "
            "(recipes/text_image_mini.toml) on other faces and set text_image= to its folder"
        )

    def extract(images: Images, faces: Faces) -> np.ndarray:
        recognized = pair.name_attributes(clip, head, pair_input(clip, images).to(device))
        correct = np.full((len(images), len(head.classes)), np.nan)
        for row, (found, face) in enumerate(zip(recognized, faces, strict=True)):
            for column, (name, classes) in enumerate(head.classes.items()):
                value = face.attributes.get(name)
                if value not in (None, False, "none") and str(value) in classes:
                    correct[row, column] = found[name] == str(value)
        return correct

    weights = text_hash(weights_hash(clip), head.weight.numpy().tobytes().hex())
    return Extractor(
        name="attributes", description=f"attribute head of the {description}", hash=weights, extract=extract
    )


def llm(protocol: Protocol, size: int, device: str) -> Extractor:
    """The score of a language model for how well image and caption agree, 0 to 1, [B, 1]; NaN without a score."""
    if protocol.llm_url is None:
        raise MissingError("The LLM score queries an OpenAI-compatible API: set llm_url=http://host/v1")
    url, model = protocol.llm_url, protocol.llm_model
    endpoint = open_endpoint(url, model, fields={"temperature": 0})

    def extract(images: Images, faces: Faces) -> np.ndarray:
        scores = np.full((len(images), 1), np.nan)
        rejected: list[str] = []
        for row, (image, face) in enumerate(zip(images, faces, strict=True)):
            try:
                scores[row] = external.query_llm(endpoint, image, face.caption)
            except Rejected as error:
                rejected.append(str(error))
        if len(rejected) == len(images) > 1:
            raise MissingError(f"{model} rejects all images: {rejected[0]}")
        return scores

    weights = text_hash(model, external.QUESTION)
    return Extractor(name="llm", description=f"{model} at {url}", hash=weights, extract=extract, chunk=BATCH)


# --- Photographs


def structural_similarity(name: str, min_size: int) -> CreateExtractor:
    """SSIM (Wang et al. 2004) or MS-SSIM (Wang et al. 2003) between image and photograph by torchmetrics, [B, 1]."""

    def create(protocol: Protocol, size: int, device: str) -> Extractor:
        if find_spec("torchmetrics") is None:
            raise MissingError("Structural similarity requires torchmetrics: pip install 'likeness[eval]'")
        if size < min_size:
            raise MissingError(f"{name} requires images of at least {min_size} px; these have {size}")
        from torchmetrics.functional import image as functional

        measure: Any = functional.structural_similarity_index_measure
        if name == "ms_ssim":
            measure = partial(functional.multiscale_structural_similarity_index_measure, normalize="relu")

        def extract(images: Images, faces: Faces) -> np.ndarray:
            photos = [read_photo(face.photo, size) for face in faces]
            generated, real = (external.to_tensor(x, "cpu").float() / 255 for x in (images, photos))
            score: Any = measure(generated, real, data_range=1.0, reduction="none")
            return score.reshape(-1, 1).numpy()

        description = "torchmetrics, Gaussian window of 11, sigma 1.5"
        return Extractor(name=name, description=description, hash=name, extract=extract)

    return create


def laplacian(protocol: Protocol, size: int, device: str) -> Extractor:
    """Sharpness, [B, 1]."""
    extract = lambda images, faces: np.array([[sharpness(image)] for image in images])  # noqa: E731
    description = f"standard deviation of the Laplacian at {size} px"
    return Extractor(name="laplacian", description=description, hash=text_hash("laplacian"), extract=extract)


EXTRACTORS: dict[str, CreateExtractor] = {
    "face_parser": face_parser,
    "laplacian": laplacian,
    "sketch": sketch,
    "landmarks": landmarks,
    "text_image": text_image,
    "attributes": attributes,
    "ssim": structural_similarity("ssim", 11),
    "ms_ssim": structural_similarity("ms_ssim", 161),
    "inception": external.inception,
    "clip_large": external.clip_large,
    "dinov2": external.dinov2,
    "lpips": external.lpips,
    "topiq": external.topiq,
    "llm": llm,
}
"""Name -> how to create it."""
