"""Synthetic faces: reproducible, with exact labels and true captions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from likeness.conditions.mask.classes import CLASSES, PALETTE
from likeness.data.synthetic import SyntheticFace, describe_face, draw_face
from likeness.data.synthetic.captions import CAPTION_COUNT, MAXIMUM_WORDS
from likeness.prepare.synthetic import write_synthetic
from likeness.types import InputError

FACES = 64
CLASS = {name: index for index, name in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def faces() -> list[SyntheticFace]:
    return [draw_face(3, index) for index in range(FACES)]


def pixels(face: SyntheticFace, name: str) -> int:
    return int((face.mask == CLASS[name]).sum())


def label_at(face: SyntheticFace, point: np.ndarray) -> str:
    x, y = np.floor(point * len(face.mask)).astype(int)
    return CLASSES[face.mask[y, x]]


def test_results_do_not_depend_on_the_order_of_calls(faces: list[SyntheticFace]) -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    for index in (7, 0, 7):
        again = draw_face(3, index)
        for name in ("image", "mask", "sketch", "keypoints"):
            np.testing.assert_array_equal(getattr(again, name), getattr(faces[index], name))
        assert again.attributes == faces[index].attributes
        assert again.captions == faces[index].captions
        assert describe_face(3, index) == (again.attributes, again.captions)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert not np.array_equal(draw_face(4, 7).image, faces[7].image)
    assert not np.array_equal(faces[8].image, faces[7].image)


def test_shapes_and_ranges(faces: list[SyntheticFace]) -> None:
    for face in faces:
        assert face.image.shape == (128, 128, 3)
        assert face.mask.shape == face.sketch.shape == (128, 128)
        assert face.image.dtype == face.mask.dtype == face.sketch.dtype == np.uint8
        assert face.mask.max() < len(CLASSES)
        assert face.keypoints.shape == (68, 2)
        assert face.keypoints.dtype == np.float32
        assert face.keypoints.min() > 0
        assert face.keypoints.max() < 1
        assert face.image.std() > 15
        assert all(isinstance(value, str | bool | float) for value in face.attributes.values())


@pytest.mark.parametrize("size", [32, 64, 256])
def test_another_size_is_the_same_face(faces: list[SyntheticFace], size: int) -> None:
    for index in (1, 5):
        other = draw_face(3, index, size)
        assert other.image.shape == (size, size, 3)
        assert other.captions == faces[index].captions
        np.testing.assert_array_equal(other.keypoints, faces[index].keypoints)
        shrunk = np.asarray(Image.fromarray(other.mask).resize((128, 128), Image.Resampling.NEAREST))
        assert (shrunk == faces[index].mask).mean() > (0.85 if size == 32 else 0.93)


def test_every_class_occurs(faces: list[SyntheticFace]) -> None:
    found = set().union(*(np.unique(face.mask).tolist() for face in faces))
    assert found == set(range(len(CLASSES)))


def test_keypoints_agree_with_the_mask(faces: list[SyntheticFace]) -> None:
    for face in faces:
        points = face.keypoints
        if face.attributes["glasses"] != "sunglasses":
            assert label_at(face, points[36:42].mean(axis=0)) == "r_eye"
            assert label_at(face, points[42:48].mean(axis=0)) == "l_eye"
        # Each lip is between its outer and inner points.
        assert label_at(face, points[[51, 62]].mean(axis=0)) == "u_lip"
        assert label_at(face, points[[57, 66]].mean(axis=0)) == "l_lip"
        assert label_at(face, points[30]) == "nose"
        inside = points[8] + (points[30] - points[8]) * 0.08
        assert label_at(face, inside) == "skin"
        assert label_at(face, points[8] + (points[8] - points[30]) * 0.08) != "skin"
        # Left to right as the viewer sees it: jaw below the ears, brows, nostrils, eye corners, mouth corners.
        for run in (range(4, 13), range(17, 27), range(31, 36), (36, 39, 42, 45), range(48, 55)):
            assert (np.diff(points[list(run), 0]) > 0).all(), run
        # Top to bottom: brows, eyes, nose, mouth, chin.
        heights = [points[part, 1].mean() for part in (slice(17, 27), slice(36, 48), slice(31, 36), slice(48, 68), 8)]
        assert heights == sorted(heights)
        assert 0.4 < points[36:48, 1].mean() < 0.54
        assert 0.36 < points[:17, 0].max() - points[:17, 0].min() < 0.62


def test_the_persons_left_is_the_viewers_right(faces: list[SyntheticFace]) -> None:
    for left, right in (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear")):
        both = [face for face in faces if pixels(face, left) and pixels(face, right)]
        assert len(both) > FACES / 4
        for face in both:
            columns = [np.nonzero(face.mask == CLASS[name])[1].mean() for name in (left, right)]
            assert columns[0] > columns[1]


def test_image_and_mask_share_their_edges(faces: list[SyntheticFace]) -> None:
    """The image changes much more across a border of the mask than elsewhere."""
    ratios = []
    for face in faces:
        change = np.abs(np.diff(face.image.astype(float), axis=1)).sum(axis=2)
        border = np.diff(face.mask.astype(int), axis=1) != 0
        ratios.append(change[border].mean() / change[~border].mean())
    assert np.median(ratios) > 4


def test_sketch_is_dark_on_white_along_the_mask(faces: list[SyntheticFace]) -> None:
    for face in faces:
        assert np.median(face.sketch) == 255
        assert face.sketch.min() < 60
        assert 0.03 < (face.sketch < 128).mean() < 0.3
        mask = face.mask.astype(int)
        border = np.zeros(mask.shape, dtype=bool)
        border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        border[1:] |= mask[1:] != mask[:-1]
        near_stroke = ndimage.binary_dilation(face.sketch < 170, iterations=2)
        assert near_stroke[border].mean() > 0.85


def test_attributes_are_visible(faces: list[SyntheticFace]) -> None:
    for face in faces:
        for attribute, name in (
            ("glasses", "eye_g"),
            ("hat", "hat"),
            ("earrings", "earring"),
            ("necklace", "necklace"),
            ("hair_style", "hair"),
        ):
            present = face.attributes[attribute] not in ("none", "bald")
            assert present == (pixels(face, name) >= 5), (attribute, face.attributes[attribute])
        assert (pixels(face, "mouth") > 0) == (face.attributes["expression"] in ("big smile", "surprised"))


def test_captions_are_different_and_true() -> None:
    claims = {
        r"glasses": lambda a: a["glasses"] != "none",
        r"sunglasses": lambda a: a["glasses"] == "sunglasses",
        r"beanie": lambda a: a["hat"] == "beanie",
        r"hat|cap": lambda a: a["hat"] != "none",
        r"earrings": lambda a: a["earrings"] != "none",
        r"necklace": lambda a: a["necklace"] != "none",
        r"(?<!no )hair": lambda a: a["hair_style"] != "bald",
        r"bald|no hair": lambda a: a["hair_style"] == "bald" and a["hat"] == "none",
        r"beard": lambda a: a["beard"] in ("short beard", "full beard"),
        r"mou?stache": lambda a: a["mustache"],
        r"clean-shaven": lambda a: a["beard"] == "none" and not a["mustache"],
        r"smil(e|ing)|grin(ning)?": lambda a: a["expression"] in ("smile", "big smile"),
        r"toothy|grin|grinning": lambda a: a["expression"] == "big smile",
        r"sad|frowning": lambda a: a["expression"] == "sad",
        r"surprised|astonished": lambda a: a["expression"] == "surprised",
        r"freckle[sd]": lambda a: a["freckles"],
        r"make-up|lipstick": lambda a: a["makeup"],
        r"bangs|fringe": lambda a: a["bangs"],
        r"she|woman|lady": lambda a: a["presentation"] == "woman",
        r"he|man|gentleman": lambda a: a["presentation"] == "man",
        r"young": lambda a: a["age"] == "young",
        r"older|elderly|wrinkles": lambda a: a["age"] == "older",
        r"left": lambda a: "left" in a["pose"],
        r"right": lambda a: "right" in a["pose"],
        r"hoodie": lambda a: a["clothing"] == "hoodie",
        r"turtleneck": lambda a: a["clothing"] == "turtleneck",
    }
    counts = dict.fromkeys(claims, 0)
    for index in range(400):
        attributes, captions = describe_face(5, index)
        assert len(captions) == len(set(captions)) == CAPTION_COUNT
        for caption in captions:
            assert len(caption.split()) < MAXIMUM_WORDS
            assert not re.search(r"[{}]|none|  |\ba [aeio]\w|\ban [^aeiou]", caption), caption
            for claim, is_true in claims.items():
                if re.search(rf"\b({claim})\b", caption, re.IGNORECASE):
                    counts[claim] += 1
                    assert is_true(attributes), (caption, attributes)
            color = re.search(r"(\w+) eyes", caption)
            assert color is None or str(attributes["eye_color"]).endswith(color[1])
    assert all(counts.values()), counts


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_written_data_set(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    write_synthetic(tmp_path / "faces", count=3, size=64, seed=9, progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    train = tmp_path / "faces" / "train"
    lines = [json.loads(line) for line in (train / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == [f"images/{index:06d}.png" for index in range(3)]
    for index, line in enumerate(lines):
        face = draw_face(9, index, 64)
        np.testing.assert_array_equal(np.asarray(Image.open(train / line["file_name"])), face.image)
        with Image.open(train / line["mask_file_name"]) as mask:
            assert mask.mode == "P"
            assert mask.getpalette()[: PALETTE.size] == PALETTE.ravel().tolist()  # type: ignore[index]
            np.testing.assert_array_equal(np.asarray(mask), face.mask)
        with Image.open(train / line["sketch_file_name"]) as sketch:
            assert sketch.mode == "L"
            np.testing.assert_array_equal(np.asarray(sketch), face.sketch)
        keypoints = json.loads((train / line["keypoints_file_name"]).read_text())
        assert keypoints["size"] == [64, 64]
        np.testing.assert_allclose(np.array(keypoints["points"]) / 64, face.keypoints, atol=1e-4)
        assert tuple(line["text"]) == face.captions
        assert line["attributes"] == face.attributes


def test_resume_restores_identical_bytes(tmp_path: Path) -> None:
    out = tmp_path / "faces"
    write_synthetic(out, count=4, size=32)
    whole = tree(out)
    (out / "train" / "masks" / "000002.png").unlink()
    (out / "train" / "metadata.jsonl").unlink()
    kept = (out / "train" / "images" / "000001.png").stat().st_mtime_ns
    write_synthetic(out, count=4, size=32)
    assert tree(out) == whole
    assert (out / "train" / "images" / "000001.png").stat().st_mtime_ns == kept
    write_synthetic(out, count=5, size=32)
    assert len((out / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def test_edited_rows_are_kept(tmp_path: Path) -> None:
    metadata = tmp_path / "faces" / "train" / "metadata.jsonl"
    write_synthetic(tmp_path / "faces", count=3, size=32)
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[2] |= {"text": ["my own"], "place": "here"}
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    for count in (3, 4):
        write_synthetic(tmp_path / "faces", count=count, size=32)
        found = [json.loads(line) for line in metadata.read_text().splitlines()]
        assert found[:2] == rows[1:]
        assert [row["file_name"] for row in found] == [f"images/{index:06d}.png" for index in range(1, count)]
    with pytest.raises(InputError, match="has 4 faces, not 2: give at least this count"):
        write_synthetic(tmp_path / "faces", count=2, size=32)
    assert [json.loads(line) for line in metadata.read_text().splitlines()] == found


def test_rejected_arguments(tmp_path: Path) -> None:
    for arguments in ({"count": 0}, {"count": 1, "size": 24}, {"count": 1, "size": 100}, {"count": 1, "seed": -1}):
        with pytest.raises(InputError):
            write_synthetic(tmp_path / "rejected", **arguments)
    assert not (tmp_path / "rejected").exists()
    write_synthetic(tmp_path / "faces", count=1, size=32, seed=1)
    with pytest.raises(InputError, match="was written with"):
        write_synthetic(tmp_path / "faces", count=1, size=32, seed=2)
    with pytest.raises(InputError, match="was written with"):
        write_synthetic(tmp_path / "faces", count=1, size=64, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_synthetic(tmp_path / "other", count=1, size=32)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("a file, no folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot write"):
            write_synthetic(place, count=1, size=32)
    with pytest.raises(InputError):
        draw_face(-1, 0)
    with pytest.raises(InputError):
        draw_face(0, 0, size=16)
